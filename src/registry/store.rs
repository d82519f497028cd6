//! The few operations of an object store that the registry is made of.
//!
//! Objects appear whole or not at all, and are never changed, only created and deleted. On a local
//! filesystem `object_store` writes a staged file beside the target, and, as asked for here, syncs it
//! before it links it to its name and the folder after: what is there after a crash or a loss of power
//! was whole. A staged file that a crash leaves behind has `#` and a number at the end of its name
//! and is ignored by listings.

use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use futures_util::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{Error, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use url::Url;

use super::RegistryError;

const EXPECTED_URL: &str = "the `file://` URL of a folder, such as \"file:///var/lib/moderatord/registry\"";

/// An object store and where it is.
#[derive(Debug, Clone)]
pub(super) struct Store {
    objects: Arc<dyn ObjectStore>,
    place: String,
    folder: Option<PathBuf>,
}

/// What became of a creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Created {
    /// It is there now.
    New,
    /// It was there before, whatever it holds.
    Existed,
}

impl Store {
    pub(super) fn new(objects: Arc<dyn ObjectStore>, place: String) -> Self {
        Self {
            objects,
            place,
            folder: None,
        }
    }

    /// The folder that a URL names, which exists.
    pub(super) fn open(url: &str) -> Result<Self, RegistryError> {
        let folder = folder(url)?;
        let objects = LocalFileSystem::new_with_prefix(&folder).map_err(|error| RegistryError::Store {
            action: "open",
            path: String::new(),
            place: url.to_owned(),
            source: Box::new(error),
        })?;
        Ok(Self {
            objects: Arc::new(objects.with_fsync(true).with_automatic_cleanup(true)),
            place: url.to_owned(),
            folder: Some(folder),
        })
    }

    /// As [`Store::open`]; makes the folder where it is missing.
    pub(super) fn create(url: &str) -> Result<Self, RegistryError> {
        let folder = folder(url)?;
        std::fs::create_dir_all(&folder).map_err(|source| RegistryError::Folder {
            action: "make the registry's folder",
            path: folder.display().to_string(),
            source,
        })?;
        Self::open(url)
    }

    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// The folder, where the store is one.
    pub(super) fn folder(&self) -> Option<&FilePath> {
        self.folder.as_deref()
    }

    /// An object's bytes, or nothing where there is none.
    pub(super) async fn get(&self, path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, RegistryError> {
        let found = match self.objects.get(path).await {
            Ok(found) => found,
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(self.error("read", path, error)),
        };
        if found.meta.size > max_bytes {
            return Err(self.corrupt(
                path,
                format!("{} bytes", found.meta.size),
                format!("at most {max_bytes}"),
            ));
        }
        let bytes = found.bytes().await.map_err(|error| self.error("read", path, error))?;
        Ok(Some(bytes.into()))
    }

    /// Creates an object where there is none.
    pub(super) async fn create_object(&self, path: &Path, bytes: Vec<u8>) -> Result<Created, RegistryError> {
        let options = PutOptions::from(PutMode::Create);
        match self.objects.put_opts(path, bytes.into(), options).await {
            Ok(_) => Ok(Created::New),
            Err(Error::AlreadyExists { .. }) => Ok(Created::Existed),
            Err(error) => Err(self.error("write", path, error)),
        }
    }

    /// Creates an object whose name follows from what it holds; nothing happens where it is there.
    pub(super) async fn create_same(&self, path: &Path, bytes: Vec<u8>) -> Result<(), RegistryError> {
        if self.create_object(path, bytes.clone()).await? == Created::New {
            return Ok(());
        }
        let found = self.get(path, bytes.len() as u64).await?;
        if found.as_deref() == Some(bytes.as_slice()) {
            return Ok(());
        }
        Err(self.corrupt(path, "other bytes", "what was written under this name before"))
    }

    /// Deletes an object; nothing happens where there is none.
    pub(super) async fn delete(&self, path: &Path) -> Result<(), RegistryError> {
        match self.objects.delete(path).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.error("delete", path, error)),
        }
    }

    /// All objects below a path, in no order.
    pub(super) async fn list(&self, below: &Path) -> Result<Vec<ObjectMeta>, RegistryError> {
        let objects = self.objects.list(Some(below)).try_collect().await;
        objects.map_err(|error| self.error("list", below, error))
    }

    /// The objects below a path whose names come after `offset`, in no order.
    pub(super) async fn list_after(&self, below: &Path, offset: &Path) -> Result<Vec<ObjectMeta>, RegistryError> {
        let objects = self.objects.list_with_offset(Some(below), offset).try_collect().await;
        objects.map_err(|error| self.error("list", below, error))
    }

    /// Names of the folders right below a path.
    pub(super) async fn folders(&self, below: &Path) -> Result<Vec<String>, RegistryError> {
        let listed = self.objects.list_with_delimiter(Some(below)).await;
        let listed = listed.map_err(|error| self.error("list", below, error))?;
        let names = listed.common_prefixes.iter().filter_map(|path| path.filename());
        Ok(names.map(str::to_owned).collect())
    }

    pub(super) fn corrupt(&self, path: &Path, found: impl Into<String>, expected: impl Into<String>) -> RegistryError {
        RegistryError::Corrupt {
            path: path.to_string(),
            place: self.place.clone(),
            found: found.into(),
            expected: expected.into(),
        }
    }

    fn error(&self, action: &'static str, path: &Path, error: Error) -> RegistryError {
        RegistryError::Store {
            action,
            path: path.to_string(),
            place: self.place.clone(),
            source: Box::new(error),
        }
    }
}

/// The folder of a `file://` URL. Anything else is refused without being quoted: it may hold a secret.
fn folder(url: &str) -> Result<PathBuf, RegistryError> {
    let wrong = |found: String| RegistryError::Url {
        found,
        expected: EXPECTED_URL,
    };
    let parsed = Url::parse(url).map_err(|error| wrong(format!("is no URL ({error})")))?;
    if parsed.scheme() != "file" {
        return Err(wrong(format!("has the scheme `{}`", parsed.scheme())));
    }
    parsed
        .to_file_path()
        .map_err(|()| wrong("names another host".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folders_url_is_understood_and_others_are_refused_unquoted() {
        assert_eq!(
            folder("file:///srv/a%20registry").unwrap(),
            PathBuf::from("/srv/a registry")
        );
        let check = |url: &str, expected: &str| {
            let error = folder(url).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
            assert!(!error.contains("secret"));
        };
        check(
            "/srv/secret",
            "registry.url is no URL (relative URL without a base), expected the `file://` URL",
        );
        check("s3://key:secret@bucket", "registry.url has the scheme `s3`, expected");
        check("file://secret/registry", "registry.url names another host, expected");
    }
}
