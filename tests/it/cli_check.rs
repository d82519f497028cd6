//! `moderatord check`, through the binary: what is wrong, all of it at once.

use std::path::Path;
use std::process::{Command, Output};

use crate::common::fixture;

fn check(settings: &str, args: &[&str]) -> (Option<i32>, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("moderatord.toml");
    std::fs::write(&path, settings).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_moderatord"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MODERATORD__") {
            command.env_remove(name);
        }
    }
    let Output { status, stdout, stderr } = command
        .arg("check")
        .arg("--config")
        .arg(&path)
        .args(args)
        .output()
        .unwrap();
    let shown = |bytes: Vec<u8>| {
        let text = String::from_utf8(bytes).unwrap();
        let text = text.replace(&format!("{}/", folder.path().display()), "");
        text.replace(&fixture("").display().to_string(), "fixtures/")
    };
    (status.code(), shown(stdout), shown(stderr))
}

fn model(family: &str) -> String {
    format!("[model]\npath = \"{}\"\n", fixture(family).display())
}

#[test]
fn a_sound_configuration_is_summed_up() {
    let settings = format!(
        "{}adapter = \"{}\"\n[policy.communities]\ngarden = {{ review = 0.2 }}\n",
        model("gemma3"),
        fixture("gemma3/lora_qv").display()
    );
    let (code, out, err) = check(&settings, &[]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    // Three decimals are the same on every processor, but for the luck of rounding: their number is what counts.
    let is_sample = |line: &&str| line.starts_with("samples");
    let samples = out.lines().find(is_sample).unwrap();
    assert_eq!(samples.matches('.').count(), 3, "{samples}");
    let rest: Vec<&str> = out.lines().filter(|line| !is_sample(line)).collect();
    insta::assert_snapshot!(rest.join("\n"), @r#"
    model     gemma3_text, 4 layers, 0.2 M parameters, cpu f32, adapter rank 4 on q_proj, v_proj
    base      sha256:960d479ac17309b1f4c7986e07e142105658e58deb9d7dc57a4393b7d10d3139
    adapter   sha256:ebec7aab5f7a47e551e9b36b663cd379ad6bbc48e140de072a8a8bf4df693436
    prompt    sha256:0bbd96837898176b0fb8e1fe4d098f4ff7c38b8b2284e827dde87c4f026ac39d
    labels    Positive and Negative, hateful is Negative, normaliser nfc-1
    policy    review from 0.5, block from 0.9, 1 community of its own; sha256:2b0d1c741de1d95d1efda1cf4db1125484eab50e73e0b32a43170d1394710202
    kafka     not set
    "#);
}

#[test]
fn the_oracle_agrees_or_says_what_it_cannot_express() {
    let (code, out, err) = check(&model("gemma"), &["--oracle"]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(
        out.contains("oracle    3 texts, largest difference of a logit"),
        "{out}"
    );
    let (code, _, err) = check(&model("gemma2"), &["--oracle"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("candle-transformers cannot express this model"), "{err}");
}

#[test]
fn settings_model_and_labels_are_judged_together() {
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

#[test]
fn a_stream_that_is_half_set_up_is_a_fault() {
    let settings = format!("{}[topics]\ncomments = \"comments\"\n", model("gemma3"));
    let (code, _, err) = check(&settings, &[]);
    assert_eq!(code, Some(78));
    for key in ["kafka.brokers", "topics.decisions", "topics.dead_letters"] {
        assert!(err.contains(&format!("{key}: not set")), "{err}");
    }
}

#[test]
fn without_any_setting_the_bundled_model_is_checked_and_said_to_be_it() {
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
fn a_folder_that_holds_no_model_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (code, _, err) = check("", &["--model", folder.path().to_str().unwrap()]);
    assert_eq!(code, Some(78));
    let file = Path::new(folder.path()).join("config.json");
    assert!(err.contains(file.to_str().unwrap()), "{err}");
}
