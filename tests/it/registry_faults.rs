//! If a writer dies at any operation on the store, the registry stays readable: the old version is in service, or the
//! new one if its pointer was created, and a second attempt succeeds.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use crate::common::registry::draft;
use async_trait::async_trait;
use futures_util::stream::{BoxStream, StreamExt};
use moderatord::registry::{Registry, Version};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// Whether the writer dies before its last operation, or after it but without receiving the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Death {
    Before,
    After,
}

/// A store that fails after a given number of operations, as if its user had died.
#[derive(Debug)]
struct FailingStore {
    inner: LocalFileSystem,
    remaining: AtomicUsize,
    death: Death,
}

impl fmt::Display for FailingStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FailingStore")
    }
}

fn dead() -> Error {
    Error::Generic {
        store: "FailingStore",
        source: "the writer is dead".into(),
    }
}

impl FailingStore {
    /// Counts an operation. Returns whether it is the last one, or an error if the writer is dead already.
    fn step(&self) -> Result<bool> {
        let remaining = self
            .remaining
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| count.checked_sub(1));
        match (remaining, self.death) {
            (Err(_), _) | (Ok(1), Death::Before) => Err(dead()),
            (Ok(remaining), _) => Ok(remaining == 1),
        }
    }

    fn finish<T>(is_last: bool, result: Result<T>) -> Result<T> {
        if is_last { Err(dead()) } else { result }
    }
}

#[async_trait]
impl ObjectStore for FailingStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let is_last = self.step()?;
        Self::finish(is_last, self.inner.put_opts(location, payload, options).await)
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(dead())
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let is_last = self.step()?;
        Self::finish(is_last, self.inner.get_opts(location, options).await)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        // The registry deletes one object at a time.
        match self.step() {
            Ok(false) => self.inner.delete_stream(locations),
            Ok(true) => {
                let deleted = self.inner.delete_stream(locations);
                deleted.map(|_| Err(dead())).boxed()
            }
            Err(error) => futures_util::stream::once(async { Err(error) }).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.step() {
            Ok(false) => self.inner.list(prefix),
            _ => futures_util::stream::once(async { Err(dead()) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let is_last = self.step()?;
        Self::finish(is_last, self.inner.list_with_delimiter(prefix).await)
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(dead())
    }
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

/// Returns a store without fsync, since there are hundreds of writes and no power failures in this test.
fn store(folder: &tempfile::TempDir) -> LocalFileSystem {
    let store = LocalFileSystem::new_with_prefix(folder.path()).unwrap();
    store.with_automatic_cleanup(true)
}

/// Creates a registry with the versions `a` and `b`, with `b` in service.
async fn registry_with_two_versions() -> (tempfile::TempDir, Registry, Version) {
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::with_store(Arc::new(store(&folder)), "registry");
    let a = registry.publish(draft("a")).await.unwrap().version;
    let b = registry.publish(draft("b")).await.unwrap().version;
    registry.promote(&a, 0, now()).await.unwrap();
    registry.promote(&b, 1, now()).await.unwrap();
    (folder, registry, b)
}

fn failing_registry(folder: &tempfile::TempDir, operations: usize, death: Death) -> Registry {
    let store = FailingStore {
        inner: store(folder),
        remaining: AtomicUsize::new(operations),
        death,
    };
    Registry::with_store(Arc::new(store), "failing registry")
}

/// Returns the version in service after verifying it and all listed versions.
async fn in_service(registry: &Registry) -> Version {
    let pointer = registry.current().await.unwrap().unwrap();
    let version = registry.read_current(&pointer).await.unwrap().unwrap();
    assert_eq!(pointer.version.as_ref(), Some(&version.manifest.version));
    let listing = registry.list().await.unwrap();
    assert!(listing.broken.is_empty(), "{:?}", listing.broken);
    for manifest in listing.versions {
        registry.read(&manifest.version).await.unwrap();
    }
    assert_eq!(registry.history().await.unwrap().last(), Some(&pointer));
    version.manifest.version
}

#[tokio::test]
async fn a_writer_that_dies_leaves_the_old_version_in_service() {
    for death in [Death::Before, Death::After] {
        let mut operations = 1;
        loop {
            let (folder, registry, old) = registry_with_two_versions().await;
            let writer = failing_registry(&folder, operations, death);
            let result = async {
                let manifest = writer.publish(draft("c")).await?;
                writer.promote(&manifest.version, 2, now()).await
            };
            let result = result.await;
            let found = in_service(&registry).await;
            let new = registry.publish(draft("c")).await.unwrap().version;
            if let Ok(pointer) = result {
                assert_eq!(Some(&found), pointer.version.as_ref());
                break;
            }
            let pointer = registry.current().await.unwrap().unwrap().sequence;
            if found == new {
                // Only the last operation, which creates the pointer, can put the new version into service.
                assert_eq!((death, pointer), (Death::After, 3), "after {operations}");
            } else {
                assert_eq!((&found, pointer), (&old, 2), "after {operations} {death:?}");
                registry.promote(&new, 2, now()).await.unwrap();
            }
            assert_eq!(in_service(&registry).await, new);
            operations += 1;
        }
        // Two records, three files and the manifest are written, then read back, and then the pointer is created.
        assert!(operations > 10, "{operations} operations: some are not counted");
    }
}

#[tokio::test]
async fn a_gc_that_dies_leaves_the_versions_that_it_keeps() {
    for death in [Death::Before, Death::After] {
        let mut operations = 1;
        loop {
            let (folder, registry, old) = registry_with_two_versions().await;
            for name in ["c", "d", "e"] {
                registry.publish(draft(name)).await.unwrap();
            }
            let result = failing_registry(&folder, operations, death).gc(1, now()).await;
            assert_eq!(in_service(&registry).await, old);
            if result.is_ok() {
                break;
            }
            registry
                .gc(1, now() + Duration::from_secs(1_000_000_000))
                .await
                .unwrap();
            let listing = registry.list().await.unwrap();
            assert_eq!((listing.versions.len(), listing.unfinished.len()), (2, 0));
            assert_eq!(in_service(&registry).await, old);
            operations += 1;
        }
        assert!(operations > 20, "{operations} operations: some are not counted");
    }
}
