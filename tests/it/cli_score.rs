//! The command `score`, run as a process on the reference checkpoints, and the help texts.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::common::fixture;
use crate::common::process::Start;
use moderatord::classifier::tolerance::BATCH_F32;
use serde_json::Value;

/// A word in comments that must not appear in any output.
const MARK: &str = "zebramarkword";

fn moderatord() -> Command {
    crate::common::without_settings(env!("CARGO_BIN_EXE_moderatord"))
}

fn score(family: &str) -> Command {
    let mut command = moderatord();
    command.args(["score", "--model"]).arg(fixture(family));
    command
}

fn finish(command: &mut Command, stdin: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .start()
        .unwrap();
    // A command that ends early closes the pipe, and the caller asserts on its output.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn decisions(output: &Output) -> Vec<Value> {
    text(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Returns the decision as pretty-printed JSON, without the time and with rounded numbers, so that it is the same in
/// every run and on every processor.
fn redacted(mut decision: Value) -> String {
    if let Some(time) = decision.get_mut("scored_at") {
        *time = "[time]".into();
    }
    for key in ["probability", "score", "margin"] {
        if let Some(number) = decision[key].as_f64() {
            decision[key] = ((number * 1e3).round() / 1e3).into();
        }
    }
    serde_json::to_string_pretty(&decision).unwrap()
}

#[test]
fn fp8_is_refused_on_the_cpu() {
    let mut command = score("gemma3");
    command.args(["--text", "See you at the garden."]);
    command.env("MODERATORD__MODEL__QUANTIZE", "fp8");
    command.env("MODERATORD__MODEL__DEVICE", "cpu");
    let output = finish(&mut command, b"");
    assert_eq!(output.status.code(), Some(78));
    let expected =
        "`fp8` is supported only on an NVIDIA GPU of compute capability 9.0, expected `none` or `int8` on the CPU";
    assert!(text(&output.stderr).contains(expected), "{}", text(&output.stderr));
}

#[test]
fn a_text_gives_one_complete_decision() {
    let output = finish(score("gemma3").args(["--text", "See you at the garden."]), b"");
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
    let [decision] = &decisions(&output)[..] else {
        panic!("{}", text(&output.stdout));
    };
    insta::assert_snapshot!(redacted(decision.clone()), @r#"
    {
      "action": "allow",
      "automated_decision": "fully",
      "automated_detection": true,
      "label": "ok",
      "margin": -0.384,
      "model": {
        "adapter": "none",
        "base": "sha256:960d479ac17309b1f4c7986e07e142105658e58deb9d7dc57a4393b7d10d3139",
        "calibration": "identity",
        "device": "cpu",
        "dtype": "f32",
        "normalizer": "fold-2",
        "prompt": "sha256:30a73c83835baef926ed07accb3d093fdf5fa164061644a85eeafa91d726eea3",
        "quantization": "none"
      },
      "policy": "sha256:720aa6b97c0651fb0abb9ca201ba099e5add671f9467930493587530639f50ab",
      "probability": 0.405,
      "schema": "moderatord.decision.v1",
      "score": 0.405,
      "scored_at": "[time]",
      "text_sha256": "a61b5b551b3142a0cb7ad28ebece3cbaf5aa709562c95435d3a357be30f9e74a",
      "thresholds": {
        "block": 0.9,
        "review": 0.5
      },
      "windows": 1
    }
    "#);
}

#[test]
fn an_adapter_changes_the_score_and_is_recorded() {
    let run = |adapter: &Path| {
        let mut command = score("gemma3");
        command
            .args(["--text", "See you at the garden.", "--adapter"])
            .arg(adapter);
        decisions(&finish(&mut command, b"")).remove(0)
    };
    let (bare, adapted) = (run(Path::new("")), run(&fixture("gemma3/lora_qv")));
    assert_eq!(bare["model"]["adapter"], "none");
    assert!(adapted["model"]["adapter"].as_str().unwrap().starts_with("sha256:"));
    assert_eq!(bare["model"]["base"], adapted["model"]["base"]);
    assert_ne!(bare["margin"], adapted["margin"]);
}

#[test]
fn every_family_can_score() {
    for family in ["gemma", "gemma2", "gemma3", "gemma3_linear8"] {
        let output = finish(score(family).args(["--text", "hello"]), b"");
        assert_eq!(output.status.code(), Some(0), "{family}: {}", text(&output.stderr));
        assert!(decisions(&output)[0]["margin"].is_number(), "{family}");
    }
}

#[test]
fn decisions_come_in_input_order_and_errors_name_the_line() {
    let long = format!(r#"{{"content_id":"long","text":"{}"}}"#, "x".repeat(2000));
    let lines = [
        r#"{"content_id":"a","event_id":"e1","community_id":"garden","text":"hello"}"#,
        "",
        r#"{"content_id":"b","text":"#,
        r#"{"content_id":"c","op":"delete","revision":4}"#,
        &long,
        r#"{"content_id":"d","text":7}"#,
        r#"{"text":"hello"}"#,
        "not json at all",
        r#"{"content_id":"e","text":"good bye","unknown":[1,2]}"#,
    ];
    let mut command = score("gemma3");
    command
        .args(["--input", "-"])
        .env("MODERATORD__INPUT__MAX_BYTES", "1024");
    let output = finish(&mut command, lines.join("\r\n").as_bytes());
    assert_eq!(output.status.code(), Some(1));
    insta::assert_snapshot!(text(&output.stderr), @r#"
    line 3: the event is not JSON at line 1, column 25: EOF while parsing a value
    line 5: the event has 2031 bytes, expected at most 1024 (input.max_bytes)
    line 6: `/text` is a number, expected a string
    line 8: the event is not JSON at line 1, column 2: expected ident
    moderatord: 4 lines could not be scored
    "#);
    let found: Vec<_> = decisions(&output)
        .into_iter()
        .map(|decision| format!("{} {}", decision["content_id"], decision["action"]))
        .collect();
    assert_eq!(found.len(), 4, "{found:?}");
    assert!(
        found[0].starts_with("\"a\"") && found[1] == r#""c" "delete""# && found[3].starts_with("\"e\""),
        "{found:?}"
    );
    insta::assert_snapshot!(redacted(decisions(&output)[1].clone()), @r#"
    {
      "action": "delete",
      "automated_decision": "not",
      "automated_detection": true,
      "content_id": "c",
      "revision": 4,
      "schema": "moderatord.decision.v1"
    }
    "#);
}

/// Writes a file with comments of many lengths, some of which have several windows.
fn many(folder: &Path) -> PathBuf {
    let path = folder.join("comments.jsonl");
    let text = |index: usize| "a word or two about the garden ".repeat(1 + index * 7 % 23);
    let event = |index: usize| serde_json::json!({ "content_id": index, "text": text(index) }).to_string() + "\n";
    std::fs::write(&path, (0..120).map(event).collect::<String>()).unwrap();
    path
}

#[test]
fn a_decision_does_not_depend_on_the_batch() {
    let folder = tempfile::tempdir().unwrap();
    let path = many(folder.path());
    let run = |max_tokens: &str| {
        let mut command = score("gemma3");
        command
            .arg("--input")
            .arg(&path)
            .env("MODERATORD__BATCH__MAX_TOKENS", max_tokens);
        command.env("MODERATORD__PROMPT__MAX_WINDOW_TOKENS", "64");
        let output = finish(&mut command, b"");
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        decisions(&output)
    };
    let (small, large, repeated) = (run("64"), run("4096"), run("4096"));
    assert_eq!(small.len(), 120);
    for (index, (one, other)) in small.iter().zip(&large).enumerate() {
        assert_eq!(one["content_id"], index.to_string());
        let margin = |decision: &Value| decision["margin"].as_f64().unwrap();
        assert!((margin(one) - margin(other)).abs() <= f64::from(BATCH_F32), "{index}");
        assert_eq!(one["windows"], other["windows"]);
    }
    assert!(
        small.iter().any(|decision| decision["windows"].as_u64() > Some(1)),
        "some comments should have several windows"
    );
    // The same input gives the same bytes, except for the time.
    let without_time = |decisions: &[Value]| {
        decisions
            .iter()
            .cloned()
            .map(|mut decision| {
                decision["scored_at"] = Value::Null;
                decision.to_string()
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(without_time(&large), without_time(&repeated));
}

#[test]
fn the_largest_window_counts_and_too_many_windows_force_a_review() {
    let long = "a word or two about the garden ".repeat(200);
    let run = |windows: &str| {
        let mut command = score("gemma3");
        command.args(["--text", &long]);
        command.env("MODERATORD__PROMPT__MAX_WINDOW_TOKENS", "64");
        command.env("MODERATORD__PROMPT__MAX_WINDOWS", windows);
        // With these thresholds, nothing is reviewed because of its score.
        command
            .env("MODERATORD__POLICY__REVIEW", "1")
            .env("MODERATORD__POLICY__BLOCK", "1");
        decisions(&finish(&mut command, b"")).remove(0)
    };
    let (whole, cut) = (run("1000"), run("3"));
    assert!(whole["windows"].as_u64() > Some(3), "{whole}");
    assert_eq!((&whole["action"], &cut["action"]), (&"allow".into(), &"review".into()));
    assert_eq!(cut["windows"], 3);
    assert!(whole["margin"].as_f64() >= cut["margin"].as_f64());
}

#[test]
fn a_line_is_answered_before_the_next_one_arrives() {
    let mut command = score("gemma3");
    let mut child = command
        .args(["--input", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .start()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    for content in ["first", "second"] {
        writeln!(stdin, r#"{{"content_id":"{content}","text":"hello"}}"#).unwrap();
        // This would block for ever if the command waited for a full batch.
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            stdout.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        assert!(text(&line).contains(content));
    }
    drop(stdin);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_closed_output_is_not_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let path = many(folder.path());
    let mut command = score("gemma3");
    let mut child = command
        .arg("--input")
        .arg(&path)
        .env("MODERATORD__PROMPT__MAX_WINDOW_TOKENS", "64")
        .env("MODERATORD__BATCH__MAX_TOKENS", "64")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .start()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
}

#[test]
fn the_error_for_a_missing_input_names_the_file() {
    let output = finish(score("gemma3").args(["--input", "/nowhere/comments.jsonl"]), b"");
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(
        error.starts_with("moderatord: cannot open `/nowhere/comments.jsonl`: No such file"),
        "{error}"
    );
}

#[test]
fn comment_text_is_never_logged_at_any_level() {
    let events = [
        format!(r#"{{"content_id":"a","text":"{MARK} in a text"}}"#),
        format!(r#"{{"content_id":"b","text":"{MARK}", "text":"{MARK}"}}"#),
        format!(r#"{{"content_id":"c","text":["{MARK}"]}}"#),
        format!(r#"{{"content_id":"d","op":"{MARK}","text":"{MARK}"}}"#),
        format!(r#"{{"content_id":"e","text":"{MARK}"#),
        MARK.to_owned(),
        format!(
            r#"{{"content_id":"f","text":"{MARK} {}"}}"#,
            "again and again ".repeat(400)
        ),
        format!(r#"{{"content_id":"g","text":"{MARK} {}"}}"#, "x".repeat(70_000)),
    ];
    for format in ["human", "json"] {
        let mut command = score("gemma3");
        command.args(["--input", "-"]);
        command
            .env("MODERATORD__LOG__LEVEL", "trace")
            .env("MODERATORD__LOG__FORMAT", format);
        command
            .env("MODERATORD__INPUT__MAX_BYTES", "65536")
            .env("RUST_LOG", "trace")
            .env("RUST_BACKTRACE", "1");
        let output = finish(&mut command, events.join("\n").as_bytes());
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(decisions(&output).len(), 2);
        let log = text(&output.stderr);
        assert!(log.contains("loaded model"), "the log is missing: {log}");
        assert!(!log.contains(MARK) && !text(&output.stdout).contains(MARK), "{log}");
    }
}

#[test]
fn invalid_settings_exit_with_78_and_are_all_reported() {
    let mut command = moderatord();
    command.args(["score", "--text", "a", "--model", "/nowhere/gemma"]);
    let output = finish(&mut command, b"");
    assert_eq!((output.status.code(), output.stdout.len()), (Some(78), 0));
    let error = text(&output.stderr);
    assert!(error.starts_with("moderatord: 1 fault\n  /nowhere/gemma"), "{error}");
    command
        .env("MODERATORD__POLICY__REVIEW", "2")
        .env("MODERATORD__BATCH__LINGER", "soon");
    let output = finish(&mut command, b"");
    assert_eq!(output.status.code(), Some(78));
    let error = text(&output.stderr);
    assert!(
        error.starts_with("moderatord: 2 faults\n  batch.linger = \"soon\""),
        "{error}"
    );
}

#[test]
fn invalid_command_lines_exit_with_64() {
    for args in [
        &["score"][..],
        &["score", "--text", "a", "--input", "-"],
        &["scor"],
        &["score", "--nope"],
        &[],
    ] {
        let output = finish(moderatord().args(args), b"");
        assert_eq!(output.status.code(), Some(64), "{args:?}");
        assert!(
            output.stdout.is_empty() && text(&output.stderr).contains("Usage"),
            "{args:?}"
        );
    }
}

#[test]
fn help_texts_match_their_snapshots() {
    for args in [&["--help"][..], &["score", "--help"], &["check", "--help"]] {
        let output = finish(moderatord().args(args).env("COLUMNS", "100"), b"");
        assert_eq!(output.status.code(), Some(0));
        insta::assert_snapshot!(
            format!("help {}", args.join(" ").replace("--help", ""))
                .trim()
                .replace(' ', "_"),
            text(&output.stdout)
        );
    }
}
