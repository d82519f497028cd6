//! Reading versions, every link of the chain proven: pointer, manifest, files.

use std::collections::BTreeMap;

use object_store::path::Path;

use super::{MAX_MANIFEST_BYTES, Manifest, Pointer, Registry, RegistryError, Version};
use super::{file_path, manifest_path};
use crate::hash::content_hash;

/// A version read back, every byte proven.
#[derive(Debug, Clone)]
pub struct AdapterVersion {
    /// Its manifest.
    pub manifest: Manifest,
    /// Its files by name.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// What a registry holds.
#[derive(Debug, Default)]
pub struct Listing {
    /// Whole versions, newest first.
    pub versions: Vec<Manifest>,
    /// Versions without a manifest: being published, or left by a crash.
    pub unfinished: Vec<Version>,
    /// What cannot be read, each with the reason.
    pub broken: Vec<RegistryError>,
}

impl Registry {
    /// Everything that was published and is still there.
    ///
    /// # Errors
    /// The store's; a version that cannot be read is listed as broken.
    pub async fn list(&self) -> Result<Listing, RegistryError> {
        let mut listing = Listing::default();
        for name in self.store.folders(&Path::from("versions")).await? {
            // Another folder that somebody made is none of ours.
            let Ok(version) = name.parse::<Version>() else {
                continue;
            };
            match self.show(&version).await {
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

    /// A version's manifest, proven by its name.
    ///
    /// # Errors
    /// [`RegistryError::NoVersion`], [`RegistryError::Corrupt`], the store's.
    pub async fn show(&self, version: &Version) -> Result<Manifest, RegistryError> {
        self.manifest(version).await.map(|(manifest, _)| manifest)
    }

    /// A version whole, each file proven by the manifest.
    ///
    /// # Errors
    /// As [`Registry::show`].
    pub async fn read(&self, version: &Version) -> Result<AdapterVersion, RegistryError> {
        self.proven(version).await.map(|(version, _)| version)
    }

    /// What a pointer names, proven from the pointer on; nothing for the bare base.
    ///
    /// # Errors
    /// As [`Registry::show`].
    pub async fn read_current(&self, pointer: &Pointer) -> Result<Option<AdapterVersion>, RegistryError> {
        let Some(version) = &pointer.version else {
            return Ok(None);
        };
        let (whole, hash) = self.proven(version).await?;
        match &pointer.manifest_sha256 {
            Some(expected) if *expected != hash => Err(self.store.corrupt(&manifest_path(version), hash, expected)),
            _ => Ok(Some(whole)),
        }
    }

    /// The version that an abbreviation of at least four digits means.
    ///
    /// # Errors
    /// [`RegistryError::NoVersion`], [`RegistryError::Ambiguous`], the store's.
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

    /// A manifest and the hash of its bytes.
    async fn manifest(&self, version: &Version) -> Result<(Manifest, String), RegistryError> {
        let path = manifest_path(version);
        let bytes = self.store.get(&path, MAX_MANIFEST_BYTES).await?;
        let bytes = bytes.ok_or_else(|| self.no_version(version.as_str()))?;
        match Manifest::parse(&bytes, version) {
            Ok(manifest) => Ok((manifest, content_hash(&bytes))),
            Err((found, expected)) => Err(self.store.corrupt(&path, found, expected)),
        }
    }

    /// A version whole, and the hash of its manifest's bytes.
    pub(super) async fn proven(&self, version: &Version) -> Result<(AdapterVersion, String), RegistryError> {
        let (manifest, hash) = self.manifest(version).await?;
        let mut files = BTreeMap::new();
        for (name, entry) in &manifest.files {
            let path = file_path(&manifest.version, name);
            let bytes = self.store.get(&path, entry.bytes).await?;
            let bytes = bytes.ok_or_else(|| self.store.corrupt(&path, "nothing", &entry.sha256))?;
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
            place: self.place().to_owned(),
        }
    }
}
