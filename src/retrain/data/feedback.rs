//! Labelled feedback: decoding, and which record of a content counts.
//!
//! Pure: lines or topic records in, labelled rows and a list of what was refused out. Nothing is
//! dropped without a reason and a place.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde_json::{Map, Value};

/// Who gave a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LabelSource {
    /// A moderator's decision.
    Moderator,
    /// The outcome of an appeal.
    Appeal,
    /// A user's report: capped in training, and never judges.
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
    /// The platform's id of this label, where it gives one.
    pub feedback_id: Option<String>,
    /// What was labelled.
    pub content_id: String,
    /// Its text.
    pub text: String,
    /// Probability that it is hateful: 0 or 1, or a soft label between.
    pub hateful: f32,
    /// Who says so.
    pub source: LabelSource,
    /// The feedback id that this label replaces.
    pub supersedes: Option<String>,
    /// Weight in training, above 0.
    pub weight: f32,
    /// Probability with which this content was chosen to be labelled, where it was sampled.
    pub inclusion: Option<f32>,
    /// The community it was posted in.
    pub community_id: Option<String>,
    /// Offset or line, for people.
    pub position: u64,
}

impl fmt::Debug for Feedback {
    /// Leaves the text out: comment text is never logged.
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

/// Why a record is no feedback. Never quotes a text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeedbackError {
    /// Not UTF-8, not JSON, or no JSON object.
    #[error("is not a JSON object in UTF-8")]
    NotJson,
    /// Larger than allowed.
    #[error("has {bytes} bytes, expected at most {limit}")]
    TooLarge {
        /// Size found.
        bytes: usize,
        /// Size allowed.
        limit: usize,
    },
    /// A field that must be there is not.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A field has another type or value.
    #[error("`{field}` is {found}, expected {expected}")]
    Wrong {
        /// The field.
        field: &'static str,
        /// Its type, or a short value that cannot be a text.
        found: String,
        /// What would do.
        expected: &'static str,
    },
}

impl FeedbackError {
    /// A short name to count by.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotJson => "not_json",
            Self::TooLarge { .. } => "too_large",
            Self::Missing(_) => "missing_field",
            Self::Wrong { .. } => "wrong_type",
        }
    }
}

/// How a source of feedback differs from the topic.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Largest record.
    pub max_bytes: usize,
    /// A file of labelled lines may leave out ids and sources: the line names the content, and a
    /// moderator is taken to have labelled it.
    pub lenient: bool,
}

/// Decodes one record's value.
///
/// # Errors
/// [`FeedbackError`].
pub fn decode(bytes: &[u8], position: u64, rules: Rules) -> Result<Feedback, FeedbackError> {
    if bytes.len() > rules.max_bytes {
        return Err(FeedbackError::TooLarge {
            bytes: bytes.len(),
            limit: rules.max_bytes,
        });
    }
    let Ok(Value::Object(fields)) = serde_json::from_slice(bytes) else {
        return Err(FeedbackError::NotJson);
    };
    let content_id = match optional_string(&fields, "content_id")? {
        Some(id) => id,
        None if rules.lenient => format!("line-{position}"),
        None => return Err(FeedbackError::Missing("content_id")),
    };
    let source = match optional_string(&fields, "source")? {
        Some(name) => LabelSource::parse(&name).ok_or(wrong("source", "another name", "moderator, appeal or user"))?,
        None if rules.lenient => LabelSource::Moderator,
        None => return Err(FeedbackError::Missing("source")),
    };
    let weight = number(&fields, "weight")?.unwrap_or(1.0);
    if !(weight > 0.0 && weight <= 1e6) {
        return Err(wrong(
            "weight",
            &weight.to_string(),
            "a number above 0, at most 1000000",
        ));
    }
    Ok(Feedback {
        feedback_id: optional_string(&fields, "feedback_id")?,
        content_id,
        text: optional_string(&fields, "text")?.ok_or(FeedbackError::Missing("text"))?,
        hateful: label(fields.get("label"))?,
        source,
        supersedes: optional_string(&fields, "supersedes")?,
        weight: weight as f32,
        inclusion: inclusion(fields.get("sample"))?,
        community_id: optional_string(&fields, "community_id")?,
        position,
    })
}

fn wrong(field: &'static str, found: &str, expected: &'static str) -> FeedbackError {
    FeedbackError::Wrong {
        field,
        found: found.to_owned(),
        expected,
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn optional_string(fields: &Map<String, Value>, field: &'static str) -> Result<Option<String>, FeedbackError> {
    match fields.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(wrong(field, type_of(other), "a string")),
    }
}

fn number(fields: &Map<String, Value>, field: &'static str) -> Result<Option<f64>, FeedbackError> {
    match fields.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Number(number)) => Ok(number.as_f64()),
        Some(other) => Err(wrong(field, type_of(other), "a number")),
    }
}

