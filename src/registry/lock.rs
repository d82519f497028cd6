//! One process of a host at a time works in a local registry.
//!
//! `flock` on a file beside the registry's folders: the kernel lets go of it when its holder dies,
//! however it dies. What the file says of the holder is for people; it stays behind and means nothing
//! without the lock.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::RegistryError;

/// Held until it is dropped.
#[derive(Debug)]
#[must_use = "the lock is let go of when this is dropped"]
pub struct HostLock {
    _file: File,
}

#[derive(Serialize, Deserialize)]
struct Holder {
    pid: u32,
    since: String,
}

impl HostLock {
    /// Takes the lock of a registry's folder, or says who has it.
    ///
    /// # Errors
    /// [`RegistryError::Locked`], [`RegistryError::Folder`].
    pub fn take(folder: &Path, now: SystemTime) -> Result<Self, RegistryError> {
        let path = folder.join("lock");
        let error = |action, source| RegistryError::Folder {
            action,
            path: path.display().to_string(),
            source,
        };
        let mut options = OpenOptions::new();
        // Not truncated: until the lock is taken the file is the holder's.
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options
            .open(&path)
            .map_err(|source| error("open the registry's lock", source))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(RegistryError::Locked {
                    path: path.display().to_string(),
                    holder: holder(&mut file),
                });
            }
            Err(TryLockError::Error(source)) => return Err(error("take the registry's lock", source)),
        }
        let holder = Holder {
            pid: std::process::id(),
            since: humantime::format_rfc3339_seconds(now).to_string(),
        };
        let text = serde_json::to_string(&holder).expect("a number and a text have a JSON form");
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(text.as_bytes()));
        written.map_err(|source| error("write the registry's lock", source))?;
        Ok(Self { _file: file })
    }
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    // It may be empty still: its holder has only just got it.
    let read = file.take(1000).read_to_string(&mut text).ok();
    match read.and_then(|_| serde_json::from_str::<Holder>(&text).ok()) {
        Some(Holder { pid, since }) => format!("process {pid} since {since}"),
        None => "another process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_second_taker_is_told_who_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        // What a crashed holder left behind is longer than what comes, and means nothing.
        std::fs::write(folder.path().join("lock"), "x".repeat(500)).unwrap();
        let first = HostLock::take(folder.path(), at(1_700_000_000)).unwrap();
        let told = HostLock::take(folder.path(), at(1_800_000_000))
            .unwrap_err()
            .to_string();
        let expected = format!("is held by process {} since 2023-11-14T22:13:20Z", std::process::id());
        assert!(told.ends_with(&expected), "{told}");
        drop(first);
        let second = HostLock::take(folder.path(), at(1_800_000_000)).unwrap();
        let told = HostLock::take(folder.path(), at(1_900_000_000))
            .unwrap_err()
            .to_string();
        assert!(told.contains("since 2027-01-15T08:00:00Z"), "{told}");
        drop(second);
    }

    #[test]
    fn a_missing_folder_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let told = HostLock::take(&folder.path().join("gone"), SystemTime::UNIX_EPOCH).unwrap_err();
        assert!(
            told.to_string().starts_with("cannot open the registry's lock `"),
            "{told}"
        );
    }
}
