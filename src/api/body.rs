//! Reads the fields of a body in JSON.

use std::borrow::Cow;

use serde_json::Value;

use super::error::ApiError;
use crate::json::{Document, JsonError};

/// The body of a request, which is an object.
pub(super) struct Fields<'a>(Document<'a>);

/// A text of a body.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct TextField {
    pub text: String,
    /// The number of halves of surrogate pairs in it, each of which was read as U+FFFD.
    pub replaced_surrogates: usize,
}

impl TextField {
    /// Appends the next part of a text, on a line of its own.
    pub fn append(&mut self, next: Self) {
        if !self.text.is_empty() {
            self.text.push('\n');
        }
        self.text.push_str(&next.text);
        self.replaced_surrogates += next.replaced_surrogates;
    }
}

impl<'a> Fields<'a> {
    /// Reads a body.
    ///
    /// # Errors
    /// Returns an error if it is not one object in JSON.
    pub fn read(body: &'a [u8]) -> Result<Self, ApiError> {
        let document = Document::read(body).map_err(|error| match error {
            JsonError::NotUtf8 { offset } => ApiError::invalid(format!("the body is not UTF-8 at byte {offset}")),
            JsonError::NotJson(error) if error.is_data() => {
                let (line, column) = (error.line(), error.column());
                ApiError::invalid(format!(
                    "the body has a duplicate field at line {line}, column {column}"
                ))
            }
            JsonError::NotJson(error) => {
                let (line, column) = (error.line(), error.column());
                ApiError::invalid(format!("the body is not JSON at line {line}, column {column}"))
            }
        })?;
        if !document.value().is_object() {
            return Err(ApiError::invalid("the body is not an object"));
        }
        Ok(Self(document))
    }

    /// Returns the body, so that fields can be given the names that they are read by.
    pub fn body_mut(&mut self) -> &mut Value {
        self.0.value_mut()
    }

    /// Returns the value at a JSON pointer, unless it is null.
    pub fn value(&self, pointer: &str) -> Option<&Value> {
        self.0.value().pointer(pointer).filter(|value| !value.is_null())
    }

    /// Returns the text at a JSON pointer, or `None` if there is nothing.
    ///
    /// # Errors
    /// Returns an error if the value is not a text.
    pub fn text(&self, pointer: &str) -> Result<Option<TextField>, ApiError> {
        match self.value(pointer) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(TextField {
                text: text.clone(),
                replaced_surrogates: self.0.replaced_surrogates(pointer),
            })),
            Some(_) => Err(ApiError::invalid("expected a text").at(field(pointer))),
        }
    }

    /// Returns the texts of a list, or of the field `text` of its items.
    ///
    /// # Errors
    /// Returns an error that names an item whose text is not a text.
    pub fn texts(&self, pointer: &str, name: Option<&str>) -> Result<Vec<TextField>, ApiError> {
        let list = self.value(pointer).and_then(Value::as_array);
        let replaced = self.0.replaced_in_items(pointer);
        let text = |(index, item): (usize, &Value)| {
            let text = name.map_or(Some(item), |name| item.get(name)).and_then(Value::as_str);
            let text = text.ok_or_else(|| {
                let place = format!("{}[{index}]", field(pointer));
                ApiError::invalid("expected a text").at(name.map_or(place.clone(), |name| format!("{place}.{name}")))
            })?;
            Ok(TextField {
                text: text.to_owned(),
                replaced_surrogates: replaced.get(index).copied().unwrap_or(0),
            })
        };
        list.into_iter().flatten().enumerate().map(text).collect()
    }

    /// Returns the text at a JSON pointer, without the count of what was replaced in it.
    ///
    /// # Errors
    /// Fails like [`Fields::text`].
    pub fn optional_text(&self, pointer: &str) -> Result<Option<String>, ApiError> {
        Ok(self.text(pointer)?.map(|text| text.text))
    }

    /// Returns whether the value at a JSON pointer is true; nothing counts as false.
    ///
    /// # Errors
    /// Returns an error if the value is neither true nor false.
    pub fn flag(&self, pointer: &str) -> Result<bool, ApiError> {
        match self.value(pointer) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(ApiError::invalid("expected true or false").at(field(pointer))),
        }
    }
}

/// Returns the name of a field in the notation of the APIs: `/comment/text` is `comment.text`.
fn field(pointer: &str) -> Cow<'static, str> {
    pointer.trim_start_matches('/').replace('/', ".").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_and_faults_name_them() {
        let body = br#"{"a": {"text": "see \ud83d", "list": [1]}, "on": true, "none": null}"#;
        let fields = Fields::read(body).unwrap_or_else(|error| panic!("{error:?}"));
        let text = fields.text("/a/text").unwrap().unwrap();
        assert_eq!((text.text.as_str(), text.replaced_surrogates), ("see \u{fffd}", 1));
        assert_eq!(fields.text("/none").unwrap(), None);
        assert!(fields.flag("/on").unwrap() && !fields.flag("/off").unwrap());
        let wrong = fields.text("/a/list").unwrap_err();
        assert_eq!(wrong.field.as_deref(), Some("a.list"));
    }

    #[test]
    fn a_body_that_is_not_one_object_is_refused_without_quoting_it() {
        for body in [
            &b"[\"secret\"]"[..],
            b"{\"secret\"",
            b"\"secret\"",
            b"{\"a\":1,\"a\":2}",
            b"\xffsecret",
            b"",
        ] {
            let Err(error) = Fields::read(body) else {
                panic!("{body:?}")
            };
            assert!(!error.message.contains("secret"), "{error:?}");
        }
    }
}
