//! `retrain`, `eval`, `explain` and `adapters` through the binary, on files: what goes wrong, and what
//! is then left.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::common::fixture;
use crate::common::labels::label;

struct Workspace {
    folder: tempfile::TempDir,
}

impl Workspace {
    /// Settings, an empty registry, and 400 labelled rows.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("registry")).unwrap();
        let place = Self { folder };
        place.set_base(&fixture("gemma3"));
        let rows: String = (0..400).map(|number| label(number).1 + "\n").collect();
        place.write("labels.jsonl", &rows);
        place
    }

    fn set_base(&self, base: &Path) {
        let settings = format!(
            "[model]\npath = \"{}\"\n[registry]\nurl = \"file://{}\"\n\
             [retrain]\nlearning_rate = 0.01\nepochs = 6\ntargets = [\"q_proj\", \"v_proj\", \"down_proj\"]\n",
            base.display(),
            self.path("registry").display(),
        );
        self.write("moderatord.toml", &settings);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    fn run(&self, command: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
        finish(
            self.plain(env!("CARGO_BIN_EXE_moderatord")).arg(command),
            self,
            arguments,
        )
    }

    /// As [`Workspace::run`], in a process that cannot write files of more than `kib`: to it, the disk is full.
    fn run_on_full_disk(&self, kib: u32, command: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
        // The signal ignored, a write beyond the limit fails like one to a full disk.
        let script = format!("trap '' XFSZ; ulimit -f {kib}; exec \"$0\" \"$@\"");
        let mut shell = self.plain("bash");
        shell.args(["-c", &script, env!("CARGO_BIN_EXE_moderatord"), command]);
        finish(&mut shell, self, arguments)
    }

    fn plain(&self, program: &str) -> Command {
        let mut plain = crate::common::without_settings(program);
        plain.env("TMPDIR", self.folder.path()).stdin(Stdio::null());
        plain
    }

    /// Trains and promotes; the version.
    fn promoted(&self) -> String {
        let (code, out, err) = self.run(
            "retrain",
            &["--input", &self.path("labels.jsonl").display().to_string()],
        );
        assert_eq!(code, Some(0), "{out}{err}");
        assert!(out.contains("promoted  pointer 1"), "{out}");
        let version = out.lines().find_map(|line| line.strip_prefix("version   "));
        version.unwrap().to_owned()
    }

    fn decision(&self) -> serde_json::Value {
        let (code, out, err) = self.run("score", &["--text", "rain rain rain over the garden"]);
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str(&out).unwrap()
    }
}

