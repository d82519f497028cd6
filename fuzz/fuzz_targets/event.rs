//! The decoder of comment events: a comment is decoded as it was encoded, and no error quotes the event.

#![no_main]

use libfuzzer_sys::fuzz_target;
use moderatord::config::{FieldLocations, InputFields};
use moderatord::message::{Comment, Op};
use moderatord::stream::decode::{DecodeError, decode, require_content_id};

/// Every description of a syntax error in serde_json. Any other text may come from the event.
const REASONS: [&str; 21] = [
    "EOF while parsing a list",
    "EOF while parsing an object",
    "EOF while parsing a string",
    "EOF while parsing a value",
    "expected `:`",
    "expected `,` or `]`",
    "expected `,` or `}`",
    "expected ident",
    "expected value",
    "invalid escape",
    "invalid number",
    "number out of range",
    "invalid unicode code point",
    "control character (\\u0000-\\u001F) found while parsing a string",
    "key must be a string",
    "expected `\"`",
    "lone leading surrogate in hex escape",
    "trailing comma",
    "trailing characters",
    "unexpected end of hex escape",
    "recursion limit exceeded",
];

const JSON_TYPES: [&str; 6] = ["null", "a boolean", "a number", "a string", "an array", "an object"];

fuzz_target!(|data: &[u8]| {
    let Some((&layout, event)) = data.split_first() else {
        return;
    };
    let fields = fields(layout);
    match decode(event, &[], &fields, event.len()) {
        Ok(comment) => {
            assert!(comment.op != Op::Delete || comment.text.is_empty());
            assert_eq!(
                require_content_id(&comment, &fields).is_ok(),
                comment.content_id.is_some()
            );
            let encoded = encode(&comment, layout);
            // What was replaced is part of the text now.
            let expected = Comment {
                replaced_surrogates: 0,
                ..comment
            };
            assert_eq!(decode(encoded.as_bytes(), &[], &fields, encoded.len()), Ok(expected));
            let too_large = decode(event, &[], &fields, event.len() - 1);
            assert!(matches!(too_large, Err(DecodeError::TooLarge { .. })));
        }
        Err(error) => check_error(&error, &fields),
    }
});

/// Returns flat or nested fields.
fn fields(layout: u8) -> InputFields {
    let field = |name: &str| FieldLocations::from(path(layout, name));
    InputFields {
        event_id: field("event_id"),
        content_id: field("content_id"),
        revision: field("revision"),
        op: field("op"),
        community_id: field("community_id"),
        text: field("text"),
        ..InputFields::default()
    }
}

/// Returns the location of a flat or nested field.
fn path(layout: u8, name: &str) -> String {
    match layout % 2 {
        0 => format!("/{name}"),
        _ => format!("/payload/a~1b/{name}"),
    }
}

/// Returns an event for a comment.
fn encode(comment: &Comment, layout: u8) -> String {
    let values = serde_json::json!({
        "event_id": comment.event_id,
        "content_id": comment.content_id,
        "revision": comment.revision,
        "op": comment.op,
        "community_id": comment.community_id,
        "text": comment.text,
    });
    match layout % 2 {
        0 => values,
        _ => serde_json::json!({"payload": {"a/b": values}}),
    }
    .to_string()
}

/// Checks that an error consists of fixed words, names from the settings and numbers.
fn check_error(error: &DecodeError, fields: &InputFields) {
    let known_fields: Vec<String> = fields.iter().map(|(_, field)| field.to_string()).collect();
    match error {
        DecodeError::TooLarge { .. } => panic!("the event has exactly the allowed size"),
        DecodeError::NotUtf8 { .. } | DecodeError::DuplicateField { .. } => {}
        DecodeError::NotJson { reason, .. } => assert!(REASONS.contains(&reason.as_str()), "`{reason}`"),
        DecodeError::NotAnObject { found } => assert!(JSON_TYPES.contains(found)),
        DecodeError::MissingField { field, .. }
        | DecodeError::WrongType { field, .. }
        | DecodeError::UnknownOp { field } => assert!(known_fields.contains(field)),
    }
    // The longest of these messages, with the longest field.
    assert!(error.to_string().len() < 200, "{error}");
}
