//! Remembers the pointer last seen in a registry, in a file outside the registry.
//!
//! A registry without pointers may be new, or it may be a volume that is not mounted. Nothing inside the registry can
//! tell the two apart. There is one file per registry, and its pointer only moves forward, so the daemons of a host can
//! share it.

use std::fmt;
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::pointer::MAX_POINTER_BYTES;
use super::{Pointer, RegistryError, store};
use crate::hash::content_hash;

/// The file that remembers the pointer last seen in one registry.
#[derive(Debug, Clone)]
pub struct PointerMemory {
    file: PathBuf,
    location: String,
}

/// The content of the file.
#[derive(Serialize, Deserialize)]
struct Remembered {
    format: u32,
    /// URL of the registry, for human readers.
    registry: String,
    pointer: Pointer,
}

/// How a registry differs from what was last seen of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistryLoss {
    /// Its folder does not exist.
    NoFolder,
    /// It has no pointers.
    NoPointers,
    /// Its last pointer is older than the one last seen, or a different one with the same number.
    OtherPointer(Pointer),
}

/// A registry that no longer has the pointer that was last seen in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the registry at {location} {loss}, but {seen} was in effect when it was last seen; mount or restore the \
         registry{}", accept(memory.as_deref()))]
pub struct LostRegistry {
    /// Location of the registry.
    pub location: String,
    /// What is wrong.
    pub loss: RegistryLoss,
    /// The pointer last seen.
    pub seen: Pointer,
    /// The file that remembers the pointer, unless only this process does.
    pub memory: Option<PathBuf>,
}

fn accept(memory: Option<&Path>) -> String {
    let delete = |path: &Path| format!(", or delete `{}` to accept it as it is", path.display());
    memory.map(delete).unwrap_or_default()
}

impl RegistryLoss {
    /// Compares the last pointer of a registry with the one last seen in it. Returns `None` if it is the same pointer
    /// or a later one.
    pub fn find(seen: &Pointer, found: Option<&Pointer>) -> Option<Self> {
        match found {
            None => Some(Self::NoPointers),
            Some(found) if found == seen || found.sequence > seen.sequence => None,
            Some(found) => Some(Self::OtherPointer(found.clone())),
        }
    }
}

impl fmt::Display for RegistryLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFolder => f.write_str("does not exist"),
            Self::NoPointers => f.write_str("is empty"),
            Self::OtherPointer(found) => write!(f, "ends at {found}"),
        }
    }
}

impl PointerMemory {
    /// Returns the memory of the registry at `url` in the folder `state`. The file need not exist.
    ///
    /// # Errors
    /// Returns [`RegistryError::Url`] if the URL is not usable.
    pub fn new(state: &Path, url: &str) -> Result<Self, RegistryError> {
        // Without differences in spelling, such as a slash at the end.
        let folder: PathBuf = store::folder(url)?.components().collect();
        let hash = content_hash(folder.as_os_str().as_encoded_bytes());
        let digits = &hash["sha256:".len()..][..16];
        Ok(Self {
            file: state.join(format!("registry-{digits}.json")),
            location: url.to_owned(),
        })
    }

    /// Returns the file, which exists once a pointer has been recorded.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Returns the pointer last recorded, or `None` if there is none.
    ///
    /// # Errors
    /// Returns [`RegistryError::Folder`] if the file cannot be read or is damaged.
    pub fn recall(&self) -> Result<Option<Pointer>, RegistryError> {
        match self.read() {
            Ok(pointer) => Ok(Some(pointer)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.error("read the pointer remembered in", error)),
        }
    }

    /// Records a pointer, unless a later one is recorded already. A damaged file is replaced.
    ///
    /// # Errors
    /// Returns [`RegistryError::Folder`] if the file cannot be written.
    pub fn record(&self, pointer: &Pointer) -> Result<(), RegistryError> {
        if self.read().is_ok_and(|recorded| recorded.sequence >= pointer.sequence) {
            return Ok(());
        }
        let written = self.replace(pointer);
        written.map_err(|error| self.error("remember the pointer in effect in", error))
    }

