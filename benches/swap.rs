//! Measures how a swap of adapters affects the comments that arrive during it. A daemon receives comments at a steady
//! rate while its registry's pointer moves between two versions. The benchmark compares the latency of comments sent
//! around a swap with that of comments sent between swaps, and the daemon's peak memory with its steady one. Prints
//! ratios within one run.
//!
//! `cargo bench --bench swap` (`-- --rate R --swaps N --model FOLDER`). The defaults are the bundled model, 20 comments
//! per second, and 20 swaps, three seconds apart. `moderatord retrain` trains the two adapters on made-up rows; their
//! quality does not matter here.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot run panics")]

#[path = "../tests/common/labels.rs"]
mod labels;
mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, Headers, Message, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde_json::Value;
use support::arguments::{argument, number, number_argument, option, read_arguments};
use support::brokers::{Broker, serve_if_requested};

const PARTITIONS: i32 = 1;
const SENT_AT: &str = "sent_at_us";
/// The time limit of waiting for the daemon.
const TIMEOUT: Duration = Duration::from_secs(120);
/// The time between two swaps.
const PERIOD: Duration = Duration::from_secs(3);
/// Comments sent within this time after the pointer moves count as sent during the swap, which consists of loading,
/// warming up and handing over.
const DURING: Duration = Duration::from_millis(1500);

fn main() {
    if serve_if_requested() {
        return;
    }
    read_arguments(
        "./dev bench swap",
        "Measures how a swap of adapters affects the latency of comments and the memory of the daemon",
        vec![
            number::<f64>("rate", "R", "Comments per second (default: 20)"),
            number::<u32>("swaps", "N", "Number of swaps (default: 20)"),
            option("model", "FOLDER", "Base model (default: the bundled one)"),
        ],
    );
    let rate = number_argument("rate").unwrap_or(20.0);
    let swaps = number_argument("swaps").unwrap_or(20);
    let mut broker = Broker::embedded();
    for topic in ["comments", "decisions", "dead-letters"] {
        broker.create_topic(topic, PARTITIONS);
    }
    let workspace = Workspace::new(broker.address(), argument("model").map(PathBuf::from));
    let mut out = std::io::stdout().lock();
    let versions = [1, 2].map(|seed| workspace.train(seed));
    workspace.promote(&versions[0]);
    let daemon = workspace.daemon();
    let consumer = reader(broker.address());
    let producer: BaseProducer = client(broker.address()).set("linger.ms", "1").create().unwrap();

    let mut load = Load::new(&producer, &consumer, rate);
    load.wait_until_ready();
    load.run(PERIOD);
    let steady_memory = memory(&daemon, "VmRSS:");
    let mut moved = Vec::new();
    for swap in 0..swaps {
        moved.push(now_us());
        workspace.promote(&versions[usize::from(swap % 2 == 0)]);
        load.run(PERIOD);
    }
    load.finish();
    let peak_memory = memory(&daemon, "VmHWM:");
    drop(daemon);

    let seen: std::collections::BTreeSet<&str> = load.latencies.values().map(|(_, version)| version.as_str()).collect();
    assert_eq!(seen.len(), 2, "only {seen:?} served, expected both versions");
    let is_during = |sent: u64| {
        moved
            .iter()
            .any(|&moved| (moved..moved + DURING.as_micros() as u64).contains(&sent))
    };
    let (mut during, mut between): (Vec<u64>, Vec<u64>) = (Vec::new(), Vec::new());
    for (&sent, &(latency, _)) in &load.latencies {
        if is_during(sent) { &mut during } else { &mut between }.push(latency);
    }
    let ratio = |share: f64| quantile(&mut during.clone(), share) / quantile(&mut between.clone(), share);
    writeln!(
        out,
        "{} comments around {swaps} swaps, {} between them",
        during.len(),
        between.len()
    )
    .unwrap();
    writeln!(
        out,
        "latency around a swap relative to between swaps: p50 {:.2}x, p99 {:.2}x",
        ratio(0.5),
        ratio(0.99)
    )
    .unwrap();
    writeln!(
        out,
        "peak memory relative to steady memory: {:.2}x",
        peak_memory / steady_memory
    )
    .unwrap();
}

fn quantile(values: &mut [u64], share: f64) -> f64 {
    values.sort_unstable();
    values[((values.len() - 1) as f64 * share).round() as usize] as f64
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64
}

fn memory(daemon: &Daemon, key: &str) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.0.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn client(address: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", address).set("fetch.wait.max.ms", "5");
    config
}

fn reader(address: &str) -> BaseConsumer {
    let consumer: BaseConsumer = client(address).set("group.id", "reader").create().unwrap();
    let mut list = TopicPartitionList::new();
    list.add_partition_offset("decisions", 0, Offset::Beginning).unwrap();
    consumer.assign(&list).unwrap();
    consumer
}

/// A temporary folder with the settings, the registry and the training rows.
struct Workspace {
    folder: tempfile::TempDir,
}

