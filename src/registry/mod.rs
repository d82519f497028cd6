//! The registry: publishes adapter versions, and records which one is in service.
//!
//! ```text
//! versions/<version>/adapter_config.json, adapter_model.safetensors, report.html, manifest.json
//! pointers/00000042.json
//! records/<kind>/<sha256>.json
//! keys/split.json
//! lock
//! ```
//!
//! Objects are never modified: each is created atomically, and only gc deletes. The manifest of a version is written
//! after its files, so a version that has one is complete. A pointer is created after that, so the version in service
//! is readable even if a writer is killed at any point. A pointer contains the hash of a manifest, and a manifest
//! contains the hashes of the files; readers verify them all. This module does not depend on how adapters are trained
//! or evaluated.

mod error;
mod gc;
mod lock;
mod manifest;
mod memory;
mod pointer;
mod publish;
mod read;
mod records;
mod service;
mod store;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::SystemTime;

use object_store::ObjectStore;
use object_store::path::Path;

pub use error::RegistryError;
pub use gc::GcSummary;
pub use lock::HostLock;
pub use manifest::{FileEntry, Manifest, Version, VersionError, VersionFacts};
pub use memory::{LostRegistry, PointerMemory, RegistryLoss};
pub use pointer::{Change, Pointer};
pub(crate) use publish::ADAPTER_FILES;
pub use publish::VersionDraft;
pub use read::{AdapterVersion, Listing};
pub use records::{RecordKind, SplitKey};
pub use service::Rollback;

use store::Store;

/// Upper bound on the size of a manifest. The loader of adapters has the same limit.
const MAX_MANIFEST_BYTES: u64 = 16 << 20;

/// A registry of adapter versions. It is cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    store: Store,
    /// The highest pointer seen so far, at which the next listing starts.
    last_sequence: Arc<AtomicU64>,
}

impl Registry {
    /// Opens the registry at a `file://` URL.
    ///
    /// # Errors
    /// Returns [`RegistryError::Url`] if the URL is not usable, and [`RegistryError::Folder`] or
    /// [`RegistryError::Store`] if the folder does not exist or cannot be opened.
    pub fn open(url: &str) -> Result<Self, RegistryError> {
        Store::open(url).map(Self::from_store)
    }

    /// Opens the registry at a `file://` URL, and creates its folder if it is missing.
    ///
    /// # Errors
    /// Returns [`RegistryError::Url`] if the URL is not usable, and [`RegistryError::Folder`] or
    /// [`RegistryError::Store`] if the folder cannot be created or opened.
    pub fn create(url: &str) -> Result<Self, RegistryError> {
        Store::create(url).map(Self::from_store)
    }

    /// Returns whether the folder at a `file://` URL exists.
    ///
    /// # Errors
    /// Returns [`RegistryError::Url`] if the URL is not usable, and [`RegistryError::Folder`] if the folder cannot be
    /// examined.
    pub fn exists(url: &str) -> Result<bool, RegistryError> {
        store::folder_exists(&store::folder(url)?)
    }

    /// Creates a registry in any object store that supports atomic create-if-absent. `location` is its name in
    /// errors.
    pub fn with_store(objects: Arc<dyn ObjectStore>, location: impl Into<String>) -> Self {
        Self::from_store(Store::new(objects, location.into()))
    }

    fn from_store(store: Store) -> Self {
        Self {
            store,
            last_sequence: Arc::default(),
        }
    }

    /// Returns the location of the registry, as it appears in errors.
    pub fn location(&self) -> &str {
        self.store.location()
    }

    /// Returns the folder of a version, or `None` if the registry is not a folder on this host.
    pub fn version_folder(&self, version: &Version) -> Option<PathBuf> {
        let folder = self.store.folder()?;
        Some(folder.join("versions").join(version.as_str()))
    }

    /// Takes the host lock. Returns `None` if the registry is not a folder on this host, and so has no lock.
    ///
    /// # Errors
    /// Returns [`RegistryError::Locked`] if another process holds the lock, and [`RegistryError::Folder`] if the lock
    /// file cannot be used.
    pub fn lock(&self, now: SystemTime) -> Result<Option<HostLock>, RegistryError> {
        self.store
            .folder()
            .map(|folder| HostLock::take(folder, now))
            .transpose()
    }
}

fn file_path(version: &Version, name: &str) -> Path {
    Path::from(format!("versions/{version}/{name}"))
}

fn manifest_path(version: &Version) -> Path {
    file_path(version, "manifest.json")
}
