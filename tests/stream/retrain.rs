//! Retraining on feedback from a topic while a daemon runs, which then swaps to the promoted version.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::broker::{Broker, OutputRecord};
use crate::common::fixture;
use crate::common::labels::label;
use crate::common::process::{Start, send_signal};
use crate::common::registry::create_with_fixed_split;
use crate::daemon::{Names, eventually};
use crate::flow::{assert_each_once, comment};

struct Workspace {
    folder: tempfile::TempDir,
}

impl Workspace {
    fn new(broker: &Broker, names: &Names, feedback: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        create_with_fixed_split(&folder.path().join("registry"));
        let delivery = if broker.is_apache() {
            "exactly_once"
        } else {
            "at_least_once"
        };
        let text = format!(
            "delivery = \"{delivery}\"\n[kafka]\nbrokers = [\"{}\"]\ngroup = \"{}\"\ninstance = \"one\"\n\
             [kafka.properties]\n\"session.timeout.ms\" = 3000\n\"heartbeat.interval.ms\" = 300\n\"fetch.wait.max.ms\" = 10\n\
             [topics]\ncomments = \"{}\"\ndecisions = \"{}\"\ndead_letters = \"{}\"\nfeedback = \"{feedback}\"\n\
             [model]\npath = \"{}\"\n[registry]\nurl = \"file://{}/registry\"\npoll = \"200ms\"\n\
             [retrain]\nlearning_rate = 0.01\nepochs = 3\nbatch = 4\nrank = 4\n\
             targets = [\"q_proj\", \"v_proj\", \"down_proj\"]\ntest = 0.5\ncross_fit = \"never\"\nmin_rows = 20\n\
             [http]\nlisten = \"127.0.0.1:0\"\n",
            broker.address(),
            names.group,
            names.comments,
            names.decisions,
            names.dead_letters,
            fixture("gemma3").display(),
            folder.path().display(),
        );
        std::fs::write(folder.path().join("moderatord.toml"), text).unwrap();
        Self { folder }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moderatord"));
        command.env_remove("STATE_DIRECTORY");
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("MODERATORD__") {
                command.env_remove(name);
            }
        }
        let (first, rest) = arguments.split_first().unwrap();
        command
            .arg(first)
            .arg("--config")
            .arg(self.folder.path().join("moderatord.toml"));
        command.args(rest).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let Output { status, stdout, stderr } = self.command(arguments).finish().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code(), text(stdout), text(stderr))
    }

    fn registry(&self) -> std::path::PathBuf {
        self.folder.path().join("registry")
    }
}

struct Service(Child, std::path::PathBuf);

