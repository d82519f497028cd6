//! The command `check`, run as a process: its summary and the problems that it reports.

use std::path::Path;
use std::process::Output;

use crate::common::process::Start;
use crate::common::{fixture, without_settings};

fn check(settings: &str, args: &[&str]) -> (Option<i32>, String, String) {
    check_with(settings, args, &[])
}

/// Runs `check` with environment variables, given without their prefix.
fn check_with(settings: &str, args: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("moderatord.toml");
    std::fs::write(&path, settings).unwrap();
    let variable = |&(name, value): &(&str, &str)| (format!("MODERATORD__{name}"), value.to_owned());
    let Output { status, stdout, stderr } = without_settings(env!("CARGO_BIN_EXE_moderatord"))
        .envs(environment.iter().map(variable))
        .arg("check")
        .arg("--config")
        .arg(&path)
        .args(args)
        .finish()
        .unwrap();
    // The text without the paths of this machine.
    let redacted = |bytes: Vec<u8>| {
        let text = String::from_utf8(bytes).unwrap();
        let text = text.replace(&format!("{}/", folder.path().display()), "");
        text.replace(&fixture("").display().to_string(), "fixtures/")
    };
    (status.code(), redacted(stdout), redacted(stderr))
}

fn model(family: &str) -> String {
    format!("[model]\npath = \"{}\"\n", fixture(family).display())
}

