//! The registry in a local folder: publishing, promotion, rollback, garbage collection and damaged objects.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::common::registry::draft;
use crate::common::{fixture, model_config, prompt_config};
use moderatord::classifier::Classifier;
use moderatord::config::ModelConfig;
use moderatord::decide::Calibration;
use moderatord::registry::{Change, Manifest, RecordKind, Registry, RegistryError, Rollback, Version, VersionDraft};
use object_store::memory::InMemory;
use tempfile::TempDir;

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

struct Folder {
    folder: TempDir,
    registry: Registry,
}

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let registry = Registry::create(&format!("file://{}/registry", folder.path().display())).unwrap();
        Self { folder, registry }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join("registry").join(path)
    }

    async fn publish(&self, name: &str) -> Manifest {
        self.registry.publish(draft(name)).await.unwrap()
    }

    async fn promote(&self, version: &Version) -> u64 {
        let after = self
            .registry
            .current()
            .await
            .unwrap()
            .map_or(0, |pointer| pointer.sequence);
        self.registry.promote(version, after, now()).await.unwrap().sequence
    }

    async fn in_service(&self) -> Option<Version> {
        self.registry
            .current()
            .await
            .unwrap()
            .and_then(|pointer| pointer.version)
    }
}

#[tokio::test]
async fn a_promoted_version_is_read_back() {
    let folder = Folder::new();
    let registry = &folder.registry;
    assert_eq!(registry.current().await.unwrap(), None);
    assert!(registry.list().await.unwrap().versions.is_empty());
    let manifest = folder.publish("a").await;
    assert_eq!(registry.current().await.unwrap(), None);
    let pointer = registry.promote(&manifest.version, 0, now()).await.unwrap();
    assert_eq!((pointer.sequence, pointer.change), (1, Change::Promote));
    assert_eq!(registry.current().await.unwrap(), Some(pointer.clone()));
    let read = registry.read_current(&pointer).await.unwrap().unwrap();
    assert_eq!((&read.manifest, &read.files), (&manifest, &draft("a").files));
    assert!(folder.path("pointers/00000001.json").is_file());
    let version = folder.path(&format!("versions/{}", manifest.version));
    for name in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "report.html",
    ] {
        assert!(version.join(name).is_file(), "{name}");
    }
    assert_eq!(registry.version_folder(&manifest.version), Some(version));
    // Another process sees the same state.
    let reopened = Registry::open(registry.location()).unwrap();
    assert_eq!(reopened.current().await.unwrap(), Some(pointer));
    assert_eq!(reopened.list().await.unwrap().versions, [manifest]);
}

#[tokio::test]
async fn a_version_depends_on_its_files_and_facts() {
    let folder = Folder::new();
    let first = folder.publish("a").await;
    assert_eq!(folder.publish("a").await, first);
    let mut changed: Vec<VersionDraft> = vec![draft("b"); 4];
    changed[0] = draft("a");
    changed[0]
        .files
        .insert("report.html".into(), b"another report".to_vec());
    changed[1] = draft("a");
    changed[1].facts.seed += 1;
    changed[2] = draft("a");
    changed[2].facts.calibration = Calibration::platt(1.5, 0.0).unwrap();
    for draft in changed {
        let version = folder.registry.publish(draft).await.unwrap().version;
        assert_ne!(version, first.version);
    }
    let short = &first.version.as_str()[..6];
    assert_eq!(folder.registry.find(short).await.unwrap(), first.version);
    for (prefix, expected) in [
        ("", "is ambiguous: "),
        ("zz", "version `zz` is not in the registry at file://"),
    ] {
        let error = folder.registry.find(prefix).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[tokio::test]
async fn a_published_adapter_is_loaded_from_its_folder() {
    let folder = Folder::new();
    let read = |name: &str| std::fs::read(fixture("gemma3/lora_qv").join(name)).unwrap();
    let bare = Classifier::load(&model_config("gemma3"), &prompt_config()).unwrap();
    let mut draft = draft("a");
    draft.facts.base = bare.identity().base.clone();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        draft.files.insert(name.into(), read(name));
    }
    let manifest = folder.registry.publish(draft).await.unwrap();
    let config = ModelConfig {
        adapter: folder.registry.version_folder(&manifest.version),
        ..model_config("gemma3")
    };
    let loaded = Classifier::load(&config, &prompt_config()).unwrap();
    let identity = loaded.identity();
    assert_eq!(identity.adapter, manifest.adapter);
    assert_eq!(identity.adapter_version.as_deref(), Some(manifest.version.as_str()));
}

#[tokio::test]
async fn one_of_several_concurrent_promotions_succeeds() {
    let folder = Folder::new();
    let manifest = folder.publish("a").await;
    let promotions = (0..8).map(|_| {
        let (registry, version) = (folder.registry.clone(), manifest.version.clone());
        tokio::spawn(async move { registry.promote(&version, 0, now()).await })
    });
    let mut succeeded = 0;
    for promotion in promotions.collect::<Vec<_>>() {
        match promotion.await.unwrap() {
            Ok(_) => succeeded += 1,
            Err(error) => assert!(matches!(error, RegistryError::Conflict { sequence: 1, .. }), "{error}"),
        }
    }
    assert_eq!((succeeded, folder.registry.history().await.unwrap().len()), (1, 1));
    // A promotion must not leave a gap in the numbers either.
    let error = folder.registry.promote(&manifest.version, 7, now()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Conflict { sequence: 8, .. }));
}

