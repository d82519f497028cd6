//! The API as a part of the whole service: its page, and the stream beside it.

use super::*;

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
    let server = Server::launch("run", folder, [port, health_port]);
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
