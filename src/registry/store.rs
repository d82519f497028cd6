//! The operations on an object store that the registry needs.
//!
//! Objects are created atomically and deleted, but never modified. On a local filesystem, `object_store` writes a
//! staged file beside the target. It is configured here to sync that file before linking it to its final name, and the
//! folder afterwards, so an object that exists after a crash or power failure is complete. A staged file that a crash
//! leaves behind has a name that ends in `#` and a number, and does not appear in listings.

use std::io::ErrorKind;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use futures_util::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{Error, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use url::Url;

use super::RegistryError;

const EXPECTED_URL: &str = "the `file://` URL of a folder, such as \"file:///var/lib/moderatord/registry\"";

/// An object store together with its location.
#[derive(Debug, Clone)]
pub(super) struct Store {
    objects: Arc<dyn ObjectStore>,
    location: String,
    folder: Option<PathBuf>,
}

/// The outcome of creating an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CreateOutcome {
    /// The object was created.
    Created,
    /// An object with this path existed already, and was left unchanged.
    AlreadyExists,
}

impl Store {
    pub(super) fn new(objects: Arc<dyn ObjectStore>, location: String) -> Self {
        Self {
            objects,
            location,
            folder: None,
        }
    }

    /// Opens the folder at a `file://` URL.
    pub(super) fn open(url: &str) -> Result<Self, RegistryError> {
        let folder = folder(url)?;
        if !folder_exists(&folder)? {
            return Err(no_folder("open", &folder));
        }
        let objects = LocalFileSystem::new_with_prefix(&folder).map_err(|error| RegistryError::Store {
            action: "open",
            path: "/".to_owned(),
            location: url.to_owned(),
            source: Box::new(error),
        })?;
        Ok(Self {
            objects: Arc::new(objects.with_fsync(true).with_automatic_cleanup(true)),
            location: url.to_owned(),
            folder: Some(folder),
        })
    }

    /// Opens the folder at a `file://` URL, and creates it if it is missing.
    pub(super) fn create(url: &str) -> Result<Self, RegistryError> {
        let folder = folder(url)?;
        std::fs::create_dir_all(&folder).map_err(|source| RegistryError::Folder {
            action: "create the registry folder",
            path: folder.display().to_string(),
            source,
        })?;
        Self::open(url)
    }

    pub(super) fn location(&self) -> &str {
        &self.location
    }

    /// Returns the folder, or `None` if the store is not a local folder.
    pub(super) fn folder(&self) -> Option<&FilePath> {
        self.folder.as_deref()
    }

    /// Reads an object of at most `max_bytes`. Returns `None` if it does not exist.
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

    /// Creates an object unless one with this path exists. Fails if the folder of the registry does not exist.
    pub(super) async fn create_object(&self, path: &Path, bytes: Vec<u8>) -> Result<CreateOutcome, RegistryError> {
        // The store would create the folder, which would then hide that a volume is not mounted.
        if let Some(folder) = &self.folder
            && !folder_exists(folder)?
        {
            return Err(no_folder("write to", folder));
        }
        let options = PutOptions::from(PutMode::Create);
        match self.objects.put_opts(path, bytes.into(), options).await {
            Ok(_) => Ok(CreateOutcome::Created),
            Err(Error::AlreadyExists { .. }) => Ok(CreateOutcome::AlreadyExists),
            Err(error) => Err(self.error("write", path, error)),
        }
    }

    /// Creates an object whose name is derived from its content. It is not an error if it exists with the same content.
    pub(super) async fn create_identical(&self, path: &Path, bytes: Vec<u8>) -> Result<(), RegistryError> {
        if self.create_object(path, bytes.clone()).await? == CreateOutcome::Created {
            return Ok(());
        }
        let found = self.get(path, bytes.len() as u64).await?;
        if found.as_deref() == Some(bytes.as_slice()) {
            return Ok(());
        }
        Err(self.corrupt(path, "different content", "the content written before"))
    }

    /// Deletes an object. It is not an error if it does not exist.
    pub(super) async fn delete(&self, path: &Path) -> Result<(), RegistryError> {
        match self.objects.delete(path).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.error("delete", path, error)),
        }
    }

    /// Lists all objects below a folder, in no particular order.
    pub(super) async fn list(&self, below: &Path) -> Result<Vec<ObjectMeta>, RegistryError> {
        let objects = self.objects.list(Some(below)).try_collect().await;
        objects.map_err(|error| self.error("list", below, error))
    }

    /// Lists the objects below a folder whose paths sort after `offset`, in no particular order.
    pub(super) async fn list_after(&self, below: &Path, offset: &Path) -> Result<Vec<ObjectMeta>, RegistryError> {
        let objects = self.objects.list_with_offset(Some(below), offset).try_collect().await;
        objects.map_err(|error| self.error("list", below, error))
    }

    /// Returns the names of the folders directly below a folder.
    pub(super) async fn folders(&self, below: &Path) -> Result<Vec<String>, RegistryError> {
        let listed = self.objects.list_with_delimiter(Some(below)).await;
        let listed = listed.map_err(|error| self.error("list", below, error))?;
        let names = listed.common_prefixes.iter().filter_map(|path| path.filename());
        Ok(names.map(str::to_owned).collect())
    }

    pub(super) fn corrupt(&self, path: &Path, found: impl Into<String>, expected: impl Into<String>) -> RegistryError {
        RegistryError::Corrupt {
            path: path.to_string(),
            location: self.location.clone(),
            found: found.into(),
            expected: expected.into(),
        }
    }

    fn error(&self, action: &'static str, path: &Path, error: Error) -> RegistryError {
        RegistryError::Store {
            action,
            path: path.to_string(),
            location: self.location.clone(),
            source: Box::new(error),
        }
    }
}

/// Returns whether a folder exists.
pub(super) fn folder_exists(folder: &FilePath) -> Result<bool, RegistryError> {
    match std::fs::metadata(folder) {
        Ok(metadata) => Ok(metadata.is_dir()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
        Err(source) => Err(RegistryError::Folder {
            action: "examine the registry folder",
            path: folder.display().to_string(),
            source,
        }),
    }
}

/// Returns the error for a registry whose folder does not exist.
pub(super) fn no_folder(action: &'static str, folder: &FilePath) -> RegistryError {
    RegistryError::NoFolder {
        action,
        path: folder.display().to_string(),
    }
}

/// Returns the folder of a `file://` URL. The error for any other URL does not quote it, because it may contain a
/// secret.
pub(super) fn folder(url: &str) -> Result<PathBuf, RegistryError> {
    let wrong = |found: String| RegistryError::Url {
        found,
        expected: EXPECTED_URL,
    };
    let parsed = Url::parse(url).map_err(|error| wrong(format!("is not a URL ({error})")))?;
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
    fn urls_that_are_not_folders_are_rejected_without_being_quoted() {
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
            "registry.url is not a URL (relative URL without a base), expected the `file://` URL",
        );
        check("s3://key:secret@bucket", "registry.url has the scheme `s3`, expected");
        check("file://secret/registry", "registry.url names another host, expected");
    }
}
