//! `moderatord.json` beside a model sets its windows and the correction for their number, the settings override it, and every
//! command gives a comment the same margin.

use std::path::Path;

use serde_json::{Value, json};

use crate::common::process::Start;
use crate::common::{fixture, without_settings};

/// Copies a model of the fixtures into a folder, with this file beside it.
fn model(folder: &Path, defaults: &Value) {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(fixture("gemma3").join(name), folder.join(name)).unwrap();
    }
    std::fs::write(folder.join("moderatord.json"), defaults.to_string()).unwrap();
}

/// Runs a command with these settings, and returns its exit code, output and errors.
fn moderatord(arguments: &[&str], settings: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let mut command = without_settings(env!("CARGO_BIN_EXE_moderatord"));
    command.args(arguments);
    for (key, value) in settings {
        command.env(format!("MODERATORD__{key}"), value);
    }
    let output = command.finish().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn score(folder: &Path, text: &str, settings: &[(&str, &str)]) -> Value {
    let (code, out, err) = moderatord(
        &["score", "--model", folder.to_str().unwrap(), "--text", text],
        settings,
    );
    assert_eq!(code, Some(0), "{err}");
    serde_json::from_str(&out).unwrap()
}

fn margin(decision: &Value) -> f64 {
    decision["margin"].as_f64().unwrap()
}

const TEXT: &str =
    "this is a fine day and we all like it. see you at the garden. the bread was good. thank you for the soup.";

#[test]
fn the_file_sets_the_windows_and_the_settings_override_it() {
    let folder = tempfile::tempdir().unwrap();
    let plain = score(&fixture("gemma3"), TEXT, &[]);
    assert_eq!(plain["windows"], 1);
    model(folder.path(), &json!({"format": 1}));
    let same = score(folder.path(), TEXT, &[]);
    assert_eq!((&same["model"], &same["margin"]), (&plain["model"], &plain["margin"]));

    model(
        folder.path(),
        &json!({"format": 1, "window": {"max_tokens": 16, "max_windows": 64}}),
    );
    let windows = score(folder.path(), TEXT, &[]);
    assert!(windows["windows"].as_u64().unwrap() > 2, "{windows}");
    assert_eq!(windows["model"]["base"], plain["model"]["base"]);
    assert_ne!(windows["model"]["prompt"], plain["model"]["prompt"]);
    let whole = score(folder.path(), TEXT, &[("PROMPT__MAX_WINDOW_TOKENS", "512")]);
    assert_eq!((&whole["windows"], &whole["margin"]), (&json!(1), &plain["margin"]));
    let partial = score(folder.path(), TEXT, &[("PROMPT__MAX_WINDOWS", "2")]);
    assert_eq!((&partial["windows"], &partial["action"]), (&json!(2), &json!("review")));
}

#[test]
fn the_correction_is_subtracted_everywhere_and_part_of_the_prompt() {
    let folder = tempfile::tempdir().unwrap();
    let window = json!({"max_tokens": 16, "max_windows": 64});
    model(folder.path(), &json!({"format": 1, "window": window}));
    let raw = score(folder.path(), TEXT, &[]);
    let corrected = json!({"max_tokens": 16, "max_windows": 64, "correction": [{"windows": 2, "margin": 0.75}]});
    model(folder.path(), &json!({"format": 1, "window": corrected}));
    let found = score(folder.path(), TEXT, &[]);
    assert_eq!(found["windows"], raw["windows"]);
    assert!((margin(&raw) - margin(&found) - 0.75).abs() < 1e-5, "{raw} {found}");
    let sigmoid = 1.0 / (1.0 + (-margin(&found)).exp());
    assert!((found["score"].as_f64().unwrap() - sigmoid).abs() < 1e-6);
    assert_ne!(found["model"]["prompt"], raw["model"]["prompt"]);
    // One window is not corrected.
    let short = |folder: &Path| margin(&score(folder, "a fine day", &[]));
    assert_eq!(short(folder.path()), short(&fixture("gemma3")));

    let file = folder.path().join("decision.json");
    std::fs::write(&file, found.to_string()).unwrap();
    let path = folder.path().to_str().unwrap();
    let explain = |file: &Path| {
        moderatord(
            &[
                "explain",
                "--model",
                path,
                "--decision",
                file.to_str().unwrap(),
                "--text",
                TEXT,
            ],
            &[],
        )
    };
    let (code, out, err) = explain(&file);
    assert_eq!(code, Some(0), "{out}{err}");
    // A decision from before the model had the file.
    let earlier = folder.path().join("earlier.json");
    std::fs::write(&earlier, score(&fixture("gemma3"), TEXT, &[]).to_string()).unwrap();
    let (code, out, err) = explain(&earlier);
    assert_eq!(code, Some(0), "{out}{err}");

    // The evaluation ranks by the same margins, of which the correction here pushes that of the long text far down.
    let window = json!({"max_tokens": 16, "max_windows": 64, "correction": [{"windows": 2, "margin": 1000}]});
    model(folder.path(), &json!({"format": 1, "window": window}));
    let labelled = folder.path().join("labelled.jsonl");
    for (long, short, expected) in [("hateful", "ok", 0.0), ("ok", "hateful", 1.0)] {
        let rows = [
            json!({"text": TEXT, "label": long}),
            json!({"text": "a fine day", "label": short}),
        ];
        std::fs::write(&labelled, rows.map(|row| row.to_string()).join("\n")).unwrap();
        let input = labelled.to_str().unwrap();
        let (code, out, err) = moderatord(&["eval", "--model", path, "--input", input, "--json"], &[]);
        assert_eq!(code, Some(0), "{err}");
        let evaluation: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(evaluation["figures"]["roc_auc"]["value"], expected, "{evaluation}");
    }
}

#[test]
fn a_file_with_a_fault_is_refused_by_name_and_value() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), &json!({"format": 1, "window": {"max_tokens": 8}}));
    let (code, _, err) = moderatord(
        &["score", "--model", folder.path().to_str().unwrap(), "--text", "a"],
        &[],
    );
    assert_eq!(code, Some(78), "{err}");
    assert!(
        err.contains("moderatord.json: `window.max_tokens` is 8, expected an integer from 16 to 8192"),
        "{err}"
    );
}

#[test]
fn a_batch_that_is_too_small_for_the_models_windows_is_a_fault() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), &json!({"format": 1, "window": {"max_tokens": 100}}));
    let path = folder.path().to_str().unwrap();
    let (code, _, err) = moderatord(&["check", "--model", path], &[("BATCH__MAX_TOKENS", "64")]);
    assert_eq!(code, Some(78), "{err}");
    assert!(
        err.contains("batch.max_tokens = 64: expected at least the 100 tokens"),
        "{err}"
    );
    let set = [("BATCH__MAX_TOKENS", "64"), ("PROMPT__MAX_WINDOW_TOKENS", "32")];
    assert_eq!(moderatord(&["check", "--model", path], &set).0, Some(0));
}
