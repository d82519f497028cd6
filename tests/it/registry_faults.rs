//! A writer that dies after any single operation of the store leaves a registry that reads: the old
//! version in service, or the new one where the pointer was made, and a second try goes through.

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

/// When the writer dies: before the operation, or when it is done but nobody was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dies {
    Before,
    After,
}

/// A store whose user dies: operations go through until there are none left, then none do.
#[derive(Debug)]
struct Mortal {
    inner: LocalFileSystem,
    left: AtomicUsize,
    dies: Dies,
}

impl fmt::Display for Mortal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mortal")
    }
}

fn dead() -> Error {
    Error::Generic {
        store: "Mortal",
        source: "the writer is dead".into(),
    }
}

impl Mortal {
    /// Whether this operation is the last one; an error when it comes too late.
    fn step(&self) -> Result<bool> {
        let left = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        match (left, self.dies) {
            (Err(_), _) | (Ok(1), Dies::Before) => Err(dead()),
            (Ok(left), _) => Ok(left == 1),
        }
    }

    fn finish<T>(last: bool, result: Result<T>) -> Result<T> {
        if last { Err(dead()) } else { result }
    }
}

#[async_trait]
impl ObjectStore for Mortal {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let last = self.step()?;
        Self::finish(last, self.inner.put_opts(location, payload, options).await)
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(dead())
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let last = self.step()?;
        Self::finish(last, self.inner.get_opts(location, options).await)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        // One object at a time is all that the registry asks for.
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
        let last = self.step()?;
        Self::finish(last, self.inner.list_with_delimiter(prefix).await)
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(dead())
    }
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

/// The same folder as the writer's. Not synced: no power fails here, and there are hundreds of writes.
fn store(folder: &tempfile::TempDir) -> LocalFileSystem {
    let store = LocalFileSystem::new_with_prefix(folder.path()).unwrap();
    store.with_automatic_cleanup(true)
}

/// A registry with `a` and `b` published and `b` in service.
async fn prepared() -> (tempfile::TempDir, Registry, Version) {
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::on(Arc::new(store(&folder)), "immortal");
    let a = registry.publish(draft("a")).await.unwrap().version;
    let b = registry.publish(draft("b")).await.unwrap().version;
    registry.promote(&a, 0, now()).await.unwrap();
    registry.promote(&b, 1, now()).await.unwrap();
    (folder, registry, b)
}

fn mortal(folder: &tempfile::TempDir, operations: usize, dies: Dies) -> Registry {
    let store = Mortal {
        inner: store(folder),
        left: AtomicUsize::new(operations),
        dies,
    };
    Registry::on(Arc::new(store), "mortal")
}

/// What is in service, every byte of it proven; everything listed reads too.
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
async fn a_writer_that_dies_anywhere_leaves_the_old_version_in_service() {
    for dies in [Dies::Before, Dies::After] {
        let mut operations = 1;
        loop {
            let (folder, registry, old) = prepared().await;
            let writer = mortal(&folder, operations, dies);
            let done = async {
                let manifest = writer.publish(draft("c")).await?;
                writer.promote(&manifest.version, 2, now()).await
            };
            let done = done.await;
            let found = in_service(&registry).await;
            let new = registry.publish(draft("c")).await.unwrap().version;
            if let Ok(pointer) = done {
                assert_eq!(Some(&found), pointer.version.as_ref());
                break;
            }
            let pointer = registry.current().await.unwrap().unwrap().sequence;
            if found == new {
                // Only the very last operation can be done without being known.
                assert_eq!((dies, pointer), (Dies::After, 3), "after {operations}");
            } else {
                assert_eq!((&found, pointer), (&old, 2), "after {operations} {dies:?}");
                registry.promote(&new, 2, now()).await.unwrap();
            }
            assert_eq!(in_service(&registry).await, new);
            operations += 1;
        }
        // Two records, three files, the manifest; its proof; the pointer.
        assert!(operations > 10, "{operations} operations: is everything counted?");
    }
}

#[tokio::test]
async fn a_gc_that_dies_anywhere_leaves_what_it_keeps() {
    for dies in [Dies::Before, Dies::After] {
        let mut operations = 1;
        loop {
            let (folder, registry, old) = prepared().await;
            for name in ["c", "d", "e"] {
                registry.publish(draft(name)).await.unwrap();
            }
            let done = mortal(&folder, operations, dies).gc(1, now()).await;
            assert_eq!(in_service(&registry).await, old);
            if done.is_ok() {
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
        assert!(operations > 20, "{operations} operations: is everything counted?");
    }
}