#[test]
fn a_valid_configuration_is_summarised() {
    let settings = format!(
        "{}adapter = \"{}\"\n[policy.communities]\ngarden = {{ review = 0.2 }}\n",
        model("gemma3"),
        fixture("gemma3/lora_qv").display()
    );
    let (code, out, err) = check(&settings, &[]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    // The margins may differ in the last digit between processors, so only count them.
    let is_sample = |line: &&str| line.starts_with("samples");
    let samples = out.lines().find(is_sample).unwrap();
    assert_eq!(samples.matches('.').count(), 3, "{samples}");
    let rest: Vec<&str> = out.lines().filter(|line| !is_sample(line)).collect();
    insta::assert_snapshot!(rest.join("\n"), @r#"
    model     gemma3_text, 4 layers, 0.2 M parameters, cpu f32, adapter rank 4 on q_proj, v_proj
    base      sha256:960d479ac17309b1f4c7986e07e142105658e58deb9d7dc57a4393b7d10d3139
    adapter   sha256:ebec7aab5f7a47e551e9b36b663cd379ad6bbc48e140de072a8a8bf4df693436
    prompt    sha256:30a73c83835baef926ed07accb3d093fdf5fa164061644a85eeafa91d726eea3
    labels    Positive and Negative, hateful label Negative, normaliser fold-2
    policy    review from 0.5, block from 0.9, 1 community with its own thresholds; sha256:2b0d1c741de1d95d1efda1cf4db1125484eab50e73e0b32a43170d1394710202
    kafka     not set
    "#);
}

#[test]
fn the_exact_prompt_is_shown_with_its_ids() {
    let template =
        "[prompt]\ntemplate = \"<bos><start_of_turn>user\\n{text}<end_of_turn>\\n<start_of_turn>model\\n\"\n";
    let args = ["--show-prompt", "--text", "<eos> fi\u{200b}ne\n"];
    let (code, out, err) = check(&format!("{}{template}", model("gemma3")), &args);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let shown: Vec<&str> = out.lines().skip_while(|line| !line.starts_with("string")).collect();
    // As transformers tokenises this string, if `<eos>` were text.
    insta::assert_snapshot!(shown.join("\n"), @r#"
    string    "<start_of_turn>user\n<eos> fine\n<end_of_turn>\n<start_of_turn>model\n"
    ids       [2, 10, 352, 291, 12, 988, 640, 968, 989, 296, 286, 961, 12, 11, 12, 10, 980, 346, 906, 12]
    answers   Negative 367 (hateful), Positive 368
    "#);
    // A text of several windows becomes several prompts.
    let windows = format!("{}[prompt]\nmax_window_tokens = 16\n", model("gemma3"));
    let long = "this is a fine day and we all like it. ".repeat(3);
    let (_, out, _) = check(&windows, &["--show-prompt", "--text", &long]);
    let strings = out
        .lines()
        .filter(|line| line.starts_with("string    \"Classify the following"))
        .count();
    let ids = out.lines().filter(|line| line.starts_with("ids       [2, ")).count();
    assert!(strings > 2 && strings == ids, "{out}");
    let (code, _, err) = check("", &["--text", "without the other flag"]);
    assert!(code == Some(64) && err.contains("--show-prompt"), "{err}");
}

#[test]
fn the_oracle_agrees_or_reports_what_it_does_not_support() {
    let (code, out, err) = check(&model("gemma"), &["--oracle"]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(
        out.contains("oracle    3 texts, largest difference between logits"),
        "{out}"
    );
    let (code, _, err) = check(&model("gemma2"), &["--oracle"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("candle-transformers cannot express this model"), "{err}");
}

#[test]
fn faults_of_settings_model_and_labels_are_reported_together() {
    let settings = format!(
        "{}adapter = \"/nowhere/adapter\"\n[prompt]\nlabels = [\"Positive\", \"Unfavourable\"]\n\
         hateful_label = \"Positive\"\n[batch]\nlingr = \"5ms\"\n[policy]\nblock = 2\n",
        model("gemma3")
    );
    let (code, out, err) = check(&settings, &[]);
    assert_eq!((code, out.as_str()), (Some(78), ""));
    insta::assert_snapshot!(err, @r#"
    moderatord: 4 faults
      policy.block = 2 (moderatord.toml): expected a number from 0.0 to 1.0
      batch.lingr (moderatord.toml): unknown key; did you mean `batch.linger`?
      fixtures/gemma3/tokenizer.json: the label `Unfavourable` is not one token of the vocabulary
      /nowhere/adapter/adapter_config.json: cannot open: No such file or directory (os error 2)
    "#);
}

/// Returns the messages of a log in JSON, all of whose lines are errors.
fn messages(log: &str) -> Vec<String> {
    let message = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {log}"));
        assert_eq!(line["level"], "ERROR", "{log}");
        assert!(line["timestamp"].is_string() && line["target"].is_string(), "{log}");
        line["message"].as_str().unwrap().to_owned()
    };
    log.lines().map(message).collect()
}

#[test]
fn errors_are_log_lines_if_the_log_is_in_json() {
    let json = "[log]\nformat = \"json\"\n";
    let faulty = format!(
        "{}adapter = \"/nowhere/adapter\"\n[batch]\nlingr = 1\n{json}",
        model("gemma3")
    );
    let (code, _, err) = check(&faulty, &[]);
    assert_eq!(code, Some(78));
    insta::assert_snapshot!(messages(&err).join("\n"), @r#"
    batch.lingr (moderatord.toml): unknown key; did you mean `batch.linger`?
    /nowhere/adapter/adapter_config.json: cannot open: No such file or directory (os error 2)
    "#);
    // An error that is not a list of faults.
    let (code, _, err) = check(&format!("{}{json}", model("gemma2")), &["--oracle"]);
    assert_eq!(code, Some(1));
    let [message] = &messages(&err)[..] else {
        panic!("{err}")
    };
    assert!(
        message.contains("candle-transformers cannot express this model"),
        "{err}"
    );
    // If the file cannot be parsed, the format may still come from the environment.
    let (code, _, err) = check_with("[model\n", &[], &[("LOG__FORMAT", "json")]);
    assert_eq!(code, Some(78));
    insta::assert_snapshot!(messages(&err).join("\n"), @"moderatord.toml: TOML parse error at line 1, column 7: unclosed table, expected `]`");
    // A format that is itself invalid is reported as text.
    let (code, _, err) = check("[log]\nformat = \"yaml\"\n", &[]);
    assert_eq!(code, Some(78));
    assert!(err.starts_with("moderatord: 1 fault\n  log.format = \"yaml\""), "{err}");
}

#[test]
fn missing_settings_of_the_stream_are_reported_once_one_is_set() {
    let settings = format!("{}[topics]\ncomments = \"comments\"\n", model("gemma3"));
    let (code, _, err) = check(&settings, &[]);
    assert_eq!(code, Some(78));
    for key in ["kafka.brokers", "topics.decisions", "topics.dead_letters"] {
        assert!(err.contains(&format!("{key}: not set")), "{err}");
    }
}

#[test]
fn without_settings_the_bundled_model_is_checked_and_named() {
    let (code, out, err) = check("", &["--oracle"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(
        out.starts_with("model     moderatord-mini (bundled), gemma3_text, 4 layers"),
        "{out}"
    );
    assert!(out.contains("\noracle    "), "{out}");
    assert!(err.contains("model.path is not set"), "{err}");
}

#[test]
fn the_error_for_a_folder_without_a_model_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let (code, _, err) = check("", &["--model", folder.path().to_str().unwrap()]);
    assert_eq!(code, Some(78));
    let file = Path::new(folder.path()).join("config.json");
    assert!(err.contains(file.to_str().unwrap()), "{err}");
}
