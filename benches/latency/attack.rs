//! How long the comments of the stream wait while the API is attacked or overloaded.
//!
//! The attackers are a process of their own with the lowest priority, because they would be on other machines. They use
//! many addresses of the loopback network, as an attacker with many hosts would, and some of them have a token.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::daemon::Daemon;
use crate::figures::LevelFigures;
use crate::load::{Load, Phase};
use crate::support::arguments::argument;
use crate::support::brokers::Broker;
use crate::support::median;

/// The argument that makes this program an attacker.
pub const ATTACKER: &str = "attacker";

/// The load of the stream, relative to its capacity.
const LOAD: f64 = 0.25;

/// How often each kind of phase is measured. They take turns.
const ROUNDS: usize = 3;

/// Connections that an attack tries to open, in all.
const CONNECTIONS: u64 = 100_000;

/// Addresses that the attackers use, each of which is a client.
const ADDRESSES: u64 = 1000;

const TOKEN: &str = "attacker-token-0123456789";

/// What happens to the API while the stream is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nothing,
    /// Connections that are opened and left idle, slow heads and bodies, huge bodies, deep JSON, and pipelines whose
    /// answers nobody reads.
    Attack,
    /// A caller with a token that asks for far more than its share of the device.
    Overload,
}

impl Beside {
    const ALL: [Self; 3] = [Self::Nothing, Self::Attack, Self::Overload];

    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Attack => "attack",
            Self::Overload => "overload",
        }
    }
}