fn label(value: Option<&Value>) -> Result<f32, FeedbackError> {
    const EXPECTED: &str = "`hateful`, `ok`, or a number from 0 to 1";
    match value {
        None => Err(FeedbackError::Missing("label")),
        Some(Value::String(name)) if name == "hateful" => Ok(1.0),
        Some(Value::String(name)) if name == "ok" => Ok(0.0),
        Some(Value::String(_)) => Err(wrong("label", "another name", EXPECTED)),
        Some(Value::Number(number)) => match number.as_f64() {
            Some(value) if (0.0..=1.0).contains(&value) => Ok(value as f32),
            _ => Err(wrong("label", &number.to_string(), EXPECTED)),
        },
        Some(other) => Err(wrong("label", type_of(other), EXPECTED)),
    }
}

fn inclusion(sample: Option<&Value>) -> Result<Option<f32>, FeedbackError> {
    const EXPECTED: &str = "an object with `rate` above 0, at most 1";
    match sample {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(sample)) => match sample.get("rate").and_then(Value::as_f64) {
            Some(rate) if rate > 0.0 && rate <= 1.0 => Ok(Some(rate as f32)),
            _ => Err(wrong("sample", "an object without such a rate", EXPECTED)),
        },
        Some(other) => Err(wrong("sample", type_of(other), EXPECTED)),
    }
}

/// The latest word on every content, built up in the order of the topic.
#[derive(Debug, Default)]
pub struct Latest {
    contents: BTreeMap<String, Feedback>,
    /// Feedback id to the content it labels.
    ids: HashMap<String, String>,
    superseded: usize,
    forgotten: usize,
}

impl Latest {
    /// A label: the highest position of a content wins, and takes the place of what it supersedes.
    pub fn label(&mut self, feedback: Feedback) {
        if let Some(old) = feedback.supersedes.as_ref().and_then(|id| self.ids.remove(id)) {
            let replaces = self
                .contents
                .get(&old)
                .is_some_and(|old| old.feedback_id == feedback.supersedes);
            if replaces && old != feedback.content_id {
                self.contents.remove(&old);
                self.superseded += 1;
            }
        }
        if let Some(id) = &feedback.feedback_id {
            self.ids.insert(id.clone(), feedback.content_id.clone());
        }
        if self.contents.insert(feedback.content_id.clone(), feedback).is_some() {
            self.superseded += 1;
        }
    }

    /// A tombstone: the platform wants this content forgotten.
    pub fn forget(&mut self, content_id: &str) {
        if self.contents.remove(content_id).is_some() {
            self.forgotten += 1;
        }
    }

    /// What stands, by content id; how many labels were superseded, and how many contents forgotten.
    pub fn finish(self) -> (Vec<Feedback>, usize, usize) {
        (self.contents.into_values().collect(), self.superseded, self.forgotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRICT: Rules = Rules {
        max_bytes: 1000,
        lenient: false,
    };
    const LENIENT: Rules = Rules {
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
        }
    }

    #[test]
    fn every_form_of_label() {
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
        check(r#""spam""#, Err("`label` is another name"));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named_without_the_text() {
        let check = |json: &str, rules, expected: &str, reason: &str| {
            let error = decode(json.as_bytes(), 7, rules).unwrap_err();
            assert_eq!((error.to_string().as_str(), error.reason()), (expected, reason));
        };
        check("{", STRICT, "is not a JSON object in UTF-8", "not_json");
        check("[]", STRICT, "is not a JSON object in UTF-8", "not_json");
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
            "`weight` is 0, expected a number above 0, at most 1000000",
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
    fn a_file_may_leave_ids_and_sources_out() {
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
    fn the_latest_word_counts() {
        let mut latest = Latest::default();
        latest.label(feedback("a", "1", None, 1.0));
        latest.label(feedback("b", "2", None, 1.0));
        latest.label(feedback("c", "3", None, 1.0));
        latest.label(feedback("a", "4", None, 0.0));
        latest.forget("b");
        latest.forget("never seen");
        // A label that replaces another content's.
        latest.label(feedback("d", "5", Some("3"), 0.0));
        // What it replaces was replaced before.
        latest.label(feedback("e", "6", Some("1"), 0.0));
        let (rows, superseded, forgotten) = latest.finish();
        let found: Vec<_> = rows.iter().map(|row| (row.content_id.as_str(), row.hateful)).collect();
        assert_eq!(found, [("a", 0.0), ("d", 0.0), ("e", 0.0)]);
        assert_eq!((superseded, forgotten), (2, 1));
    }
}
