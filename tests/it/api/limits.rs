//! Limits, deadlines, and the end of the service.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;

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
        let detail = answer.body["detail"].as_str().unwrap();
        assert!(detail.contains("the share of this caller is used up"), "{detail}");
    }
}

#[test]
fn a_caller_that_fills_the_queue_does_not_keep_another_out() {
    let server = Server::start(
        "tokens = \"tokens\"\n[api.limits]\ncomments = 4\nwaiting = 4\ntimeout = \"60s\"",
        "",
    );
    let text = "a long walk along the river and back again ".repeat(100);
    let (refused, is_done) = (AtomicUsize::new(0), AtomicBool::new(false));
    let flood = |number: usize| {
        for round in 0.. {
            if is_done.load(Ordering::Relaxed) {
                return;
            }
            let comment = |index: usize| json!({"text": format!("{number} {round} {index} {text}")});
            let comments: Vec<Value> = (0..4).map(comment).collect();
            match server.post("/v1/score", &comments.into()).status {
                200 => {}
                429 => {
                    refused.fetch_add(1, Ordering::Relaxed);
                }
                status => panic!("{status}"),
            }
        }
    };
    std::thread::scope(|scope| {
        // Whatever happens below, the flood ends.
        let _end = OnDrop(|| is_done.store(true, Ordering::Relaxed));
        for number in 0..4 {
            let flood = &flood;
            scope.spawn(move || flood(number));
        }
        let deadline = Instant::now() + PATIENCE;
        while refused.load(Ordering::Relaxed) == 0 {
            assert!(Instant::now() < deadline, "the queue is never full");
            std::thread::sleep(Duration::from_millis(1));
        }
        for number in 0..20 {
            // More than its share, which is 2 of 4 places, but it has no other comments waiting.
            let comments: Vec<Value> = (0..3)
                .map(|index| json!({"text": format!("hat {number} {index}")}))
                .collect();
            let answer = server.post_as(OTHER_TOKEN, "/v1/score", &comments.into());
            assert_eq!(answer.status, 200, "{answer:?}");
        }
    });
}

/// Calls a function when it is dropped.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
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
    let server = Server::start(
        "tokens = \"tokens\"\n[api.limits]\ntimeout = \"60s\"",
        "[shutdown]\ngrace = \"60s\"\n",
    );
    let text = "a long walk along the river and back again ".repeat(400);
    let comments: Vec<Value> = (0..6)
        .map(|number| json!({"text": format!("{number} {text}")}))
        .collect();
    let answer = std::thread::scope(|scope| {
        let asking = scope.spawn(|| server.post("/v1/score", &comments.clone().into()));
        let deadline = Instant::now() + PATIENCE;
        // Until the comments are taken, or on a very fast machine until they are scored.
        let is_waiting = |line: &str| {
            let count = line.strip_prefix("moderatord_api_waiting ");
            count.is_some_and(|count| count != "0")
        };
        while !server.metrics().lines().any(is_waiting) && !asking.is_finished() {
            assert!(Instant::now() < deadline, "{}", server.metrics());
            std::thread::sleep(Duration::from_millis(1));
        }
        server.service.signal("TERM");
        asking.join().unwrap()
    });
    assert_eq!(answer.status, 200, "{answer:?}: {}", server.log());
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
