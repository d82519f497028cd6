//! Helpers that several test files share, such as the reference checkpoints and their recorded cases.

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod labels;
pub mod process;
pub mod registry;

use std::path::{Path, PathBuf};
use std::process::Command;

use moderatord::config::{DeviceChoice, DtypeChoice, Markup, ModelConfig, Normalize, PromptConfig, Quantize};
use moderatord::fault::Faults;
use serde_json::Value;

/// Returns a path below `tests/fixtures`. The environment variable takes precedence, because a test may run on another
/// machine than the one that built it.
pub fn fixture(path: &str) -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&root).join("tests/fixtures").join(path)
}

/// Returns the faults with one per line.
pub fn lines(faults: &Faults) -> String {
    let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
    faults.join("\n")
}

/// Returns a command without the settings of the developer's environment.
pub fn without_settings(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env_remove("STATE_DIRECTORY");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MODERATORD__") {
            command.env_remove(name);
        }
    }
    command
}

/// Returns the settings for a reference checkpoint without an adapter.
pub fn model_config(family: &str) -> ModelConfig {
    ModelConfig {
        path: Some(fixture(family)),
        adapter: None,
        download: false,
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::Auto,
        quantize: Quantize::None,
    }
}

/// Returns the frame of the published method without the normaliser and with one long window, with which the references
/// were recorded.
pub fn prompt_config() -> PromptConfig {
    PromptConfig {
        labels: ["Positive".into(), "Negative".into()],
        hateful_label: "Negative".into(),
        instructions: "Classify the following text into one of the following classes:[{labels}]".into(),
        separator: "<separator>".into(),
        template: None,
        markup: Markup::None,
        normalize: Normalize::None,
        max_window_tokens: Some(4096),
        max_windows: Some(1),
        windows: None,
    }
}

/// A text of the reference with its recorded scores. Logits are in the order positive, negative.
pub struct Case {
    pub key: String,
    pub text: String,
    pub prompt: String,
    /// Ids of the Hugging Face tokeniser, which recognises control tokens in the text.
    pub token_ids: Vec<u32>,
    json: Value,
}

impl Case {
    /// Returns the ids of the tokenisation in service, which treats control tokens in the text as plain text.
    pub fn served_ids(&self) -> Vec<u32> {
        self.json
            .get("token_ids_no_specials")
            .map_or_else(|| self.token_ids.clone(), ids)
    }

    pub fn served_logits(&self) -> [f64; 2] {
        pair(self.json.get("no_specials_logits").unwrap_or(&self.json["logits"]))
    }

    /// Returns the probability of the hateful label.
    pub fn served_probability(&self) -> f64 {
        pair(self.json.get("no_specials_prob").unwrap_or(&self.json["prob"]))[1]
    }
}

pub fn reference_cases(family: &str) -> Vec<Case> {
    let text = std::fs::read_to_string(fixture(family).join("expected.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let string = |case: &Value, key: &str| case[key].as_str().unwrap().to_owned();
    let cases = json["cases"].as_array().unwrap().iter().map(|case| Case {
        key: string(case, "key"),
        text: string(case, "text"),
        prompt: string(case, "prompt"),
        token_ids: ids(&case["token_ids"]),
        json: case.clone(),
    });
    cases.collect()
}

/// Returns the key, the ids and the probability of the hateful label for every case, as recorded after training in
/// Keras.
pub fn keras_probabilities(trace: &Value) -> Vec<(String, Vec<u32>, f64)> {
    let after = trace["prob_after_cases"].as_array().unwrap();
    let cases = trace["cases"].as_array().unwrap().iter().zip(after);
    cases
        .map(|(case, after)| {
            (
                case["key"].as_str().unwrap().to_owned(),
                ids(&case["token_ids"]),
                pair(after)[1],
            )
        })
        .collect()
}

fn ids(json: &Value) -> Vec<u32> {
    json.as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

fn pair(json: &Value) -> [f64; 2] {
    [json[0].as_f64().unwrap(), json[1].as_f64().unwrap()]
}
