//! The command `run` from the point of view of a service manager, and `check` and `demo` on an embedded broker.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::fixture;
use crate::common::process::{Start, send_signal};
use crate::model_defaults::model_with_defaults;
use moderatord::kafka::embedded::EmbeddedBroker;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde_json::json;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn moderatord() -> Command {
    crate::common::without_settings(env!("CARGO_BIN_EXE_moderatord"))
}

pub(crate) fn broker() -> EmbeddedBroker {
    let broker = EmbeddedBroker::start().unwrap();
    for topic in ["comments", "decisions", "dead"] {
        broker.create_topic(topic, 1).unwrap();
    }
    broker
}

pub(crate) fn settings(broker: &str, port: u16) -> String {
    format!(
        "delivery = \"at_least_once\"\n[kafka]\nbrokers = [\"{broker}\"]\ninstance = \"test\"\n\
         [kafka.properties]\n\"session.timeout.ms\" = 3000\n\"heartbeat.interval.ms\" = 300\n\"fetch.wait.max.ms\" = 10\n\
         [topics]\ncomments = \"comments\"\ndecisions = \"decisions\"\ndead_letters = \"dead\"\n\
         [model]\npath = \"{}\"\n[http]\nlisten = \"127.0.0.1:{port}\"\n",
        fixture("gemma3").display()
    )
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub(crate) fn ask(port: u16, path: &str) -> String {
    try_ask(port, path).unwrap()
}

pub(crate) fn try_ask(port: u16, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The messages from the service to the service manager.
pub(crate) struct Notifications(std::sync::mpsc::Receiver<String>);

impl Notifications {
    pub(crate) fn bind(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok(length) = socket.recv(&mut buffer) {
                let text = String::from_utf8(buffer[..length].to_vec()).unwrap();
                if sender.send(text).is_err() {
                    break;
                }
            }
        });
        Self(receiver)
    }

    /// Returns the next watchdog ping if `is_ping` is true, and the next other message otherwise.
    fn next(&self, is_ping: bool) -> String {
        loop {
            let text = self.0.recv_timeout(PATIENCE).unwrap();
            if (text == "WATCHDOG=1") == is_ping {
                return text;
            }
        }
    }

    pub(crate) fn state(&self) -> String {
        self.next(false)
    }

    /// Returns the messages until none arrives for this long.
    pub(crate) fn until_silence(&self, time: Duration) -> Vec<String> {
        std::iter::from_fn(|| self.0.recv_timeout(time).ok()).collect()
    }

    /// Waits until the service is ready, and returns the messages before that.
    pub(crate) fn await_ready(&self) -> Vec<String> {
        let mut before = Vec::new();
        loop {
            match self.state() {
                text if text == "READY=1\nSTATUS=serving" => return before,
                text => before.push(text),
            }
        }
    }
}

pub(crate) struct Service(pub(crate) Child);

