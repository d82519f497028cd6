//! Classification heads in checkpoints and adapters: each scores as with transformers and PEFT, or is refused by name.

use moderatord::classifier::Classifier;
use moderatord::config::PromptConfig;
use serde_json::{Value, json};

use crate::common::{fixture, prompt_config};
use crate::other_models::{Built, HEAD, Tensors, assert_fault, load, load_tensors, margins, read_json, zeros};

/// A checkpoint with the head of the recorded adapter, of which `rows` are kept.
fn with_head(rows: usize, change: impl FnOnce(&mut Value)) -> Built {
    Built::changed(|config, tensors| {
        let adapter = load_tensors(&fixture("gemma3/seq_cls/adapter_model.safetensors"));
        let head = adapter["base_model.model.score.weight"].narrow(0, 0, rows).unwrap();
        tensors.insert(HEAD.into(), head.contiguous().unwrap());
        config["architectures"] = json!(["Gemma3TextForSequenceClassification"]);
        change(config);
    })
}

/// Returns the recorded texts, and the logits of both outputs for each.
fn recorded_heads(base: &str, kind: &str) -> (Vec<String>, Vec<[f64; 2]>) {
    let recorded = read_json(&fixture(base).join("seq_cls/expected.json"));
    let texts = recorded["texts"].as_array().unwrap().iter();
    let logits = recorded[kind].as_array().unwrap().iter();
    (
        texts.map(|text| text.as_str().unwrap().to_owned()).collect(),
        logits
            .map(|pair| [pair[0].as_f64().unwrap(), pair[1].as_f64().unwrap()])
            .collect(),
    )
}

#[track_caller]
fn assert_head(classifier: &mut Classifier, kind: &str, margin: impl Fn([f64; 2]) -> f64) {
    assert_head_over("gemma3", classifier, kind, margin);
}

#[track_caller]
fn assert_head_over(base: &str, classifier: &mut Classifier, kind: &str, margin: impl Fn([f64; 2]) -> f64) {
    let (texts, logits) = recorded_heads(base, kind);
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    for (found, logits) in margins(classifier, &texts).into_iter().zip(logits) {
        let expected = margin(logits);
        assert!((found - expected).abs() < 1e-5, "{found}, expected {expected}");
    }
}

/// `tests/transformers/record_heads.py` records the logits.
#[test]
fn classification_heads_score_as_with_transformers_and_peft() {
    let second = |[first, second]: [f64; 2]| second - first;
    assert_head(&mut with_head(2, |_| ()).load(None).unwrap(), "base", second);
    let adapter = fixture("gemma3/seq_cls");
    let mut classifier = load(fixture("gemma3"), Some(adapter.clone()), &prompt_config()).unwrap();
    assert_head(&mut classifier, "adapter", second);
    assert!(classifier.head().unwrap().contains("output 1 minus output 0"));
    assert_ne!(classifier.identity().prompt, prompt_config().content_hash());
    // The head of the adapter replaces that of the checkpoint.
    let mut both = with_head(1, |_| ()).load(Some(adapter)).unwrap();
    assert_head(&mut both, "adapter", second);

    assert_head(&mut with_head(1, |_| ()).load(None).unwrap(), "base", |[first, _]| {
        first
    });
    let named = with_head(2, |config| config["id2label"] = json!({"0": "hateful", "1": "ok"}));
    assert_head(&mut named.load(None).unwrap(), "base", |[first, second]| first - second);
    // A cap of logits concerns the vocabulary.
    let capped = with_head(2, |config| config["final_logit_softcapping"] = json!(0.01));
    assert_head(&mut capped.load(None).unwrap(), "base", second);
    let capped = Built::changed(|config, _| config["final_logit_softcapping"] = json!(0.01));
    let mut adapted = capped.load(Some(fixture("gemma3/seq_cls"))).unwrap();
    assert_head(&mut adapted, "adapter", second);
}

