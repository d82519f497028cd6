//! What nobody needs any more goes.
//!
//! Kept are the newest versions, and whatever the recent pointers name, so that there is always
//! something to roll back to. A version goes manifest first: whenever gc is killed, what is left is
//! unfinished, never half there. A record goes only with the last version that names it; one that no
//! version ever named may belong to a decision and stays.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path as FilePath;
use std::time::{Duration, SystemTime};

use object_store::path::Path;

use super::{Manifest, Registry, RegistryError, Version, manifest_path, records};

/// What is unfinished for so long is not being written any more: publishing takes seconds.
const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

/// What gc removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Whole versions.
    pub versions: Vec<Version>,
    /// What crashed publications left.
    pub unfinished: Vec<Version>,
    /// Records that nothing left over names.
    pub records: usize,
    /// Staged files that crashed writes left.
    pub staged: usize,
}

impl Registry {
    /// Removes all but the newest `keep` versions (at least one) and those that the last `keep`
    /// pointers name. What cannot be read is left alone. To be called under the host's lock.
    ///
    /// # Errors
    /// The store's; what was removed until then is gone, and calling again goes on.
    pub async fn gc(&self, keep: usize, now: SystemTime) -> Result<Removed, RegistryError> {
        let keep = keep.max(1);
        let listing = self.list().await?;
        let history = self.history().await?;
        let mut kept: BTreeSet<Version> = listing
            .versions
            .iter()
            .take(keep)
            .map(|one| one.version.clone())
            .collect();
        kept.extend(
            history
                .iter()
                .rev()
                .take(keep)
                .filter_map(|pointer| pointer.version.clone()),
        );
        let (stay, go): (Vec<Manifest>, Vec<Manifest>) = listing
            .versions
            .into_iter()
            .partition(|manifest| kept.contains(&manifest.version));
        let mut removed = Removed::default();
        for manifest in &go {
            self.remove_version(&manifest.version).await?;
            removed.versions.push(manifest.version.clone());
        }
        let named: BTreeSet<_> = stay.iter().flat_map(|manifest| &manifest.records).collect();
        let unnamed: BTreeSet<_> = go.iter().flat_map(|manifest| &manifest.records).collect();
        // What a broken manifest names is not known.
        let unnamed = if listing.broken.is_empty() {
            unnamed
        } else {
            BTreeSet::new()
        };
        for (kind, hash) in unnamed.difference(&named) {
            if let Some(path) = records::path(**kind, hash) {
                self.store.delete(&path).await?;
                removed.records += 1;
            }
        }
        for version in listing.unfinished {
            if self.is_abandoned(&version, now).await? {
                self.remove_version(&version).await?;
                removed.unfinished.push(version);
            }
        }
        if let Some(folder) = self.store.folder() {
            removed.staged = sweep_staged(folder, now);
        }
        Ok(removed)
    }

    async fn remove_version(&self, version: &Version) -> Result<(), RegistryError> {
        self.store.delete(&manifest_path(version)).await?;
        for object in self.store.list(&folder(version)).await? {
            self.store.delete(&object.location).await?;
        }
        Ok(())
    }

    async fn is_abandoned(&self, version: &Version, now: SystemTime) -> Result<bool, RegistryError> {
        let objects = self.store.list(&folder(version)).await?;
        let old = |modified: SystemTime| now.duration_since(modified).is_ok_and(|age| age >= ABANDONED_AFTER);
        Ok(objects.iter().all(|object| old(object.last_modified.into())))
    }
}

fn folder(version: &Version) -> Path {
    Path::from(format!("versions/{version}"))
}

/// Removes old staged files, which listings do not show, and folders that they kept from being empty.
/// What cannot be removed is left: it is only litter.
fn sweep_staged(folder: &FilePath, now: SystemTime) -> usize {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    let mut removed = 0;
    for entry in entries.flatten() {
        let (path, Ok(metadata)) = (entry.path(), fs::symlink_metadata(entry.path())) else {
            continue;
        };
        if metadata.is_dir() {
            let below = sweep_staged(&path, now);
            if below > 0 {
                // Fails where anything is left in it.
                let _ = fs::remove_dir(&path);
            }
            removed += below;
            continue;
        }
        let old = metadata
            .modified()
            .is_ok_and(|modified| now.duration_since(modified).is_ok_and(|age| age >= ABANDONED_AFTER));
        let name = entry.file_name();
        let staged = name
            .to_str()
            .and_then(|name| name.rsplit_once('#'))
            .is_some_and(|(_, number)| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()));
        if metadata.is_file() && staged && old && fs::remove_file(&path).is_ok() {
            removed += 1;
        }
    }
    removed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_staged_files_are_swept() {
        let folder = tempfile::tempdir().unwrap();
        let touch = |name: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        };
        for name in [
            "versions/a/model#1",
            "versions/b/model#12",
            "versions/b/model",
            "lock",
            "x#",
            "x#1a",
        ] {
            touch(name);
        }
        let now = SystemTime::now();
        assert_eq!(sweep_staged(folder.path(), now), 0);
        assert_eq!(sweep_staged(folder.path(), now + 2 * ABANDONED_AFTER), 2);
        let left = |name: &str| folder.path().join(name).exists();
        assert!(left("versions/b/model") && left("lock") && left("x#") && left("x#1a"));
        assert!(!left("versions/a") && !left("versions/b/model#12"));
    }
}
