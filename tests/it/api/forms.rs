//! The forms of requests and answers.

use super::*;

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
    let none = server.request("POST", "/v1/moderations", &[], b"{}");
    assert_eq!((none.status, &none.body["error"]["code"]), (401, &Value::Null));
    let message = none.body["error"]["message"].as_str().unwrap();
    assert!(message.starts_with("You didn't provide an API key."), "{message}");
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

    // The sentences are not comments of their own.
    let metrics = server.metrics();
    let counted: u64 = metrics
        .lines()
        .filter(|line| line.starts_with("moderatord_api_decisions_total{"))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum();
    assert_eq!(counted, 2, "{metrics}");
    assert!(metrics.contains("moderatord_probability_count 2\n"), "{metrics}");

    let recognised = analyze(&json!({
        "comment": {"text": "We walked along the river until it got dark."},
        "requestedAttributes": {"IDENTITY_ATTACK": {}},
    }));
    assert_eq!(
        (&recognised.body["languages"], &recognised.body["detectedLanguages"]),
        (&json!(["en"]), &json!(["en"]))
    );
    // Fields may have the names of Google's definitions.
    let defined = analyze(&json!({
        "comment": {"text": text}, "requested_attributes": {"IDENTITY_ATTACK": {"score_threshold": 0.0}},
        "languages": ["en"], "do_not_store": true, "client_token": "c-1", "span_annotations": true,
    }));
    for name in ["attributeScores", "clientToken"] {
        assert_eq!(defined.body[name], answer.body[name], "{defined:?}");
    }
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
            json!({"comment": comment, "requestedAttributes": attributes, "requested_attributes": attributes}),
            "requestedAttributes",
        ),
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
        (no_key.status, &no_key.body["error"]["status"]),
        (403, &json!("PERMISSION_DENIED"))
    );
    let message = no_key.body["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("unregistered callers") && message.contains("use API Key"),
        "{message}"
    );
    let wrong_key = server.request("POST", "/v1alpha1/comments:analyze?key=wrong", &[], b"{}");
    assert_eq!(
        (wrong_key.status, &wrong_key.body["error"]["details"][0]["reason"]),
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
            status == if path.contains(':') { "403" } else { "401" },
            "{path} {status}"
        );
        assert!(method["responses"][&status].is_object(), "{path} {status}");
    }
}
