//! Decodes the bytes of one comment event into a [`Comment`].
//!
//! Decoding does no I/O and is safe for untrusted input: size and nesting are limited, and duplicate fields are
//! rejected. A byte order mark is skipped, and half of a surrogate pair is read as U+FFFD and counted. An error names the
//! field, what was found and what was expected, and never quotes the event. The caller handles null values (tombstones).

#[cfg(test)]
mod tests;

use std::borrow::Cow;

use serde_json::Value;
use serde_json::error::Category;

use super::record::Header;
use crate::config::{FieldLocation, FieldLocations, InputFields};
use crate::json::{Document, JsonError, type_name};
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
