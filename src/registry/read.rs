//! Reads versions and verifies their hashes, from the pointer through the manifest to the files.

use std::collections::BTreeMap;

use object_store::path::Path;

use super::{MAX_MANIFEST_BYTES, Manifest, Pointer, Registry, RegistryError, Version};
use super::{file_path, manifest_path};
use crate::hash::content_hash;

/// A version whose files have been read and verified.
#[derive(Debug, Clone)]
pub struct AdapterVersion {
    /// The verified manifest.
    pub manifest: Manifest,
    /// Contents of its files by name.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// The versions in a registry.
#[derive(Debug, Default)]
pub struct Listing {
    /// Complete versions, newest first.
    pub versions: Vec<Manifest>,
    /// Versions without a manifest: they are being published, or a crash interrupted their publication.
    pub unfinished: Vec<Version>,
    /// Errors for versions that cannot be read.
    pub broken: Vec<RegistryError>,
}

impl Registry {
    /// Lists all versions. A version that cannot be read is listed as broken.
    ///
    /// # Errors
    /// Returns an error if the folders of the versions cannot be listed.
    pub async fn list(&self) -> Result<Listing, RegistryError> {
        let mut listing = Listing::default();
        for name in self.store.folders(&Path::from("versions")).await? {
            // Ignore other folders.
            let Ok(version) = name.parse::<Version>() else {
                continue;
            };
            match self.manifest(&version).await {
                Ok(manifest) => listing.versions.push(manifest),
                Err(RegistryError::NoVersion { .. }) => listing.unfinished.push(version),
                Err(error) => listing.broken.push(error),
            }
        }
        let newest_first = |manifest: &Manifest| {
            let created_at = manifest.facts.created_at.clone();
            (std::cmp::Reverse(created_at), manifest.version.clone())
        };
        listing.versions.sort_by_cached_key(newest_first);
        Ok(listing)
    }

    /// Reads the manifest of a version and verifies it against the version's name.
    ///
    /// # Errors
    /// Returns [`RegistryError::NoVersion`] if there is no such version, [`RegistryError::Corrupt`] if the manifest
    /// does not match it, or another error if the store fails.
    pub async fn manifest(&self, version: &Version) -> Result<Manifest, RegistryError> {
        self.manifest_and_hash(version).await.map(|(manifest, _)| manifest)
    }

    /// Reads a version with all its files and verifies them against the manifest.
    ///
    /// # Errors
    /// Fails like [`Registry::manifest`], and returns [`RegistryError::Corrupt`] if a file is missing or does not match
    /// the manifest.
    pub async fn read(&self, version: &Version) -> Result<AdapterVersion, RegistryError> {
        self.version_and_hash(version).await.map(|(version, _)| version)
    }

    /// Reads the version that a pointer names, and verifies it against the hash in the pointer. Returns `None` if the
    /// pointer names the bare base model.
    ///
    /// # Errors
    /// Fails like [`Registry::read`], and returns [`RegistryError::Corrupt`] if the manifest is not the one that the
    /// pointer was created for.
    pub async fn read_current(&self, pointer: &Pointer) -> Result<Option<AdapterVersion>, RegistryError> {
        let Some(version) = &pointer.version else {
            return Ok(None);
        };
        let (read, hash) = self.version_and_hash(version).await?;
        match &pointer.manifest_sha256 {
            Some(expected) if *expected != hash => Err(self.store.corrupt(&manifest_path(version), hash, expected)),
            _ => Ok(Some(read)),
        }
    }

    /// Finds the version that begins with `prefix`, which must have at least four digits.
    ///
    /// # Errors
    /// Returns [`RegistryError::NoVersion`] if no version begins with the prefix or it is too short,
    /// [`RegistryError::Ambiguous`] if several versions do, or another error if the store fails.
    pub async fn find(&self, prefix: &str) -> Result<Version, RegistryError> {
        let names = self.store.folders(&Path::from("versions")).await?;
        let versions = names.iter().filter_map(|name| name.parse::<Version>().ok());
        let mut versions: Vec<Version> = versions
            .filter(|version| version.as_str().starts_with(prefix))
            .collect();
        match versions.len() {
            1 if prefix.len() >= 4 => Ok(versions.remove(0)),
            0 | 1 => Err(self.no_version(prefix)),
            _ => Err(RegistryError::Ambiguous {
                prefix: prefix.to_owned(),
                versions,
            }),
        }
    }

    /// Returns a manifest and the hash of its bytes.
    async fn manifest_and_hash(&self, version: &Version) -> Result<(Manifest, String), RegistryError> {
        let path = manifest_path(version);
        let bytes = self.store.get(&path, MAX_MANIFEST_BYTES).await?;
        let bytes = bytes.ok_or_else(|| self.no_version(version.as_str()))?;
        match Manifest::parse(&bytes, version) {
            Ok(manifest) => Ok((manifest, content_hash(&bytes))),
            Err((found, expected)) => Err(self.store.corrupt(&path, found, expected)),
        }
    }

    /// Returns a version with all its files, and the hash of its manifest's bytes.
    pub(super) async fn version_and_hash(&self, version: &Version) -> Result<(AdapterVersion, String), RegistryError> {
        let (manifest, hash) = self.manifest_and_hash(version).await?;
        let mut files = BTreeMap::new();
        for (name, entry) in &manifest.files {
            let path = file_path(&manifest.version, name);
            let bytes = self.store.get(&path, entry.bytes).await?;
            let bytes = bytes.ok_or_else(|| self.store.corrupt(&path, "missing", &entry.sha256))?;
            let found = content_hash(&bytes);
            if found != entry.sha256 {
                return Err(self.store.corrupt(&path, found, &entry.sha256));
            }
            files.insert(name.clone(), bytes);
        }
        Ok((AdapterVersion { manifest, files }, hash))
    }

    fn no_version(&self, version: &str) -> RegistryError {
        RegistryError::NoVersion {
            version: version.chars().take(40).collect(),
            location: self.location().to_owned(),
        }
    }
}
