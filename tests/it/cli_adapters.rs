//! The commands `retrain`, `eval`, `explain` and `adapters`, run on files: their errors, and the state of the registry
//! afterwards.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use crate::common::fixture;
use crate::common::labels::label;
use crate::common::process::Start;
use crate::common::registry::create_with_fixed_split;
use moderatord::hash::content_hash;

const TEXT: &str = "rain rain rain over the garden";

/// A registry with one promoted version.
struct TrainedRegistry {
    version: String,
    /// Contents of its files by their path within the registry.
    files: Vec<(PathBuf, Vec<u8>)>,
}

struct Workspace {
    folder: tempfile::TempDir,
}

impl Workspace {
    /// Creates settings, an empty registry and 200 labelled comments.
    ///
    /// The settings keep training in a debug build short: half of the comments are used for testing, since promotion
    /// requires at least 20 of each class, and about 70 of the others for training.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        create_with_fixed_split(&folder.path().join("registry"));
        let workspace = Self { folder };
        workspace.set_base(&fixture("gemma3"));
        let rows: String = (0..200).map(|number| label(number).1 + "\n").collect();
        workspace.write("labels.jsonl", &rows);
        workspace
    }

    /// Creates a workspace whose registry has one promoted version, and returns it with that version. The version is
    /// trained once for all tests.
    fn with_promoted_version() -> (Self, String) {
        static TRAINED: OnceLock<TrainedRegistry> = OnceLock::new();
        let trained = TRAINED.get_or_init(|| {
            let workspace = Self::new();
            let version = workspace.train_and_promote();
            let registry = workspace.path("registry");
            let mut files = Vec::new();
            read_files(&registry, &registry, &mut files);
            TrainedRegistry { version, files }
        });
        let workspace = Self::new();
        for (path, bytes) in &trained.files {
            let path = workspace.path("registry").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        (workspace, trained.version.clone())
    }

    fn set_base(&self, base: &Path) {
        let settings = format!(
            "[model]\npath = \"{}\"\n[registry]\nurl = \"file://{}\"\n\
             [retrain]\nlearning_rate = 0.01\nepochs = 3\nbatch = 4\nrank = 4\n\
             targets = [\"q_proj\", \"v_proj\", \"down_proj\"]\ntest = 0.5\ncross_fit = \"never\"\nmin_rows = 20\n",
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

    /// Runs a command in a process that cannot write files larger than `kib`, as if the disk were full.
    fn run_on_full_disk(&self, kib: u32, command: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
        // A write beyond the limit fails like a write to a full disk.
        let script = format!("ulimit -f {kib}; exec \"$0\" \"$@\"");
        let mut shell = self.plain("bash");
        // How well the adapter is trained makes no difference here.
        shell.env("MODERATORD__RETRAIN__EPOCHS", "1");
        shell.args(["-c", &script, env!("CARGO_BIN_EXE_moderatord"), command]);
        finish(&mut shell, self, arguments)
    }

    fn plain(&self, program: &str) -> Command {
        let mut plain = crate::common::without_settings(program);
        plain.env("TMPDIR", self.folder.path()).stdin(Stdio::null());
        plain
    }

    /// Trains a version that is promoted as the first one, and returns it.
    fn train_and_promote(&self) -> String {
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
        let (code, out, err) = self.run("score", &["--text", TEXT]);
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str(&out).unwrap()
    }
}

fn read_files(root: &Path, folder: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_files(root, &path, files);
        } else {
            files.push((
                path.strip_prefix(root).unwrap().to_owned(),
                std::fs::read(&path).unwrap(),
            ));
        }
    }
}

