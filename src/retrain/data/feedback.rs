//! Decodes labelled feedback, and selects the latest label for each content id.
//!
//! This module performs no I/O. A record that cannot be used gives an error with a reason.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde_json::Value;

use crate::json::{Document, JsonError, type_name};

/// Who gave a label. The order is that of trust: the first is trusted most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LabelSource {
    /// A moderator's decision.
    Moderator,
    /// The outcome of an appeal.
    Appeal,
    /// A user's report. Reports have a capped weight in training, and are never used for validation or tests.
    User,
}

impl LabelSource {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "moderator" => Some(Self::Moderator),
            "appeal" => Some(Self::Appeal),
            "user" => Some(Self::User),
            _ => None,
        }
    }
}

/// One labelled text.
#[derive(Clone, PartialEq)]
pub struct Feedback {
    /// The platform's id of this label, if it gives one.
    pub feedback_id: Option<String>,
    /// The platform's id of the labelled content.
    pub content_id: String,
    /// The text of the content.
    pub text: String,
    /// Probability that the text is hateful: 0 or 1, or a soft label in between.
    pub hateful: f32,
    /// Who gave the label.
    pub source: LabelSource,
    /// The feedback id that this label replaces.
    pub supersedes: Option<String>,
    /// Weight in training, greater than 0.
    pub weight: f32,
    /// Probability with which this content was selected for labelling, if it was sampled.
    pub inclusion: Option<f32>,
    /// The community that the content was posted in.
    pub community_id: Option<String>,
    /// Offset in the topic or line number in the file.
    pub position: u64,
    /// The number of halves of surrogate pairs in the text, each of which was read as U+FFFD.
    pub replaced_surrogates: usize,
}

impl fmt::Debug for Feedback {
    /// Omits the text, because comment text is never logged.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feedback")
            .field("content_id", &self.content_id)
            .field("hateful", &self.hateful)
            .field("source", &self.source)
            .field("position", &self.position)
            .field("text_bytes", &self.text.len())
            .finish_non_exhaustive()
    }
}

/// Why a record cannot be used as feedback. Its message never quotes a text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeedbackError {
    /// The record is not UTF-8, not JSON, or not a JSON object.
    #[error("is not a JSON object in UTF-8")]
    NotJson,
    /// An object has the same field twice; parsers differ in which one they use.
    #[error("has a duplicate field")]
    DuplicateField,
    /// The row of a table cannot be read, for the reason given.
    #[error("{0}")]
    BrokenRow(String),
    /// The record is larger than allowed.
    #[error("has {bytes} bytes, expected at most {limit}")]
    TooLarge {
        /// Size of the record in bytes.
        bytes: usize,
        /// Largest allowed size in bytes.
        limit: usize,
    },
    /// A required field is missing.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A field has a wrong type or value.
    #[error("`{field}` is {found}, expected {expected}")]
    Wrong {
        /// Name of the field.
        field: &'static str,
        /// The type of its value, or the value itself if it is a number.
        found: String,
        /// The values that are allowed.
        expected: &'static str,
    },
}

impl FeedbackError {
    /// Returns the short name of the reason, by which refused records are counted.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotJson => "not_json",
            Self::DuplicateField => "duplicate_field",
            Self::BrokenRow(_) => "broken_row",
            Self::TooLarge { .. } => "too_large",
            Self::Missing(_) => "missing_field",
            Self::Wrong { .. } => "wrong_type",
        }
    }
}

/// How records of a topic or a file are decoded.
#[derive(Debug, Clone, Copy)]
pub struct FeedbackRules {
    /// Size of the largest allowed record in bytes.
    pub max_bytes: usize,
    /// Whether records may omit the content id and the source, as lines of a file may. The line number then serves as
    /// the content id, and the label counts as a moderator's.
    pub lenient: bool,
}

