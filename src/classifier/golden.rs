//! The golden set of a version: cases with the margins that it had when it was made.
//!
//! A daemon that loads the version must find the same margins again, and right answers where there is
//! one. So a version that was cut, mixed up or computed otherwise than where it was proven cannot
//! enter service.

use serde::{Deserialize, Serialize};

use super::canary::TEXTS;
use crate::message::ModelIdentity;
use crate::prompt::Prompter;
use crate::scorer::{Row, Scorer, call, largest_margin};

/// Name of its file beside the adapter's.
pub const GOLDEN_FILE: &str = "golden.json";

/// How far a margin may be off where weights are f32: two correct implementations differ by about
/// 1e-4, another processor's rounding included.
const TOLERANCE: f32 = 1e-2;

/// The same where either margin comes of quantised weights or of bf16, whose error depends on the device.
const ROUNDED_TOLERANCE: f32 = 1.0;

/// In what a margin was computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arithmetic {
    /// f32 throughout.
    #[default]
    Exact,
    /// Over quantised weights, or in bf16.
    Rounded,
}

impl Arithmetic {
    /// A model's.
    pub fn of(identity: &ModelIdentity) -> Self {
        if identity.quantization == "none" && identity.dtype == "f32" {
            Self::Exact
        } else {
            Self::Rounded
        }
    }

    /// How far a margin computed in it may be from one computed in `other`.
    fn tolerance(self, other: Self) -> f32 {
        match (self, other) {
            (Self::Exact, Self::Exact) => TOLERANCE,
            _ => ROUNDED_TOLERANCE,
        }
    }
}

/// One case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GoldenCase {
    /// Names it in errors.
    pub id: String,
    /// Ours, or the operator's to show: it is kept in the version.
    pub text: String,
    /// What every adapter must say, where there is a right answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hateful: Option<bool>,
    /// What the version said.
    pub margin: f32,
    /// In what it was computed.
    #[serde(default)]
    pub arithmetic: Arithmetic,
}

/// A case before anything was scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Names it.
    pub id: String,
    /// The text.
    pub text: String,
    /// The right answer, where there is one.
    pub hateful: Option<bool>,
}

/// The questions that need no operator: texts of ours without a right answer.
pub fn own_questions() -> Vec<Question> {
    let question = |(number, text): (usize, &&str)| Question {
        id: format!("own-{number}"),
        text: (*text).to_owned(),
        hateful: None,
    };
    TEXTS.iter().enumerate().map(question).collect()
}

/// Scores questions, in the scorer's arithmetic.
///
/// # Errors
/// In words, the first that has no margin.
pub fn ask(
    scorer: &mut dyn Scorer,
    prompter: &Prompter,
    questions: Vec<Question>,
    arithmetic: Arithmetic,
) -> Result<Vec<GoldenCase>, String> {
    let mut cases = Vec::with_capacity(questions.len());
    for Question { id, text, hateful } in questions {
        let margin = margin(scorer, prompter, &text).map_err(|error| format!("case {id}: {error}"))?;
        cases.push(GoldenCase {
            id,
            text,
            hateful,
            margin,
            arithmetic,
        });
    }
    Ok(cases)
}

/// Ids of the cases whose answer is wrong.
pub fn wrong(cases: &[GoldenCase]) -> Vec<String> {
    let is_wrong = |case: &&GoldenCase| case.hateful.is_some_and(|hateful| hateful != (case.margin >= 0.0));
    cases.iter().filter(is_wrong).map(|case| case.id.clone()).collect()
}

/// Proves that a loaded version says what it said when it was made, in the scorer's arithmetic.
///
/// # Errors
/// In words, the first case that differs.
pub fn verify(
    scorer: &mut dyn Scorer,
    prompter: &Prompter,
    cases: &[GoldenCase],
    arithmetic: Arithmetic,
) -> Result<(), String> {
    for case in cases {
        let tolerance = case.arithmetic.tolerance(arithmetic);
        let found = margin(scorer, prompter, &case.text).map_err(|error| format!("case {}: {error}", case.id))?;
        if (found - case.margin).abs() > tolerance {
            let (id, expected) = (&case.id, case.margin);
            return Err(format!(
                "case {id} has margin {found}, expected {expected} +- {tolerance}"
            ));
        }
    }
    Ok(())
}

/// The largest margin of a text's windows.
fn margin(scorer: &mut dyn Scorer, prompter: &Prompter, text: &str) -> Result<f32, String> {
    let rows: Vec<Row> = prompter.encode(text).map_err(|error| error.to_string())?.rows;
    let margins = call(scorer, &rows).map_err(|error| error.to_string())?;
    largest_margin(margins).ok_or_else(|| "no window".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A version that was made on a GPU serves on a CPU, and the other way round.
    #[test]
    fn rounding_on_either_side_widens_the_tolerance() {
        use Arithmetic::{Exact, Rounded};
        for (made, served, expected) in [
            (Exact, Exact, TOLERANCE),
            (Rounded, Exact, ROUNDED_TOLERANCE),
            (Exact, Rounded, ROUNDED_TOLERANCE),
            (Rounded, Rounded, ROUNDED_TOLERANCE),
        ] {
            assert_eq!(made.tolerance(served), expected);
        }
        let before: GoldenCase = serde_json::from_str(r#"{"id": "a", "text": "b", "margin": 1.5}"#).unwrap();
        assert_eq!(before.arithmetic, Exact);
    }

    #[test]
    fn only_a_right_answer_can_be_missed() {
        let case = |id: &str, hateful, margin| GoldenCase {
            id: id.into(),
            text: String::new(),
            hateful,
            margin,
            arithmetic: Arithmetic::Exact,
        };
        let cases = [
            case("a", None, -1.0),
            case("b", Some(true), 0.0),
            case("c", Some(true), -0.1),
            case("d", Some(false), 0.1),
        ];
        assert_eq!(wrong(&cases), ["c", "d"]);
    }
}
