//! The registry: a manifest or pointer that is accepted reads back as it was written, and hostile content of a registry
//! is refused.
//!
//! The input has three sections: what to do, the manifest, and the pointer.

#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use moderatord::hash::content_hash;
use moderatord::registry::{Manifest, Pointer, Registry, Version};
use moderatord_fuzz::sections;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, PutOptions};
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    let [version, manifest, pointer] = sections(data);
    if let Ok(version) = String::from_utf8_lossy(version).parse::<Version>() {
        assert_eq!(version.to_string().parse(), Ok(version));
    }
    let manifest = check_manifest(manifest);
    check_pointer(pointer);
    if let Some((manifest, bytes)) = manifest {
        check_registry(&manifest, bytes, pointer);
    }
});

/// Checks a manifest, and returns it with its bytes if it is valid. The version is corrected first, because no random
/// change would keep a hash correct.
fn check_manifest(bytes: &[u8]) -> Option<(Manifest, Vec<u8>)> {
    let mut value: Value = serde_json::from_slice(bytes).ok()?;
    let version = Version::of(&value);
    if let Ok(manifest) = Manifest::parse(bytes, &version) {
        assert_eq!(manifest.version, version);
    }
    value
        .as_object_mut()?
        .insert("version".to_owned(), version.as_str().into());
    assert_eq!(Version::of(&value), version, "the version depends on itself");
    let compact = value.to_string().into_bytes();
    let manifest = Manifest::parse(&compact, &version).ok()?;
    assert_eq!(manifest.version, version);
    for name in manifest.files.keys() {
        assert!(
            !name.contains(['/', '\\', '\0']) && !name.starts_with('.') && name != "manifest.json",
            "{name}"
        );
    }
    let pretty = serde_json::to_vec_pretty(&value).expect("it is JSON");
    assert_eq!(
        Manifest::parse(&pretty, &version),
        Ok(manifest.clone()),
        "formatting changes the manifest"
    );

    // Fields that this release does not know are not written, so the copy has a version of its own.
    let written: Value = serde_json::from_slice(&manifest.to_bytes()).expect("a manifest is JSON");
    let mut copy = manifest.clone();
    copy.version = Version::of(&written);
    let bytes = copy.to_bytes();
    let read = Manifest::parse(&bytes, &copy.version).expect("a written manifest is valid");
    assert_eq!(read, copy);
    assert_eq!(
        content_hash(&read.to_bytes()),
        content_hash(&bytes),
        "writing again changes the hash"
    );
    Some((manifest, compact))
}

fn check_pointer(bytes: &[u8]) {
    let sequence = serde_json::from_slice::<Value>(bytes).ok();
    let sequence = sequence.and_then(|value| value["sequence"].as_u64()).unwrap_or(1);
    if let Ok(pointer) = Pointer::parse(bytes, sequence) {
        assert_eq!(pointer.sequence, sequence);
        let written = serde_json::to_vec(&pointer).expect("a pointer is JSON");
        assert_eq!(Pointer::parse(&written, sequence), Ok(pointer));
        assert!(Pointer::parse(&written, sequence ^ 1).is_err());
    }
}

/// Puts the objects into a registry and reads it as a daemon does. Each file contains its own name.
fn check_registry(manifest: &Manifest, bytes: Vec<u8>, pointer: &[u8]) {
    let objects = Arc::new(InMemory::new());
    let hash = content_hash(&bytes);
    let put = |path: String, content: Vec<u8>| {
        let path = Path::from(path);
        let put = objects.put_opts(&path, content.into(), PutOptions::default());
        block_on(put).expect("the memory accepts any object");
    };
    let folder = format!("versions/{}", manifest.version);
    put(format!("{folder}/manifest.json"), bytes);
    for name in manifest.files.keys() {
        put(format!("{folder}/{name}"), name.clone().into_bytes());
    }
    put("pointers/00000001.json".to_owned(), pointer.to_vec());
    let registry = Registry::with_store(objects.clone(), "memory");
    block_on(async {
        let listing = registry.list().await.expect("the memory can be listed");
        assert_eq!((listing.versions.len(), listing.broken.len()), (1, 0));
        if let Ok(version) = registry.read(&manifest.version).await {
            for (name, content) in &version.files {
                assert_eq!(content_hash(content), manifest.files[name].sha256);
                assert!(content.len() as u64 <= manifest.files[name].bytes);
            }
        }
        let Ok(Some(pointer)) = registry.current().await else {
            return;
        };
        if let Ok(Some(version)) = registry.read_current(&pointer).await {
            assert_eq!(Some(&version.manifest.version), pointer.version.as_ref());
            assert!(pointer.manifest_sha256.is_none_or(|expected| expected == hash));
        }
    });
}

fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.expect("a runtime without drivers").block_on(future)
}
