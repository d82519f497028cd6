//! The model agrees with candle-transformers, an independent implementation, on the same files.

use crate::common::{fixture, model_config, prompt_config, reference_cases};
use moderatord::classifier::tolerance::{QUANTISED_INT8, REFERENCE_SHORT_F32};
use moderatord::classifier::{Classifier, oracle};
use moderatord::config::{ModelConfig, Normalize, PromptConfig, Quantize};
use moderatord::scorer::Scorer;
use serde_json::json;

/// Copies a fixture's weights and changes its config to one that candle-transformers can express.
fn expressible(family: &str) -> (tempfile::TempDir, ModelConfig) {
    let folder = tempfile::tempdir().unwrap();
    for file in ["model.safetensors", "tokenizer.json"] {
        std::fs::copy(fixture(family).join(file), folder.path().join(file)).unwrap();
    }
    let text = std::fs::read_to_string(fixture(family).join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    // candle-transformers always scales queries by head_dim^-0.5, requires windows to follow a regular pattern, and
    // masks one position too many, or none for Gemma 2. The window is therefore longer than every text.
    config["query_pre_attn_scalar"] = config["head_dim"].clone();
    config["sliding_window"] = json!(512);
    if family == "gemma3" {
        config["layer_types"] = serde_json::Value::Null;
        config["sliding_window_pattern"] = json!(3);
    }
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let model = ModelConfig {
        path: Some(folder.path().to_owned()),
        ..model_config(family)
    };
    (folder, model)
}

#[test]
fn both_implementations_give_the_same_logits() {
    let cases = reference_cases("gemma");
    let texts: Vec<&str> = cases
        .iter()
        .filter(|case| case.key != "long")
        .map(|case| case.text.as_str())
        .collect();
    for family in ["gemma", "gemma2", "gemma3"] {
        let (_folder, model) = expressible(family);
        let report = oracle::compare(&model, &prompt_config(), &texts).unwrap();
        println!("{family}: {report:?}");
        assert_eq!(report.texts, 15);
        assert!(
            report.max_difference <= REFERENCE_SHORT_F32.logit,
            "{family}: {report:?}"
        );
    }
}

#[test]
fn a_model_that_the_oracle_cannot_express_is_rejected() {
    for (family, reason) in [
        ("gemma2", "head_dim^-0.5"),
        ("gemma3", "head_dim^-0.5"),
        ("gemma3_linear8", "head_dim^-0.5"),
    ] {
        let error = oracle::compare(&model_config(family), &prompt_config(), &["a fine day"])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("cannot express this model") && error.contains(reason),
            "{error}"
        );
    }
}

/// int8 changes margins by its rounding error only, and does not quantise the adapter.
#[test]
fn quantised_margins_differ_by_rounding_only() {
    let prompt = PromptConfig {
        normalize: Normalize::Full,
        ..prompt_config()
    };
    for (family, adapter) in [
        ("gemma", None),
        ("gemma3", Some("lora_qv")),
        ("gemma3", Some("lora_all_rslora")),
    ] {
        let folder = adapter.map(|adapter| fixture(family).join(adapter));
        let model = ModelConfig {
            adapter: folder,
            ..model_config(family)
        };
        let mut exact = Classifier::load(&model, &prompt).unwrap();
        let mut quantised = Classifier::load(
            &ModelConfig {
                quantize: Quantize::Int8,
                ..model
            },
            &prompt,
        )
        .unwrap();
        assert_eq!(quantised.identity().quantization, "int8");
        let mut largest = 0f32;
        for case in reference_cases(family) {
            let rows = exact.prompter().encode(&case.text).unwrap().rows;
            let (exact, quantised) = (exact.score(&rows).unwrap(), quantised.score(&rows).unwrap());
            largest = largest.max((exact[0] - quantised[0]).abs());
        }
        println!("{family} {adapter:?}: largest margin difference {largest:.4}");
        assert!(
            largest > 0.0 && largest < QUANTISED_INT8,
            "{family} {adapter:?}: {largest}"
        );
    }
}
