//! The host lock, which lets one process per host at a time retrain or collect garbage in a local registry.
//!
//! It is an `flock` on a file in the registry's folder, so the kernel releases it even if its holder is killed. While
//! the lock is held, the content of the file names the holder, for error messages. The file remains after the release.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::RegistryError;

/// The host lock of a registry, which is released on drop.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub struct HostLock {
    _file: File,
}

#[derive(Serialize, Deserialize)]
struct LockHolder {
    pid: u32,
    since: String,
}

impl HostLock {
    /// Takes the lock of the registry in `folder`.
    ///
    /// # Errors
    /// Returns [`RegistryError::Locked`] if another process holds the lock, and [`RegistryError::Folder`] if the lock
    /// file cannot be opened or written.
    pub(super) fn take(folder: &Path, now: SystemTime) -> Result<Self, RegistryError> {
        let path = folder.join("lock");
        let error = |action, source| RegistryError::Folder {
            action,
            path: path.display().to_string(),
            source,
        };
        let mut options = OpenOptions::new();
        // The content belongs to the current holder, so it must not be truncated before the lock is taken.
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options
            .open(&path)
            .map_err(|source| error("open the registry lock", source))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(RegistryError::Locked {
                    path: path.display().to_string(),
                    holder: describe_holder(&mut file),
                });
            }
            Err(TryLockError::Error(source)) => return Err(error("take the registry lock", source)),
        }
        let holder = LockHolder {
            pid: std::process::id(),
            since: humantime::format_rfc3339_seconds(now).to_string(),
        };
        let text = serde_json::to_string(&holder).expect("a number and a string serialise to JSON");
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(text.as_bytes()));
        written.map_err(|source| error("write the registry lock", source))?;
        Ok(Self { _file: file })
    }
}

fn describe_holder(file: &mut File) -> String {
    let mut text = String::new();
    // The file may still be empty if the lock was taken a moment ago.
    let read = file.take(1000).read_to_string(&mut text).ok();
    match read.and_then(|_| serde_json::from_str::<LockHolder>(&text).ok()) {
        Some(LockHolder { pid, since }) => format!("process {pid} since {since}"),
        None => "another process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_error_for_a_held_lock_names_its_holder() {
        let folder = tempfile::tempdir().unwrap();
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        // Content left behind by a crashed holder, longer than what is written next.
        std::fs::write(folder.path().join("lock"), "x".repeat(500)).unwrap();
        let first = HostLock::take(folder.path(), at(1_700_000_000)).unwrap();
        let error = HostLock::take(folder.path(), at(1_800_000_000))
            .unwrap_err()
            .to_string();
        let expected = format!("is held by process {} since 2023-11-14T22:13:20Z", std::process::id());
        assert!(error.ends_with(&expected), "{error}");
        drop(first);
        let second = HostLock::take(folder.path(), at(1_800_000_000)).unwrap();
        let error = HostLock::take(folder.path(), at(1_900_000_000))
            .unwrap_err()
            .to_string();
        assert!(error.contains("since 2027-01-15T08:00:00Z"), "{error}");
        drop(second);
    }

    #[test]
    fn the_error_for_a_missing_folder_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = HostLock::take(&folder.path().join("gone"), SystemTime::UNIX_EPOCH).unwrap_err();
        assert!(
            error.to_string().starts_with("cannot open the registry lock `"),
            "{error}"
        );
    }
}
