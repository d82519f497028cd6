//! A registry that loses the version in service: the loss is noticed at startup and while serving, nothing is created
//! in its place, and a registry that only cannot be written to is served.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use crate::cli_run::{
    Notifications, PATIENCE, Service, ask, broker, free_port, moderatord, next_record, produce, reader, settings,
};
use crate::common::fixture;
use crate::common::labels::label;
use crate::common::process::Start;
use crate::common::registry::servable_draft;
use moderatord::config::{Config, Sources};
use moderatord::kafka::embedded::EmbeddedBroker;
use moderatord::registry::{Pointer, PointerMemory, Registry, Rollback};

/// Settings with a registry that has one version in service, and a state folder.
struct Workspace {
    folder: tempfile::TempDir,
    port: u16,
    version: String,
}

impl Workspace {
    /// Creates the workspace for commands that need no broker.
    fn new() -> Self {
        let model = format!("[model]\npath = \"{}\"\n", fixture("gemma3").display());
        Self::with_settings(&model, 0)
    }

    fn with_broker(broker: &EmbeddedBroker) -> Self {
        let port = free_port();
        Self::with_settings(&settings(&broker.address(), port), port)
    }

    fn with_settings(settings: &str, port: u16) -> Self {
        let mut workspace = Self {
            folder: tempfile::tempdir().unwrap(),
            port,
            version: String::new(),
        };
        let registry = format!("[registry]\nurl = \"{}\"\npoll = \"100ms\"\n", workspace.url());
        std::fs::write(workspace.config(), settings.to_owned() + &registry).unwrap();
        let config = Config::load(&Sources {
            file: Some(workspace.config()),
            ..Sources::default()
        });
        let registry = Registry::create(&workspace.url()).unwrap();
        workspace.version = block_on(async {
            let draft = servable_draft(&config.unwrap(), &fixture("gemma3/lora_qv"));
            let version = registry.publish(draft).await.unwrap().version;
            registry.promote(&version, 0, SystemTime::now()).await.unwrap();
            version.to_string()
        });
        workspace
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn config(&self) -> PathBuf {
        self.path("moderatord.toml")
    }

    fn url(&self) -> String {
        format!("file://{}", self.path("registry").display())
    }

    fn registry(&self) -> Registry {
        Registry::open(&self.url()).unwrap()
    }

    fn memory(&self) -> PointerMemory {
        PointerMemory::new(&self.path("state"), &self.url()).unwrap()
    }

    fn pointer(&self) -> Pointer {
        block_on(self.registry().current()).unwrap().unwrap()
    }

    /// Puts the bare base model into service.
    fn roll_back(&self) {
        block_on(self.registry().rollback(&Rollback::Base, SystemTime::now())).unwrap();
    }

    fn unmount(&self) {
        std::fs::rename(self.path("registry"), self.path("unmounted")).unwrap();
    }

    fn mount(&self) {
        std::fs::rename(self.path("unmounted"), self.path("registry")).unwrap();
    }

    fn run(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let mut command = moderatord();
        command.args(arguments).arg("--config").arg(self.config());
        command.env("STATE_DIRECTORY", self.path("state")).stdin(Stdio::null());
        let Output { status, stdout, stderr } = command.finish().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code(), text(stdout), text(stderr))
    }

    fn start(&self, environment: &[(&str, &str)]) -> Daemon<'_> {
        let notifications = Notifications::bind(&self.path("notify"));
        let mut command = moderatord();
        let child = command
            .args(["run", "--config"])
            .arg(self.config())
            .env("NOTIFY_SOCKET", self.path("notify"))
            .env("STATE_DIRECTORY", self.path("state"))
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(self.path("log")).unwrap())
            .start()
            .unwrap();
        let daemon = Daemon {
            workspace: self,
            service: Service(child),
            notifications,
        };
        daemon.notifications.await_ready();
        daemon
    }
}

struct Daemon<'a> {
    workspace: &'a Workspace,
    service: Service,
    notifications: Notifications,
}

