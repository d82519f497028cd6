//! Decodes the bytes of one comment event into a [`Comment`].
//!
//! Decoding does no I/O and is safe for untrusted input: size and nesting are limited, and duplicate fields are
//! rejected. An error names the field, what was found and what was expected, and never quotes the event. The caller
//! handles null values (tombstones).

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::error::Category;

use crate::config::InputFields;
use crate::message::{Comment, Op};

/// The reason why an event cannot be decoded. Never quotes the event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The event is longer than the limit and was not parsed.
    #[error("the event has {bytes} bytes, expected at most {max_bytes} (input.max_bytes)")]
    TooLarge {
        /// The size of the event.
        bytes: usize,
        /// The largest accepted size.
        max_bytes: usize,
    },
    /// The event contains bytes that are not UTF-8 and was not parsed.
    #[error("the event is not valid UTF-8 at byte {offset}")]
    NotUtf8 {
        /// The first byte that is not valid.
        offset: usize,
    },
    /// The event is not one complete JSON value, or is nested too deeply.
    #[error("the event is not JSON at line {line}, column {column}: {reason}")]
    NotJson {
        /// One-based.
        line: usize,
        /// One-based, in bytes.
        column: usize,
        /// The parser's description of the error.
        reason: String,
    },
    /// An object has the same field twice; parsers differ in which one they use.
    #[error("the event has a duplicate field at line {line}, column {column}")]
    DuplicateField {
        /// One-based.
        line: usize,
        /// One-based, in bytes.
        column: usize,
    },
    /// The event is JSON, but not an object.
    #[error("the event is {found}, expected an object")]
    NotAnObject {
        /// The JSON type of the event.
        found: &'static str,
    },
    /// A required field is absent or null.
    #[error("`{field}` is missing, expected {expected}")]
    MissingField {
        /// The JSON pointer of the field.
        field: String,
        /// The values that are accepted.
        expected: &'static str,
    },
    /// A field has a value of an unexpected type.
    #[error("`{field}` is {found}, expected {expected}")]
    WrongType {
        /// The JSON pointer of the field.
        field: String,
        /// The JSON type of the value.
        found: &'static str,
        /// The values that are accepted.
        expected: &'static str,
    },
    /// The operation is a string, but not one of the known ones.
    #[error("`{field}` is an unknown string, expected create, edit or delete")]
    UnknownOp {
        /// The JSON pointer of the field.
        field: String,
    },
}

impl DecodeError {
    /// Returns a stable name for the reason, used in metrics and dead letters.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "too_large",
            Self::NotUtf8 { .. } => "not_utf8",
            Self::NotJson { .. } => "not_json",
            Self::DuplicateField { .. } => "duplicate_field",
            Self::NotAnObject { .. } => "not_an_object",
            Self::MissingField { .. } => "missing_field",
            Self::WrongType { .. } => "wrong_type",
            Self::UnknownOp { .. } => "unknown_op",
        }
    }
}

/// Decodes one comment event.
///
/// The text is required unless the content was deleted. Ids are optional, because comments on the command line have
/// none; a stream requires one with [`require_content_id`].
///
/// # Errors
/// Returns the first problem found, in the order of the variants of [`DecodeError`].
pub fn decode(event: &[u8], fields: &InputFields, max_bytes: usize) -> Result<Comment, DecodeError> {
    if event.len() > max_bytes {
        return Err(DecodeError::TooLarge {
            bytes: event.len(),
            max_bytes,
        });
    }
    let event = std::str::from_utf8(event).map_err(|error| DecodeError::NotUtf8 {
        offset: error.valid_up_to(),
    })?;
    // serde_json rejects more than 128 levels of nesting, long before the stack overflows.
    let UniqueFields(event) = serde_json::from_str(event).map_err(|error| not_json(&error))?;
    if !event.is_object() {
        return Err(DecodeError::NotAnObject {
            found: type_name(&event),
        });
    }
    let op = op(&event, &fields.op)?;
    let text = match (op, event.pointer(&fields.text)) {
        // The text of deleted content is not needed, so it is not kept.
        (Op::Delete, _) => String::new(),
        (_, Some(Value::String(text))) => text.clone(),
        (_, found) => return Err(unexpected(&fields.text, found, "a string")),
    };
    Ok(Comment {
        event_id: id(&event, &fields.event_id)?,
        content_id: id(&event, &fields.content_id)?,
        revision: revision(&event, &fields.revision)?,
        op,
        community_id: id(&event, &fields.community_id)?,
        text,
    })
}

