//! Decodes the bytes of one comment event into a [`Comment`].
//!
//! Decoding does no I/O and is safe for untrusted input: size and nesting are limited, and duplicate fields are
//! rejected. A byte order mark is skipped, and half of a surrogate pair is read as U+FFFD and counted. An error names the field, what was found and what was expected, and never quotes the event. The caller
//! handles null values (tombstones).

use std::borrow::Cow;

use serde_json::Value;
use serde_json::error::Category;

use super::record::Header;
use crate::config::{FieldLocation, FieldLocations, InputFields};
use crate::json::{Document, JsonError};
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
    #[error("{field} is missing, expected {expected}")]
    MissingField {
        /// The locations of the field, as in the settings.
        field: String,
        /// The values that are accepted.
        expected: &'static str,
    },
    /// A field has a value of an unexpected type.
    #[error("{field} is {found}, expected {expected}")]
    WrongType {
        /// The locations of the field, as in the settings.
        field: String,
        /// The JSON type of the value.
        found: &'static str,
        /// The values that are accepted.
        expected: &'static str,
    },
    /// The operation has no meaning in the settings.
    #[error("{field} is an unknown operation, expected one of input.ops")]
    UnknownOp {
        /// The locations of the field, as in the settings.
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

/// Decodes one comment event, which came with these headers.
///
/// The text is required unless the content was deleted. Ids are optional, because comments on the command line have
/// none; a stream requires one with [`require_content_id`].
///
/// # Errors
/// Returns the first problem found, in the order of the variants of [`DecodeError`].
pub fn decode(
    event: &[u8],
    headers: &[Header],
    fields: &InputFields,
    max_bytes: usize,
) -> Result<Comment, DecodeError> {
    if event.len() > max_bytes {
        return Err(DecodeError::TooLarge {
            bytes: event.len(),
            max_bytes,
        });
    }
    let document = Document::read(event).map_err(|error| match error {
        JsonError::NotUtf8 { offset } => DecodeError::NotUtf8 { offset },
        JsonError::NotJson(error) => not_json(&error),
    })?;
    if !document.value().is_object() {
        return Err(DecodeError::NotAnObject {
            found: type_name(document.value()),
        });
    }
    let mut event = Event {
        document,
        headers,
        replaced_surrogates: 0,
    };
    let op = event.op(fields)?;
    let text = match op {
        // The text of deleted content is not needed, so it is not kept.
        Op::Delete => String::new(),
        Op::Create | Op::Edit => event.text(&fields.text)?,
    };
    Ok(Comment {
        event_id: event.id(&fields.event_id)?,
        content_id: event.id(&fields.content_id)?,
        revision: event.revision(&fields.revision)?,
        op,
        community_id: event.id(&fields.community_id)?,
        text,
        replaced_surrogates: event.replaced_surrogates,
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

/// An event whose fields are being read.
struct Event<'a> {
    document: Document<'a>,
    headers: &'a [Header],
    /// Halves of surrogate pairs that were replaced in the fields read so far.
    replaced_surrogates: usize,
}

/// The value of a field, and the JSON pointer at which it was found, unless it comes from a header.
struct FoundValue<'e> {
    value: Cow<'e, Value>,
    pointer: Option<&'e str>,
}

impl Event<'_> {
    /// Returns the value of a field at the first of its locations that has one.
    fn find<'e>(&'e self, field: &'e FieldLocations) -> Option<FoundValue<'e>> {
        field.iter().find_map(|location| match location {
            FieldLocation::Pointer(pointer) => {
                let value = self
                    .document
                    .value()
                    .pointer(pointer)
                    .filter(|value| !value.is_null())?;
                Some(FoundValue {
                    value: Cow::Borrowed(value),
                    pointer: Some(pointer),
                })
            }
            FieldLocation::Header(name) => {
                // As in HTTP, but Kafka allows the same header twice; the last one was added last.
                let (_, value) = self.headers.iter().rev().find(|(header, _)| header == name)?;
                let text = String::from_utf8_lossy(value.as_deref()?).into_owned();
                Some(FoundValue {
                    value: Cow::Owned(text.into()),
                    pointer: None,
                })
            }
        })
    }

    fn text(&mut self, field: &FieldLocations) -> Result<String, DecodeError> {
        let found = self.find(field);
        match found.as_ref().map(|found| (found.value.as_ref(), found.pointer)) {
            Some((Value::String(text), pointer)) => {
                let (text, replaced) = (text.clone(), self.replaced_at(pointer));
                self.replaced_surrogates += replaced;
                Ok(text)
            }
            found => Err(unexpected(field, found.map(|(value, _)| value), "a string")),
        }
    }

    /// Returns the operation. Its name may also be a number or a boolean, such as that of a column `deleted`.
    fn op(&self, fields: &InputFields) -> Result<Op, DecodeError> {
        let field = &fields.op;
        let Some(found) = self.find(field) else {
            return Ok(Op::default());
        };
        let name = match found.value.as_ref() {
            Value::String(name) => Cow::Borrowed(name.as_str()),
            value @ (Value::Bool(_) | Value::Number(_)) => Cow::Owned(value.to_string()),
            value => return Err(unexpected(field, Some(value), "one of input.ops")),
        };
        fields
            .ops
            .get(name.as_ref())
            .copied()
            .ok_or_else(|| DecodeError::UnknownOp {
                field: field.to_string(),
            })
    }

    /// Integers are accepted as ids, because many platforms number their content.
    fn id(&mut self, field: &FieldLocations) -> Result<Option<String>, DecodeError> {
        let Some(found) = self.find(field) else { return Ok(None) };
        let (id, replaced) = match found.value.as_ref() {
            Value::String(id) => (Some(id.clone()), self.replaced_at(found.pointer)),
            Value::Number(_) => (found.pointer.and_then(|pointer| self.document.integer(pointer)), 0),
            _ => (None, 0),
        };
        let Some(id) = id else {
            return Err(unexpected(field, Some(&found.value), "a string or an integer"));
        };
        self.replaced_surrogates += replaced;
        Ok(Some(id))
    }

    fn revision(&self, field: &FieldLocations) -> Result<Option<i64>, DecodeError> {
        let Some(found) = self.find(field) else { return Ok(None) };
        // A header is always text.
        let revision = match (found.value.as_ref(), found.pointer) {
            (Value::String(text), None) => text.parse().ok(),
            (value, _) => value.as_i64(),
        };
        match revision {
            Some(revision) => Ok(Some(revision)),
            None => Err(unexpected(field, Some(&found.value), "a 64-bit integer")),
        }
    }

    fn replaced_at(&self, pointer: Option<&str>) -> usize {
        pointer.map_or(0, |pointer| self.document.replaced_surrogates(pointer))
    }
}

fn unexpected(field: &FieldLocations, found: Option<&Value>, expected: &'static str) -> DecodeError {
    let field = field.to_string();
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
        // The only data error that reading a document raises.
        Category::Data => DecodeError::DuplicateField { line, column },
        // serde_json describes a syntax error by what it expected, without quoting the input.
        _ => {
            let text = error.to_string();
            let reason = text.split(" at line ").next().unwrap_or_default().to_owned();
            DecodeError::NotJson { line, column, reason }
        }
    }
}

#[cfg(test)]
mod tests {
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
}
