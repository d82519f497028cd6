//! From an adapter's files to a version: records, files, then the manifest.

use std::collections::BTreeMap;

use super::manifest::is_file_name;
use super::{FileEntry, MAX_MANIFEST_BYTES, Manifest, RecordKind, Registry, RegistryError, VersionFacts};
use super::{file_path, manifest_path};
use crate::hash::{adapter_hash, content_hash};

/// The two files that make an adapter.
pub const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// What is to become a version.
#[derive(Debug, Clone)]
pub struct VersionDraft {
    /// What its maker says of it.
    pub facts: VersionFacts,
    /// Files by name, [`ADAPTER_FILES`] among them; the manifest is made here.
    pub files: BTreeMap<String, Vec<u8>>,
    /// What it rests on, as canonical JSON.
    pub records: BTreeMap<RecordKind, String>,
}

impl Registry {
    /// Publishes a version: records, files, then the manifest. Publishing the same again changes
    /// nothing. It is not in service by that.
    ///
    /// # Errors
    /// [`RegistryError::Unpublishable`] for a draft that nobody could load, else the store's.
    pub async fn publish(&self, draft: VersionDraft) -> Result<Manifest, RegistryError> {
        let VersionDraft { facts, files, records } = draft;
        let adapter = check_files(&files).map_err(RegistryError::Unpublishable)?;
        let mut hashes = BTreeMap::new();
        for (kind, canonical) in records {
            hashes.insert(kind, self.put_record(kind, &canonical).await?);
        }
        let entries = files.iter().map(|(name, bytes)| {
            let entry = FileEntry {
                sha256: content_hash(bytes),
                bytes: bytes.len() as u64,
            };
            (name.clone(), entry)
        });
        let manifest = Manifest::new(entries.collect(), adapter, hashes, facts);
        let manifest_bytes = manifest.to_bytes();
        if manifest_bytes.len() as u64 > MAX_MANIFEST_BYTES {
            let size = manifest_bytes.len();
            let text = format!("the manifest has {size} bytes, expected at most {MAX_MANIFEST_BYTES}");
            return Err(RegistryError::Unpublishable(text));
        }
        for (name, bytes) in files {
            let path = file_path(&manifest.version, &name);
            self.store.create_same(&path, bytes).await?;
        }
        let path = manifest_path(&manifest.version);
        self.store.create_same(&path, manifest_bytes).await?;
        Ok(manifest)
    }
}

/// Shows that files make an adapter and gives its hash.
fn check_files(files: &BTreeMap<String, Vec<u8>>) -> Result<String, String> {
    if let Some(name) = files.keys().find(|name| !is_file_name(name)) {
        return Err(format!(
            "a file is named `{name}`, expected letters, digits, `_`, `-` and `.`"
        ));
    }
    match ADAPTER_FILES.map(|name| files.get(name).ok_or(name)) {
        [Ok(config), Ok(weights)] => Ok(adapter_hash(config, weights)),
        [Err(missing), _] | [_, Err(missing)] => Err(format!("`{missing}` is missing")),
    }
}