impl Daemon<'_> {
    fn log(&self) -> String {
        std::fs::read_to_string(self.workspace.path("log")).unwrap()
    }

    /// Waits until the log has a text, which must occur once.
    fn logs_once(&self, text: &str) {
        eventually(text, || self.log().contains(text));
        assert_eq!(self.log().matches(text).count(), 1, "{}", self.log());
    }

    fn metric(&self, name: &str) -> Option<f64> {
        let metrics = ask(self.workspace.port, "/metrics");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.map(|value| value.parse().unwrap())
    }

    /// Waits for two more reads of the registry with this result, the second of which began after the call.
    fn reads_twice(&self, result: &str) {
        let name = format!("moderatord_registry_reads_total{{result=\"{result}\"}}");
        let before = self.metric(&name).unwrap_or(0.0);
        eventually(&name, || self.metric(&name).is_some_and(|count| count >= before + 2.0));
    }

    fn serves(&self, version: &str) -> bool {
        let metrics = ask(self.workspace.port, "/metrics");
        let label = format!("adapter_version=\"{version}\"");
        metrics
            .lines()
            .any(|line| line.starts_with("moderatord_model_info{") && line.contains(&label) && line.ends_with("} 1"))
    }

    fn reload(&self) {
        self.service.signal("HUP");
        assert!(self.notifications.state().starts_with("RELOADING=1"));
        assert_eq!(self.notifications.state(), "READY=1\nSTATUS=serving");
    }

    fn stop(self) {
        self.service.signal("TERM");
        let log = self.workspace.path("log");
        assert_eq!(self.service.end(), Some(0), "{}", std::fs::read_to_string(log).unwrap());
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(future)
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn count_files(folder: &Path) -> usize {
    std::fs::read_dir(folder).map_or(0, Iterator::count)
}

#[test]
fn a_daemon_keeps_its_version_while_the_registry_is_lost() {
    let broker = broker();
    let workspace = Workspace::with_broker(&broker);
    let daemon = workspace.start(&[]);
    daemon.reads_twice("ok");
    assert!(daemon.serves(&workspace.version));
    assert_eq!(daemon.metric("moderatord_registry_missing"), Some(0.0));
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let last_read = daemon
        .metric("moderatord_registry_last_read_timestamp_seconds")
        .unwrap();
    assert!((now - 60.0..=now).contains(&last_read), "{last_read}");
    assert_eq!(workspace.memory().recall().unwrap(), Some(workspace.pointer()));
    assert_eq!(count_files(&workspace.path("registry/records/policy")), 1);

    // The folder vanishes. A reload neither creates it nor changes the version in service.
    workspace.unmount();
    daemon.reads_twice("missing");
    assert_eq!(daemon.metric("moderatord_registry_missing"), Some(1.0));
    let last_read = daemon.metric("moderatord_registry_last_read_timestamp_seconds");
    let text = std::fs::read_to_string(workspace.config()).unwrap();
    std::fs::write(workspace.config(), text + "[policy]\nreview = 0.0\n").unwrap();
    daemon.reload();
    assert_eq!(daemon.metric("moderatord_reloads_total{result=\"ok\"}"), Some(1.0));
    daemon.reads_twice("missing");
    assert!(!workspace.path("registry").exists());
    daemon.logs_once("does not exist, but pointer 1 (version ");
    produce(&broker.address(), "while lost");
    let decision = next_record(&reader(&broker.address(), "decisions"));
    assert_eq!(decision["model"]["adapter_version"], workspace.version.as_str());
    assert_eq!(decision["action"], "review");

    // An empty folder takes its place, as when a volume is unmounted. Nothing is written to it.
    std::fs::create_dir(workspace.path("registry")).unwrap();
    daemon.logs_once("is empty, but pointer 1 (version ");
    daemon.reload();
    daemon.reads_twice("missing");
    assert_eq!(count_files(&workspace.path("registry")), 0);
    assert_eq!(
        daemon.metric("moderatord_registry_last_read_timestamp_seconds"),
        last_read
    );

    // When the registry is back, the policy of the reload is stored, and the next pointer is followed.
    std::fs::remove_dir(workspace.path("registry")).unwrap();
    workspace.mount();
    daemon.logs_once("the registry can be read again");
    assert_eq!(daemon.metric("moderatord_registry_missing"), Some(0.0));
    daemon.reads_twice("ok");
    assert_eq!(count_files(&workspace.path("registry/records/policy")), 2);
    workspace.roll_back();
    eventually("the bare base model is served", || daemon.serves(""));
    assert_eq!(workspace.memory().recall().unwrap(), Some(workspace.pointer()));

    // A restored backup without the last pointer does not bring the version before it back into service.
    std::fs::remove_file(workspace.path("registry/pointers/00000002.json")).unwrap();
    daemon.logs_once("ends at pointer 1 (version ");
    daemon.reads_twice("missing");
    assert!(daemon.serves(""));

    // Another problem is reported once as well.
    std::fs::write(workspace.path("registry/pointers/00000003.json"), "{").unwrap();
    daemon.logs_once("cannot read the registry; the version in service stays");
    daemon.reads_twice("failed");
    daemon.logs_once("cannot read the registry; the version in service stays");

    std::fs::write(workspace.config(), "[policy]\nreview = 7\n").unwrap();
    daemon.reload();
    assert_eq!(daemon.metric("moderatord_reloads_total{result=\"refused\"}"), Some(1.0));
    daemon.stop();
}

#[test]
fn a_daemon_that_may_continue_serves_the_base_model_until_the_registry_is_back() {
    let broker = broker();
    let workspace = Workspace::with_broker(&broker);
    workspace.memory().record(&workspace.pointer()).unwrap();
    workspace.unmount();
    let (code, _, err) = workspace.run(&["run"]);
    assert_eq!(code, Some(78), "{err}");
    assert!(
        err.contains(&format!("pointer 1 (version {})", workspace.version)),
        "{err}"
    );
    assert!(!workspace.path("registry").exists());

    let daemon = workspace.start(&[("MODERATORD__REGISTRY__ON_MISSING", "continue")]);
    daemon.reads_twice("missing");
    assert!(daemon.serves(""));
    assert_eq!(daemon.metric("moderatord_registry_missing"), Some(1.0));
    assert_eq!(daemon.metric("moderatord_registry_last_read_timestamp_seconds"), None);
    daemon.logs_once("the registry has lost the version in service");
    assert!(!workspace.path("registry").exists());
    workspace.mount();
    eventually("the version is served again", || daemon.serves(&workspace.version));
    assert_eq!(daemon.metric("moderatord_registry_missing"), Some(0.0));
    daemon.stop();
}

#[test]
fn a_registry_and_a_state_folder_that_cannot_be_written_to_are_reported_once() {
    let broker = broker();
    let workspace = Workspace::with_broker(&broker);
    // Even root cannot create a file below another file.
    let records = workspace.path("registry/records");
    std::fs::remove_dir_all(&records).unwrap();
    std::fs::write(&records, "").unwrap();
    std::fs::write(workspace.path("state"), "").unwrap();
    let daemon = workspace.start(&[]);
    daemon.reads_twice("ok");
    daemon.reads_twice("ok");
    daemon.logs_once("cannot store the records that decisions refer to");
    daemon.logs_once("cannot read the pointer remembered in `");
    daemon.logs_once("cannot remember the pointer in effect in `");
    assert!(daemon.serves(&workspace.version));

    std::fs::remove_file(workspace.path("state")).unwrap();
    std::fs::remove_file(&records).unwrap();
    daemon.logs_once("stored the records that decisions refer to");
    let files = ["prompt", "calibration", "policy"].map(|kind| count_files(&records.join(kind)));
    assert_eq!(files, [1, 1, 1]);
    daemon.reads_twice("ok");
    assert_eq!(workspace.memory().recall().unwrap(), Some(workspace.pointer()));
    daemon.stop();
}

#[test]
fn a_lost_registry_stops_every_command_that_would_serve_or_change_it() {
    let workspace = Workspace::new();
    workspace.memory().record(&workspace.pointer()).unwrap();
    let rows: String = (0..20).map(|number| label(number).1 + "\n").collect();
    std::fs::write(workspace.path("labels.jsonl"), rows).unwrap();
    let labels = workspace.path("labels.jsonl").display().to_string();
    let commands = [
        &["check"][..],
        &["score", "--text", "rain"],
        &["eval", "--input", &labels],
        &["retrain", "--input", &labels],
        &["adapters", "promote", &workspace.version],
        &["adapters", "rollback"],
        &["adapters", "gc"],
    ];
    let refused = |loss: &str| {
        for arguments in commands {
            let (code, out, err) = workspace.run(arguments);
            assert_eq!((code, out.as_str()), (Some(78), ""), "{arguments:?}: {err}");
            let expected = format!(
                "the registry at {} {loss}, but pointer 1 (version {}) was in effect when it was last seen; mount or \
                 restore the registry, or delete `{}` to accept it as it is",
                workspace.url(),
                workspace.version,
                workspace.memory().file().display()
            );
            assert!(err.contains(&expected), "{arguments:?}: {err}\nexpected {expected}");
        }
    };
    workspace.unmount();
    refused("does not exist");
    assert_eq!(workspace.run(&["adapters", "list"]).0, Some(78));
    assert!(!workspace.path("registry").exists());

    std::fs::create_dir(workspace.path("registry")).unwrap();
    refused("is empty");
    let (code, out, err) = workspace.run(&["adapters", "list"]);
    assert_eq!((code, out.as_str()), (Some(0), "* bare base model\n"), "{err}");
    assert!(err.contains("the registry has lost the version in service"), "{err}");
    assert_eq!(count_files(&workspace.path("registry")), 0);

    // With `continue`, the base model is served, and the loss is reported.
    let text = std::fs::read_to_string(workspace.config()).unwrap();
    std::fs::write(workspace.config(), text + "on_missing = \"continue\"\n").unwrap();
    let (code, out, err) = workspace.run(&["check"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(
        out.contains("\nadapter   none\n") && out.contains("\nwarning   the registry at "),
        "{out}"
    );
    let (code, out, err) = workspace.run(&["score", "--text", "rain"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("\"adapter\":\"none\""), "{out}");
    assert!(err.contains("the registry has lost the version in service"), "{err}");
    // A retraining would compare with the base model, so it is refused all the same.
    assert_eq!(workspace.run(&["retrain", "--input", &labels]).0, Some(78));

    // Once the memory is deleted, the empty registry counts as new.
    std::fs::remove_file(workspace.memory().file()).unwrap();
    let (code, out, err) = workspace.run(&["check"]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(!out.contains("warning"), "{out}");
    let (code, out, err) = workspace.run(&["retrain", "--input", &labels]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("skipped: "), "{out}");
}

#[test]
fn an_older_registry_is_a_loss_and_a_later_one_is_not() {
    let workspace = Workspace::new();
    let first = workspace.pointer();
    workspace.roll_back();
    workspace.memory().record(&workspace.pointer()).unwrap();
    assert_eq!(workspace.run(&["check"]).0, Some(0));
    std::fs::remove_file(workspace.path("registry/pointers/00000002.json")).unwrap();
    let (code, _, err) = workspace.run(&["check"]);
    assert_eq!(code, Some(78));
    let expected = format!(
        "ends at pointer 1 (version {}), but pointer 2 (the bare base model) was in effect when it was last seen",
        workspace.version
    );
    assert!(err.contains(&expected), "{err}");
    // With `continue`, the version that the older registry has is served.
    let text = std::fs::read_to_string(workspace.config()).unwrap();
    std::fs::write(workspace.config(), text + "on_missing = \"continue\"\n").unwrap();
    let (code, out, err) = workspace.run(&["check"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(
        out.contains(&format!("pointer 1, version {}\n", workspace.version)),
        "{out}"
    );
    assert!(out.contains(&expected), "{out}");
    // A registry whose pointers are newer than the memory is intact.
    std::fs::remove_file(workspace.memory().file()).unwrap();
    workspace.memory().record(&first).unwrap();
    workspace.roll_back();
    let (code, out, err) = workspace.run(&["check"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(!out.contains("warning"), "{out}");
    // Commands that change the registry move the memory forward.
    let (code, _, err) = workspace.run(&["adapters", "promote", &workspace.version]);
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(workspace.memory().recall().unwrap(), Some(workspace.pointer()));
}

#[test]
fn a_memory_that_cannot_be_read_keeps_nothing_from_starting() {
    let workspace = Workspace::new();
    workspace.memory().record(&workspace.pointer()).unwrap();
    std::fs::write(workspace.memory().file(), "{").unwrap();
    for arguments in [&["check"][..], &["score", "--text", "rain"]] {
        let (code, out, err) = workspace.run(arguments);
        assert_eq!(code, Some(0), "{err}");
        assert!(out.contains(&workspace.version), "{out}");
        assert!(err.contains("cannot read the pointer remembered in `"), "{err}");
    }
}

#[test]
fn a_check_writes_nothing_and_decisions_need_no_room_on_the_disk() {
    let workspace = Workspace::new();
    let records = workspace.path("registry/records");
    std::fs::remove_dir_all(&records).unwrap();
    assert_eq!(workspace.run(&["check"]).0, Some(0));
    assert!(!records.exists() && !workspace.path("state").exists());
    std::fs::write(&records, "").unwrap();
    let (code, out, err) = workspace.run(&["score", "--text", "rain"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains(&workspace.version), "{out}");
    assert!(
        err.contains("cannot store the records that decisions refer to"),
        "{err}"
    );
    std::fs::remove_file(&records).unwrap();
    assert_eq!(workspace.run(&["score", "--text", "rain"]).0, Some(0));
    assert_eq!(count_files(&records), 2);
}