fn finish(command: &mut Command, place: &Workspace, arguments: &[&str]) -> (Option<i32>, String, String) {
    command
        .arg("--config")
        .arg(place.path("moderatord.toml"))
        .args(arguments);
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn a_full_disk_fails_the_retraining_and_leaves_the_registry_as_it_was() {
    let place = Workspace::new();
    let input = place.path("labels.jsonl").display().to_string();
    // At the first file that is written, at one in the middle, and at the largest.
    for kib in [0, 16, 60] {
        let (code, out, err) = place.run_on_full_disk(kib, "retrain", &["--input", &input]);
        assert_eq!(code, Some(1), "{kib} KiB: {out}{err}");
        assert!(err.contains("File too large"), "{kib} KiB: {err}");
        let (code, out, err) = place.run("adapters", &["list"]);
        assert_eq!(code, Some(0), "{kib} KiB: {err}");
        assert!(out.starts_with("* the bare base"), "{kib} KiB: {out}");
    }
    // With room again it goes on as if nothing had been.
    let version = place.promoted();
    let (code, out, _) = place.run("adapters", &["gc"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("0 versions, ") && !out.contains(&version), "{out}");
}

#[test]
fn a_base_that_changed_under_a_published_adapter_is_named_and_never_served_with_it() {
    let place = Workspace::new();
    let version = place.promoted();
    let changed = place.path("changed");
    std::fs::create_dir(&changed).unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(fixture("gemma3").join(name), changed.join(name)).unwrap();
    }
    // One byte of one weight, well behind the header.
    let weights = changed.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    place.set_base(&changed);

    let (code, out, err) = place.run("check", &[]);
    assert_eq!((code, out.as_str()), (Some(78), ""), "{err}");
    assert!(err.contains("base") && err.contains(&version), "{err}");
    // A retraining judges against the bare new base, and may replace what can serve nobody.
    let input = place.path("labels.jsonl").display().to_string();
    let (code, out, err) = place.run("retrain", &["--input", &input]);
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(err.contains("what is in service was made for another base"), "{err}");
    assert!(out.contains("promoted  pointer 2"), "{out}");
    assert_eq!(place.run("check", &[]).0, Some(0));
}

#[test]
fn eval_names_what_it_cannot_measure() {
    let place = Workspace::new();
    let eval = |arguments: &[&str]| place.run("eval", arguments);
    let missing = place.path("missing.jsonl").display().to_string();
    let (code, _, err) = eval(&["--input", &missing]);
    assert_eq!(code, Some(1));
    assert!(err.contains("cannot open") && err.contains("missing.jsonl"), "{err}");

    let empty = place.write("empty.jsonl", "\n");
    let (code, _, err) = eval(&["--input", &empty]);
    assert_eq!(code, Some(1));
    assert!(err.contains("has no labelled rows"), "{err}");

    // What can be measured is, and the rest is named by its line.
    let mut rows: String = (0..20).map(|number| label(number).1 + "\n").collect();
    rows += "{\"text\": \"a\"}\nnot JSON\n";
    let mixed = place.write("mixed.jsonl", &rows);
    let (code, out, err) = eval(&["--input", &mixed]);
    assert_eq!(code, Some(1));
    assert!(out.contains("rows      20, 10 of them hateful"), "{out}");
    assert!(out.contains("community (none): 20 rows, 10 hateful"), "{out}");
    assert!(err.contains("line 21: ") && err.contains("line 22: "), "{err}");

    let labels = place.path("labels.jsonl").display().to_string();
    let (code, _, err) = eval(&["--input", &labels, "--adapter", "abcdef"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("version `abcdef` is not in the registry"), "{err}");
    let (code, _, err) = eval(&["--input", &mixed, "--report", "/nonexistent/report.html"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("cannot write `/nonexistent/report.html`"), "{err}");
}

#[test]
fn explain_names_the_piece_that_is_missing() {
    let place = Workspace::new();
    place.promoted();
    let decision = place.decision();
    let explain = |decision: &str, text: Option<&str>| {
        let file = place.write("decision.json", decision);
        let mut arguments = vec!["--decision", file.as_str()];
        arguments.extend(text.iter().flat_map(|text| ["--text", *text]));
        place.run("explain", &arguments)
    };
    let text = "rain rain rain over the garden";
    let (code, out, err) = explain(&decision.to_string(), Some(text));
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains("\nequal: "), "{out}");

    let (code, _, err) = explain("{\"schema\": 1", None);
    assert_eq!(code, Some(1));
    assert!(err.contains("is no decision"), "{err}");
    let (code, _, err) = explain(&decision.to_string(), None);
    assert_eq!(code, Some(1));
    assert!(
        err.contains("the decision names no source; give the text with --text"),
        "{err}"
    );
    let zeros = format!("sha256:{}", "0".repeat(64));
    for piece in ["base", "adapter", "prompt"] {
        let mut changed = decision.clone();
        changed["model"][piece] = zeros.clone().into();
        let (code, out, err) = explain(&changed.to_string(), Some(text));
        assert_eq!(code, Some(1), "{piece}: {out}{err}");
        assert!(out.contains(&format!("the {piece} {zeros}")), "{piece}: {out}");
    }
    let mut changed = decision.clone();
    changed["margin"] = (decision["margin"].as_f64().unwrap() + 1.0).into();
    let (code, out, _) = explain(&changed.to_string(), Some(text));
    assert_eq!(code, Some(1));
    assert!(out.contains("\ndifferent: "), "{out}");
}
