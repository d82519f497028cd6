//! Bytes of one comment event in, [`Comment`] out.
//!
//! Pure, and safe against what a stranger may send: bounded, no recursion without end, no field told
//! twice. An error names the field, what was found and what was expected, and never quotes the event.
//! A null value (tombstone) is the caller's business.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::error::Category;

use crate::config::InputFields;
use crate::message::{Comment, Op};

/// Why an event is no comment. Never quotes the event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Longer than allowed; it was not read.
    #[error("the event has {bytes} bytes, expected at most {max_bytes} (input.max_bytes)")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        max_bytes: usize,
    },
    /// Not text at all.
    #[error("the event is not UTF-8 from byte {offset} on")]
    NotUtf8 {
        /// The first byte that is not.
        offset: usize,
    },
    /// Text, but no JSON.
    #[error("the event is not JSON at line {line}, column {column}: {reason}")]
    NotJson {
        /// One-based.
        line: usize,
        /// One-based, in bytes.
        column: usize,
        /// What the parser expected.
        reason: String,
    },
    /// An object names a field twice; readers would differ in which one they take.
    #[error("the event names a field twice, at line {line}, column {column}")]
    DuplicateField {
        /// One-based.
        line: usize,
        /// One-based, in bytes.
        column: usize,
    },
    /// JSON, but no object.
    #[error("the event is {found}, expected an object")]
    NotAnObject {
        /// The JSON type found.
        found: &'static str,
    },
    /// A field that is needed is absent or null.
    #[error("`{field}` is missing, expected {expected}")]
    MissingField {
        /// JSON pointer.
        field: String,
        /// What belongs there.
        expected: &'static str,
    },
    /// A field holds something else.
    #[error("`{field}` is {found}, expected {expected}")]
    WrongType {
        /// JSON pointer.
        field: String,
        /// The JSON type found.
        found: &'static str,
        /// What belongs there.
        expected: &'static str,
    },
    /// `op` is a text, but none of ours.
    #[error("`{field}` is another text, expected create, edit or delete")]
    UnknownOp {
        /// JSON pointer.
        field: String,
    },
}

impl DecodeError {
    /// A stable name: the label of metrics and dead letters.
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

/// Reads one comment event. `text` is needed unless the content was deleted; ids are not, as a
/// command line has none: a stream asks for them with [`require_content_id`].
///
/// # Errors
/// [`DecodeError`], the first fault in the order of its variants.
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
    // serde_json itself stops at 128 levels, long before the stack ends.
    let Once(event) = serde_json::from_str(event).map_err(|error| not_json(&error))?;
    if !event.is_object() {
        return Err(DecodeError::NotAnObject { found: kind(&event) });
    }
    let op = op(&event, &fields.op)?;
    let text = match (op, event.pointer(&fields.text)) {
        // What a deleted content once said is none of our business.
        (Op::Delete, _) => String::new(),
        (_, Some(Value::String(text))) => text.clone(),
        (_, found) => return Err(not_a(&fields.text, found, "a text")),
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

/// What a stream needs beside the text: a decision about unnamed content helps nobody.
///
/// # Errors
/// [`DecodeError::MissingField`].
pub fn require_content_id(comment: &Comment, fields: &InputFields) -> Result<(), DecodeError> {
    match comment.content_id {
        Some(_) => Ok(()),
        None => Err(not_a(&fields.content_id, None, "an id")),
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
        found => Err(not_a(field, found, "create, edit or delete")),
    }
}

/// Many platforms count their ids, so a whole number is one as well.
fn id(event: &Value, field: &str) -> Result<Option<String>, DecodeError> {
    match event.pointer(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(id)) => Ok(Some(id.clone())),
        Some(Value::Number(id)) if id.is_i64() || id.is_u64() => Ok(Some(id.to_string())),
        found => Err(not_a(field, found, "a text or a whole number")),
    }
}

fn revision(event: &Value, field: &str) -> Result<Option<i64>, DecodeError> {
    let expected = "a whole number of 64 bits";
    match event.pointer(field) {
        None | Some(Value::Null) => Ok(None),
        found => match found.and_then(Value::as_i64) {
            Some(revision) => Ok(Some(revision)),
            None => Err(not_a(field, found, expected)),
        },
    }
}

fn not_a(field: &str, found: Option<&Value>, expected: &'static str) -> DecodeError {
    let field = field.to_owned();
    match found {
        None | Some(Value::Null) => DecodeError::MissingField { field, expected },
        Some(value) => DecodeError::WrongType {
            field,
            found: kind(value),
            expected,
        },
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn not_json(error: &serde_json::Error) -> DecodeError {
    let (line, column) = (error.line(), error.column());
    match error.classify() {
        // The only fault of content that `Once` can find.
        Category::Data => DecodeError::DuplicateField { line, column },
        // serde_json words its syntax errors by what it expected, without the input.
        _ => {
            let text = error.to_string();
            let reason = text.split(" at line ").next().unwrap_or_default().to_owned();
            DecodeError::NotJson { line, column, reason }
        }
    }
}

/// A JSON value in which no object names a field twice.
struct Once(Value);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OnceVisitor).map(Self)
    }
}