/// Decodes the value of one record, whose offset or line number is `position`.
///
/// # Errors
/// Returns an error if the record is too large or not a JSON object, or if a field is missing or wrong.
pub fn decode(bytes: &[u8], position: u64, rules: FeedbackRules) -> Result<Feedback, FeedbackError> {
    if bytes.len() > rules.max_bytes {
        return Err(FeedbackError::TooLarge {
            bytes: bytes.len(),
            limit: rules.max_bytes,
        });
    }
    let fields = Fields(Document::read(bytes).map_err(|error| match error {
        JsonError::NotJson(error) if error.is_data() => FeedbackError::DuplicateField,
        _ => FeedbackError::NotJson,
    })?);
    if !fields.0.value().is_object() {
        return Err(FeedbackError::NotJson);
    }
    let content_id = match fields.id("content_id")? {
        Some(id) => id,
        None if rules.lenient => format!("line-{position}"),
        None => return Err(FeedbackError::Missing("content_id")),
    };
    let source = match fields.string("source")? {
        Some(name) => {
            LabelSource::parse(&name).ok_or(wrong("source", "an unknown name", "`moderator`, `appeal` or `user`"))?
        }
        None if rules.lenient => LabelSource::Moderator,
        None => return Err(FeedbackError::Missing("source")),
    };
    let weight = fields.number("weight")?.unwrap_or(1.0);
    // A smaller number than f32 can represent becomes 0, which is not a weight.
    if !(weight as f32 > 0.0 && weight <= 1e6) {
        return Err(wrong(
            "weight",
            &weight.to_string(),
            "a number above 0 and at most 1000000",
        ));
    }
    Ok(Feedback {
        feedback_id: fields.id("feedback_id")?,
        content_id,
        text: fields.string("text")?.ok_or(FeedbackError::Missing("text"))?,
        hateful: label(fields.get("label"))?,
        source,
        supersedes: fields.id("supersedes")?,
        weight: weight as f32,
        inclusion: inclusion(fields.get("sample"))?,
        community_id: fields.id("community_id")?,
        position,
        replaced_surrogates: fields.0.replaced_surrogates("/text"),
    })
}

fn wrong(field: &'static str, found: &str, expected: &'static str) -> FeedbackError {
    FeedbackError::Wrong {
        field,
        found: found.to_owned(),
        expected,
    }
}

/// The fields of one record, which is an object.
struct Fields<'a>(Document<'a>);

impl Fields<'_> {
    fn get(&self, field: &'static str) -> Option<&Value> {
        self.0.value().get(field)
    }

    fn string(&self, field: &'static str) -> Result<Option<String>, FeedbackError> {
        match self.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(wrong(field, type_name(other), "a string")),
        }
    }

    /// Integers are accepted as ids, as they are in comment events.
    fn id(&self, field: &'static str) -> Result<Option<String>, FeedbackError> {
        match self.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => match self.0.integer(&format!("/{field}")) {
                Some(digits) => Ok(Some(digits)),
                None => Err(wrong(field, type_name(other), "a string or an integer")),
            },
        }
    }

    fn number(&self, field: &'static str) -> Result<Option<f64>, FeedbackError> {
        match self.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Number(number)) => Ok(number.as_f64()),
            Some(other) => Err(wrong(field, type_name(other), "a number")),
        }
    }
}

fn label(value: Option<&Value>) -> Result<f32, FeedbackError> {
    const EXPECTED: &str = "`hateful`, `ok`, or a number from 0 to 1";
    match value {
        None => Err(FeedbackError::Missing("label")),
        Some(Value::String(name)) if name == "hateful" => Ok(1.0),
        Some(Value::String(name)) if name == "ok" => Ok(0.0),
        Some(Value::String(_)) => Err(wrong("label", "an unknown name", EXPECTED)),
        Some(Value::Number(number)) => match number.as_f64() {
            Some(value) if (0.0..=1.0).contains(&value) => Ok(value as f32),
            _ => Err(wrong("label", &number.to_string(), EXPECTED)),
        },
        Some(other) => Err(wrong("label", type_name(other), EXPECTED)),
    }
}