#[tokio::test]
async fn rollback_goes_back_step_by_step_to_the_base() {
    let folder = Folder::new();
    let error = folder.registry.rollback(&Rollback::Previous, now()).await.unwrap_err();
    assert!(matches!(error, RegistryError::NoEarlierVersion(_)));
    let (a, b, c) = (
        folder.publish("a").await.version,
        folder.publish("b").await.version,
        folder.publish("c").await.version,
    );
    for version in [&a, &b, &c] {
        folder.promote(version).await;
    }
    for (expected, restores) in [(Some(&b), 2), (Some(&a), 1), (None, 0)] {
        let pointer = folder.registry.rollback(&Rollback::Previous, now()).await.unwrap();
        assert_eq!(
            (pointer.version.as_ref(), pointer.change),
            (expected, Change::Rollback { restores })
        );
    }
    assert!(folder.registry.rollback(&Rollback::Previous, now()).await.is_err());
    let pointer = folder.registry.rollback(&Rollback::To(b.clone()), now()).await.unwrap();
    assert_eq!(pointer.change, Change::Rollback { restores: 2 });
    assert_eq!(folder.in_service().await, Some(b));
    folder.registry.rollback(&Rollback::Base, now()).await.unwrap();
    assert_eq!(folder.in_service().await, None);
    let never = folder.publish("d").await.version;
    let pointer = folder.registry.rollback(&Rollback::To(never), now()).await.unwrap();
    assert_eq!((pointer.change, pointer.sequence), (Change::Promote, 9));
    assert_eq!(folder.registry.history().await.unwrap().len(), 9);
}

#[tokio::test]
async fn writing_does_not_create_the_folder_of_the_registry() {
    let folder = Folder::new();
    std::fs::remove_dir(folder.path("")).unwrap();
    let path = folder.path("").display().to_string();
    let path = path.trim_end_matches('/');
    let error = folder.registry.put_record(RecordKind::Policy, "{}").await.unwrap_err();
    let expected = format!("cannot write to the registry: the folder `{path}` does not exist");
    assert_eq!(error.to_string(), expected);
    assert!(folder.registry.publish(draft("a")).await.is_err());
    let error = Registry::open(folder.registry.location()).unwrap_err();
    let expected = format!("cannot open the registry: the folder `{path}` does not exist");
    assert_eq!(error.to_string(), expected);
    assert!(!folder.path("").exists());
    Registry::create(folder.registry.location()).unwrap();
    assert!(folder.path("").exists());
}

#[tokio::test]
async fn damaged_objects_are_reported_and_never_served() {
    let folder = Folder::new();
    let (a, b) = (folder.publish("a").await, folder.publish("b").await);
    folder.promote(&a.version).await;
    let weights = folder.path(&format!("versions/{}/adapter_model.safetensors", b.version));
    let good = std::fs::read(&weights).unwrap();
    let check = async |bytes: Option<&[u8]>, expected: &str| {
        match bytes {
            Some(bytes) => std::fs::write(&weights, bytes).unwrap(),
            None => std::fs::remove_file(&weights).unwrap(),
        }
        let error = folder
            .registry
            .promote(&b.version, 1, now())
            .await
            .unwrap_err()
            .to_string();
        let path = format!(
            "`versions/{}/adapter_model.safetensors` in the registry at file://",
            b.version
        );
        assert!(error.starts_with(&path) && error.contains(expected), "{error}");
        assert_eq!(folder.in_service().await.as_ref(), Some(&a.version));
    };
    let mut flipped = good.clone();
    flipped[0] ^= 1;
    check(Some(&flipped), ": sha256:").await;
    check(Some(&good[..3]), ": sha256:").await;
    check(Some(&[good.clone(), good.clone()].concat()), "bytes, expected at most ").await;
    check(None, ": missing, expected sha256:").await;

    let manifest = folder.path(&format!("versions/{}/manifest.json", b.version));
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("sha256:base", "sha256:other")).unwrap();
    let error = folder.registry.manifest(&b.version).await.unwrap_err().to_string();
    assert!(error.contains("its hash gives version "), "{error}");
    let listing = folder.registry.list().await.unwrap();
    assert_eq!((listing.versions.len(), listing.broken.len()), (1, 1));
    std::fs::remove_file(&manifest).unwrap();
    let unfinished = folder.registry.list().await.unwrap().unfinished;
    assert_eq!(unfinished, std::slice::from_ref(&b.version));

    // An invalid pointer is reported and not skipped, because the version in service is then unknown.
    std::fs::write(folder.path("pointers/00000002.json"), "{").unwrap();
    let error = folder.registry.current().await.unwrap_err().to_string();
    assert!(
        error.starts_with("`pointers/00000002.json` in the registry at "),
        "{error}"
    );
    std::fs::remove_file(folder.path("pointers/00000002.json")).unwrap();
    std::fs::write(folder.path("pointers/notes.txt"), "x").unwrap();
    assert_eq!(folder.in_service().await, Some(a.version));
}