struct OnceVisitor;

impl<'de> Visitor<'de> for OnceVisitor {
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
        while let Some(Once(value)) = values.next_element()? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = serde_json::Map::new();
        while let Some((name, Once(value))) = entries.next_entry::<String, Once>()? {
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
    fn a_whole_event_is_read() {
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
    fn fields_stand_where_the_settings_say() {
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
    fn a_deletion_needs_no_text_and_keeps_none() {
        for event in [r#"{"op":"delete"}"#, r#"{"op":"delete","text":"gone"}"#] {
            let comment = read(event.as_bytes()).unwrap();
            assert_eq!((comment.op, comment.text.as_str()), (Op::Delete, ""));
        }
    }

    #[test]
    fn a_stream_needs_an_id() {
        let comment = read(br#"{"text":"hello"}"#).unwrap();
        let error = require_content_id(&comment, &fields()).unwrap_err();
        assert_eq!(error.to_string(), "`/content_id` is missing, expected an id");
    }

    #[test]
    fn each_fault_has_its_reason_and_text() {
        let check = |event: &[u8], reason: &str, text: &str| {
            let error = read(event).unwrap_err();
            assert_eq!((error.reason(), error.to_string().as_str()), (reason, text));
        };
        check(
            b"{\"text\":\"\xff\"}",
            "not_utf8",
            "the event is not UTF-8 from byte 9 on",
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
            "the event names a field twice, at line 1, column 23",
        );
        check(
            br#"{"text":"a","x":{"y":1,"y":1}}"#,
            "duplicate_field",
            "the event names a field twice, at line 1, column 29",
        );
        check(b"[1]", "not_an_object", "the event is a list, expected an object");
        check(b"{}", "missing_field", "`/text` is missing, expected a text");
        check(
            br#"{"text":null}"#,
            "missing_field",
            "`/text` is missing, expected a text",
        );
        check(br#"{"text":1}"#, "wrong_type", "`/text` is a number, expected a text");
        check(
            br#"{"text":"a","revision":1.5}"#,
            "wrong_type",
            "`/revision` is a number, expected a whole number of 64 bits",
        );
        check(
            br#"{"text":"a","content_id":{}}"#,
            "wrong_type",
            "`/content_id` is an object, expected a text or a whole number",
        );
        check(
            br#"{"text":"a","op":"purge"}"#,
            "unknown_op",
            "`/op` is another text, expected create, edit or delete",
        );
        check(
            br#"{"text":"a","op":false}"#,
            "wrong_type",
            "`/op` is a boolean, expected create, edit or delete",
        );
    }

    #[test]
    fn the_limit_is_the_longest_event() {
        let event = br#"{"text":"a"}"#;
        assert!(decode(event, &fields(), event.len()).is_ok());
        let error = decode(event, &fields(), event.len() - 1).unwrap_err();
        assert_eq!(error.reason(), "too_large");
    }

    #[test]
    fn nesting_without_end_is_refused() {
        for opening in ["[", "{\"a\":"] {
            let event = format!("{{\"text\":\"a\",\"x\":{}", opening.repeat(100_000));
            assert_eq!(read(event.as_bytes()).unwrap_err().reason(), "not_json");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(event in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&event);
        }

        #[test]
        fn any_text_survives(text in any::<String>(), id in any::<String>()) {
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
