//! Adapter versions: published, promoted, rolled back, watched.
//!
//! ```text
//! versions/<version>/adapter_config.json, adapter_model.safetensors, report.html, manifest.json
//! pointers/00000042.json
//! records/<kind>/<sha256>.json
//! keys/split.json
//! lock
//! ```
//!
//! Nothing is ever changed: objects are created whole, and gc alone deletes. A version's manifest is
//! written last, so a version that has one is whole; the pointer is made after that, so what is in
//! service is always readable, whenever a writer is killed. Pointer, manifest and files are a chain of
//! hashes, and reading proves each link. How adapters are made and judged is not known here.

mod error;
mod gc;
mod lock;
mod manifest;
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
pub use gc::Removed;
pub use lock::HostLock;
pub use manifest::{FileEntry, MANIFEST_FORMAT, Manifest, Version, VersionError, VersionFacts};
pub use pointer::{Change, Pointer};
pub use publish::{ADAPTER_FILES, VersionDraft};
pub use read::{AdapterVersion, Listing};
pub use records::{RecordKind, SplitKey};
pub use service::Rollback;

use store::Store;

/// Larger than any manifest; the reader of adapters stops at this size too.
const MAX_MANIFEST_BYTES: u64 = 16 << 20;

/// A place that holds adapter versions. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    store: Store,
    /// The highest pointer seen: listing begins there.
    known: Arc<AtomicU64>,
}

impl Registry {
    /// Opens the registry at a `file://` URL, whose folder exists.
    ///
    /// # Errors
    /// [`RegistryError::Url`], [`RegistryError::Store`].
    pub fn open(url: &str) -> Result<Self, RegistryError> {
        Store::open(url).map(Self::with)
    }

    /// As [`Registry::open`]; makes the folder where it is missing.
    ///
    /// # Errors
    /// As [`Registry::open`], and [`RegistryError::Folder`].
    pub fn create(url: &str) -> Result<Self, RegistryError> {
        Store::create(url).map(Self::with)
    }

    /// A registry in any object store that creates objects atomically and only where there is none;
    /// `place` names it in errors.
    pub fn on(objects: Arc<dyn ObjectStore>, place: impl Into<String>) -> Self {
        Self::with(Store::new(objects, place.into()))
    }

    fn with(store: Store) -> Self {
        Self {
            store,
            known: Arc::default(),
        }
    }

    /// Where it is, as errors name it.
    pub fn place(&self) -> &str {
        self.store.place()
    }

    /// The folder of a version, where the registry is one on this host.
    pub fn version_folder(&self, version: &Version) -> Option<PathBuf> {
        let folder = self.store.folder()?;
        Some(folder.join("versions").join(version.as_str()))
    }

    /// Takes the host's lock, where the registry is a folder on it; elsewhere there is none to take.
    ///
    /// # Errors
    /// [`RegistryError::Locked`], [`RegistryError::Folder`].
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