#[tokio::test]
async fn a_pointer_verifies_its_manifest() {
    let folder = Folder::new();
    let a = folder.publish("a").await;
    folder.promote(&a.version).await;
    let pointer = folder.registry.current().await.unwrap().unwrap();
    // Reformatting the manifest keeps the version but changes the hash that the pointer records.
    let path = folder.path(&format!("versions/{}/manifest.json", a.version));
    let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    std::fs::write(&path, value.to_string()).unwrap();
    assert!(folder.registry.read(&a.version).await.is_ok());
    let error = folder.registry.read_current(&pointer).await.unwrap_err();
    assert!(matches!(error, RegistryError::Corrupt { .. }), "{error}");
}

#[tokio::test]
async fn drafts_that_could_not_be_loaded_are_rejected() {
    let folder = Folder::new();
    let check = async |change: fn(&mut VersionDraft), expected: &str| {
        let mut draft = draft("a");
        change(&mut draft);
        let error = folder.registry.publish(draft).await.unwrap_err();
        assert_eq!(error.to_string(), expected);
        assert!(!folder.path("versions").exists());
    };
    check(
        |draft| {
            draft.files.remove("adapter_config.json");
        },
        "cannot publish: `adapter_config.json` is missing",
    )
    .await;
    check(
        |draft| {
            draft.files.insert("../evil".into(), Vec::new());
        },
        "cannot publish: a file is named `../evil`, expected letters, digits, `_`, `-` and `.`",
    )
    .await;
}

#[tokio::test]
async fn gc_keeps_the_newest_versions_and_those_recently_in_service() {
    let folder = Folder::new();
    let mut versions = Vec::new();
    for name in ["a", "b", "c", "d", "e", "f"] {
        versions.push(folder.publish(name).await.version);
    }
    // First a is in service, then b, then a again.
    folder.promote(&versions[0]).await;
    folder.promote(&versions[1]).await;
    folder.registry.rollback(&Rollback::Previous, now()).await.unwrap();
    let removed = folder.registry.gc(2, now()).await.unwrap();
    assert_eq!(removed.versions, [versions[3].clone(), versions[2].clone()]);
    // All versions share a prompt, and each has its own calibration.
    assert_eq!((removed.records, removed.unfinished.len()), (2, 0));
    let left = folder.registry.list().await.unwrap().versions;
    let left: Vec<_> = left.iter().map(|manifest| manifest.version.clone()).collect();
    assert_eq!(left, [5, 4, 1, 0].map(|index: usize| versions[index].clone()));
    for version in &left {
        let read = folder.registry.read(version).await.unwrap();
        for (&kind, hash) in &read.manifest.records {
            assert!(folder.registry.record(kind, hash).await.unwrap().is_some());
        }
    }
    assert!(!folder.path(&format!("versions/{}", versions[2])).exists());
    assert_eq!(folder.in_service().await, Some(versions[0].clone()));
    let repeated = folder.registry.gc(2, now()).await.unwrap();
    assert_eq!(repeated, Default::default());
    // A rollback to a removed version fails.
    let error = folder
        .registry
        .rollback(&Rollback::To(versions[2].clone()), now())
        .await
        .unwrap_err();
    assert!(matches!(error, RegistryError::NoVersion { .. }), "{error}");
    // At least one version is kept in addition to the one in service.
    folder.registry.gc(0, now()).await.unwrap();
    assert_eq!(folder.registry.list().await.unwrap().versions.len(), 2);
}

