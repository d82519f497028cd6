//! The server over real sockets: its answers, and its limits on connections.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::super::health::Phase;
use super::super::metrics::{EVENTS, HTTP_CONNECTIONS, HTTP_OPEN_CONNECTIONS, install};
use super::super::work::{GroupState, StreamWork};
use super::*;

/// How long a test waits for the server.
const PATIENCE: Duration = Duration::from_secs(30);

/// Limits that no test reaches, except for those that it changes.
const GENEROUS: ConnectionLimits = ConnectionLimits {
    connections: 64,
    connections_per_client: 64,
    write: Duration::from_secs(60),
    head: PATIENCE,
    lifetime: PATIENCE,
    close: PATIENCE,
};

/// A duration that a test can wait out.
const SHORT: Duration = Duration::from_millis(300);

/// A server whose connections no other test counts.
struct Fixture {
    server: HttpServer,
    health: Arc<Health>,
    metrics: Exporter,
    _alone: MutexGuard<'static, ()>,
}

impl Fixture {
    fn start(limits: ConnectionLimits) -> Self {
        static METRICS: LazyLock<Exporter> = LazyLock::new(|| install().unwrap());
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let health = Arc::new(Health::new(Duration::from_secs(60)));
        let metrics = METRICS.clone();
        let state = HttpState {
            metrics: metrics.clone(),
            health: Arc::clone(&health),
            now: Instant::now,
        };
        let router = router(state).route("/large", get(|| async { vec![b'x'; 32 << 20] }));
        let address = ([127, 0, 0, 1], 0).into();
        let server = HttpServer::start("http", address, site(router, limits), run_upkeep(metrics.clone())).unwrap();
        Self {
            server,
            health,
            metrics,
            _alone: alone,
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.server.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a request on a connection of its own, and returns the answer.
    fn ask(&self, path: &str) -> String {
        let mut stream = self.connect();
        send(&mut stream, path, "Connection: close\r\n");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Returns a metric without its labels' quotes, or 0 if it has not been recorded.
    fn metric(&self, name: &str) -> u64 {
        let text = self.metrics.render();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().unwrap())
    }

    fn connections(&self, result: &str) -> u64 {
        self.metric(&format!("{HTTP_CONNECTIONS}{{result=\"{result}\"}}"))
    }

    /// Waits until a metric has a value, which a connection's task may set after the client has seen it end.
    fn await_value(&self, expected: u64, read: impl Fn(&Self) -> u64) {
        let deadline = Instant::now() + PATIENCE;
        while read(self) != expected {
            assert!(Instant::now() < deadline, "{} is not {expected}", read(self));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn send(stream: &mut TcpStream, path: &str, headers: &str) {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n").unwrap();
}

/// Reads until the server closes the connection. Returns what it sent.
fn read_to_end(mut stream: &TcpStream) -> Vec<u8> {
    let (mut read, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return read,
            Ok(length) => read.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return read,
            Err(error) => panic!("the connection stays open: {error}"),
        }
    }
}

#[test]
fn health_checks_and_metrics_are_served_over_http() {
    let server = Fixture::start(GENEROUS);
    assert!(server.ask("/healthz").starts_with("HTTP/1.1 200"));
    let starting = server.ask("/readyz");
    assert!(
        starting.starts_with("HTTP/1.1 503") && starting.ends_with("starting\n"),
        "{starting}"
    );
    server.health.enter(Phase::Serving);
    assert!(server.ask("/readyz").ends_with("no batch scored yet\n"));
    server.health.record_scored(Instant::now());
    assert!(server.ask("/metrics").contains("moderatord_ready 0\n"));
    server.health.watch(|| StreamWork {
        group: GroupState::Settled,
        ..StreamWork::default()
    });
    assert!(server.ask("/readyz").starts_with("HTTP/1.1 200"));
    assert!(server.ask("/metrics").contains("moderatord_ready 1\n"));
    metrics::counter!(EVENTS, "outcome" => "decided").increment(3);
    let metrics = server.ask("/metrics");
    assert!(
        metrics.contains("moderatord_events_total{outcome=\"decided\"} 3"),
        "{metrics}"
    );
    assert!(server.ask("/nothing").starts_with("HTTP/1.1 404"));
}

#[test]
fn a_client_that_sends_its_request_slowly_is_disconnected() {
    let server = Fixture::start(ConnectionLimits {
        head: SHORT,
        ..GENEROUS
    });
    let before = server.connections("timed_out");
    let silent = server.connect();
    let mut unfinished = server.connect();
    unfinished.write_all(b"GET /healthz HTTP/1.1\r\nHost: l").unwrap();
    let mut trickling = server.connect();
    trickling.write_all(b"GET /healthz HTTP/1.1\r\n").unwrap();
    let deadline = Instant::now() + PATIENCE;
    // Each byte in time does not extend the time for the whole head.
    while trickling.write_all(b"a").is_ok() {
        assert!(Instant::now() < deadline, "a trickling client stays connected");
        std::thread::sleep(SHORT / 10);
    }
    read_to_end(&silent);
    read_to_end(&unfinished);
    server.await_value(before + 3, |server| server.connections("timed_out"));
    // The same applies between two requests.
    let mut idle = server.connect();
    send(&mut idle, "/healthz", "");
    assert!(read_to_end(&idle).starts_with(b"HTTP/1.1 200"));
    server.await_value(before + 4, |server| server.connections("timed_out"));
    server.await_value(0, |server| server.metric(HTTP_OPEN_CONNECTIONS));
}

#[test]
fn a_request_with_large_headers_is_refused() {
    let server = Fixture::start(GENEROUS);
    let before = server.connections("invalid");
    let padding = format!("X-Padding: {}\r\n", "a".repeat(7 << 10));
    let mut stream = server.connect();
    send(&mut stream, "/healthz", &format!("{padding}Connection: close\r\n"));
    assert!(read_to_end(&stream).starts_with(b"HTTP/1.1 200"));
    let mut stream = server.connect();
    send(&mut stream, "/healthz", &format!("{padding}{padding}"));
    assert!(read_to_end(&stream).starts_with(b"HTTP/1.1 431"));
    // A head without an end is not read to its end.
    let mut endless = server.connect();
    endless.write_all(b"GET /healthz HTTP/1.1\r\nX-Padding: ").unwrap();
    let mut sent = 0;
    while endless.write_all(&[b'a'; 4096]).is_ok() {
        sent += 4096;
        assert!(sent < 256 << 20, "the server reads a head of {sent} bytes");
    }
    server.await_value(before + 2, |server| server.connections("invalid"));
}

#[test]
fn a_request_with_a_body_is_refused() {
    let server = Fixture::start(GENEROUS);
    for headers in ["Content-Length: 1000000000\r\n", "Transfer-Encoding: chunked\r\n"] {
        let mut stream = server.connect();
        send(&mut stream, "/healthz", headers);
        assert!(read_to_end(&stream).starts_with(b"HTTP/1.1 413"), "{headers}");
    }
    let mut stream = server.connect();
    stream
        .write_all(b"POST /healthz HTTP/1.1\r\nHost: l\r\nConnection: close\r\n\r\n")
        .unwrap();
    assert!(read_to_end(&stream).starts_with(b"HTTP/1.1 405"));
}

#[test]
fn more_connections_than_allowed_are_closed_at_once() {
    let server = Fixture::start(ConnectionLimits {
        connections: 8,
        ..GENEROUS
    });
    let before = server.connections("refused");
    let mut open: Vec<TcpStream> = (0..8).map(|_| server.connect()).collect();
    server.await_value(8, |server| server.metric(HTTP_OPEN_CONNECTIONS));
    for _ in 0..100 {
        assert_eq!(read_to_end(&server.connect()), b"");
    }
    assert_eq!(server.connections("refused"), before + 100);
    assert_eq!(server.metric(HTTP_OPEN_CONNECTIONS), 8);
    // Those that are open still work, and each that ends makes room for another.
    for mut stream in open.drain(..) {
        send(&mut stream, "/healthz", "Connection: close\r\n");
        assert!(read_to_end(&stream).starts_with(b"HTTP/1.1 200"));
    }
    server.await_value(0, |server| server.metric(HTTP_OPEN_CONNECTIONS));
    assert!(server.ask("/healthz").starts_with("HTTP/1.1 200"));
}

#[test]
fn a_client_that_reads_no_answers_is_cut_off() {
    let server = Fixture::start(ConnectionLimits {
        write: Duration::from_millis(200),
        ..GENEROUS
    });
    let mut greedy = server.connect();
    greedy.set_nonblocking(true).unwrap();
    let request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(100);
    // Until the buffers of both sides are full, so that the server neither writes nor reads.
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut last = Instant::now();
    while last.elapsed() < Duration::from_millis(100) && Instant::now() < deadline {
        if greedy.write(&request).is_ok_and(|written| written > 0) {
            last = Instant::now();
        }
    }
    server.await_value(0, |server| server.metric(HTTP_OPEN_CONNECTIONS));
    assert!(server.ask("/healthz").starts_with("HTTP/1.1 200"));
}

#[test]
fn a_client_cannot_take_all_connections() {
    let server = Fixture::start(ConnectionLimits {
        connections_per_client: 2,
        ..GENEROUS
    });
    let before = server.connections("refused_client");
    let open = [server.connect(), server.connect()];
    server.await_value(2, |server| server.metric(HTTP_OPEN_CONNECTIONS));
    assert_eq!(read_to_end(&server.connect()), b"");
    assert_eq!(server.connections("refused_client"), before + 1);
    drop(open);
    server.await_value(0, |server| server.metric(HTTP_OPEN_CONNECTIONS));
    assert!(server.ask("/healthz").starts_with("HTTP/1.1 200"));
}

#[test]
fn a_connection_does_not_live_for_ever() {
    let server = Fixture::start(ConnectionLimits {
        lifetime: SHORT,
        close: SHORT,
        ..GENEROUS
    });
    // A client that always sends the next request in time.
    let mut busy = server.connect();
    let deadline = Instant::now() + PATIENCE;
    let mut answered = 0;
    loop {
        let request = write!(busy, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let mut buffer = [0; 1024];
        match request.and_then(|()| busy.read(&mut buffer)) {
            Ok(length) if length > 0 => answered += 1,
            _ => break,
        }
        assert!(Instant::now() < deadline, "the connection stays open");
    }
    assert!(answered > 0);
    // A client that does not read its answer.
    let before = server.connections("timed_out");
    let mut slow = server.connect();
    send(&mut slow, "/large", "");
    server.await_value(before + 1, |server| server.connections("timed_out"));
    server.await_value(0, |server| server.metric(HTTP_OPEN_CONNECTIONS));
}

#[test]
fn connections_leave_most_file_descriptors_to_the_rest_of_the_daemon() {
    let check = |open_files, expected| {
        assert_eq!(ConnectionLimits::new(open_files).connections, expected, "{open_files}");
    };
    check(64, 8);
    check(256, 32);
    check(1024, 64);
    check(u64::MAX, 64);
    check(0, 4);
}
