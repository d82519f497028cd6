//! The command `run` from the point of view of a service manager, and `check` and `demo` on an embedded broker.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::fixture;
use moderatord::kafka::embedded::EmbeddedBroker;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

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

fn try_ask(port: u16, path: &str) -> std::io::Result<String> {
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
        let sent = Command::new("kill")
            .arg(format!("-{name}"))
            .arg(self.0.id().to_string())
            .status();
        assert!(sent.unwrap().success());
    }

    fn is_running(&mut self) -> bool {
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

/// Returns a consumer at the beginning of the decisions.
pub(crate) fn reader(broker: &str) -> BaseConsumer {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", broker)
        .set("group.id", "reader")
        .set("auto.offset.reset", "earliest")
        .set("fetch.wait.max.ms", "10");
    let consumer: BaseConsumer = config.create().unwrap();
    let mut list = rdkafka::TopicPartitionList::new();
    list.add_partition_offset("decisions", 0, rdkafka::Offset::Beginning)
        .unwrap();
    consumer.assign(&list).unwrap();
    consumer
}

pub(crate) fn next_decision(reader: &BaseConsumer) -> serde_json::Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let Some(polled) = reader.poll(PATIENCE) else {
            // A poll also ends early when the client has served an event of its own.
            assert!(Instant::now() < deadline, "no decision in time");
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
    let notifications = Notifications::bind(&folder.path().join("notify"));
    let mut command = moderatord();
    let child = command
        .args(["run", "--config"])
        .arg(&config)
        .env("NOTIFY_SOCKET", folder.path().join("notify"))
        .env("WATCHDOG_USEC", "300000")
        .env("MODERATORD__LOG__LEVEL", "trace")
        .env("MODERATORD__LOG__FORMAT", "json")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // Not a pipe: it would fill up without a reader, and the daemon would block.
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let service = Service(child);
    let first = notifications.state();
    assert!(
        first.starts_with("EXTEND_TIMEOUT_USEC=600000000\nSTATUS=no partition is assigned: waiting for "),
        "{first}"
    );
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

    let reader = reader(&address);
    produce(&address, "before");
    let before = next_decision(&reader);
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
    let after = next_decision(&reader);
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
        "moderatord_append_to_commit_seconds_count 2",
        "moderatord_probability_count 2",
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

/// A port on which connections are not answered until the gate is opened. Then they reach a broker.
struct Gate(TcpListener);

impl Gate {
    fn close() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    fn address(&self) -> String {
        self.0.local_addr().unwrap().to_string()
    }

    fn open(self, broker: &str) {
        let broker = broker.to_owned();
        // The threads end with the connections, and the first one with the test's process.
        std::thread::spawn(move || {
            for client in self.0.incoming() {
                let (client, server) = (client.unwrap(), TcpStream::connect(&broker).unwrap());
                for (mut from, mut to) in [
                    (client.try_clone().unwrap(), server.try_clone().unwrap()),
                    (server, client),
                ] {
                    std::thread::spawn(move || std::io::copy(&mut from, &mut to));
                }
            }
        });
    }
}

fn run_command(config: &Path, log: &Path) -> Command {
    let mut command = moderatord();
    command
        .args(["run", "--config"])
        .arg(config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(log).unwrap());
    command
}

/// Waits until the daemon listens on a port.
fn await_port(service: &mut Service, port: u16, log: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        let log = || std::fs::read_to_string(log).unwrap();
        assert!(service.is_running() && Instant::now() < deadline, "{}", log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_daemon_that_is_starting_answers_and_remembers_a_reload() {
    let (broker, gate) = (broker(), Gate::close());
    let folder = tempfile::tempdir().unwrap();
    let (config, port, log) = (
        folder.path().join("moderatord.toml"),
        free_port(),
        folder.path().join("log"),
    );
    std::fs::write(&config, settings(&gate.address(), port)).unwrap();
    let notifications = Notifications::bind(&folder.path().join("notify"));
    let mut command = run_command(&config, &log);
    let child = command.env("NOTIFY_SOCKET", folder.path().join("notify")).spawn();
    let mut service = Service(child.unwrap());
    await_port(&mut service, port, &log);
    // The daemon waits for the broker, so it stays in this phase until the gate is opened.
    assert!(ask(port, "/healthz").starts_with("HTTP/1.1 200"));
    let readiness = ask(port, "/readyz");
    assert!(
        readiness.starts_with("HTTP/1.1 503") && readiness.ends_with("starting\n"),
        "{readiness}"
    );
    let metrics = ask(port, "/metrics");
    assert!(metrics.contains("moderatord_http_open_connections 1\n"), "{metrics}");
    service.signal("HUP");
    // The start takes as long as the broker needs, and the service manager is told so.
    let waiting = notifications.state();
    let expected = format!(
        "EXTEND_TIMEOUT_USEC=600000000\nSTATUS=waiting for the brokers: cannot query the brokers {}: ",
        gate.address()
    );
    assert!(waiting.starts_with(&expected), "{waiting}");
    gate.open(&broker.address());
    for text in notifications.await_ready() {
        assert!(text.starts_with("EXTEND_TIMEOUT_USEC=600000000\nSTATUS="), "{text}");
    }
    assert!(notifications.state().starts_with("RELOADING=1"));
    assert_eq!(notifications.state(), "READY=1\nSTATUS=serving");
    service.signal("TERM");
    let code = service.end();
    let log = std::fs::read_to_string(&log).unwrap();
    assert_eq!(code, Some(0), "{log}");
    for line in ["waiting for the brokers", "the brokers answer"] {
        assert_eq!(log.matches(line).count(), 1, "{line} in {log}");
    }
}

#[test]
fn a_daemon_that_is_starting_stops_at_once_on_a_signal() {
    for signal in ["TERM", "INT"] {
        let gate = Gate::close();
        let folder = tempfile::tempdir().unwrap();
        let (config, port, log) = (
            folder.path().join("moderatord.toml"),
            free_port(),
            folder.path().join("log"),
        );
        std::fs::write(&config, settings(&gate.address(), port)).unwrap();
        let mut service = Service(run_command(&config, &log).spawn().unwrap());
        await_port(&mut service, port, &log);
        service.signal(signal);
        // The gate stays closed. Without the signal, the daemon would report that no broker answers, and exit with 1.
        let code = service.end();
        let log = std::fs::read_to_string(&log).unwrap();
        assert_eq!(code, Some(0), "{signal}: {log}");
        assert!(log.contains("stopped by a signal before serving"), "{log}");
    }
}

#[test]
fn a_port_that_is_in_use_is_reported_with_the_other_problems() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let broker = broker();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("moderatord.toml");
    let listen = format!("cannot listen on 127.0.0.1:{port} (http.listen): Address already in use");
    let valid = settings(&broker.address(), port);
    let missing_topic = valid.replace("\"decisions\"", "\"nowhere\"");
    for (settings, code, others) in [
        // The port may become free, so a restart may help.
        (valid, 1, vec![]),
        (
            missing_topic.replace("[model]\n", "[model]\nadapter = \"/nowhere/adapter\"\n"),
            78,
            vec!["topics.decisions = \"nowhere\"", "/nowhere/adapter/adapter_config.json"],
        ),
    ] {
        std::fs::write(&config, settings).unwrap();
        let output = moderatord().args(["run", "--config"]).arg(&config).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{error}");
        assert!(error.contains(&listen), "{error}");
        for other in others {
            assert!(error.contains(other), "{other} in {error}");
        }
    }
}

#[test]
fn clients_of_the_http_port_leave_file_descriptors_for_the_broker() {
    let broker = broker();
    let address = broker.address();
    let folder = tempfile::tempdir().unwrap();
    let (config, port, log) = (
        folder.path().join("moderatord.toml"),
        free_port(),
        folder.path().join("log"),
    );
    std::fs::write(&config, settings(&address, port)).unwrap();
    let notifications = Notifications::bind(&folder.path().join("notify"));
    let run = run_command(&config, &log);
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -Sn 64 && ulimit -Hn 128 && exec \"$0\" \"$@\""])
        .arg(run.get_program())
        .args(run.get_args())
        .env("NOTIFY_SOCKET", folder.path().join("notify"))
        .stderr(std::fs::File::create(&log).unwrap());
    let service = Service(command.spawn().unwrap());
    notifications.await_ready();
    let reader = reader(&address);
    produce(&address, "before");
    assert_eq!(next_decision(&reader)["content_id"], "before");

    let clients: Vec<TcpStream> = (0..200)
        .map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap())
        .collect();
    // The daemon has to connect again, for which it needs file descriptors.
    broker.cluster().broker_down(1).unwrap();
    broker.cluster().broker_up(1).unwrap();
    produce(&address, "after");
    assert_eq!(next_decision(&reader)["content_id"], "after");
    drop(clients);
    let deadline = Instant::now() + PATIENCE;
    // While the connections of the clients are being closed, further ones may still be refused.
    let metrics = loop {
        let metrics = try_ask(port, "/metrics").unwrap_or_default();
        if metrics.contains("moderatord_http_open_connections 1\n") {
            break metrics;
        }
        assert!(Instant::now() < deadline, "{metrics}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(metrics.contains("process_max_fds 128"), "{metrics}");
    let refused = "moderatord_http_connections_total{result=\"refused\"} ";
    let refused = metrics.lines().find_map(|line| line.strip_prefix(refused)).unwrap();
    // 16 are allowed: an eighth of the hard limit, to which the daemon raises its own.
    assert!(refused.parse::<u32>().unwrap() >= 200 - 16, "{metrics}");
    service.signal("TERM");
    assert_eq!(service.end(), Some(0), "{}", std::fs::read_to_string(&log).unwrap());
}

#[test]
fn a_log_that_cannot_be_written_does_not_stop_the_daemon() {
    // A file that may not grow, and a pipe without a reader.
    for is_pipe in [false, true] {
        let broker = broker();
        let address = broker.address();
        let folder = tempfile::tempdir().unwrap();
        let (config, log) = (folder.path().join("moderatord.toml"), folder.path().join("log"));
        std::fs::write(&config, settings(&address, free_port())).unwrap();
        let notifications = Notifications::bind(&folder.path().join("notify"));
        let run = run_command(&config, &log);
        let mut command = Command::new("sh");
        command
            .args(["-c", "ulimit -f 0; exec \"$0\" \"$@\""])
            .arg(run.get_program())
            .args(run.get_args())
            .env("NOTIFY_SOCKET", folder.path().join("notify"))
            .env("MODERATORD__LOG__LEVEL", "trace")
            .stderr(std::fs::File::create(&log).unwrap());
        if is_pipe {
            let (unread, pipe) = std::io::pipe().unwrap();
            drop(unread);
            command.stderr(pipe);
        }
        let service = Service(command.spawn().unwrap());
        notifications.await_ready();
        let reader = reader(&address);
        produce(&address, "unlogged");
        assert_eq!(next_decision(&reader)["content_id"], "unlogged");
        service.signal("TERM");
        assert_eq!(service.end(), Some(0), "pipe: {is_pipe}");
    }
}

#[test]
fn an_invalid_client_setting_ends_the_daemon_at_startup() {
    let broker = EmbeddedBroker::start().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("moderatord.toml");
    let text = settings(&broker.address(), 0).replace("[topics]\n", "\"sasl.mechanizm\" = \"PLAIN\"\n[topics]\n");
    std::fs::write(&config, text).unwrap();
    let output = moderatord().args(["run", "--config"]).arg(&config).output().unwrap();
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
    let output = moderatord().args(["check", "--config"]).arg(&config).output().unwrap();
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
    let output = moderatord().args(["check", "--config"]).arg(&config).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("cannot query the brokers 127.0.0.1:1: "), "{error}");
}

#[test]
fn a_demo_counts_everything_once() {
    let mut demo = moderatord();
    let demo = demo.args(["demo", "--events", "100", "--rate", "200", "--json"]);
    let output = demo.output().unwrap();
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
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("broker    127.0.0.1:"), "{text}");
    assert!(
        text.contains("produced 40, decided 40, dead letters 0, lost 0, duplicated 0"),
        "{text}"
    );
}