fn inclusion(sample: Option<&Value>) -> Result<Option<f32>, FeedbackError> {
    const EXPECTED: &str = "an object with a `rate` above 0 and at most 1";
    match sample {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(sample)) => match sample.get("rate").and_then(Value::as_f64) {
            // The check follows the conversion, because f32 rounds the smallest numbers to 0.
            Some(rate) if rate as f32 > 0.0 && rate <= 1.0 => Ok(Some(rate as f32)),
            _ => Err(wrong("sample", "an object without a valid `rate`", EXPECTED)),
        },
        Some(other) => Err(wrong("sample", type_name(other), EXPECTED)),
    }
}

/// The latest label for each content id, updated record by record in the order of the topic.
#[derive(Debug, Default)]
pub struct LatestLabels {
    contents: BTreeMap<String, Feedback>,
    /// The content id that each feedback id labels.
    content_ids: HashMap<String, String>,
    superseded: usize,
    forgotten: usize,
}

impl LatestLabels {
    /// Adds a label. It replaces the previous label for the same content id, and the label that it supersedes.
    pub fn insert(&mut self, feedback: Feedback) {
        if let Some(old) = feedback.supersedes.as_ref().and_then(|id| self.content_ids.remove(id)) {
            let is_in_effect = self
                .contents
                .get(&old)
                .is_some_and(|old| old.feedback_id == feedback.supersedes);
            if is_in_effect && old != feedback.content_id {
                self.contents.remove(&old);
                self.superseded += 1;
            }
        }
        if let Some(id) = &feedback.feedback_id {
            self.content_ids.insert(id.clone(), feedback.content_id.clone());
        }
        if self.contents.insert(feedback.content_id.clone(), feedback).is_some() {
            self.superseded += 1;
        }
    }

    /// Removes the label for a content id, because the topic contains a tombstone for it.
    pub fn remove(&mut self, content_id: &str) {
        if self.contents.remove(content_id).is_some() {
            self.forgotten += 1;
        }
    }