/// The multimodal fixture has other names on disk than transformers writes today, so both are tried.
#[test]
fn heads_over_gemma_2_and_multimodal_models_score_as_with_transformers_and_peft() {
    let second = |[first, second]: [f64; 2]| second - first;
    let add_head = |base: &str, config: &mut Value, tensors: &mut Tensors| {
        let adapter = load_tensors(&fixture(base).join("seq_cls/adapter_model.safetensors"));
        tensors.insert(HEAD.into(), adapter["base_model.model.score.weight"].clone());
        let architecture = config["architectures"][0].as_str().unwrap();
        let family = architecture.split("For").next().unwrap();
        config["architectures"] = json!([format!("{family}ForSequenceClassification")]);
    };
    let adapter = |base: &str| Some(fixture(base).join("seq_cls"));

    let base = "gemma2";
    let mut config = read_json(&fixture("gemma2/config.json"));
    // A cap of logits concerns the vocabulary.
    assert!(config["final_logit_softcapping"].as_f64().is_some());
    let mut tensors = load_tensors(&fixture("gemma2/model.safetensors"));
    let mut adapted = load(fixture(base), adapter(base), &prompt_config()).unwrap();
    assert_head_over(base, &mut adapted, "adapter", second);
    add_head(base, &mut config, &mut tensors);
    let built = Built::new(&config, &tensors);
    std::fs::copy(fixture("gemma2/tokenizer.json"), built.path().join("tokenizer.json")).unwrap();
    assert_head_over(base, &mut built.load(None).unwrap(), "base", second);
    assert_head_over(base, &mut built.load(adapter(base)).unwrap(), "adapter", second);

    let base = "gemma3/multimodal";
    for prefix in ["language_model.model.", "model.language_model."] {
        let bare = Built::multimodal(prefix, |_, _| ());
        assert_head_over(base, &mut bare.load(adapter(base)).unwrap(), "adapter", second);
        let built = Built::multimodal(prefix, |config, tensors| add_head(base, config, tensors));
        assert_head_over(base, &mut built.load(None).unwrap(), "base", second);
        assert_head_over(base, &mut built.load(adapter(base)).unwrap(), "adapter", second);
    }
}

#[test]
fn the_labels_of_the_settings_choose_the_hateful_output() {
    let built = with_head(2, |config| config["id2label"] = json!({"0": "toxic", "1": "safe"}));
    assert_fault(built.load(None), &["set `prompt.labels` to [\"toxic\", \"safe\"]"]);
    let prompt = PromptConfig {
        labels: ["safe".into(), "toxic".into()],
        hateful_label: "toxic".into(),
        ..prompt_config()
    };
    let mut classifier = load(built.path(), None, &prompt).unwrap();
    assert_head(&mut classifier, "base", |[first, second]| first - second);
}

#[test]
fn heads_that_do_not_fit_are_refused() {
    let missing = Built::changed(|config, _| config["architectures"] = json!(["Gemma3TextForSequenceClassification"]));
    assert_fault(missing.load(None), &["tensor `score.weight` is missing"]);
    let three = with_head(2, |_| ());
    let mut tensors = load_tensors(&three.path().join("model.safetensors"));
    tensors.insert(HEAD.into(), zeros((3, 64)));
    candle_core::safetensors::save(&tensors, three.path().join("model.safetensors")).unwrap();
    assert_fault(
        three.load(None),
        &["the classification head has 3 outputs, expected 1, or 2"],
    );
    let multi = with_head(2, |config| config["problem_type"] = json!("multi_label_classification"));
    assert_fault(multi.load(None), &["`problem_type` is `multi_label_classification`"]);
    let causal = with_head(2, |_| ()).load(Some(fixture("gemma3/lora_qv")));
    assert_fault(
        causal,
        &["`task_type` is `CAUSAL_LM`, but the base model is a `Gemma3TextForSequenceClassification`"],
    );
}