impl Workspace {
    fn new(address: &str, model: Option<PathBuf>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = model.map_or_else(String::new, |path| format!("[model]\npath = \"{}\"\n", path.display()));
        let settings = format!(
            "delivery = \"at_least_once\"\n[kafka]\nbrokers = [\"{address}\"]\ninstance = \"bench\"\n\
             [kafka.properties]\n\"session.timeout.ms\" = 6000\n\"fetch.wait.max.ms\" = 10\n\
             [topics]\ncomments = \"comments\"\ndecisions = \"decisions\"\ndead_letters = \"dead-letters\"\n\
             {model}[registry]\nurl = \"file://{0}/registry\"\npoll = \"100ms\"\nkeep = 100\n\
             [retrain]\nepochs = 1\n[http]\nlisten = \"127.0.0.1:0\"\n[log]\nlevel = \"warn\"\n",
            folder.path().display(),
        );
        std::fs::write(folder.path().join("moderatord.toml"), settings).unwrap();
        let rows: String = (0..400).map(|row| labels::label(row).1 + "\n").collect();
        std::fs::write(folder.path().join("rows.jsonl"), rows).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_moderatord")));
        command
            .args(arguments)
            .arg("--config")
            .arg(self.path("moderatord.toml"));
        command
    }

    /// Trains an adapter with a seed and returns its version.
    fn train(&self, seed: u32) -> String {
        let rows = self.path("rows.jsonl");
        let mut command = self.command(&["retrain", "--no-promote", "--input", rows.to_str().unwrap()]);
        let output = finish(command.env("MODERATORD__RETRAIN__SEED", seed.to_string()));
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("version "));
        line.unwrap_or_else(|| panic!("no version in {text}")).trim().to_owned()
    }

    fn promote(&self, version: &str) {
        let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_moderatord")));
        let config = self.path("moderatord.toml");
        finish(command.args(["adapters", "--config", config.to_str().unwrap(), "promote", version]));
    }

    fn daemon(&self) -> Daemon {
        Daemon(self.command(&["run"]).stdout(Stdio::null()).spawn().unwrap())
    }
}

/// A daemon that is killed when the benchmark ends, even if it panics.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn finish(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Sends comments at a steady rate and records the latency of their decisions.
struct Load<'a> {
    producer: &'a BaseProducer,
    consumer: &'a BaseConsumer,
    gap: Duration,
    next: Instant,
    sent: u64,
    /// The latency in microseconds and the version that decided, by the time of sending.
    latencies: BTreeMap<u64, (u64, String)>,
}

impl<'a> Load<'a> {
    fn new(producer: &'a BaseProducer, consumer: &'a BaseConsumer, rate: f64) -> Self {
        Self {
            producer,
            consumer,
            gap: Duration::from_secs_f64(1.0 / rate),
            next: Instant::now(),
            sent: 0,
            latencies: BTreeMap::new(),
        }
    }

    /// Sends one comment and waits for its decision, so that the daemon has loaded its model and joined the group.
    fn wait_until_ready(&mut self) {
        self.send();
        self.finish();
        self.latencies.clear();
        self.sent = 0;
        self.next = Instant::now();
    }

    fn run(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            if Instant::now() >= self.next {
                self.send();
                self.next += self.gap;
            }
            self.receive();
        }
    }

    fn finish(&mut self) {
        let deadline = Instant::now() + TIMEOUT;
        while (self.latencies.len() as u64) < self.sent {
            assert!(
                Instant::now() < deadline,
                "timed out after {} of {} decisions",
                self.latencies.len(),
                self.sent
            );
            self.receive();
        }
    }

    fn send(&mut self) {
        let number = self.sent;
        let sent_at = now_us().to_string();
        let key = format!("c{number}");
        let event =
            format!("{{\"content_id\": \"{key}\", \"text\": \"comment number {number}, see you at the garden\"}}");
        let headers = OwnedHeaders::new().insert(Header {
            key: SENT_AT,
            value: Some(&sent_at),
        });
        let record = BaseRecord::to("comments")
            .partition(0)
            .key(&key)
            .payload(&event)
            .headers(headers);
        self.producer
            .send(record)
            .unwrap_or_else(|(error, _)| panic!("{error}"));
        self.producer.poll(Duration::ZERO);
        self.sent += 1;
    }

    fn receive(&mut self) {
        self.producer.poll(Duration::ZERO);
        let Some(message) = self.consumer.poll(Duration::from_millis(1)) else {
            return;
        };
        let (message, received) = (message.unwrap(), now_us());
        let headers = message.headers().unwrap();
        let sent = headers.iter().find(|header| header.key == SENT_AT).unwrap();
        let sent: u64 = std::str::from_utf8(sent.value.unwrap()).unwrap().parse().unwrap();
        let decision: Value = serde_json::from_slice(message.payload().unwrap()).unwrap();
        let version = decision["model"]["adapter_version"]
            .as_str()
            .unwrap_or("none")
            .to_owned();
        self.latencies.insert(sent, (received.saturating_sub(sent), version));
    }
}
