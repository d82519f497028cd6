//! `moderatord run` while it starts, and under the limits of its process.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::cli_run::*;
use crate::common::process::{Start, broker_down};

/// Returns the command of [`run_command`], run by a shell after it has set limits.
fn limited_command(limits: &str, config: &Path, log: &Path) -> Command {
    let run = run_command(config, log);
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("{limits}; exec \"$0\" \"$@\"")])
        .arg(run.get_program())
        .args(run.get_args())
        .stderr(std::fs::File::create(log).unwrap());
    command
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
    let child = command.env("NOTIFY_SOCKET", folder.path().join("notify")).start();
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
    // Loading may take this long, and so may warming up, after the wait for the broker.
    assert_eq!(
        notifications.state(),
        "EXTEND_TIMEOUT_USEC=600000000\nSTATUS=loading the model"
    );
    // The start takes as long as the broker needs, and the service manager is told so.
    let waiting = notifications.state();
    let expected = format!(
        "EXTEND_TIMEOUT_USEC=600000000\nSTATUS=waiting for the brokers: cannot query the brokers {}: ",
        gate.address()
    );
    assert!(waiting.starts_with(&expected), "{waiting}");
    gate.open(&broker.address());
    let before = notifications.await_ready();
    for text in &before {
        assert!(text.starts_with("EXTEND_TIMEOUT_USEC=600000000\nSTATUS="), "{text}");
    }
    let warms_up = |text: &String| text.ends_with("STATUS=warming up the model");
    assert!(before.iter().any(warms_up), "{before:?}");
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
        let mut service = Service(run_command(&config, &log).start().unwrap());
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
        let output = moderatord().args(["run", "--config"]).arg(&config).finish().unwrap();
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
    let mut command = limited_command("ulimit -Sn 64 && ulimit -Hn 128", &config, &log);
    command.env("NOTIFY_SOCKET", folder.path().join("notify"));
    let service = Service(command.start().unwrap());
    notifications.await_ready();
    let reader = reader(&address, "decisions");
    produce(&address, "before");
    assert_eq!(next_record(&reader)["content_id"], "before");

    let clients: Vec<TcpStream> = (0..200)
        .map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap())
        .collect();
    // The daemon has to connect again, for which it needs file descriptors.
    broker_down(broker.cluster(), 1);
    broker.cluster().broker_up(1).unwrap();
    produce(&address, "after");
    assert_eq!(next_record(&reader)["content_id"], "after");
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
        let mut command = limited_command("ulimit -f 0", &config, &log);
        command
            .env("NOTIFY_SOCKET", folder.path().join("notify"))
            .env("MODERATORD__LOG__LEVEL", "trace");
        if is_pipe {
            let (unread, pipe) = std::io::pipe().unwrap();
            drop(unread);
            command.stderr(pipe);
        }
        let service = Service(command.start().unwrap());
        notifications.await_ready();
        let reader = reader(&address, "decisions");
        produce(&address, "unlogged");
        assert_eq!(next_record(&reader)["content_id"], "unlogged");
        service.signal("TERM");
        assert_eq!(service.end(), Some(0), "pipe: {is_pipe}");
    }
}