    /// Returns the latest labels by content id, the number of superseded labels, and the number of removed labels.
    pub fn finish(self) -> (Vec<Feedback>, usize, usize) {
        (self.contents.into_values().collect(), self.superseded, self.forgotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRICT: FeedbackRules = FeedbackRules {
        max_bytes: 1000,
        lenient: false,
    };
    const LENIENT: FeedbackRules = FeedbackRules {
        max_bytes: 1000,
        lenient: true,
    };

    fn feedback(content: &str, id: &str, supersedes: Option<&str>, hateful: f32) -> Feedback {
        Feedback {
            feedback_id: Some(id.into()),
            content_id: content.into(),
            text: content.into(),
            hateful,
            source: LabelSource::Moderator,
            supersedes: supersedes.map(Into::into),
            weight: 1.0,
            inclusion: None,
            community_id: None,
            position: 0,
            replaced_surrogates: 0,
        }
    }

    #[test]
    fn labels_are_names_or_numbers_from_0_to_1() {
        let check = |label: &str, expected: Result<f32, &str>| {
            let json = format!(r#"{{"content_id": "c", "text": "t", "source": "appeal", "label": {label}}}"#);
            let found = decode(json.as_bytes(), 7, STRICT).map(|feedback| feedback.hateful);
            match (found, expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{label}"),
                (Err(found), Err(expected)) => assert!(found.to_string().contains(expected), "{label}: {found}"),
                (found, expected) => panic!("{label}: {found:?}, expected {expected:?}"),
            }
        };
        check(r#""hateful""#, Ok(1.0));
        check(r#""ok""#, Ok(0.0));
        check("1", Ok(1.0));
        check("0", Ok(0.0));
        check("0.25", Ok(0.25));
        check(
            "1.5",
            Err("`label` is 1.5, expected `hateful`, `ok`, or a number from 0 to 1"),
        );
        check("-1", Err("`label` is -1"));
        check("true", Err("`label` is a boolean"));
        check("null", Err("`label` is null"));
        check(r#""spam""#, Err("`label` is an unknown name"));
    }

    #[test]
    fn errors_name_the_field_and_never_quote_the_text() {
        let check = |json: &str, rules, expected: &str, reason: &str| {
            let error = decode(json.as_bytes(), 7, rules).unwrap_err();
            assert_eq!((error.to_string().as_str(), error.reason()), (expected, reason));
        };
        check("{", STRICT, "is not a JSON object in UTF-8", "not_json");
        check("[]", STRICT, "is not a JSON object in UTF-8", "not_json");
        check(
            r#"{"text": "t", "text": "u"}"#,
            STRICT,
            "has a duplicate field",
            "duplicate_field",
        );
        check(
            r#"{"content_id": 1.5, "text": "t", "label": 1, "source": "user"}"#,
            STRICT,
            "`content_id` is a number, expected a string or an integer",
            "wrong_type",
        );
        check(
            r#"{"text": "t", "label": 1, "source": "user"}"#,
            STRICT,
            "`content_id` is missing",
            "missing_field",
        );
        check(
            r#"{"content_id": "c", "label": 1, "source": "user"}"#,
            STRICT,
            "`text` is missing",
            "missing_field",
        );
        check(
            r#"{"content_id": "c", "text": "t", "label": 1}"#,
            STRICT,
            "`source` is missing",
            "missing_field",
        );
        check(
            r#"{"text": ["secret"], "label": 1}"#,
            LENIENT,
            "`text` is an array, expected a string",
            "wrong_type",
        );
        check(
            r#"{"text": "t", "label": 1, "weight": 0}"#,
            LENIENT,
            "`weight` is 0, expected a number above 0 and at most 1000000",
            "wrong_type",
        );
        // Above 0, but not as f32.
        check(
            r#"{"text": "t", "label": 1, "weight": 1e-50}"#,
            LENIENT,
            "`weight` is 0.00000000000000000000000000000000000000000000000001, \
             expected a number above 0 and at most 1000000",
            "wrong_type",
        );
        check(
            r#"{"text": "t", "label": 1, "sample": {"rate": 1e-50}}"#,
            LENIENT,
            "`sample` is an object without a valid `rate`, expected an object with a `rate` above 0 and at most 1",
            "wrong_type",
        );
        let large = format!(r#"{{"text": "{}"}}"#, "a".repeat(2000));
        check(
            &large,
            LENIENT,
            &format!("has {} bytes, expected at most 1000", large.len()),
            "too_large",
        );
    }

    #[test]
    fn what_other_programs_write_is_read() {
        let json =
            b"\xef\xbb\xbf{\"content_id\": 12345678901234567890123, \"text\": \"a nice day \\ud83d\", \"label\": 1}";
        let row = decode(json, 3, LENIENT).unwrap();
        assert_eq!(row.content_id, "12345678901234567890123");
        assert_eq!((row.text.as_str(), row.replaced_surrogates), ("a nice day \u{fffd}", 1));
    }

    #[test]
    fn lines_of_a_file_may_omit_ids_and_sources() {
        let row = decode(
            br#"{"text": "t", "label": 1, "sample": {"kind": "random", "rate": 0.1}}"#,
            3,
            LENIENT,
        );
        let row = row.unwrap();
        assert_eq!(
            (row.content_id.as_str(), row.source),
            ("line-3", LabelSource::Moderator)
        );
        assert_eq!(row.inclusion, Some(0.1));
    }

    #[test]
    fn the_latest_label_of_each_content_applies() {
        let mut latest = LatestLabels::default();
        latest.insert(feedback("a", "1", None, 1.0));
        latest.insert(feedback("b", "2", None, 1.0));
        latest.insert(feedback("c", "3", None, 1.0));
        latest.insert(feedback("a", "4", None, 0.0));
        latest.remove("b");
        latest.remove("never seen");
        // This label supersedes the label for another content id.
        latest.insert(feedback("d", "5", Some("3"), 0.0));
        // The label that this one supersedes has already been replaced.
        latest.insert(feedback("e", "6", Some("1"), 0.0));
        let (rows, superseded, forgotten) = latest.finish();
        let found: Vec<_> = rows.iter().map(|row| (row.content_id.as_str(), row.hateful)).collect();
        assert_eq!(found, [("a", 0.0), ("d", 0.0), ("e", 0.0)]);
        assert_eq!((superseded, forgotten), (2, 1));
    }
}