impl Service {
    fn start(workspace: &Workspace) -> Self {
        let log = workspace.folder.path().join("log");
        let mut command = workspace.command(&["run"]);
        let child = command
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .start()
            .unwrap();
        Self(child, log)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.1).unwrap()
    }

    fn stop(mut self) {
        send_signal(self.0.id(), "TERM");
        eventually("the daemon ends", || self.0.try_wait().unwrap().is_some());
        assert_eq!(self.0.wait().unwrap().code(), Some(0), "{}", self.log());
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

fn adapters(decisions: &[OutputRecord]) -> Vec<Value> {
    decisions
        .iter()
        .map(|decision| decision.json()["model"]["adapter_version"].clone())
        .collect()
}

#[test]
fn a_running_daemon_swaps_to_the_version_that_retraining_promotes() {
    let broker = Broker::start();
    let names = Names::create(&broker, "retrain", 1);
    let feedback = crate::broker::unique("feedback");
    broker.create_topic(&feedback, 2);
    let workspace = Workspace::new(&broker, &names, &feedback);
    let comments = |from: usize, count: usize| {
        let values: Vec<Vec<u8>> = (from..from + count)
            .map(|id| comment(id, "a walk in the rain rain rain"))
            .collect();
        broker.produce(
            &names.comments,
            values.iter().map(|value| (0, "k", Some(value.as_slice()))),
        );
    };
    let decided = |count: usize| {
        eventually("all are decided", || {
            broker.committed(&names.group, &names.comments, 1)[0] == i64::try_from(count).unwrap()
        });
    };
    let service = Service::start(&workspace);
    comments(0, 50);
    decided(50);

    let (code, out, err) = workspace.run(&["retrain"]);
    assert_eq!((code, err.as_str()), (Some(0), ""), "{out}");
    assert!(
        out.contains("skipped: the training part has 0 rows, expected at least 20"),
        "{out}"
    );

    let labels: Vec<(String, String)> = (0..200).map(label).collect();
    broker.produce(
        &feedback,
        labels
            .iter()
            .zip(0i32..)
            .map(|((key, event), number)| (number % 2, key.as_str(), Some(event.as_bytes()))),
    );
    broker.produce(&feedback, [(0, "f0", Some(b"no json".as_slice())), (1, "f1", None)]);
    let (code, out, err) = workspace.run(&["retrain"]);
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(
        out.contains("feedback  202 records, 199 content ids, 0 superseded, 1 forgotten, 1 refused"),
        "{out}"
    );
    assert!(
        err.contains("partition 0 offset 100: is not a JSON object in UTF-8"),
        "{err}"
    );
    assert!(out.contains("promoted  pointer 1"), "{out}");
    let version = out
        .lines()
        .find_map(|line| line.strip_prefix("version   "))
        .unwrap()
        .to_owned();
    comments(50, 50);
    eventually("the daemon swaps", || {
        service.log().contains("adapter swapped between two batches")
    });
    comments(100, 50);
    decided(150);

    // Each decision names the adapter that made it, and nothing is lost, duplicated or out of order.
    let decisions = broker.read(&names.decisions);
    assert_each_once(&decisions, &[], &[150]);
    let adapters = adapters(&decisions);
    let swapped = adapters
        .iter()
        .position(|adapter| *adapter == version.as_str())
        .unwrap();
    assert!((50..=100).contains(&swapped), "{swapped}");
    assert!(adapters[..swapped].iter().all(Value::is_null));
    assert!(adapters[swapped..].iter().all(|adapter| *adapter == version.as_str()));
    assert_eq!(decisions[149].json()["label"], "hateful");

    // Each decision can be explained with its own adapter and the text read again from its source.
    for decision in [&decisions[0], &decisions[149]] {
        let file = workspace.folder.path().join("decision.json");
        std::fs::write(&file, decision.value.as_ref().unwrap()).unwrap();
        let (code, out, err) = workspace.run(&["explain", "--decision", file.to_str().unwrap()]);
        assert_eq!(code, Some(0), "{out}{err}");
        assert!(out.contains("\nequal: "), "{out}");
        let (code, out, _) = workspace.run(&["explain", "--decision", file.to_str().unwrap(), "--text", "another"]);
        assert_eq!(code, Some(1));
        assert!(out.contains("the text: it has sha256 "), "{out}");
    }

    // An adapter that is no better is kept but not promoted.
    let (code, out, _) = workspace.run(&["retrain"]);
    assert_eq!(code, Some(0), "{out}");
    assert!(
        out.contains("keep the champion") && out.contains("kept      not promoted"),
        "{out}"
    );

    // A pointer to an incomplete version is refused, and the old version stays in service.
    break_version(&workspace.registry(), &version);
    eventually("the daemon refuses", || {
        service
            .log()
            .contains("refused a version; the previous one stays in service")
    });
    comments(150, 10);
    decided(160);
    let decisions = broker.read(&names.decisions);
    assert_each_once(&decisions, &[], &[160]);
    assert_eq!(decisions[159].json()["model"]["adapter_version"], version.as_str());
    let no_memory = "neither registry.state nor $STATE_DIRECTORY is set";
    assert_eq!(service.log().matches(no_memory).count(), 1, "{}", service.log());
    service.stop();
}

/// Copies a version's pointer under the next number, with another hash for its manifest.
fn break_version(registry: &Path, version: &str) {
    let pointer = std::fs::read_to_string(registry.join("pointers/00000001.json")).unwrap();
    let mut pointer: Value = serde_json::from_str(&pointer).unwrap();
    assert_eq!(pointer["version"], version);
    pointer["sequence"] = 2.into();
    pointer["manifest_sha256"] = format!("sha256:{}", "0".repeat(64)).into();
    std::fs::write(registry.join("pointers/00000002.json"), pointer.to_string()).unwrap();
}

#[test]
fn a_second_retraining_is_refused_and_bad_input_is_named() {
    let broker = Broker::start();
    let names = Names::new("lock");
    let workspace = Workspace::new(&broker, &names, "none");
    let input = workspace.folder.path().join("labels.jsonl");
    let labels: Vec<String> = (0..200).map(|number| label(number).1 + "\n").collect();
    std::fs::write(&input, labels.concat()).unwrap();
    let input = input.to_str().unwrap();
    let registry = moderatord::registry::Registry::open(&format!("file://{}", workspace.registry().display())).unwrap();
    let lock = registry.lock(std::time::SystemTime::now()).unwrap();
    let (code, _, err) = workspace.run(&["retrain", "--input", input]);
    assert_eq!(code, Some(1));
    assert!(
        err.contains("lock` is held by") && err.contains(&std::process::id().to_string()),
        "{err}"
    );
    drop(lock);

    // A single class, a row that is too long, and labels that are not allowed.
    let path = workspace.folder.path().join("bad.jsonl");
    let mut bad: String = (0..300).map(|number| label(2 * number).1 + "\n").collect();
    bad += &format!("{{\"text\":\"{}\",\"label\":\"ok\"}}\n", "long ".repeat(300_000));
    bad += "{\"text\":\"a\",\"label\":\"nasty\"}\n{\"text\":\"a\",\"label\":7}\n";
    std::fs::write(&path, bad).unwrap();
    let (code, out, err) = workspace.run(&["retrain", "--input", path.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains("skipped: the training part has"), "{out}");
    for fault in [
        "line 301: has 1500024 bytes",
        "line 302: `label` is an unknown name",
        "line 303: `label` is 7",
    ] {
        assert!(err.contains(fault), "{fault}: {err}");
    }

    // The registry stays readable whenever retraining is killed.
    let mut was_running = false;
    for millis in [100, 400, 900, 1500] {
        let mut child = workspace
            .command(&["retrain", "--input", input])
            .stdout(Stdio::null())
            .start()
            .unwrap();
        std::thread::sleep(Duration::from_millis(millis));
        was_running |= child.try_wait().unwrap().is_none();
        let _ = child.kill();
        child.wait().unwrap();
        let (code, out, err) = workspace.run(&["adapters", "list"]);
        assert_eq!(code, Some(0), "{out}{err}");
    }
    assert!(was_running, "every run had ended before it was killed");
    let (code, out, err) = workspace.run(&["retrain", "--input", input]);
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains("version   "), "{out}");
}