/// Checks that a comment has a content id, without which a consumer could not act on its decision.
///
/// # Errors
/// Returns [`DecodeError::MissingField`] if the comment has no content id.
pub fn require_content_id(comment: &Comment, fields: &InputFields) -> Result<(), DecodeError> {
    match comment.content_id {
        Some(_) => Ok(()),
        None => Err(unexpected(&fields.content_id, None, "an id")),
    }
}

fn op(event: &Value, field: &str) -> Result<Op, DecodeError> {
    match event.pointer(field) {
        None | Some(Value::Null) => Ok(Op::default()),
        Some(Value::String(op)) => match op.as_str() {
            "create" => Ok(Op::Create),
            "edit" => Ok(Op::Edit),
            "delete" => Ok(Op::Delete),
            _ => Err(DecodeError::UnknownOp {
                field: field.to_owned(),
            }),
        },
        found => Err(unexpected(field, found, "create, edit or delete")),
    }
}

/// Integers are accepted as ids, because many platforms number their content.
fn id(event: &Value, field: &str) -> Result<Option<String>, DecodeError> {
    match event.pointer(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(id)) => Ok(Some(id.clone())),
        Some(Value::Number(id)) if id.is_i64() || id.is_u64() => Ok(Some(id.to_string())),
        found => Err(unexpected(field, found, "a string or an integer")),
    }
}

fn revision(event: &Value, field: &str) -> Result<Option<i64>, DecodeError> {
    let expected = "a 64-bit integer";
    match event.pointer(field) {
        None | Some(Value::Null) => Ok(None),
        found => match found.and_then(Value::as_i64) {
            Some(revision) => Ok(Some(revision)),
            None => Err(unexpected(field, found, expected)),
        },
    }
}

fn unexpected(field: &str, found: Option<&Value>, expected: &'static str) -> DecodeError {
    let field = field.to_owned();
    match found {
        None | Some(Value::Null) => DecodeError::MissingField { field, expected },
        Some(value) => DecodeError::WrongType {
            field,
            found: type_name(value),
            expected,
        },
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn not_json(error: &serde_json::Error) -> DecodeError {
    let (line, column) = (error.line(), error.column());
    match error.classify() {
        // The only data error that `UniqueFields` raises.
        Category::Data => DecodeError::DuplicateField { line, column },
        // serde_json describes a syntax error by what it expected, without quoting the input.
        _ => {
            let text = error.to_string();
            let reason = text.split(" at line ").next().unwrap_or_default().to_owned();
            DecodeError::NotJson { line, column, reason }
        }
    }
}

/// A JSON value in which no object has duplicate fields.
struct UniqueFields(Value);

impl<'de> Deserialize<'de> for UniqueFields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueFieldsVisitor).map(Self)
    }
}

struct UniqueFieldsVisitor;

impl<'de> Visitor<'de> for UniqueFieldsVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(UniqueFields(value)) = values.next_element()? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = serde_json::Map::new();
        while let Some((name, UniqueFields(value))) = entries.next_entry::<String, UniqueFields>()? {
            if object.insert(name, value).is_some() {
                return Err(A::Error::custom("duplicate field"));
            }
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fields() -> InputFields {
        InputFields {
            event_id: "/event_id".into(),
            content_id: "/content_id".into(),
            revision: "/revision".into(),
            op: "/op".into(),
            community_id: "/community_id".into(),
            text: "/text".into(),
        }
    }

    fn read(event: &[u8]) -> Result<Comment, DecodeError> {
        decode(event, &fields(), 1 << 20)
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
        };
        assert_eq!(read(event), Ok(expected));
    }

    #[test]
    fn the_settings_choose_the_fields() {
        let fields = InputFields {
            text: "/payload/body".into(),
            content_id: "/a~1b".into(),
            ..fields()
        };
        let comment = decode(br#"{"payload":{"body":"hello"},"a/b":"c"}"#, &fields, 100).unwrap();
        assert_eq!(
            (comment.text.as_str(), comment.content_id.as_deref()),
            ("hello", Some("c"))
        );
        assert_eq!(require_content_id(&comment, &fields), Ok(()));
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
        let error = require_content_id(&comment, &fields()).unwrap_err();
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
            "`/op` is an unknown string, expected create, edit or delete",
        );
        check(
            br#"{"text":"a","op":false}"#,
            "wrong_type",
            "`/op` is a boolean, expected create, edit or delete",
        );
    }

    #[test]
    fn an_event_of_max_bytes_is_accepted() {
        let event = br#"{"text":"a"}"#;
        assert!(decode(event, &fields(), event.len()).is_ok());
        let error = decode(event, &fields(), event.len() - 1).unwrap_err();
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
}
