//! Small drafts of adapter versions for tests of the registry.

use std::collections::BTreeMap;
use std::path::Path;

use moderatord::classifier::Classifier;
use moderatord::config::{Config, ModelConfig};
use moderatord::decide::{Calibration, DerivedThresholds};
use moderatord::registry::{RecordKind, VersionDraft, VersionFacts};
use serde_json::json;

/// Returns a draft with the given one-letter name. A later letter gives a later version. All drafts share a prompt, and
/// each has its own calibration.
pub fn draft(name: &str) -> VersionDraft {
    let number = name.bytes().next().unwrap();
    let calibration = Calibration::platt(f64::from(number) / 100.0, 0.0).unwrap();
    let prompt = r#"{"format":1,"separator":"<separator>"}"#;
    let files = [
        ("adapter_config.json", r#"{"r": 8}"#.to_owned()),
        ("adapter_model.safetensors", format!("weights of {name}")),
        ("report.html", format!("<p>{name}</p>")),
    ];
    VersionDraft {
        facts: VersionFacts {
            created_at: format!("2026-01-01T00:00:00.{number:03}Z"),
            parent: None,
            base: "sha256:base".into(),
            prompt: "sha256:prompt".into(),
            normalizer: "nfc-1".into(),
            calibration,
            thresholds: DerivedThresholds::default(),
            threshold_derivation: serde_json::Value::Null,
            seed: 1,
            hyperparameters: json!({"rank": 8}),
            data: json!({"hash": "sha256:data"}),
            metrics: json!({"pr_auc": 0.9}),
            gate: json!({"promote": true}),
        },
        files: files
            .map(|(name, text)| (name.to_owned(), text.into_bytes()))
            .into_iter()
            .collect(),
        records: BTreeMap::from([
            (RecordKind::Prompt, prompt.to_owned()),
            (RecordKind::Calibration, calibration.canonical()),
        ]),
    }
}

/// Returns a draft of the adapter in a folder that can be served with the model and the prompt of the settings.
pub fn servable_draft(config: &Config, adapter: &Path) -> VersionDraft {
    let model = ModelConfig {
        adapter: Some(adapter.to_owned()),
        ..config.model.clone()
    };
    let classifier = Classifier::load(&model, &config.prompt).unwrap();
    let identity = classifier.identity();
    let mut draft = draft("a");
    draft.facts.base = identity.base.clone();
    draft.facts.prompt = identity.prompt.clone();
    draft.facts.normalizer = identity.normalizer.clone();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let bytes = std::fs::read(adapter.join(name)).unwrap();
        draft.files.insert(name.to_owned(), bytes);
    }
    draft
}

/// Creates an empty registry with a split key that is always the same. With a random one, now and then a split of the
/// few labels that a test trains on is so unlucky that the gate refuses the adapter.
pub fn create_with_fixed_split(registry: &Path) {
    std::fs::create_dir_all(registry.join("keys")).unwrap();
    let key = json!({"format": 1, "key": "5a".repeat(32)});
    std::fs::write(registry.join("keys/split.json"), key.to_string()).unwrap();
}
