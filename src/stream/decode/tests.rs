//! Events that are read, and the reason for which each other one is refused.

use proptest::prelude::*;

use super::*;

fn read(event: &[u8]) -> Result<Comment, DecodeError> {
    decode(event, &[], &InputFields::default(), 1 << 20)
}

#[test]
fn an_event_with_every_field_is_decoded() {
    let event = br#"{"event_id":"e","content_id":7,"revision":3,"op":"edit","community_id":"garden",
                     "text":"caf\u00e9 \ud83c\udf31","later":[{"deep":null}]}"#;
    let expected = Comment {
        event_id: Some("e".into()),
        content_id: Some("7".into()),
        revision: Some(3),
        op: Op::Edit,
        community_id: Some("garden".into()),
        text: "café \u{1f331}".into(),
        replaced_surrogates: 0,
    };
    assert_eq!(read(event), Ok(expected));
}

#[test]
fn the_settings_choose_the_fields() {
    let fields = InputFields {
        text: "/payload/body".into(),
        content_id: "/a~1b".into(),
        ..InputFields::default()
    };
    let comment = decode(br#"{"payload":{"body":"hello"},"a/b":"c"}"#, &[], &fields, 100).unwrap();
    assert_eq!(
        (comment.text.as_str(), comment.content_id.as_deref()),
        ("hello", Some("c"))
    );
    assert_eq!(require_content_id(&comment, &fields), Ok(()));
}

#[test]
fn the_first_location_with_a_value_counts() {
    let fields = InputFields {
        text: ["/after/text", "/before/text"].into(),
        content_id: ["/after/id", "/before/id", "header:id"].into(),
        ..InputFields::default()
    };
    let read = |event: &str, headers: &[Header]| decode(event.as_bytes(), headers, &fields, 1000);
    let comment = read(r#"{"after":null,"before":{"id":1,"text":"old"}}"#, &[]).unwrap();
    assert_eq!(
        (comment.text.as_str(), comment.content_id.as_deref()),
        ("old", Some("1"))
    );
    let comment = read(r#"{"after":{"id":2,"text":"new"},"before":{"id":1,"text":"old"}}"#, &[]).unwrap();
    assert_eq!(
        (comment.text.as_str(), comment.content_id.as_deref()),
        ("new", Some("2"))
    );
    let header = |value: &[u8]| ("id".to_owned(), Some(value.to_vec()));
    let comment = read(r#"{"after":{"text":"new"}}"#, &[header(b"3"), header(b"4")]).unwrap();
    assert_eq!(comment.content_id.as_deref(), Some("4"));
    assert_eq!(
        read("{}", &[]).unwrap_err().to_string(),
        "`/after/text` or `/before/text` is missing, expected a string"
    );
    // A value of another type is not skipped.
    assert_eq!(
        read(r#"{"after":{"text":"new","id":true},"before":{"id":1}}"#, &[])
            .unwrap_err()
            .to_string(),
        "`/after/id` or `/before/id` or `header:id` is a boolean, expected a string or an integer"
    );
}

#[test]
fn the_settings_give_operations_their_meaning() {
    let ops = [
        ("c", Op::Create),
        ("d", Op::Delete),
        ("true", Op::Delete),
        ("2", Op::Edit),
    ];
    let fields = InputFields {
        op: ["/op", "header:kind"].into(),
        revision: "header:revision".into(),
        ops: ops.map(|(name, op)| (name.to_owned(), op)).into(),
        ..InputFields::default()
    };
    let read = |op: &str, headers: &[Header]| {
        let event = format!(r#"{{"text":"a","op":{op}}}"#);
        decode(event.as_bytes(), headers, &fields, 1000)
    };
    for (op, expected) in [
        ("\"c\"", Op::Create),
        ("\"d\"", Op::Delete),
        ("true", Op::Delete),
        ("2", Op::Edit),
    ] {
        assert_eq!(read(op, &[]).unwrap().op, expected, "{op}");
    }
    let headers = [
        ("kind".to_owned(), Some(b"d".to_vec())),
        ("revision".to_owned(), Some(b"7".to_vec())),
    ];
    let comment = read("null", &headers).unwrap();
    assert_eq!((comment.op, comment.revision), (Op::Delete, Some(7)));
    for op in ["\"create\"", "\"C\"", "false", "3"] {
        assert_eq!(read(op, &headers).unwrap_err().reason(), "unknown_op", "{op}");
    }
}

#[test]
fn half_a_surrogate_pair_and_a_byte_order_mark_do_not_make_an_event_unreadable() {
    let comment = read(br#"{"content_id":"\udc00","text":"have a nice day \ud83d","x":"\ud83d"}"#).unwrap();
    assert_eq!(comment.text, "have a nice day \u{fffd}");
    assert_eq!(comment.content_id.as_deref(), Some("\u{fffd}"));
    assert_eq!(comment.replaced_surrogates, 2);
    let comment = read(b"\xef\xbb\xbf{\"content_id\":\"1\",\"text\":\"have a nice day\"}").unwrap();
    assert_eq!(
        (comment.text.as_str(), comment.replaced_surrogates),
        ("have a nice day", 0)
    );
}

#[test]
fn integers_of_any_size_are_ids_with_their_own_digits() {
    let comment = read(br#"{"content_id":12345678901234567890123,"event_id":-0,"text":"a"}"#).unwrap();
    assert_eq!(comment.content_id.as_deref(), Some("12345678901234567890123"));
}

#[test]
fn a_deletion_needs_no_text_and_drops_any() {
    for event in [r#"{"op":"delete"}"#, r#"{"op":"delete","text":"gone"}"#] {
        let comment = read(event.as_bytes()).unwrap();
        assert_eq!((comment.op, comment.text.as_str()), (Op::Delete, ""));
    }
}

#[test]
fn a_stream_requires_a_content_id() {
    let comment = read(br#"{"text":"hello"}"#).unwrap();
    let error = require_content_id(&comment, &InputFields::default()).unwrap_err();
    assert_eq!(error.to_string(), "`/content_id` is missing, expected an id");
}

#[test]
fn each_error_has_a_reason_and_a_message() {
    let check = |event: &[u8], reason: &str, text: &str| {
        let error = read(event).unwrap_err();
        assert_eq!((error.reason(), error.to_string().as_str()), (reason, text));
    };
    check(
        b"{\"text\":\"\xff\"}",
        "not_utf8",
        "the event is not valid UTF-8 at byte 9",
    );
    check(
        b"{\"text\":",
        "not_json",
        "the event is not JSON at line 1, column 8: EOF while parsing a value",
    );
    check(
        br#"{"text":"a"} b"#,
        "not_json",
        "the event is not JSON at line 1, column 14: trailing characters",
    );
    check(
        br#"{"text":"a","text":"b"}"#,
        "duplicate_field",
        "the event has a duplicate field at line 1, column 23",
    );
    check(
        br#"{"text":"a","x":{"y":1,"y":1}}"#,
        "duplicate_field",
        "the event has a duplicate field at line 1, column 29",
    );
    check(b"[1]", "not_an_object", "the event is an array, expected an object");
    check(b"{}", "missing_field", "`/text` is missing, expected a string");
    check(
        br#"{"text":null}"#,
        "missing_field",
        "`/text` is missing, expected a string",
    );
    check(br#"{"text":1}"#, "wrong_type", "`/text` is a number, expected a string");
    check(
        br#"{"text":"a","revision":1.5}"#,
        "wrong_type",
        "`/revision` is a number, expected a 64-bit integer",
    );
    check(
        br#"{"text":"a","content_id":{}}"#,
        "wrong_type",
        "`/content_id` is an object, expected a string or an integer",
    );
    check(
        br#"{"text":"a","op":"purge"}"#,
        "unknown_op",
        "`/op` is an unknown operation, expected one of input.ops",
    );
    check(
        br#"{"text":"a","op":false}"#,
        "unknown_op",
        "`/op` is an unknown operation, expected one of input.ops",
    );
    check(
        br#"{"text":"a","op":["create"]}"#,
        "wrong_type",
        "`/op` is an array, expected one of input.ops",
    );
    check(
        br#"{"text":"a","content_id":12345678901234567890123.5}"#,
        "wrong_type",
        "`/content_id` is a number, expected a string or an integer",
    );
    check(
        br#"{"text":"a","revision":12345678901234567890123}"#,
        "wrong_type",
        "`/revision` is a number, expected a 64-bit integer",
    );
}

#[test]
fn an_event_of_max_bytes_is_accepted() {
    let event = br#"{"text":"a"}"#;
    assert!(decode(event, &[], &InputFields::default(), event.len()).is_ok());
    let error = decode(event, &[], &InputFields::default(), event.len() - 1).unwrap_err();
    assert_eq!(error.reason(), "too_large");
}

#[test]
fn deep_nesting_is_rejected() {
    for opening in ["[", "{\"a\":"] {
        let event = format!("{{\"text\":\"a\",\"x\":{}", opening.repeat(100_000));
        assert_eq!(read(event.as_bytes()).unwrap_err().reason(), "not_json");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_rejected(event in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read(&event);
    }

    #[test]
    fn any_text_and_id_are_decoded_unchanged(text in any::<String>(), id in any::<String>()) {
        let event = serde_json::json!({ "text": text, "content_id": id }).to_string();
        let comment = read(event.as_bytes()).unwrap();
        prop_assert_eq!((comment.text, comment.content_id), (text, Some(id)));
    }

    #[test]
    fn no_error_quotes_the_event(cut in 0usize..60, junk in "[xyz]{1,3}") {
        let event = r#"{"text":"marked-words","op":"marked-words","marked-words":1}"#;
        let mut event = event.to_owned();
        event.insert_str(cut.min(event.len()), &junk);
        if let Err(error) = read(event.as_bytes()) {
            prop_assert!(!format!("{error} {error:?}").contains("marked"), "{}", error);
        }
    }
}
