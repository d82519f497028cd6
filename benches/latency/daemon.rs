//! A daemon in a process of its own, so that its CPU time is its own.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use crate::argument;
use crate::support::brokers::Broker;
use crate::support::cpu_time_of;

pub const PARTITIONS: i32 = 4;

/// The topics that a daemon reads and writes.
#[derive(Clone)]
pub struct Topics {
    pub comments: String,
    pub decisions: String,
}

/// A daemon that is killed when the benchmark ends, even if it panics.
pub struct Daemon {
    process: Child,
    pub topics: Topics,
    _folder: tempfile::TempDir,
}

impl Daemon {
    /// Starts a daemon on new topics, with settings of the form `KEY=VALUE`, in TOML.
    pub fn start(broker: &mut Broker, settings: &[String]) -> Self {
        let [comments, decisions, dead_letters] = ["comments", "decisions", "dead-letters"].map(unique);
        for topic in [&comments, &decisions, &dead_letters] {
            broker.create_topic(topic, PARTITIONS);
        }
        let folder = tempfile::tempdir().unwrap();
        let mut text = settings.join("\n");
        text += &format!(
            "\nkafka.brokers = [\"{}\"]\nkafka.instance = \"bench\"\nkafka.group = \"{}\"\n\
             topics = {{ comments = \"{comments}\", decisions = \"{decisions}\", dead_letters = \"{dead_letters}\" }}\n\
             http.listen = \"127.0.0.1:0\"\nlog.level = \"warn\"\n",
            broker.address(),
            unique("group"),
        );
        if !broker.is_apache() {
            // On the embedded broker, joining a group takes as long as the session timeout, and new data does not end a
            // fetch that waits.
            text += "delivery = \"at_least_once\"\n\
                     kafka.properties.\"session.timeout.ms\" = 6000\n\
                     kafka.properties.\"fetch.wait.max.ms\" = 5\n";
        }
        let file = folder.path().join("moderatord.toml");
        std::fs::write(&file, text).unwrap();
        let program = argument("daemon").unwrap_or_else(|| env!("CARGO_BIN_EXE_moderatord").to_owned());
        let process = Command::new(program)
            .arg("run")
            .arg("--config")
            .arg(&file)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            process,
            topics: Topics { comments, decisions },
            _folder: folder,
        }
    }

    /// Returns the CPU time of all threads of the daemon.
    pub fn cpu_time(&self) -> Duration {
        cpu_time_of(&self.process.id().to_string())
    }

    /// Returns the resident memory in MiB.
    pub fn resident_mib(&self) -> f64 {
        self.status("VmRSS")
    }

    /// Returns the largest resident memory so far in MiB.
    pub fn peak_mib(&self) -> f64 {
        self.status("VmHWM")
    }

    /// Returns a field of the process's status that is in KiB, in MiB.
    fn status(&self, name: &str) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib / 1024.0
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Returns a name that the broker has not seen before.
fn unique(name: &str) -> String {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis();
    format!("latency-{name}-{now}-{}", COUNT.fetch_add(1, Ordering::Relaxed))
}