#[tokio::test]
async fn gc_leaves_recent_unfinished_versions_and_unreadable_ones_alone() {
    let folder = Folder::new();
    for name in ["a", "b", "c"] {
        folder.publish(name).await;
    }
    let versions = folder.registry.list().await.unwrap().versions;
    let path = |index: usize, name: &str| folder.path(&format!("versions/{}/{name}", versions[index].version));
    std::fs::remove_file(path(1, "manifest.json")).unwrap();
    std::fs::write(path(2, "manifest.json"), "{}").unwrap();
    let removed = folder.registry.gc(1, SystemTime::now()).await.unwrap();
    assert_eq!(removed, Default::default());
    let later = SystemTime::now() + Duration::from_secs(2 * 24 * 60 * 60);
    let removed = folder.registry.gc(1, later).await.unwrap();
    assert_eq!(removed.unfinished, [versions[1].version.clone()]);
    assert!(path(2, "report.html").exists() && !path(1, "report.html").exists());
}

#[tokio::test]
async fn records_are_kept_under_their_hash() {
    let folder = Folder::new();
    let registry = &folder.registry;
    let calibration = Calibration::platt(1.5, -0.25).unwrap();
    let hash = registry
        .put_record(RecordKind::Calibration, &calibration.canonical())
        .await
        .unwrap();
    assert_eq!(hash, calibration.name());
    registry
        .put_record(RecordKind::Calibration, &calibration.canonical())
        .await
        .unwrap();
    let record = registry.record(RecordKind::Calibration, &hash).await.unwrap();
    assert_eq!(record.as_deref(), Some(calibration.canonical().as_str()));
    for (kind, hash) in [
        (RecordKind::Policy, hash.as_str()),
        (RecordKind::Calibration, "identity"),
    ] {
        assert_eq!(registry.record(kind, hash).await.unwrap(), None);
    }
    let path = folder.path(&format!("records/calibration/{}.json", &hash[7..]));
    std::fs::write(&path, "other").unwrap();
    assert!(registry.record(RecordKind::Calibration, &hash).await.is_err());
    let error = registry
        .put_record(RecordKind::Calibration, &calibration.canonical())
        .await
        .unwrap_err();
    assert!(matches!(error, RegistryError::Corrupt { .. }), "{error}");
}

#[tokio::test]
async fn the_split_key_is_created_once() {
    let folder = Folder::new();
    let asked = (0..8).map(|_| {
        let registry = folder.registry.clone();
        tokio::spawn(async move { registry.split_key().await.unwrap() })
    });
    let mut keys = Vec::new();
    for key in asked.collect::<Vec<_>>() {
        keys.push(key.await.unwrap());
    }
    assert!(keys.iter().all(|key| *key == keys[0] && *key.as_bytes() != [0; 32]));
    assert_ne!(Folder::new().registry.split_key().await.unwrap(), keys[0]);
    std::fs::write(folder.path("keys/split.json"), "{}").unwrap();
    assert!(folder.registry.split_key().await.is_err());
}

#[tokio::test]
async fn only_a_folder_has_a_lock() {
    let folder = Folder::new();
    let held = folder.registry.lock(now()).unwrap().unwrap();
    let error = folder.registry.lock(now()).unwrap_err();
    assert!(matches!(error, RegistryError::Locked { .. }), "{error}");
    drop(held);
    assert!(folder.registry.lock(now()).unwrap().is_some());
    let memory = Registry::with_store(Arc::new(InMemory::new()), "memory");
    assert!(memory.lock(now()).unwrap().is_none());
    let manifest = memory.publish(draft("a")).await.unwrap();
    memory.promote(&manifest.version, 0, now()).await.unwrap();
    let pointer = memory.current().await.unwrap().unwrap();
    assert!(memory.read_current(&pointer).await.unwrap().is_some());
    assert_eq!(memory.version_folder(&manifest.version), None);
    assert_eq!(memory.gc(1, now()).await.unwrap().versions, []);
}

#[tokio::test]
async fn the_error_for_a_missing_folder_names_it() {
    let error = Registry::open("file:///nowhere/at/all").unwrap_err().to_string();
    assert!(error.contains("the folder `/nowhere/at/all` does not exist"), "{error}");
}

/// A watcher lists only from the last pointer that it has seen, and still notices if that pointer disappears.
#[tokio::test]
async fn a_watcher_sees_every_change() {
    let folder = Folder::new();
    let watcher = Registry::open(folder.registry.location()).unwrap();
    let seen = async || watcher.current().await.unwrap().map(|pointer| pointer.sequence);
    assert_eq!(seen().await, None);
    let a = folder.publish("a").await.version;
    for sequence in 1..=12 {
        folder.promote(&a).await;
        assert_eq!(seen().await, Some(sequence));
    }
    for sequence in [12, 11] {
        std::fs::remove_file(folder.path(&format!("pointers/{sequence:08}.json"))).unwrap();
    }
    assert_eq!(seen().await, Some(10));
    let files: BTreeMap<_, _> = draft("a").files;
    assert_eq!(watcher.read(&a).await.unwrap().files, files);
}