    fn read(&self) -> io::Result<Pointer> {
        let mut text = String::new();
        File::open(&self.file)?
            .take(MAX_POINTER_BYTES)
            .read_to_string(&mut text)?;
        let remembered: Remembered = serde_json::from_str(&text)?;
        match remembered.format {
            1 => Ok(remembered.pointer),
            format => {
                let text = format!("has the format {format}, expected 1");
                Err(io::Error::new(ErrorKind::InvalidData, text))
            }
        }
    }

    /// Replaces the file as a whole, so that a crash or a full disk leaves the previous content.
    fn replace(&self, pointer: &Pointer) -> io::Result<()> {
        let folder = self.file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let remembered = Remembered {
            format: 1,
            registry: self.location.clone(),
            pointer: pointer.clone(),
        };
        // An operator's command may write the file as another user than the daemon, which must be able to read it.
        let mut file = tempfile::Builder::new()
            .prefix(".registry-")
            .permissions(Permissions::from_mode(0o644))
            .tempfile_in(folder)?;
        file.write_all(&serde_json::to_vec(&remembered)?)?;
        file.as_file().sync_all()?;
        file.persist(&self.file)?;
        File::open(folder)?.sync_all()
    }

    fn error(&self, action: &'static str, source: io::Error) -> RegistryError {
        RegistryError::Folder {
            action,
            path: self.file.display().to_string(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Change;

    const URL: &str = "file:///srv/registry";

    fn pointer(sequence: u64, version: &str) -> Pointer {
        Pointer {
            sequence,
            version: version.repeat(16).parse().ok(),
            manifest_sha256: None,
            change: Change::Promote,
            at: "2026-01-01T00:00:00Z".to_owned(),
        }
    }

    #[test]
    fn a_memory_only_moves_forward() {
        let folder = tempfile::tempdir().unwrap();
        let memory = PointerMemory::new(&folder.path().join("new"), URL).unwrap();
        assert_eq!(memory.recall().unwrap(), None);
        for (recorded, expected) in [(2, 2), (1, 2), (3, 3)] {
            memory.record(&pointer(recorded, "a")).unwrap();
            assert_eq!(memory.recall().unwrap(), Some(pointer(expected, "a")));
        }
        let entries = fs::read_dir(folder.path().join("new")).unwrap();
        assert_eq!(entries.count(), 1, "temporary files are left");
    }

    #[test]
    fn each_registry_has_one_file_however_its_url_is_spelt() {
        let file = |url: &str| PointerMemory::new(Path::new("/state"), url).unwrap().file().to_owned();
        assert_eq!(file(URL), file("file:///srv/registry/"));
        assert_ne!(file(URL), file("file:///srv/registry2"));
    }

    #[test]
    fn a_damaged_memory_is_an_error_until_it_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let memory = PointerMemory::new(folder.path(), URL).unwrap();
        memory.record(&pointer(7, "a")).unwrap();
        let good = fs::read(memory.file()).unwrap();
        let other_format = String::from_utf8(good.clone())
            .unwrap()
            .replace("\"format\":1", "\"format\":2");
        for bad in [&b""[..], &good[..good.len() / 2], &[0xff; 100], other_format.as_bytes()] {
            fs::write(memory.file(), bad).unwrap();
            let error = memory.recall().unwrap_err().to_string();
            let expected = format!("cannot read the pointer remembered in `{}`: ", memory.file().display());
            assert!(error.starts_with(&expected), "{error}");
            memory.record(&pointer(3, "a")).unwrap();
            assert_eq!(memory.recall().unwrap(), Some(pointer(3, "a")));
        }
        fs::remove_file(memory.file()).unwrap();
        fs::create_dir(memory.file()).unwrap();
        assert!(memory.recall().is_err() && memory.record(&pointer(1, "a")).is_err());
    }

    #[test]
    fn only_the_same_pointer_or_a_later_one_is_no_loss() {
        let seen = pointer(5, "a");
        let check = |found: Option<Pointer>, expected: Option<&str>| {
            let loss = RegistryLoss::find(&seen, found.as_ref()).map(|loss| loss.to_string());
            assert_eq!(loss.as_deref(), expected);
        };
        check(Some(seen.clone()), None);
        check(Some(pointer(6, "b")), None);
        check(None, Some("is empty"));
        check(
            Some(pointer(4, "b")),
            Some("ends at pointer 4 (version bbbbbbbbbbbbbbbb)"),
        );
        check(Some(pointer(5, "")), Some("ends at pointer 5 (the bare base model)"));
    }
}
