//! The golden set of a version: texts with the margins that the version gave them when it was made.
//!
//! A daemon that loads the version must reproduce these margins before the version enters service. A version that was
//! damaged or mixed up, or that this machine computes differently, is therefore refused. Texts with a known answer are
//! also checked by the gate, which does not promote a version that classifies one of them incorrectly.

use serde::{Deserialize, Serialize};

use super::canary::TEXTS;
use super::tolerance::{GOLDEN_EXACT, GOLDEN_ROUNDED};
use crate::message::ModelIdentity;
use crate::prompt::Prompter;
use crate::scorer::{Scorer, comment_margin, score_checked};

/// The name of the file that holds the golden set, in the folder of the version.
pub const GOLDEN_FILE: &str = "golden.json";

/// The precision in which a margin was computed, as far as it affects the tolerance.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arithmetic {
    /// In f32, over weights that are not quantised.
    #[default]
    Exact,
    /// In bf16 or over quantised weights.
    Rounded,
}

impl Arithmetic {
    /// Returns the arithmetic of a model.
    pub fn of(identity: &ModelIdentity) -> Self {
        if identity.quantization == "none" && identity.dtype == "f32" {
            Self::Exact
        } else {
            Self::Rounded
        }
    }

    /// Returns the largest allowed difference between a margin computed in this arithmetic and one computed in `other`.
    fn tolerance(self, other: Self) -> f32 {
        match (self, other) {
            (Self::Exact, Self::Exact) => GOLDEN_EXACT,
            _ => GOLDEN_ROUNDED,
        }
    }
}

/// A text of the golden set with its margin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GoldenCase {
    /// The name of the case in errors.
    pub id: String,
    /// The text, which is stored in the version: a built-in one, or one from the operator's golden file.
    pub text: String,
    /// Whether the text is hateful, if it has a label that every version must agree with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hateful: Option<bool>,
    /// The margin that the version gave the text when it was made.
    pub margin: f32,
    /// The arithmetic in which `margin` was computed. Files that do not state it are from f32.
    #[serde(default)]
    pub arithmetic: Arithmetic,
}

/// A text for the golden set that has not been scored yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoldenText {
    /// The name of the case in errors.
    pub id: String,
    /// The text, which will be stored in the version.
    pub text: String,
    /// Whether the text is hateful, if it has a label that every version must agree with.
    pub hateful: Option<bool>,
}

/// Returns the texts that every golden set contains: the canary, without labels.
pub fn builtin_texts() -> Vec<GoldenText> {
    let golden_text = |(number, text): (usize, &&str)| GoldenText {
        id: format!("own-{number}"),
        text: (*text).to_owned(),
        hateful: None,
    };
    TEXTS.iter().enumerate().map(golden_text).collect()
}

/// Scores texts and returns them with their margins. `arithmetic` is the scorer's.
///
/// # Errors
/// Returns a message that names the first text that cannot be scored.
pub fn score_texts(
    scorer: &mut dyn Scorer,
    prompter: &Prompter,
    texts: Vec<GoldenText>,
    arithmetic: Arithmetic,
) -> Result<Vec<GoldenCase>, String> {
    let mut cases = Vec::with_capacity(texts.len());
    for GoldenText { id, text, hateful } in texts {
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

/// Returns the ids of the cases whose margin contradicts their label.
pub fn misclassified(cases: &[GoldenCase]) -> Vec<String> {
    let is_wrong = |case: &&GoldenCase| case.hateful.is_some_and(|hateful| hateful != (case.margin >= 0.0));
    cases.iter().filter(is_wrong).map(|case| case.id.clone()).collect()
}

/// Checks that a loaded version reproduces the margins of its golden set. `arithmetic` is the scorer's.
///
/// # Errors
/// Returns a message that names the first case whose margin differs or cannot be computed.
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

fn margin(scorer: &mut dyn Scorer, prompter: &Prompter, text: &str) -> Result<f32, String> {
    let prompt = prompter.encode(text).map_err(|error| error.to_string())?;
    let margins = score_checked(scorer, &prompt.rows).map_err(|error| error.to_string())?;
    let scored = comment_margin(margins, prompt.facts()).ok_or_else(|| "the text has no window".to_owned())?;
    Ok(scored.margin)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A version that was made on a GPU can serve on a CPU, and the other way round.
    #[test]
    fn rounding_on_either_side_widens_the_tolerance() {
        use Arithmetic::{Exact, Rounded};
        for (made, served, expected) in [
            (Exact, Exact, GOLDEN_EXACT),
            (Rounded, Exact, GOLDEN_ROUNDED),
            (Exact, Rounded, GOLDEN_ROUNDED),
            (Rounded, Rounded, GOLDEN_ROUNDED),
        ] {
            assert_eq!(made.tolerance(served), expected);
        }
        let without_arithmetic: GoldenCase =
            serde_json::from_str(r#"{"id": "a", "text": "b", "margin": 1.5}"#).unwrap();
        assert_eq!(without_arithmetic.arithmetic, Exact);
    }

    #[test]
    fn only_labelled_cases_can_be_misclassified() {
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
        assert_eq!(misclassified(&cases), ["c", "d"]);
    }
}