fn finish(command: &mut Command, workspace: &Workspace, arguments: &[&str]) -> (Option<i32>, String, String) {
    command
        .arg("--config")
        .arg(workspace.path("moderatord.toml"))
        .args(arguments);
    let Output { status, stdout, stderr } = command.finish().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn the_settings_are_accepted_before_and_after_every_subcommand() {
    let workspace = Workspace::new();
    let settings = workspace.path("moderatord.toml").display().to_string();
    for subcommand in [
        &["list"][..],
        &["show", "abcd"],
        &["promote", "abcd"],
        &["rollback"],
        &["gc"],
    ] {
        let run = |arguments: &[&str]| {
            let mut command = workspace.plain(env!("CARGO_BIN_EXE_moderatord"));
            let Output { status, stdout, stderr } = command.arg("adapters").args(arguments).finish().unwrap();
            let text = |bytes| String::from_utf8(bytes).unwrap();
            (status.code(), text(stdout), text(stderr))
        };
        let before = run(&[&["--config", settings.as_str()][..], subcommand].concat());
        let after = run(&[subcommand, &["--config", settings.as_str()]].concat());
        assert_ne!(before.0, Some(64), "{subcommand:?}: {}", before.2);
        assert_eq!(before, after, "{subcommand:?}");
    }
}

#[test]
fn a_full_disk_fails_the_retraining_and_leaves_the_registry_as_it_was() {
    let workspace = Workspace::new();
    let input = workspace.path("labels.jsonl").display().to_string();
    // The adapter is about 34 KiB and the report about 58 KiB.
    for (kib, expected) in [
        (0, "cannot write the registry lock"),
        (16, "cannot write the adapter"),
        (45, "/report.html` in the registry"),
    ] {
        let (code, out, err) = workspace.run_on_full_disk(kib, "retrain", &["--input", &input]);
        assert_eq!(code, Some(1), "{kib} KiB: {out}{err}");
        assert!(
            err.contains(expected) && err.contains("File too large"),
            "{kib} KiB: {err}"
        );
        let (code, out, err) = workspace.run("adapters", &["list"]);
        assert_eq!(code, Some(0), "{kib} KiB: {err}");
        assert!(out.starts_with("* bare base model"), "{kib} KiB: {out}");
    }
    // Once there is room again, retraining works as if nothing had happened.
    let version = workspace.train_and_promote();
    // The list names the adapter of a version, and so does the version's report.
    let (_, out, _) = workspace.run("adapters", &["list"]);
    let (listed, adapter) = out.lines().next().unwrap().split_once(", adapter ").unwrap();
    assert!(listed.contains(&version) && adapter.starts_with("sha256:"), "{out}");
    let report = workspace.path(&format!("registry/versions/{version}/report.html"));
    assert!(std::fs::read_to_string(report).unwrap().contains(adapter), "{adapter}");
    let (code, out, _) = workspace.run("adapters", &["gc"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("0 versions, ") && !out.contains(&version), "{out}");
}

/// Both retrainings use the same labels: the first compares with the bare base model, and the second with the first.
#[test]
fn with_few_labels_all_rows_judge_that_neither_side_was_trained_on() {
    let workspace = Workspace::new();
    let input = workspace.path("labels.jsonl").display().to_string();
    let retrain = |arguments: &[&str]| {
        let mut command = workspace.plain(env!("CARGO_BIN_EXE_moderatord"));
        command.arg("retrain").env("MODERATORD__RETRAIN__CROSS_FIT", "auto");
        let arguments = [&["--input", input.as_str()], arguments].concat();
        let (code, out, err) = finish(&mut command, &workspace, &arguments);
        assert_eq!(code, Some(0), "{out}{err}");
        let version = out.lines().find_map(|line| line.strip_prefix("version   ")).unwrap();
        let (_, manifest, _) = workspace.run("adapters", &["show", version]);
        let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
        (out, manifest)
    };
    let (out, manifest) = retrain(&[]);
    assert!(out.contains("promoted  pointer 1"), "{out}");
    // With half of the texts in the test part, there are two folds.
    assert!(
        out.contains("judging   200 rows in 2 folds, for which 1 more adapter was trained in "),
        "{out}"
    );
    assert!(
        out.contains("\npower     a challenger whose PR-AUC is truly higher by 0."),
        "{out}"
    );
    assert_eq!(
        (&manifest["gate"]["rows"], &manifest["gate"]["folds"]),
        (&200.into(), &2.into())
    );
    let data = |key: &str| manifest["data"][key].as_u64().unwrap();
    assert_eq!(data("judged"), 200);
    // The thresholds come from the validation and the training part, and are not representative.
    assert_eq!(manifest["thresholds"]["representative"], false);
    let derivation = &manifest["threshold_derivation"];
    assert_eq!(derivation["rows"], data("validation") + data("train"));
    for threshold in ["block", "review"] {
        assert!(out.contains(&format!("\n{threshold:<9} from 0.")), "{out}");
        let [low, high] = [0, 1].map(|end| {
            let interval = &derivation[threshold]["figures"]["precision_interval"];
            interval[end].as_f64().unwrap()
        });
        assert!(0.0 < low && low < high && high <= 1.0, "{derivation}");
    }

    let trained_on = data("train");
    let (out, manifest) = retrain(&["--no-promote"]);
    let data = |key: &str| manifest["data"][key].as_u64().unwrap();
    assert_eq!(
        (data("near_champion_not_judged"), data("judged")),
        (trained_on, 200 - trained_on),
        "{out}"
    );
    assert_eq!(manifest["gate"]["promote"], false, "{out}");
    let sentence = manifest["gate"]["sentence"].as_str().unwrap();
    assert!(out.contains(&format!("\nverdict   {sentence}\n")), "{out}");
}

#[test]
fn labels_of_copies_of_one_text_are_too_few() {
    let workspace = Workspace::new();
    let row = |number: usize| {
        let label = if number.is_multiple_of(2) { "ok" } else { "hateful" };
        let text =
            format!("We walked along the river until it got dark, and then went home for soup and bread. {number}");
        format!(
            "{}\n",
            serde_json::json!({"content_id": number.to_string(), "text": text, "label": label})
        )
    };
    let input = workspace.write("copies.jsonl", &(0..80).map(row).collect::<String>());
    let (code, out, err) = workspace.run("retrain", &["--input", &input]);
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains("skipped: the training part has 0 rows ("), "{out}");
    assert!(
        out.contains(" more are near-duplicates of rows that judge, and were left out), expected at least 20"),
        "{out}"
    );
}

#[test]
fn retraining_on_a_base_model_that_cannot_be_loaded_is_a_fault_of_the_settings() {
    let check = |workspace: &Workspace| {
        let absent = workspace.path("absent");
        workspace.set_base(&absent);
        let input = workspace.path("labels.jsonl").display().to_string();
        let (code, out, err) = workspace.run("retrain", &["--input", &input]);
        assert_eq!((code, out.lines().count()), (Some(78), 1), "{out}{err}");
        assert!(err.contains(absent.to_str().unwrap()), "{err}");
    };
    check(&Workspace::new());
    check(&Workspace::with_promoted_version().0);
}

#[cfg(not(feature = "cuda"))]
#[test]
fn retraining_on_a_device_that_is_missing_is_a_fault_of_the_settings() {
    let check = |workspace: &Workspace| {
        let input = workspace.path("labels.jsonl").display().to_string();
        let settings = std::fs::read_to_string(workspace.path("moderatord.toml")).unwrap();
        workspace.write(
            "moderatord.toml",
            &settings.replace("[model]", "[model]\ndevice = \"cuda:0\""),
        );
        let (code, _, err) = workspace.run("retrain", &["--input", &input]);
        assert_eq!(code, Some(78), "{err}");
        assert!(err.contains("model.device: `cuda:0` needs a build with CUDA"), "{err}");
    };
    check(&Workspace::new());
    check(&Workspace::with_promoted_version().0);
}

#[test]
fn a_classification_head_is_not_retrained() {
    let workspace = Workspace::new();
    let base = workspace.path("classifier");
    std::fs::create_dir(&base).unwrap();
    let config = std::fs::read_to_string(fixture("gemma3/config.json")).unwrap();
    let config = config.replace("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification");
    std::fs::write(base.join("config.json"), config).unwrap();
    std::fs::copy(fixture("gemma3/tokenizer.json"), base.join("tokenizer.json")).unwrap();
    let device = candle_core::Device::Cpu;
    let mut tensors = candle_core::safetensors::load(fixture("gemma3/model.safetensors"), &device).unwrap();
    let head = candle_core::Tensor::ones((2, 64), candle_core::DType::F32, &device).unwrap();
    tensors.insert("score.weight".into(), head);
    candle_core::safetensors::save(&tensors, base.join("model.safetensors")).unwrap();
    workspace.set_base(&base);
    let input = workspace.path("labels.jsonl").display().to_string();
    let (code, _, err) = workspace.run("retrain", &["--input", &input]);
    assert_eq!(code, Some(78), "{err}");
    let expected = "is a `Gemma3TextForSequenceClassification`, whose classification head cannot be retrained";
    assert!(err.contains(expected), "{err}");
}

#[test]
fn an_adapter_is_not_served_with_a_base_model_other_than_its_own() {
    let (workspace, version) = Workspace::with_promoted_version();
    let changed = workspace.path("changed");
    std::fs::create_dir(&changed).unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(fixture("gemma3").join(name), changed.join(name)).unwrap();
    }
    // Change one bit of the last weight, far behind the header.
    let weights = changed.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    workspace.set_base(&changed);

    let (code, out, err) = workspace.run("check", &[]);
    assert_eq!((code, out.as_str()), (Some(78), ""), "{err}");
    assert!(err.contains("base") && err.contains(&version), "{err}");
    // A retraining compares with the bare new base model, and replaces the version that can no longer be served.
    let input = workspace.path("labels.jsonl").display().to_string();
    let (code, out, err) = workspace.run("retrain", &["--input", &input]);
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(
        err.contains("the version in service was made for another base model"),
        "{err}"
    );
    assert!(out.contains("promoted  pointer 2"), "{out}");
    assert_eq!(workspace.run("check", &[]).0, Some(0));
}