/// Runs as an attacker if this process was started as one.
pub fn attack_if_requested() -> bool {
    let Some(kind) = argument(ATTACKER) else { return false };
    let address = argument("address").unwrap().parse().unwrap();
    let time = Duration::from_secs_f64(argument("seconds").unwrap().parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let counts = runtime.block_on(async {
        if kind == Beside::Attack.name() {
            attack(address, time).await
        } else {
            overload(address, time).await
        }
    });
    crate::print(&counts);
    true
}

/// Measures the stream while the API is idle, attacked and overloaded, in turns.
pub fn measure(name: &str, broker: &mut Broker, time: Duration, settings: &[String]) {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    std::fs::write(&tokens, format!("attacker {TOKEN}\n")).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let api = [
        format!("api.listen=\"{address}\""),
        format!("api.tokens=\"{}\"", tokens.display()),
    ];
    let daemon = Daemon::start(broker, &[settings, &api].concat());
    let mut load = Load::start(broker, &daemon.topics, 0.0);
    load.wait_until_ready();
    let rate = LOAD * load.capacity(crate::CAPACITY_TIME);
    crate::print(&format!(
        "\n{name}: {rate:.0} comments per second, {:.0} % of the capacity; milliseconds from due to visible\n\
         beside      p50      p99    p99.9  cores  memory MiB",
        100.0 * LOAD
    ));
    let mut p99 = Beside::ALL.map(|_| Vec::new());
    for _ in 0..ROUNDS {
        for (beside, p99) in Beside::ALL.into_iter().zip(&mut p99) {
            let attacker = (beside != Beside::Nothing).then(|| start(beside, address, time));
            let before = daemon.cpu_time();
            let samples = load.run(&[Phase { rate, time }]);
            let cores = (daemon.cpu_time() - before).as_secs_f64() / time.as_secs_f64();
            let counts = attacker.map(end).unwrap_or_default();
            let figures = LevelFigures::new(LOAD, rate, cores, &samples);
            let visible = &figures.visible;
            crate::print(&format!(
                "{:<8}{:>7.1}{:>9.1}{:>9.1}{cores:>7.2}{:>12.0}  {counts}",
                beside.name(),
                visible.p50,
                visible.p99,
                visible.p999,
                daemon.resident_mib(),
            ));
            p99.push(visible.p99);
        }
    }
    let [nothing, attack, overload] = p99.map(median);
    crate::print(&format!(
        "medians of the p99: {:.2}x under attack, {:.2}x during an overload; peak memory {:.0} MiB",
        attack / nothing,
        overload / nothing,
        daemon.peak_mib()
    ));
}

fn start(kind: Beside, address: SocketAddr, time: Duration) -> Child {
    Command::new("nice")
        .args(["-n", "19"])
        .arg(std::env::current_exe().unwrap())
        .args([&format!("--{ATTACKER}"), kind.name(), "--address", &address.to_string()])
        .args(["--seconds", &time.as_secs_f64().to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for an attacker, and returns what it counted.
fn end(attacker: Child) -> String {
    let output = attacker.wait_with_output().unwrap();
    assert!(output.status.success(), "an attacker failed: {}", output.status);
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// What became of the attackers' connections.
#[derive(Default)]
struct Counts {
    attempts: AtomicU64,
    /// Closed at once, without an answer.
    refused: AtomicU64,
    /// Cut off later, by the limits on time and size.
    cut_off: AtomicU64,
    /// Answered with an error.
    errors: AtomicU64,
}

impl Counts {
    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

async fn attack(address: SocketAddr, time: Duration) -> String {
    let counts = Arc::new(Counts::default());
    let end = Instant::now() + time;
    for number in 0..20 {
        for kind in 0..5 {
            let counts = Arc::clone(&counts);
            // One client each, so that their own number does not keep them out.
            let number = 5 * number + kind;
            tokio::spawn(async move {
                while Instant::now() < end {
                    let done = match kind {
                        0 => slow_head(address, number, &counts).await,
                        1 => slow_body(address, number, &counts).await,
                        2 => huge_body(address, number, &counts).await,
                        3 => deep_json(address, number, &counts).await,
                        _ => pipeline(address, number, &counts).await,
                    };
                    if done.is_err() {
                        Counts::add(&counts.cut_off);
                    }
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            });
        }
    }
    let start = Instant::now();
    let mut begun = 0;
    while Instant::now() < end {
        let due = (start.elapsed().as_secs_f64() / time.as_secs_f64() * CONNECTIONS as f64) as u64;
        for number in begun..due.min(CONNECTIONS) {
            let counts = Arc::clone(&counts);
            tokio::spawn(async move { idle(address, number, end, &counts).await });
        }
        begun = due;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    format!(
        "{} connections tried, {} closed at once, {} cut off, {} errors",
        count(&counts.attempts),
        count(&counts.refused),
        count(&counts.cut_off),
        count(&counts.errors)
    )
}

/// Opens a connection from one of the addresses, and leaves it idle until it is closed.
async fn idle(address: SocketAddr, number: u64, end: Instant, counts: &Counts) {
    Counts::add(&counts.attempts);
    let opened = Instant::now();
    let Ok(mut stream) = connect(address, number).await else {
        return Counts::add(&counts.refused);
    };
    let mut buffer = [0; 64];
    let ended = tokio::time::timeout_at(end.into(), stream.read(&mut buffer)).await;
    if ended.is_ok() {
        let closed_at_once = opened.elapsed() < Duration::from_secs(1);
        Counts::add(if closed_at_once {
            &counts.refused
        } else {
            &counts.cut_off
        });
    }
}

async fn connect(address: SocketAddr, number: u64) -> std::io::Result<TcpStream> {
    let client = number % ADDRESSES;
    let from = Ipv4Addr::new(127, 1, (client / 250) as u8, 1 + (client % 250) as u8);
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((from, 0)))?;
    socket.connect(address).await
}

fn head(length: usize) -> String {
    format!(
        "POST /v1/score HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {length}\r\n\r\n"
    )
}

/// Sends a byte of a head from time to time.
async fn slow_head(address: SocketAddr, number: u64, _: &Counts) -> std::io::Result<()> {
    let mut stream = connect(address, number).await?;
    for byte in head(10).bytes() {
        stream.write_all(&[byte]).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    Ok(())
}

/// Sends a byte of a body from time to time.
async fn slow_body(address: SocketAddr, number: u64, counts: &Counts) -> std::io::Result<()> {
    let mut stream = connect(address, number).await?;
    stream.write_all(head(1000).as_bytes()).await?;
    let mut answer = [0; 512];
    loop {
        stream.write_all(b" ").await?;
        if let Ok(read) = tokio::time::timeout(Duration::from_secs(1), stream.read(&mut answer)).await {
            Counts::add(&counts.errors);
            return read.map(drop);
        }
    }
}

/// Announces and sends 100 MB.
async fn huge_body(address: SocketAddr, number: u64, counts: &Counts) -> std::io::Result<()> {
    let mut stream = connect(address, number).await?;
    stream.write_all(head(100_000_000).as_bytes()).await?;
    let chunk = vec![b' '; 64 << 10];
    for _ in 0..100_000_000 / chunk.len() {
        if stream.write_all(&chunk).await.is_err() {
            break;
        }
    }
    await_error(stream, counts).await
}

/// Sends half a megabyte of brackets.
async fn deep_json(address: SocketAddr, number: u64, counts: &Counts) -> std::io::Result<()> {
    let mut stream = connect(address, number).await?;
    let body = "[".repeat(500_000);
    stream.write_all(head(body.len()).as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    await_error(stream, counts).await
}

/// Sends requests without a token one after the other, and reads no answer for a while.
async fn pipeline(address: SocketAddr, number: u64, counts: &Counts) -> std::io::Result<()> {
    let mut stream = connect(address, number).await?;
    let request = "POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}".repeat(1000);
    let sent = tokio::time::timeout(Duration::from_secs(2), stream.write_all(request.as_bytes())).await;
    if let Ok(Err(error)) = sent {
        return Err(error);
    }
    await_error(stream, counts).await
}

async fn await_error(mut stream: TcpStream, counts: &Counts) -> std::io::Result<()> {
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await?;
    if answer.starts_with(b"HTTP/1.1 4") {
        Counts::add(&counts.errors);
    }
    Ok(())
}

/// Asks for scores of 256 comments at a time on 32 connections.
async fn overload(address: SocketAddr, time: Duration) -> String {
    let end = Instant::now() + time;
    let (answered, busy) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let callers: Vec<_> = (0..32u64)
        .map(|caller| {
            let (answered, busy) = (Arc::clone(&answered), Arc::clone(&busy));
            tokio::spawn(async move {
                let mut stream = connect(address, caller).await.unwrap();
                let mut number = 0u64;
                while Instant::now() < end {
                    // Each text is new, so that the cache does not help.
                    let text = |index| {
                        format!(
                            r#"{{"text":"caller {caller} walks by the river {} times, and home again"}}"#,
                            number + index
                        )
                    };
                    let body = format!("[{}]", (0..256).map(text).collect::<Vec<_>>().join(","));
                    number += 256;
                    stream.write_all(head(body.len()).as_bytes()).await.unwrap();
                    stream.write_all(body.as_bytes()).await.unwrap();
                    let status = read_answer(&mut stream).await;
                    let counter = if status == 200 { &answered } else { &busy };
                    counter.fetch_add(1, Ordering::Relaxed);
                    if status == 429 {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    format!(
        "{:.0} comments per second scored, {} requests turned away",
        (256 * answered.load(Ordering::Relaxed)) as f64 / time.as_secs_f64(),
        busy.load(Ordering::Relaxed)
    )
}

/// Reads an answer whose length is known, and returns its status.
async fn read_answer(stream: &mut TcpStream) -> u16 {
    let mut read = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = stream.read(&mut buffer).await.unwrap();
        assert!(length > 0, "the connection was closed");
        read.extend_from_slice(&buffer[..length]);
        let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") else {
            continue;
        };
        let head = String::from_utf8_lossy(&read[..end]).to_lowercase();
        let length = head.split("content-length: ").nth(1).unwrap().lines().next().unwrap();
        if read.len() >= end + 4 + length.trim().parse::<usize>().unwrap() {
            return head[9..12].parse().unwrap();
        }
    }
}
