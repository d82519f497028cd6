//! The examples in docs/input.md work as they stand.

use moderatord::config::{Config, InputConfig, Sources};
use moderatord::message::{Comment, Op};
use moderatord::stream::decode::{decode, require_content_id};

/// The headers of a record, as the stream reads them.
type Headers = Vec<(String, Option<Vec<u8>>)>;

/// Returns the code blocks in a language below a heading, up to the next heading.
fn blocks(heading: &str, language: &str) -> Vec<String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/input.md");
    let page = std::fs::read_to_string(path).unwrap();
    let (_, section) = page.split_once(&format!("\n{heading}\n")).unwrap();
    let section = section.split("\n#").next().unwrap();
    let mut found = Vec::new();
    for part in section.split(&format!("```{language}\n")).skip(1) {
        found.push(part.split("```").next().unwrap().to_owned());
    }
    found
}

/// Returns the settings of a section, and its events.
fn example(heading: &str) -> (InputConfig, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("moderatord.toml");
    let [settings] = &blocks(heading, "toml")[..] else {
        panic!("{heading} has one example of settings")
    };
    std::fs::write(&file, settings).unwrap();
    let sources = Sources {
        file: Some(file),
        ..Sources::default()
    };
    let [events] = &blocks(heading, "json")[..] else {
        panic!("{heading} has one example of events")
    };
    let input = Config::load(&sources).unwrap().input;
    (input, events.lines().map(str::to_owned).collect())
}

fn read(heading: &str, headers: &Headers) -> Vec<Comment> {
    let (input, events) = example(heading);
    let read = |event: &String| {
        let comment = decode(event.as_bytes(), headers, &input.fields, input.max_bytes).unwrap();
        require_content_id(&comment, &input.fields).unwrap();
        comment
    };
    events.iter().map(read).collect()
}

fn comment(op: Op, content_id: &str, text: &str) -> Comment {
    Comment {
        event_id: None,
        content_id: Some(content_id.to_owned()),
        revision: None,
        op,
        community_id: Some("gardening".to_owned()),
        text: text.to_owned(),
        replaced_surrogates: 0,
    }
}

#[test]
fn change_events_of_debezium_are_read() {
    let change = |revision, op, text| Comment {
        revision: Some(revision),
        ..comment(op, "7", text)
    };
    let expected = [
        change(33_227_720, Op::Create, "see you at the garden"),
        change(33_227_800, Op::Edit, "see you tomorrow"),
        change(33_227_900, Op::Delete, ""),
    ];
    assert_eq!(read("### Debezium", &Vec::new()), expected);
    // As the page says, a pointer to the payload is enough if the schema is part of the event.
    let (mut input, events) = example("### Debezium");
    for field in [
        &mut input.fields.op,
        &mut input.fields.content_id,
        &mut input.fields.community_id,
        &mut input.fields.revision,
        &mut input.fields.text,
    ] {
        let locations = field.to_string();
        let nested: Vec<String> = locations
            .split(" or ")
            .map(|pointer| format!("/payload{}", pointer.trim_matches('`')))
            .collect();
        *field = nested.into_iter().collect();
    }
    for (event, expected) in events.iter().zip(&expected) {
        let event = format!(r#"{{"schema": {{"type": "struct"}}, "payload": {event}}}"#);
        let found = decode(event.as_bytes(), &[], &input.fields, input.max_bytes).unwrap();
        assert_eq!(&found, expected);
    }
    // An operation of another kind is not taken for a comment.
    let (input, _) = example("### Debezium");
    let error = decode(br#"{"op": "t"}"#, &[], &input.fields, 1000).unwrap_err();
    assert_eq!(error.reason(), "unknown_op");
}

#[test]
fn structured_cloud_events_are_read() {
    let event = |id: &str, comment| Comment {
        event_id: Some(id.to_owned()),
        ..comment
    };
    let removed = Comment {
        community_id: None,
        ..comment(Op::Delete, "c1", "")
    };
    let created = comment(Op::Create, "c1", "see you at the garden");
    assert_eq!(
        read("### CloudEvents, structured mode", &Vec::new()),
        [event("e1", created), event("e2", removed)]
    );
}

#[test]
fn binary_cloud_events_are_read() {
    let headers = |kind: &str| -> Headers {
        [("ce_id", "e1"), ("ce_type", kind), ("ce_subject", "c9")]
            .map(|(name, value)| (name.to_owned(), Some(value.as_bytes().to_vec())))
            .into()
    };
    let expected = |comment| Comment {
        event_id: Some("e1".to_owned()),
        ..comment
    };
    let heading = "### CloudEvents, binary mode";
    assert_eq!(
        read(heading, &headers("com.example.comment.created")),
        [expected(comment(Op::Create, "c9", "see you at the garden"))]
    );
    assert_eq!(
        read(heading, &headers("com.example.comment.removed")),
        [expected(comment(Op::Delete, "c9", ""))]
    );
    // Without headers, as in a file, the content id is in the event.
    assert_eq!(
        read(heading, &Vec::new()),
        [comment(Op::Create, "c1", "see you at the garden")]
    );
}
