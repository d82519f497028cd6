//! A LoRA adapter: damaged files are refused with a fault, and accepted ones fit the base model.
//!
//! The input has four sections: `adapter_config.json`, the manifest (empty if there is none), the header of a
//! safetensors file, and its data.

#![no_main]

use std::cell::LazyCell;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use moderatord::config::Projection;
use moderatord::model::config::GemmaConfig;
use moderatord::model::files::lora::Adapter;
use moderatord_fuzz::{Folder, check_faults, safetensors, sections};

thread_local! {
    static SUBJECT: LazyCell<(Folder, GemmaConfig)> = LazyCell::new(|| {
        let config = include_str!("../seeds/config/tiny.json");
        let config = GemmaConfig::parse(Path::new("config.json"), config).expect("a valid config");
        (Folder::new(), config)
    });
}

fuzz_target!(|data: &[u8]| {
    let Some((&raw, rest)) = data.split_first() else {
        return;
    };
    let [config, manifest, header, tensors] = sections(rest);
    let file = match raw % 2 {
        0 => safetensors(header, tensors),
        _ => [header, tensors].concat(),
    };
    SUBJECT.with(|subject| {
        let (folder, base) = &**subject;
        folder.write("adapter_config.json", Some(config));
        folder.write("manifest.json", (!manifest.is_empty()).then_some(manifest));
        folder.write("adapter_model.safetensors", Some(&file));
        match Adapter::load(&folder.path(""), base, "sha256:base") {
            Ok(adapter) => check(&adapter, base),
            Err(faults) => check_faults(&faults, data),
        }
    });
});

fn check(adapter: &Adapter, base: &GemmaConfig) {
    let mut adapted = 0;
    for layer in 0..base.num_layers() {
        for projection in Projection::ALL {
            let Some(lora) = adapter.get(layer, projection) else {
                continue;
            };
            let [outputs, inputs] = projection.shape(base);
            let rank = lora.a.dims()[0];
            assert!(rank > 0);
            assert_eq!(
                (lora.a.dims(), lora.b.dims()),
                (&[rank, inputs][..], &[outputs, rank][..])
            );
            assert!((lora.scale as f32).is_finite(), "scale {}", lora.scale);
            adapted += 1;
        }
    }
    assert!(adapted > 0, "an adapter that adapts nothing is accepted");
}