impl Service {
    pub(crate) fn signal(&self, name: &str) {
        send_signal(self.0.id(), name);
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    pub(crate) fn end(mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        while self.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the service does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.0.wait().unwrap().code()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

pub(crate) fn produce(broker: &str, id: &str) {
    let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", broker).create().unwrap();
    let event = format!(r#"{{"content_id":"{id}","text":"zebramarkword in the garden"}}"#);
    producer
        .send(BaseRecord::to("comments").key("k").payload(&event))
        .unwrap();
    producer.flush(PATIENCE).unwrap();
}

/// Returns a consumer at the beginning of a topic of one partition.
pub(crate) fn reader(broker: &str, topic: &str) -> BaseConsumer {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", broker)
        .set("group.id", "reader")
        .set("auto.offset.reset", "earliest")
        .set("fetch.wait.max.ms", "10");
    let consumer: BaseConsumer = config.create().unwrap();
    let mut list = rdkafka::TopicPartitionList::new();
    list.add_partition_offset(topic, 0, rdkafka::Offset::Beginning).unwrap();
    consumer.assign(&list).unwrap();
    consumer
}

pub(crate) fn next_record(reader: &BaseConsumer) -> serde_json::Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let Some(polled) = reader.poll(PATIENCE) else {
            // A poll also ends early when the client has served an event of its own.
            assert!(Instant::now() < deadline, "no record in time");
            continue;
        };
        // The reader, too, reports that a broker is down.
        match polled {
            Ok(message) => {
                return serde_json::from_slice(message.payload().unwrap()).unwrap();
            }
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    }
}

#[test]
fn a_service_is_ready_reloads_its_policy_and_stops() {
    let broker = broker();
    let address = broker.address();
    let folder = tempfile::tempdir().unwrap();
    let (config, port) = (folder.path().join("moderatord.toml"), free_port());
    std::fs::write(&config, settings(&address, port)).unwrap();
    let log = folder.path().join("log");
    let model = tempfile::tempdir().unwrap();
    model_with_defaults(model.path(), &json!({"format": 1, "languages": ["en"]}));
    let notifications = Notifications::bind(&folder.path().join("notify"));
    let mut command = moderatord();
    let child = command
        .args(["run", "--config"])
        .arg(&config)
        .env("MODERATORD__MODEL__PATH", model.path())
        .env("NOTIFY_SOCKET", folder.path().join("notify"))
        .env("WATCHDOG_USEC", "300000")
        .env("MODERATORD__LOG__LEVEL", "trace")
        .env("MODERATORD__LOG__FORMAT", "json")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // Not a pipe: it would fill up without a reader, and the daemon would block.
        .stderr(std::fs::File::create(&log).unwrap())
        .start()
        .unwrap();
    let service = Service(child);
    for status in [
        "loading the model",
        "warming up the model",
        "no partition is assigned: waiting for ",
    ] {
        let expected = format!("EXTEND_TIMEOUT_USEC=600000000\nSTATUS={status}");
        let text = notifications.state();
        assert!(text.starts_with(&expected), "{text}");
    }
    assert!(ask(port, "/healthz").starts_with("HTTP/1.1 200"));
    let answer = ask(port, "/readyz");
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.contains("\r\n\r\nno partition is assigned: "),
        "{answer}"
    );
    assert!(ask(port, "/metrics").contains("\nmoderatord_ready 0\n"));
    // A reload does not make the service ready.
    service.signal("HUP");
    for text in notifications.await_ready() {
        assert!(text.starts_with("EXTEND_TIMEOUT_USEC=600000000\nSTATUS="), "{text}");
    }
    assert!(notifications.state().starts_with("RELOADING=1"));
    assert_eq!(notifications.state(), "READY=1\nSTATUS=serving");
    assert!(ask(port, "/healthz").starts_with("HTTP/1.1 200"));
    assert!(ask(port, "/metrics").contains("\nmoderatord_ready 1\n"));
    assert!(ask(port, "/readyz").starts_with("HTTP/1.1 200"));
    notifications.next(true);

    let reader = reader(&address, "decisions");
    produce(&address, "before");
    let before = next_record(&reader);
    assert_eq!(
        (&before["content_id"], &before["action"]),
        (&"before".into(), &"allow".into())
    );

    // An invalid file changes nothing. A valid one is in force from the next comment.
    std::fs::write(&config, settings(&address, port) + "[policy]\nreview = 7\n").unwrap();
    service.signal("HUP");
    assert!(notifications.state().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert_eq!(notifications.state(), "READY=1\nSTATUS=serving");
    std::fs::write(
        &config,
        settings(&address, port) + "[policy]\nreview = 0.0\nblock = 0.01\n",
    )
    .unwrap();
    service.signal("HUP");
    assert!(notifications.state().starts_with("RELOADING=1"));
    assert_eq!(notifications.state(), "READY=1\nSTATUS=serving");
    produce(&address, "after");
    let after = next_record(&reader);
    assert_eq!(
        (&after["content_id"], &after["action"]),
        (&"after".into(), &"block".into())
    );
    assert_ne!(before["policy"], after["policy"]);
    assert_eq!(before["margin"], after["margin"]);

    // A comment is counted when its offset is committed, shortly after its decision becomes visible.
    let deadline = Instant::now() + PATIENCE;
    let metrics = loop {
        let metrics = ask(port, "/metrics");
        if metrics.contains("moderatord_events_total{outcome=\"decided\"} 2") {
            break metrics;
        }
        assert!(Instant::now() < deadline, "{metrics}");
        std::thread::sleep(Duration::from_millis(20));
    };
    for line in [
        "moderatord_decisions_total{action=\"allow\"} 1",
        "moderatord_decisions_total{action=\"block\"} 1",
        // Of which the second is that of a text in the cache.
        "moderatord_competence_total{competence=\"in_scope\"} 2",
        "moderatord_append_to_commit_seconds_count 2",
        "moderatord_probability_count 2",
        "moderatord_cache_lookups_total{result=\"miss\"} 1",
        "moderatord_cache_lookups_total{result=\"hit\"} 1",
        "moderatord_cache_entries 1",
        "moderatord_model_info{",
        "moderatord_build_info{version=\"0.1.0\",commit=\"",
        "\nprocess_cpu_seconds_total ",
        "\nprocess_resident_memory_bytes ",
        "moderatord_assigned_partitions 1",
        "moderatord_brokers_up 1",
        "moderatord_last_commit_timestamp_seconds 1",
        "moderatord_oldest_unfinished_seconds 0",
        "moderatord_queue_events{queue=\"commit\"} 0",
        "moderatord_rebalances_total{kind=\"assigned\"} 1",
        "moderatord_rebalances_total{kind=\"lost\"} 0",
        "moderatord_gap_records_total 0",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }

    service.signal("TERM");
    assert_eq!(
        notifications.state(),
        "STOPPING=1\nEXTEND_TIMEOUT_USEC=30000000\nSTATUS=draining"
    );
    let code = service.end();
    let log = std::fs::read_to_string(&log).unwrap();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("policy.review = 7"), "{log}");
    assert!(
        log.lines()
            .all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()),
        "{log}"
    );
    assert!(!log.contains("zebramarkword") && !metrics.contains("zebramarkword"));
}

#[test]
fn an_invalid_client_setting_ends_the_daemon_at_startup() {
    let broker = EmbeddedBroker::start().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("moderatord.toml");
    let text = settings(&broker.address(), 0).replace("[topics]\n", "\"sasl.mechanizm\" = \"PLAIN\"\n[topics]\n");
    std::fs::write(&config, text).unwrap();
    let output = moderatord().args(["run", "--config"]).arg(&config).finish().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{error}");
    assert!(
        error.contains("kafka.properties.sasl.mechanizm: no such configuration property"),
        "{error}"
    );
}

#[test]
fn a_check_describes_the_topics() {
    let broker = broker();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("moderatord.toml");
    std::fs::write(&config, settings(&broker.address(), 0)).unwrap();
    let output = moderatord().args(["check", "--config"]).arg(&config).finish().unwrap();
    let (out, error) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    assert_eq!(output.status.code(), Some(0), "{error}");
    let expected = format!(
        "kafka     {}, group moderatord, instance test, at least once",
        broker.address()
    );
    assert!(out.contains(&expected), "{out}");
    assert!(
        out.contains("topics    comments (1 partition) to decisions (1) and dead (1)"),
        "{out}"
    );
}

#[test]
fn a_check_fails_if_no_broker_answers() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("moderatord.toml");
    std::fs::write(&config, settings("127.0.0.1:1", 0)).unwrap();
    let output = moderatord().args(["check", "--config"]).arg(&config).finish().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("cannot query the brokers 127.0.0.1:1: "), "{error}");
}

#[test]
fn a_demo_counts_everything_once() {
    let mut demo = moderatord();
    let demo = demo.args(["demo", "--events", "100", "--rate", "200", "--json"]);
    let output = demo.finish().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{error}");
    let summary: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for (key, value) in [
        ("produced", 100),
        ("decided", 98),
        ("dead_lettered", 2),
        ("lost", 0),
        ("duplicated", 0),
    ] {
        assert_eq!(summary[key], value, "{summary}");
    }
    for key in ["p50_ms", "p99_ms", "comments_per_second"] {
        assert!(summary[key].as_f64().unwrap() > 0.0, "{summary}");
    }
}

#[test]
fn a_demo_prints_its_broker_and_a_summary() {
    let output = moderatord()
        .args(["demo", "--events", "40", "--rate", "0"])
        .finish()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("broker    127.0.0.1:"), "{text}");
    assert!(
        text.contains("produced 40, decided 40, dead letters 0, lost 0, duplicated 0"),
        "{text}"
    );
}