#[test]
fn eval_reports_what_it_cannot_evaluate() {
    let workspace = Workspace::new();
    let eval = |arguments: &[&str]| workspace.run("eval", arguments);
    let missing = workspace.path("missing.jsonl").display().to_string();
    let (code, _, err) = eval(&["--input", &missing]);
    assert_eq!(code, Some(1));
    assert!(err.contains("cannot open") && err.contains("missing.jsonl"), "{err}");

    let empty = workspace.write("empty.jsonl", "\n");
    let (code, _, err) = eval(&["--input", &empty]);
    assert_eq!(code, Some(1));
    assert!(err.contains("has no labelled comments"), "{err}");

    // Valid lines are evaluated, and the others are reported with their numbers.
    let mut rows: String = (0..20).map(|number| label(number).1 + "\n").collect();
    rows += "{\"text\": \"a\"}\nnot JSON\n";
    let mixed = workspace.write("mixed.jsonl", &rows);
    let (code, out, err) = eval(&["--input", &mixed]);
    assert_eq!(code, Some(1));
    assert!(out.contains("rows      20, 10 hateful"), "{out}");
    assert!(out.contains("community (none): 20 rows, 10 hateful"), "{out}");
    assert!(err.contains("line 21: ") && err.contains("line 22: "), "{err}");

    let labels = workspace.path("labels.jsonl").display().to_string();
    let (code, _, err) = eval(&["--input", &labels, "--adapter", "abcdef"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("version `abcdef` is not in the registry"), "{err}");
    let (code, _, err) = eval(&["--input", &mixed, "--report", "/nonexistent/report.html"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("cannot write `/nonexistent/report.html`"), "{err}");
}

#[test]
fn explain_reports_what_is_missing() {
    let (workspace, _) = Workspace::with_promoted_version();
    let decision = workspace.decision();
    let explain = |decision: &str, text: Option<&str>| {
        let file = workspace.write("decision.json", decision);
        let mut arguments = vec!["--decision", file.as_str()];
        arguments.extend(text.iter().flat_map(|text| ["--text", *text]));
        workspace.run("explain", &arguments)
    };
    let (code, out, err) = explain(&decision.to_string(), Some(TEXT));
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains("\nequal: "), "{out}");

    // A decision that was made before the windows of very long texts changed.
    let records = std::fs::read_dir(workspace.path("registry/records/prompt")).unwrap();
    let record = records
        .map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap())
        .next()
        .unwrap();
    assert!(record.contains("\"format\":2"), "{record}");
    let earlier = content_hash(record.replace("\"format\":2", "\"format\":1").as_bytes());
    let mut changed = decision.clone();
    changed["model"]["prompt"] = earlier.clone().into();
    let (code, out, err) = explain(&changed.to_string(), Some(TEXT));
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(
        out.contains(&format!(
            "{earlier} in the decision; only windows of very long texts differ"
        )),
        "{out}"
    );

    let (code, _, err) = explain("{\"schema\": 1", None);
    assert_eq!(code, Some(1));
    assert!(err.contains("is not a decision"), "{err}");
    let (code, _, err) = explain(&decision.to_string(), None);
    assert_eq!(code, Some(1));
    assert!(
        err.contains("the decision records no source; pass the text with --text"),
        "{err}"
    );
    let zeros = format!("sha256:{}", "0".repeat(64));
    for (key, name) in [("base", "base model"), ("adapter", "adapter"), ("prompt", "prompt")] {
        let mut changed = decision.clone();
        changed["model"][key] = zeros.clone().into();
        let (code, out, err) = explain(&changed.to_string(), Some(TEXT));
        assert_eq!(code, Some(1), "{key}: {out}{err}");
        assert!(out.contains(&format!("the {name} {zeros}")), "{key}: {out}");
    }
    let mut changed = decision.clone();
    changed["margin"] = (decision["margin"].as_f64().unwrap() + 1.0).into();
    let (code, out, _) = explain(&changed.to_string(), Some(TEXT));
    assert_eq!(code, Some(1));
    assert!(out.contains("\ndifferent: "), "{out}");
}
