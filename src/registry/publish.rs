//! Publishes a version from the files of an adapter.

use std::collections::BTreeMap;

use super::manifest::is_file_name;
use super::{FileEntry, MAX_MANIFEST_BYTES, Manifest, RecordKind, Registry, RegistryError, VersionFacts};
use super::{file_path, manifest_path};
use crate::hash::{adapter_hash, content_hash};

/// The two files of an adapter, in PEFT format.
pub(crate) const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The content of a version that is to be published.
#[derive(Debug, Clone)]
pub struct VersionDraft {
    /// How the version was made and evaluated.
    pub facts: VersionFacts,
    /// Files by name, including `adapter_config.json` and `adapter_model.safetensors`. The manifest is added on
    /// publication.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Records that the version depends on, as canonical JSON.
    pub records: BTreeMap<RecordKind, String>,
}

impl Registry {
    /// Publishes a version without putting it into service: writes its records, then its files, then the manifest.
    ///
    /// Publishing the same draft again has no effect.
    ///
    /// # Errors
    /// Returns [`RegistryError::InvalidDraft`] if a file name is invalid, a file of the adapter is missing or the
    /// manifest is too large, or another error if the store fails.
    pub async fn publish(&self, draft: VersionDraft) -> Result<Manifest, RegistryError> {
        let VersionDraft { facts, files, records } = draft;
        let adapter = check_files(&files).map_err(RegistryError::InvalidDraft)?;
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
            return Err(RegistryError::InvalidDraft(text));
        }
        for (name, bytes) in files {
            let path = file_path(&manifest.version, &name);
            self.store.create_identical(&path, bytes).await?;
        }
        let path = manifest_path(&manifest.version);
        self.store.create_identical(&path, manifest_bytes).await?;
        Ok(manifest)
    }
}

/// Checks the file names and returns the hash of the adapter.
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
