//! Who may call, and over which connections.

use super::*;

#[test]
fn only_callers_with_a_token_are_served_and_tokens_can_be_replaced() {
    let server = Server::with_token();
    let body = br#"{"text": "see you at the garden"}"#;
    let send = |headers: &[(&str, &str)]| server.request("POST", "/v1/score", headers, body);
    let ask = |token: &str| send(&[("Authorization", token)]).status;
    for (headers, detail) in [
        (&[][..], "no token was sent"),
        (&[("Authorization", "Bearer ")], "no token was sent"),
        (
            &[("Authorization", "Bearer wrong-token-0123456789")],
            "the token is not that of a caller",
        ),
    ] {
        let refused = send(headers);
        assert_eq!(refused.status, 401, "{refused:?}");
        assert!(
            refused.body["detail"].as_str().unwrap().starts_with(detail),
            "{refused:?}"
        );
    }
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
