//! Garbage collection: removes old versions and what crashed writers left behind.
//!
//! The newest versions are kept, and so are the versions named by recent pointers, so that a rollback stays possible.
//! The manifest of a version is deleted first: if gc is killed, the rest is an unfinished version, which no reader
//! mistakes for a complete one. A record is removed together with the last version that refers to it. A record that no
//! version ever referred to is kept, because a decision may refer to it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path as FilePath;
use std::time::{Duration, SystemTime};

use object_store::path::Path;

use super::{Manifest, Registry, RegistryError, Version, manifest_path, records};

/// Age after which an unfinished version or a staged file counts as abandoned. Publishing takes seconds.
const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

/// What [`Registry::gc`] removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct GcSummary {
    /// Complete versions.
    pub versions: Vec<Version>,
    /// Unfinished versions, left behind by publications that crashed.
    pub unfinished: Vec<Version>,
    /// Number of records that no remaining version refers to.
    pub records: usize,
    /// Number of staged files, left behind by writes that crashed.
    pub staged: usize,
}

impl Registry {
    /// Removes all versions except the newest `keep` (at least one) and those named by the last `keep` pointers.
    ///
    /// Versions that cannot be read are left alone. The caller must hold the host lock ([`Registry::lock`]).
    ///
    /// # Errors
    /// Returns an error if the store fails. Everything removed up to then stays removed, and the call can be repeated.
    pub async fn gc(&self, keep: usize, now: SystemTime) -> Result<GcSummary, RegistryError> {
        let keep = keep.max(1);
        let listing = self.list().await?;
        let history = self.history().await?;
        let mut keep_versions: BTreeSet<Version> = listing
            .versions
            .iter()
            .take(keep)
            .map(|manifest| manifest.version.clone())
            .collect();
        keep_versions.extend(
            history
                .iter()
                .rev()
                .take(keep)
                .filter_map(|pointer| pointer.version.clone()),
        );
        let (remaining, old): (Vec<Manifest>, Vec<Manifest>) = listing
            .versions
            .into_iter()
            .partition(|manifest| keep_versions.contains(&manifest.version));
        let mut removed = GcSummary::default();
        for manifest in &old {
            self.remove_version(&manifest.version).await?;
            removed.versions.push(manifest.version.clone());
        }
        let in_use: BTreeSet<_> = remaining.iter().flat_map(|manifest| &manifest.records).collect();
        let candidates: BTreeSet<_> = old.iter().flat_map(|manifest| &manifest.records).collect();
        // A broken manifest may refer to any of them.
        let candidates = if listing.broken.is_empty() {
            candidates
        } else {
            BTreeSet::new()
        };
        for (kind, hash) in candidates.difference(&in_use) {
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
        Ok(objects.iter().all(|object| is_old(object.last_modified.into(), now)))
    }
}

fn folder(version: &Version) -> Path {
    Path::from(format!("versions/{version}"))
}

/// Returns whether something that was last modified at `modified` counts as abandoned.
fn is_old(modified: SystemTime, now: SystemTime) -> bool {
    now.duration_since(modified).is_ok_and(|age| age >= ABANDONED_AFTER)
}

/// Removes old staged files, which do not appear in listings, and folders that become empty as a result. Returns the
/// number of files removed.
///
/// Files that cannot be removed are skipped, because they do no harm.
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
                // Fails if the folder is not empty.
                let _ = fs::remove_dir(&path);
            }
            removed += below;
            continue;
        }
        let is_old = metadata.modified().is_ok_and(|modified| is_old(modified, now));
        let name = entry.file_name();
        let is_staged = name
            .to_str()
            .and_then(|name| name.rsplit_once('#'))
            .is_some_and(|(_, number)| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()));
        if metadata.is_file() && is_staged && is_old && fs::remove_file(&path).is_ok() {
            removed += 1;
        }
    }
    removed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_staged_files_are_removed() {
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
