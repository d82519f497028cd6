//! Scoring over HTTP, by `moderatord serve` over real sockets.

mod callers;
mod forms;
mod limits;
mod service;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use moderatord::registry::Registry;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::cli_run::*;
use crate::common::fixture;
use crate::common::process::Start;
use crate::common::registry::draft;

/// The token of the caller `forum`, which the tests use.
const TOKEN: &str = "forum-token-0123456789";

/// The token of another caller, `game`.
const OTHER_TOKEN: &str = "game-token-0123456789";

/// A running `moderatord serve`.
struct Server {
    service: Service,
    port: u16,
    health_port: u16,
    folder: tempfile::TempDir,
}

/// An answer of the API.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: String,
    body: Value,
}

impl Server {
    /// Starts a server with further settings for the section `api`, and waits until it is ready.
    fn start(api: &str, other: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (port, health_port) = (free_port(), free_port());
        let config = folder.path().join("moderatord.toml");
        let tokens = format!("forum {TOKEN}\ngame {OTHER_TOKEN}\n");
        std::fs::write(folder.path().join("tokens"), tokens).unwrap();
        let settings = format!(
            "[model]\npath = \"{}\"\n[http]\nlisten = \"127.0.0.1:{health_port}\"\n{other}\n\
             [api]\nlisten = \"127.0.0.1:{port}\"\n{api}\n",
            fixture("gemma3").display()
        );
        std::fs::write(&config, settings).unwrap();
        Self::launch("serve", folder, [port, health_port])
    }

    /// Starts a command with the settings in the folder, which name the ports of the API and of its health checks, and waits
    /// until it is ready.
    fn launch(command: &str, folder: tempfile::TempDir, [port, health_port]: [u16; 2]) -> Self {
        let notifications = Notifications::bind(&folder.path().join("notify"));
        let child = moderatord()
            .args([command, "--config"])
            .arg(folder.path().join("moderatord.toml"))
            .env("NOTIFY_SOCKET", folder.path().join("notify"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(folder.path().join("log")).unwrap())
            .start();
        let server = Self {
            service: Service(child.unwrap()),
            port,
            health_port,
            folder,
        };
        notifications.await_ready();
        server
    }

    /// Starts a server with the token of the tests.
    fn with_token() -> Self {
        Self::start("tokens = \"tokens\"", "")
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    /// Sends a request with the token of the tests.
    fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_as(TOKEN, path, body)
    }

    /// Sends a request with a token.
    fn post_as(&self, token: &str, path: &str, body: &Value) -> Answer {
        let token = format!("Bearer {token}");
        self.request("POST", path, &[("Authorization", &token)], body.to_string().as_bytes())
    }

    /// Returns the whole answer, with its head.
    fn text(&self, path: &str) -> String {
        try_ask(self.port, path).unwrap()
    }

    fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("Content-Length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        // The server may answer and close before it has read all of the body.
        let _ = stream.write_all(body);
        read_answer(&mut stream)
    }

    fn metrics(&self) -> String {
        ask(self.health_port, "/metrics")
    }
}

fn read_answer(stream: &mut TcpStream) -> Answer {
    let mut bytes = Vec::new();
    if let Err(error) = stream.read_to_end(&mut bytes) {
        assert!(!bytes.is_empty(), "{error}");
    }
    let text = String::from_utf8(bytes).unwrap();
    let (headers, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = headers.split(' ').nth(1).unwrap_or_default().parse().unwrap_or(0);
    Answer {
        status,
        headers: headers.to_lowercase(),
        body: serde_json::from_str(body).unwrap_or_else(|_| body.into()),
    }
}

/// Returns the decisions that `moderatord score` makes about comments, with the settings of a server.
fn scored(config: &Path, comments: &[Value]) -> Vec<Value> {
    let input = config.with_file_name("comments.jsonl");
    let lines: String = comments.iter().map(|comment| format!("{comment}\n")).collect();
    std::fs::write(&input, lines).unwrap();
    let output = moderatord()
        .args(["score", "--config"])
        .arg(config)
        .arg("--input")
        .arg(&input)
        .finish()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Asserts that two decisions are the same, apart from the time and the last digits of the score.
fn assert_same(found: &Value, expected: &Value) {
    let (mut found, mut expected) = (found.clone(), expected.clone());
    for name in ["margin", "probability", "score"] {
        let difference = found[name].as_f64().unwrap() - expected[name].as_f64().unwrap();
        assert!(difference.abs() < 1e-5, "{name}: {found} {expected}");
        found[name] = Value::Null;
        expected[name] = Value::Null;
    }
    found["scored_at"] = Value::Null;
    expected["scored_at"] = Value::Null;
    assert_eq!(found, expected);
}
