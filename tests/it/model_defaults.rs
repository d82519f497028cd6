//! `moderatord.json` beside a model sets its windows, the correction for their number, its thresholds and its languages; the
//! settings override it, and every command judges a comment in the same way.

use std::path::Path;

use serde_json::{Value, json};

use crate::common::process::Start;
use crate::common::{fixture, without_settings};

/// Copies a model of the fixtures into a folder, with this file beside it.
pub(crate) fn model_with_defaults(folder: &Path, defaults: &Value) {
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
    model_with_defaults(folder.path(), &json!({"format": 1}));
    let same = score(folder.path(), TEXT, &[]);
    assert_eq!((&same["model"], &same["margin"]), (&plain["model"], &plain["margin"]));

    model_with_defaults(
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
    model_with_defaults(folder.path(), &json!({"format": 1, "window": window}));
    let raw = score(folder.path(), TEXT, &[]);
    let corrected = json!({"max_tokens": 16, "max_windows": 64, "correction": [{"windows": 2, "margin": 0.75}]});
    model_with_defaults(folder.path(), &json!({"format": 1, "window": corrected}));
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
    model_with_defaults(folder.path(), &json!({"format": 1, "window": window}));
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
    model_with_defaults(folder.path(), &json!({"format": 1, "window": {"max_tokens": 8}}));
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
    model_with_defaults(folder.path(), &json!({"format": 1, "window": {"max_tokens": 100}}));
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

/// A friendly sentence in German.
const GERMAN: &str = "Ich habe heute Morgen Brot gebacken und es schmeckt uns allen sehr gut.";

#[test]
fn comments_in_other_languages_are_reviewed_if_the_model_lists_its_languages() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let high = [("POLICY__REVIEW", "1.0"), ("POLICY__BLOCK", "1.0")];
    let decide = [high[0], high[1], ("POLICY__NOT_IN_SCOPE", "decide")];
    let found = |text: &str, settings: &[(&str, &str)]| {
        let decision = score(folder.path(), text, settings);
        (decision["competence"].clone(), decision["action"].clone())
    };
    model_with_defaults(folder.path(), &json!({"format": 1}));
    assert_eq!(found(GERMAN, &high), (Value::Null, json!("allow")));
    let without = score(folder.path(), TEXT, &high);

    model_with_defaults(folder.path(), &json!({"format": 1, "languages": ["en"]}));
    assert_eq!(found(GERMAN, &high), (json!("out_of_scope"), json!("review")));
    assert_eq!(found(GERMAN, &decide), (json!("out_of_scope"), json!("allow")));
    assert_eq!(
        found(GERMAN, &[("POLICY__REVIEW", "0.0"), ("POLICY__BLOCK", "0.0")]).1,
        "block"
    );
    assert_eq!(found(TEXT, &high), (json!("in_scope"), json!("allow")));
    assert_eq!(found("\u{434}\u{430}", &high), (json!("out_of_scope"), json!("review")));

    // Languages change the policy and nothing else of what identifies a decision.
    let with = score(folder.path(), TEXT, &high);
    assert_eq!(
        (&with["model"], &with["margin"]),
        (&without["model"], &without["margin"])
    );
    assert_ne!(with["policy"], without["policy"]);
    let (code, out, _) = moderatord(&["check", "--model", path], &[]);
    assert_eq!(code, Some(0));
    assert!(
        out.contains("\nlanguages en; comments in others are reviewed\n"),
        "{out}"
    );

    let file = folder.path().join("decision.json");
    let explain = || {
        let arguments = [
            "explain",
            "--model",
            path,
            "--decision",
            file.to_str().unwrap(),
            "--text",
            GERMAN,
        ];
        moderatord(&arguments, &[])
    };
    std::fs::write(&file, score(folder.path(), GERMAN, &[]).to_string()).unwrap();
    let (code, out, err) = explain();
    assert_eq!(code, Some(0), "{err}");
    assert!(
        out.contains("competence   out_of_scope now, out_of_scope in the decision"),
        "{out}"
    );
    model_with_defaults(folder.path(), &json!({"format": 1, "languages": ["de"]}));
    let (code, out, _) = explain();
    assert_eq!(code, Some(1));
    assert!(
        out.contains("competence   in_scope now, out_of_scope in the decision"),
        "{out}"
    );
}

#[test]
fn thresholds_and_the_calibration_of_the_file_apply_unless_the_settings_have_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let file = json!({
        "format": 1, "thresholds": {"review": 0.25, "block": 0.75},
        "calibration": {"platt": {"slope": 2.0, "intercept": -0.5}},
    });
    model_with_defaults(folder.path(), &file);
    let decision = score(folder.path(), TEXT, &[]);
    assert_eq!(decision["thresholds"], json!({"review": 0.25, "block": 0.75}));
    let expected = 1.0 / (1.0 + (0.5 - 2.0 * margin(&decision)).exp());
    assert!(
        (decision["probability"].as_f64().unwrap() - expected).abs() < 1e-6,
        "{decision}"
    );
    let own = score(folder.path(), TEXT, &[("POLICY__REVIEW", "0.8")]);
    assert_eq!(own["thresholds"], json!({"review": 0.8, "block": 0.8}));

    // The margins of an adapter are others.
    let adapter = fixture("gemma3/lora_qv");
    let arguments = ["--adapter", adapter.to_str().unwrap(), "--text", TEXT];
    let path = folder.path().to_str().unwrap();
    let (code, out, err) = moderatord(&[&["score", "--model", path][..], &arguments[..]].concat(), &[]);
    assert_eq!(code, Some(0), "{err}");
    let adapted: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(adapted["model"]["calibration"], "identity");

    model_with_defaults(
        folder.path(),
        &json!({"format": 1, "calibration": {"platt": {"slope": 0, "intercept": 0}}}),
    );
    let (code, _, err) = moderatord(&["score", "--model", path, "--text", TEXT], &[]);
    assert_eq!(code, Some(78), "{err}");
    assert!(
        err.contains("moderatord.json: `calibration`: the calibration's slope is 0"),
        "{err}"
    );
}
