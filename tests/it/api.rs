//! Scoring over HTTP, by `moderatord serve` over real sockets.

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

/// A token of the tests.
const TOKEN: &str = "forum-token-0123456789";

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
        std::fs::write(folder.path().join("tokens"), format!("forum {TOKEN}\n")).unwrap();
        let settings = format!(
            "[model]\npath = \"{}\"\n[http]\nlisten = \"127.0.0.1:{health_port}\"\n{other}\n\
             [api]\nlisten = \"127.0.0.1:{port}\"\n{api}\n",
            fixture("gemma3").display()
        );
        std::fs::write(&config, settings).unwrap();
        let notifications = Notifications::bind(&folder.path().join("notify"));
        let child = moderatord()
            .args(["serve", "--config"])
            .arg(&config)
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
        self.request(
            "POST",
            path,
            &[("Authorization", &format!("Bearer {TOKEN}"))],
            body.to_string().as_bytes(),
        )
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

#[test]
fn comments_are_decided_as_by_the_command_line() {
    let communities = "[policy.communities]\ngarden = { review = 0.0, block = 0.0 }";
    let server = Server::start("tokens = \"tokens\"", communities);
    let long = "a long walk along the river and back again ".repeat(200);
    let comments = [
        json!({"content_id": "1", "text": "see you at the garden", "community_id": "garden"}),
        json!({"content_id": "2", "text": long, "event_id": "e"}),
        json!({"text": "\u{e4}\u{1f600} a hat", "revision": 3}),
    ];
    let expected = scored(&server.path("moderatord.toml"), &comments);
    for (comment, expected) in comments.iter().zip(&expected) {
        let answer = server.post("/v1/score", comment);
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_same(&answer.body, expected);
    }
    assert_eq!(expected[0]["action"], "block");
    let mut list = comments.to_vec();
    list.push(json!({"content_id": "4", "op": "delete"}));
    let answer = server.post("/v1/score", &list.into());
    let decisions = answer.body.as_array().unwrap();
    for (found, expected) in decisions.iter().zip(&expected) {
        assert_same(found, expected);
    }
    assert_eq!((decisions.len(), &decisions[3]["action"]), (4, &json!("delete")));

    // The decision can be explained from its text.
    let decision = server.path("decision.json");
    std::fs::write(&decision, decisions[0].to_string()).unwrap();
    let explained = moderatord()
        .args(["explain", "--config"])
        .arg(server.path("moderatord.toml"))
        .arg("--decision")
        .arg(&decision)
        .args(["--text", "see you at the garden"])
        .finish()
        .unwrap();
    assert!(explained.status.success(), "{explained:?}");
    let metrics = server.metrics();
    for line in [
        "moderatord_api_requests_total{endpoint=\"score\",caller=\"forum\",status=\"200\"} 4\n",
        "moderatord_api_decisions_total{action=\"delete\"} 1\n",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    assert!(!server.log().contains("garden") && !metrics.contains("see you"));
}

#[test]
fn only_callers_with_a_token_are_served_and_tokens_can_be_replaced() {
    let server = Server::with_token();
    let body = br#"{"text": "see you at the garden"}"#;
    let ask = |token: &str| {
        server
            .request("POST", "/v1/score", &[("Authorization", token)], body)
            .status
    };
    assert_eq!(server.request("POST", "/v1/score", &[], body).status, 401);
    assert_eq!(ask("Bearer wrong-token-0123456789"), 401);
    assert_eq!(ask(&format!("Bearer {TOKEN}")), 200);
    std::fs::write(server.path("tokens"), "game another-token-0123456789\n").unwrap();
    server.service.signal("HUP");
    let deadline = Instant::now() + PATIENCE;
    while ask("Bearer another-token-0123456789") != 200 {
        assert!(Instant::now() < deadline, "{}", server.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(ask(&format!("Bearer {TOKEN}")), 401);
    let log = server.log();
    assert!(!log.contains(TOKEN) && !log.contains("another-token"), "{log}");
}

#[test]
fn bad_requests_are_refused_by_what_is_wrong_with_them() {
    let server = Server::start("tokens = \"tokens\"\n[api.limits]\nbody_bytes = 2000\ncomments = 3", "");
    let check = |path: &str, body: &[u8], headers: &[(&str, &str)], status: u16, part: &str| {
        let token = format!("Bearer {TOKEN}");
        let headers: Vec<_> = [("Authorization", token.as_str())]
            .iter()
            .chain(headers)
            .copied()
            .collect();
        let answer = server.request("POST", path, &headers, body);
        let text = answer.body.to_string();
        assert!(
            answer.status == status && text.contains(part),
            "{answer:?}, expected {status} {part}"
        );
        assert!(!text.contains("secret"), "{text}");
    };
    check("/v1/score", b"secret", &[], 400, "not JSON at line 1, column 1");
    check("/v1/score", b"{\"secret\": 1}", &[], 400, "/text` is missing");
    check(
        "/v1/score",
        b"[{\"text\": \"a\"}, {\"text\": 7}]",
        &[],
        400,
        "\"field\":\"/1\"",
    );
    check("/v1/score", b"[1, 2, 3, 4]", &[], 413, "api.limits.comments");
    check("/v1/score", &[b'x'; 3000], &[], 413, "api.limits.body_bytes");
    check(
        "/v1/score",
        format!("{}secret", "[".repeat(1000)).as_bytes(),
        &[],
        400,
        "",
    );
    check(
        "/v1/score",
        b"{\"text\": \"a\"}",
        &[("Request-Timeout", "soon")],
        400,
        "Request-Timeout",
    );
    check("/v1/other", b"{}", &[], 404, "/v1/other");
    let wrong_method = server.request("GET", "/v1/score", &[], b"");
    assert_eq!(wrong_method.status, 405, "{wrong_method:?}");
    // The connection of a body that is not read is closed.
    let large = server.request(
        "POST",
        "/v1/score",
        &[("Authorization", &format!("Bearer {TOKEN}"))],
        &[b'x'; 3000],
    );
    assert!(large.headers.contains("connection: close"), "{large:?}");
}

#[test]
fn too_many_comments_are_turned_away_at_once() {
    let server = Server::start(
        "tokens = \"tokens\"\n[api.limits]\ncomments = 4\nwaiting = 4\ntimeout = \"60s\"",
        "",
    );
    // Long comments keep the scorer busy.
    let text = "a long walk along the river and back again ".repeat(400);
    let body = json!([{"text": text}, {"text": text}, {"text": text}, {"text": text}]);
    let answers: Vec<Answer> = std::thread::scope(|scope| {
        let ask = |number: usize| {
            let mut body = body.clone();
            for comment in body.as_array_mut().unwrap() {
                comment["text"] = format!("{number} {}", comment["text"].as_str().unwrap()).into();
            }
            server.post("/v1/score", &body)
        };
        let threads: Vec<_> = (0..8).map(|number| scope.spawn(move || ask(number))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let (done, busy): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.status == 200);
    assert!(!done.is_empty() && !busy.is_empty(), "{} {}", done.len(), busy.len());
    for answer in busy {
        assert!(
            answer.status == 429 && answer.headers.contains("retry-after: 1"),
            "{answer:?}"
        );
    }
}

#[test]
fn a_deadline_drops_the_work() {
    let server = Server::with_token();
    let text = "a long walk along the river and back again ".repeat(400);
    let comments: Vec<Value> = (0..40)
        .map(|number| json!({"text": format!("{number} {text}")}))
        .collect();
    let token = format!("Bearer {TOKEN}");
    let headers = [("Authorization", token.as_str()), ("Request-Timeout", "0.05")];
    let answer = server.request(
        "POST",
        "/v1/score",
        &headers,
        Value::from(comments).to_string().as_bytes(),
    );
    assert_eq!(answer.status, 504, "{answer:?}");
    let deadline = Instant::now() + PATIENCE;
    while server.metrics().contains("moderatord_api_dropped_total 0\n") {
        assert!(Instant::now() < deadline, "{}", server.metrics());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_stop_answers_what_was_taken() {
    let server = Server::start("tokens = \"tokens\"\n[api.limits]\ntimeout = \"60s\"", "");
    let text = "a long walk along the river and back again ".repeat(400);
    let comments: Vec<Value> = (0..6)
        .map(|number| json!({"text": format!("{number} {text}")}))
        .collect();
    let answer = std::thread::scope(|scope| {
        let asking = scope.spawn(|| server.post("/v1/score", &comments.clone().into()));
        // Until the comments are taken.
        let deadline = Instant::now() + PATIENCE;
        while !server.metrics().contains("moderatord_api_open_connections 1\n") {
            assert!(Instant::now() < deadline, "{}", server.metrics());
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(100));
        server.service.signal("TERM");
        asking.join().unwrap()
    });
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.body.as_array().unwrap().len(), 6);
    let log = server.path("log");
    let Server { service, folder, .. } = server;
    assert_eq!(service.end(), Some(0), "{}", std::fs::read_to_string(log).unwrap());
    drop(folder);
}

#[test]
fn a_stop_waits_until_a_long_answer_is_read() {
    let server = Server::start(
        "tokens = \"tokens\"\n[api.limits]\ncomments = 10000\nwaiting = 10000\nbody_bytes = 16000000",
        "",
    );
    // More than the buffers of a connection hold.
    let id = "c".repeat(900);
    let comments: Vec<Value> = (0..8000)
        .map(|number| json!({"content_id": format!("{id}{number}"), "op": "delete"}))
        .collect();
    let body = json!(comments).to_string();
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!(
        "POST /v1/score HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).unwrap();
    let mut answer = vec![0; 12];
    stream.read_exact(&mut answer).unwrap();
    server.service.signal("TERM");
    // The service listens no more once it stops, but the answer is still to be read.
    let deadline = Instant::now() + PATIENCE;
    while TcpStream::connect(("127.0.0.1", server.port)).is_ok() {
        assert!(Instant::now() < deadline, "{}", server.log());
        std::thread::sleep(Duration::from_millis(5));
    }
    stream.read_to_end(&mut answer).unwrap();
    let text = String::from_utf8(answer).unwrap();
    let (_, body) = text.split_once("\r\n\r\n").unwrap();
    assert_eq!(serde_json::from_str::<Vec<Value>>(body).unwrap().len(), 8000);
    let Server { service, .. } = server;
    assert_eq!(service.end(), Some(0));
}

#[test]
fn a_refusal_reaches_clients_that_send_everything_first() {
    let server = Server::with_token();
    for (token, size, status) in [("wrong", 900_000, 401), (TOKEN, 5_000_000, 413)] {
        let body = vec![b' '; size];
        let answer = server.request(
            "POST",
            "/v1/score",
            &[("Authorization", &format!("Bearer {token}"))],
            &body,
        );
        assert_eq!(answer.status, status);
    }
}

#[test]
fn without_tokens_pages_of_other_hosts_get_nothing() {
    let server = Server::start("", "");
    let body = json!({"text": "see you at the garden"}).to_string();
    let ask = |headers: &[(&str, &str)]| server.request("POST", "/v1/score", headers, body.as_bytes()).status;
    assert_eq!(ask(&[]), 200);
    assert_eq!(ask(&[("Origin", "http://page.example")]), 403);
    let head = "GET /v1/status HTTP/1.1\r\nHost: page.example\r\nConnection: close\r\n\r\n";
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
}

#[test]
fn half_a_request_costs_a_connection_and_nothing_else() {
    let server = Server::with_token();
    let mut slow = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    slow.write_all(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\n")
        .unwrap();
    let mut cut_off = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    let head =
        format!("POST /v1/score HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 100\r\n\r\n{{");
    cut_off.write_all(head.as_bytes()).unwrap();
    cut_off.shutdown(Shutdown::Write).unwrap();
    // Two requests in one packet are answered one after the other.
    let mut pipelined = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    let body = br#"{"text": "see you at the garden"}"#;
    for close in ["", "Connection: close\r\n"] {
        let head = format!(
            "POST /v1/score HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n{close}Content-Length: {}\r\n\r\n",
            body.len()
        );
        pipelined.write_all(&[head.as_bytes(), body].concat()).unwrap();
    }
    let mut text = String::new();
    pipelined.read_to_string(&mut text).unwrap();
    assert_eq!(text.matches("HTTP/1.1 200").count(), 2, "{text}");
    assert_eq!(server.post("/v1/score", &json!({"text": "a hat"})).status, 200);
}

#[test]
fn an_address_that_others_can_reach_requires_tokens() {
    let output = moderatord()
        .args(["serve", "--model"])
        .arg(fixture("gemma3"))
        .env("MODERATORD__API__LISTEN", "0.0.0.0:0")
        .finish()
        .unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{errors}");
    assert!(
        errors.contains("api.listen") && errors.contains("api.tokens is not set"),
        "{errors}"
    );
    let nowhere = moderatord()
        .args(["serve", "--model"])
        .arg(fixture("gemma3"))
        .finish()
        .unwrap();
    assert_eq!(nowhere.status.code(), Some(78), "{nowhere:?}");
}

#[test]
fn moderations_have_openais_form() {
    let server = Server::with_token();
    let texts = json!(["see you at the garden", "a hat"]);
    let answer = server.post(
        "/v1/moderations",
        &json!({"input": texts, "model": "omni-moderation-latest"}),
    );
    assert_eq!(answer.status, 200, "{answer:?}");
    let results = answer.body["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    for result in results {
        for name in ["hateful", "hate"] {
            assert_eq!(result["category_scores"][name], result["decision"]["probability"]);
            assert_eq!(result["categories"][name], result["flagged"]);
        }
    }
    // Halves of surrogate pairs are counted for each text, and a list of any length is refused by its length first.
    let send = |body: &str| {
        let token = format!("Bearer {TOKEN}");
        server.request("POST", "/v1/moderations", &[("Authorization", &token)], body.as_bytes())
    };
    let halves = send(r#"{"input": ["a hat", "a \ud800 hat \udc00", "\ud83d\ude00"]}"#).body;
    let counts: Vec<_> = (0..3)
        .map(|index| &halves["results"][index]["decision"]["replaced_surrogates"])
        .collect();
    assert_eq!(counts, [&Value::Null, &json!(2), &Value::Null], "{halves}");
    let many = format!(r#"{{"input": ["\ud800"{}]}}"#, ", \"\"".repeat(100_000));
    assert_eq!(send(&many).status, 413);
    let many = format!(r#"{{"input": [{{"type": "text"}}{}]}}"#, ", 1".repeat(1000));
    assert_eq!(send(&many).status, 413);
    for (input, param) in [
        (json!(["a hat", null]), "input[1]"),
        (json!([{"type": "text", "text": 1}]), "input[0].text"),
        (json!([]), "input"),
    ] {
        let refused = server.post("/v1/moderations", &json!({"input": input}));
        assert_eq!(
            (refused.status, &refused.body["error"]["param"]),
            (400, &json!(param)),
            "{refused:?}"
        );
    }
    let community = json!({"input": texts, "community_id": "c".repeat(2000)});
    assert_eq!(server.post("/v1/moderations", &community).status, 400);
    let parts = json!([{"type": "text", "text": "see you"}, {"type": "text", "text": "at the garden"}]);
    let whole = server.post("/v1/moderations", &json!({"input": parts}));
    assert_eq!(whole.body["results"].as_array().unwrap().len(), 1, "{whole:?}");
    let image = json!([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]);
    let refused = server.post("/v1/moderations", &json!({"input": image}));
    assert_eq!(
        (refused.status, &refused.body["error"]["param"]),
        (400, &json!("input[0].image_url"))
    );
    let wrong = server.request("POST", "/v1/moderations", &[("Authorization", "Bearer x")], b"{}");
    assert_eq!(
        (wrong.status, &wrong.body["error"]["code"]),
        (401, &json!("invalid_api_key"))
    );
}

#[test]
fn comments_are_analysed_in_perspectives_form() {
    let server = Server::with_token();
    let analyze = |body: &Value| {
        server.request(
            "POST",
            &format!("/v1alpha1/comments:analyze?key={TOKEN}"),
            &[],
            body.to_string().as_bytes(),
        )
    };
    let text = "See you at the garden. Bring a hat!";
    let answer = analyze(&json!({
        "comment": {"text": text}, "requestedAttributes": {"IDENTITY_ATTACK": {}},
        "languages": ["en"], "doNotStore": true, "clientToken": "c-1", "spanAnnotations": true,
    }));
    assert_eq!(answer.status, 200, "{answer:?}");
    let score = &answer.body["attributeScores"]["IDENTITY_ATTACK"];
    let alone = server.post("/v1/score", &json!({"text": text})).body;
    assert_eq!(
        score["summaryScore"],
        json!({"value": alone["probability"], "type": "PROBABILITY"})
    );
    let places: Vec<_> = score["spanScores"]
        .as_array()
        .unwrap()
        .iter()
        .map(|span| (&span["begin"], &span["end"]))
        .collect();
    assert_eq!(places, [(&json!(0), &json!(22)), (&json!(23), &json!(35))]);
    assert_eq!(
        (&answer.body["languages"], &answer.body["clientToken"]),
        (&json!(["en"]), &json!("c-1"))
    );

    let recognised = analyze(&json!({
        "comment": {"text": "We walked along the river until it got dark."},
        "requestedAttributes": {"IDENTITY_ATTACK": {}},
    }));
    assert_eq!(
        (&recognised.body["languages"], &recognised.body["detectedLanguages"]),
        (&json!(["en"]), &json!(["en"]))
    );
    // Without annotations, there is one span, in UTF-16.
    let smiley = analyze(&json!({"comment": {"text": "😀 Hello."}, "requestedAttributes": {"IDENTITY_ATTACK": null}}));
    let score = &smiley.body["attributeScores"]["IDENTITY_ATTACK"];
    let span = json!([{"begin": 0, "end": 9, "score": score["summaryScore"]}]);
    assert_eq!(score["spanScores"], span, "{smiley:?}");
    let encoded = format!("/v1alpha1/comments%3Aanalyze?key={TOKEN}");
    let body = json!({"comment": {"text": text}, "requestedAttributes": {"IDENTITY_ATTACK": {}}, "languages": "en"});
    assert_eq!(
        server
            .request("POST", &encoded, &[], body.to_string().as_bytes())
            .status,
        200
    );
    let unknown = server.request("POST", "/v1alpha1/comments:list", &[], b"");
    assert_eq!(
        (unknown.status, &unknown.body["error"]["status"]),
        (404, &json!("NOT_FOUND"))
    );

    let check = |body: Value, error_type: &str, message: &str| {
        let answer = analyze(&body);
        let error = &answer.body["error"];
        assert_eq!(
            (answer.status, &error["status"]),
            (400, &json!("INVALID_ARGUMENT")),
            "{answer:?}"
        );
        assert_eq!(error["details"][0]["errorType"], error_type, "{answer:?}");
        assert!(error["message"].as_str().unwrap().contains(message), "{answer:?}");
    };
    let comment = json!({"text": text});
    let attributes = json!({"IDENTITY_ATTACK": {}});
    check(
        json!({"comment": {"text": " "}, "requestedAttributes": attributes}),
        "COMMENT_EMPTY",
        "non-empty",
    );
    check(
        json!({"comment": comment}),
        "NO_REQUESTED_ATTRIBUTES",
        "Missing requested_attributes",
    );
    check(
        json!({"comment": comment, "requestedAttributes": {"TOXICITY": {}}}),
        "INVALID_REQUEST",
        "Unknown requested attribute: TOXICITY",
    );
    check(
        json!({"comment": {"text": text, "type": "HTML"}, "requestedAttributes": attributes}),
        "INVALID_REQUEST",
        "PLAIN_TEXT",
    );
    check(
        json!({"comment": comment, "requestedAttributes": {"IDENTITY_ATTACK": {"scoreType": "RAW"}}}),
        "INVALID_REQUEST",
        "score type RAW is not supported",
    );
    for (body, field) in [
        (
            json!({"comment": comment, "requestedAttributes": {"IDENTITY_ATTACK": 7}}),
            "requestedAttributes.IDENTITY_ATTACK",
        ),
        (json!({"comment": text, "requestedAttributes": attributes}), "comment"),
        (
            json!({"comment": comment, "requestedAttributes": attributes, "languages": 1}),
            "languages",
        ),
    ] {
        check(body, "INVALID_REQUEST", field);
    }
    let sentences = json!({"text": "A hat. ".repeat(300)});
    let annotated = analyze(&json!({"comment": sentences, "requestedAttributes": attributes, "spanAnnotations": true}));
    assert!(
        annotated.status == 413 && annotated.body.to_string().contains("300 sentences"),
        "{annotated:?}"
    );
    let threshold =
        analyze(&json!({"comment": comment, "requestedAttributes": {"IDENTITY_ATTACK": {"scoreThreshold": 1.0}}}));
    assert_eq!(threshold.body["attributeScores"], json!({}));
    let no_key = server.request("POST", "/v1alpha1/comments:analyze", &[], b"{}");
    assert_eq!(
        (no_key.status, &no_key.body["error"]["details"][0]["reason"]),
        (400, &json!("API_KEY_INVALID"))
    );
    // There is no topic for suggestions.
    let suggestion =
        json!({"comment": comment, "attributeScores": {"IDENTITY_ATTACK": {"summaryScore": {"value": 0}}}});
    let path = format!("/v1alpha1/comments:suggestscore?key={TOKEN}");
    let refused = server.request("POST", &path, &[], suggestion.to_string().as_bytes());
    assert!(
        refused.status == 400 && refused.body.to_string().contains("topics.feedback"),
        "{refused:?}"
    );
}

#[test]
fn the_description_names_what_is_served() {
    let server = Server::start("tokens = \"tokens\"", "[input]\ntext = \"/post/body\"\n");
    let described = server.request("GET", "/openapi.json", &[], b"");
    assert_eq!(described.status, 200);
    let document = described.body;
    let schemas = &document["components"]["schemas"];
    assert_eq!(
        schemas["Comment"]["properties"]["post"]["properties"]["body"]["type"][0],
        "string"
    );
    assert_eq!(
        schemas["Decision"]["allOf"][0]["anyOf"][0]["$ref"],
        "#/components/schemas/Scoring"
    );
    let paths: Vec<&String> = document["paths"].as_object().unwrap().keys().collect();
    assert_eq!(
        paths,
        [
            "/v1/moderations",
            "/v1/score",
            "/v1alpha1/comments:analyze",
            "/v1alpha1/comments:suggestscore"
        ]
    );
    for path in paths {
        let method = &document["paths"][path]["post"];
        // The names of the schemes are alternatives.
        let scheme = method["security"][0].as_object().unwrap().keys().next().unwrap();
        assert!(document["components"]["securitySchemes"][scheme].is_object(), "{path}");
        // Without a token, each endpoint refuses in its own form.
        let status = server.request("POST", path, &[], b"{}").status.to_string();
        assert!(
            status == "401" || status == "400" && path.contains(':'),
            "{path} {status}"
        );
        assert!(method["responses"][&status].is_object(), "{path} {status}");
    }
}

#[tokio::test]
async fn the_page_shows_what_serves_and_the_newest_version_to_callers_only() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}/registry", folder.path().display());
    let registry = Registry::create(&url).unwrap();
    let mut newest = draft("a");
    newest.facts.gate = json!({"promote": false, "sentence": "keep the champion"});
    let newest = registry.publish(newest).await.unwrap();
    let server = Server::start("tokens = \"tokens\"", &format!("[registry]\nurl = \"{url}\""));
    let page = server.text("/");
    assert!(
        page.contains("200 OK") && page.contains("<title>moderatord</title>"),
        "{page}"
    );
    assert!(page.contains("content-security-policy: default-src 'none'"), "{page}");
    for file in ["page.css", "page.js"] {
        assert!(
            page.contains(file) && server.text(&format!("/{file}")).contains("200 OK"),
            "{file}"
        );
    }
    assert_eq!(server.request("GET", "/v1/status", &[], b"").status, 401);
    let token = format!("Bearer {TOKEN}");
    let answer = server.request("GET", "/v1/status", &[("Authorization", &token)], b"");
    let status = &answer.body;
    let expected = json!({
        "version": newest.version.as_str(), "created_at": newest.facts.created_at,
        "promote": false, "verdict": "keep the champion",
    });
    assert_eq!((answer.status, &status["newest_version"]), (200, &expected));
    assert_eq!(
        (&status["ready"], &status["model"]["device"]),
        (&json!(true), &json!("cpu"))
    );
    // The registry's address may contain a secret.
    assert_eq!(status["configuration"]["registry.url"], "***");
    assert!(status["metrics"].as_str().unwrap().contains("moderatord_build_info{"));
}

/// Connects with TLS, as a client that trusts the tests' authority, and returns the server's certificate and its answer.
fn ask_with_tls(port: u16, client: Option<&str>) -> std::io::Result<(Vec<u8>, String)> {
    let pem = |name: &str| fixture("tls").join(name);
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(pem("ca.pem")).unwrap())
        .unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match client {
        None => builder.with_no_client_auth(),
        Some(name) => {
            let chain = vec![CertificateDer::from_pem_file(pem(&format!("{name}.pem"))).unwrap()];
            let key = PrivateKeyDer::from_pem_file(pem(&format!("{name}.key"))).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    let name = "localhost".try_into().unwrap();
    let mut session = rustls::ClientConnection::new(std::sync::Arc::new(config), name).unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut stream = rustls::Stream::new(&mut session, &mut stream);
    let body = r#"{"text": "see you at the garden"}"#;
    write!(
        stream,
        "POST /v1/score HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = [0; 15];
    stream.read_exact(&mut answer)?;
    let certificate = session.peer_certificates().unwrap()[0].to_vec();
    Ok((certificate, String::from_utf8_lossy(&answer).into_owned()))
}

#[test]
fn connections_are_encrypted_and_certificates_can_be_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let serve_as = |name: &str| {
        for kind in ["pem", "key"] {
            let from = fixture("tls").join(format!("{name}.{kind}"));
            std::fs::copy(from, folder.path().join(format!("server.{kind}"))).unwrap();
        }
    };
    let certificate = |name: &str| {
        CertificateDer::from_pem_file(fixture("tls").join(name))
            .unwrap()
            .to_vec()
    };
    serve_as("server");
    let tls = format!(
        "tokens = \"tokens\"\n[api.tls]\ncertificate = \"{0}/server.pem\"\nkey = \"{0}/server.key\"\nclient_ca = \"{1}\"",
        folder.path().display(),
        fixture("tls/ca.pem").display()
    );
    let server = Server::start(&tls, "");
    let found = ask_with_tls(server.port, Some("client")).unwrap();
    assert_eq!(found, (certificate("server.pem"), "HTTP/1.1 200 OK".to_owned()));
    // Neither a client without a certificate nor one without TLS is answered.
    assert!(ask_with_tls(server.port, None).is_err());
    let mut plain = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");

    serve_as("other");
    server.service.signal("HUP");
    let deadline = Instant::now() + PATIENCE;
    while ask_with_tls(server.port, Some("client")).unwrap().0 != certificate("other.pem") {
        assert!(Instant::now() < deadline, "{}", server.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    // A key that belongs to another certificate is refused, and the old ones stay.
    std::fs::copy(fixture("tls/client.key"), folder.path().join("server.key")).unwrap();
    server.service.signal("HUP");
    while !server.log().contains("expected the key of") {
        assert!(Instant::now() < deadline, "{}", server.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(
        ask_with_tls(server.port, Some("client")).unwrap().0,
        certificate("other.pem")
    );
}

#[test]
fn requests_and_the_stream_share_the_scorer() {
    let broker = broker();
    broker.create_topic("feedback", 1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (port, health_port) = (free_port(), free_port());
    let config = folder.path().join("moderatord.toml");
    let settings =
        settings(&broker.address(), health_port).replace("[topics]\n", "[topics]\nfeedback = \"feedback\"\n");
    std::fs::write(&config, format!("{settings}[api]\nlisten = \"127.0.0.1:{port}\"\n")).unwrap();
    let notifications = Notifications::bind(&folder.path().join("notify"));
    let log = std::fs::File::create(folder.path().join("log")).unwrap();
    let child = moderatord()
        .args(["run", "--config"])
        .arg(&config)
        .env("NOTIFY_SOCKET", folder.path().join("notify"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .start();
    let server = Server {
        service: Service(child.unwrap()),
        port,
        health_port,
        folder,
    };
    notifications.await_ready();
    produce(&broker.address(), "c1");
    let decision = next_record(&reader(&broker.address(), "decisions"));
    let answer = server.post(
        "/v1/score",
        &json!({"content_id": "c1", "text": "zebramarkword in the garden"}),
    );
    assert_eq!(answer.status, 200, "{answer:?}");
    let mut streamed = decision;
    for name in ["source", "decision_id"] {
        streamed.as_object_mut().unwrap().remove(name);
    }
    assert_same(&answer.body, &streamed);

    let suggestion = json!({
        "comment": {"text": "a hat"}, "communityId": "garden", "clientToken": "c-2",
        "attributeScores": {"IDENTITY_ATTACK": {"summaryScore": {"value": 0.25}}},
    });
    let taken = server.post("/v1alpha1/comments:suggestscore", &suggestion);
    assert_eq!((taken.status, &taken.body), (200, &json!({"clientToken": "c-2"})));
    let mut feedback = next_record(&reader(&broker.address(), "feedback"));
    assert!(feedback["labelled_at"].as_str().unwrap().ends_with('Z'), "{feedback}");
    feedback["labelled_at"] = Value::Null;
    let content_id = format!("text-sha256:{:x}", Sha256::digest("a hat"));
    let expected = json!({
        "content_id": content_id, "text": "a hat", "label": 0.25, "source": "user", "community_id": "garden",
        "labelled_at": null,
    });
    assert_eq!(feedback, expected);
    server.service.signal("TERM");
    let Server { service, folder, .. } = server;
    let log = std::fs::read_to_string(folder.path().join("log"));
    assert_eq!(service.end(), Some(0), "{}", log.unwrap());
}
