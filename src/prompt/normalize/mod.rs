//! Normalises a comment's text before the frame is put around it.
//!
//! The rules undo what hides a text from the model and not from a reader. They change a copy, which is scored; hashes are of the
//! text as received. Each rule has a file:
//!
//! | rule | what it does |
//! |---|---|
//! | `direction` | puts text under direction overrides into the order that a reader sees |
//! | `invisible` | removes characters that readers cannot see |
//! | NFC | composes the text |
//! | `marks` | removes marks that are piled on letters |
//! | `spaces` | turns unusual white space into spaces |
//! | `styles` | turns mathematical, full-width, enclosed, raised and small capital letters into plain ones |
//! | `apart` | joins letters that are set apart |
//! | `lookalikes` | folds letters that look like those of another script to the script of their word |
//! | `leet` | reads digits and signs in words as letters |
//! | `separator` | breaks up literal spellings of the frame's separator |
//!
//! The rules of [`Normalize::Nfc`] are `invisible`, NFC and `separator`. Case, spelling and punctuation are for the model to
//! judge. Training, calibration and serving use the same rules, and every decision names their version.
//!
//! The tokenizer is not taken into account here: `prompt/imitation` breaks up what a tokenizer turns into the separator.

mod apart;
mod direction;
mod invisible;
mod leet;
mod lookalikes;
mod marks;
mod plain;
mod separator;
mod spaces;
mod styles;
#[cfg(test)]
mod tests;

use std::borrow::Cow;

use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use crate::config::Normalize;
use separator::Separator;

/// The version of all rules. It must change whenever one of them does.
pub const NORMALIZER_VERSION: &str = "fold-2";

/// The version of the rules of [`Normalize::Nfc`], which were the only ones before.
pub const NFC_VERSION: &str = "nfc-1";

/// A rule: returns the text as it is read, or `None` if the rule changes nothing.
type Rule = fn(&str) -> Option<String>;

/// The rules in their order, each of which sees what the ones before have returned.
///
/// Overrides are applied while their control characters are there. Look-alikes and digits are judged by their words, so
/// letters are plain and joined by then.
const RULES: [Rule; 9] = [
    direction::applied,
    invisible::removed,
    composed,
    marks::limited,
    spaces::plain,
    styles::plain,
    apart::joined,
    lookalikes::folded,
    leet::spelled,
];

/// The most times that the rules are applied, so that the time is linear. What one rule makes visible, a rule before it can
/// have to change, but no text that a person wrote needs more than two passes.
const MAX_PASSES: usize = 12;

/// Returns the name of rules with their version, or `None` if there are none.
pub(super) fn version(rules: Normalize) -> Option<&'static str> {
    match rules {
        Normalize::Full => Some(NORMALIZER_VERSION),
        Normalize::Nfc => Some(NFC_VERSION),
        Normalize::None => None,
    }
}

/// Normalises texts for a frame with a given separator.
#[derive(Debug, Clone)]
pub struct Normalizer {
    rules: Normalize,
    separator: Separator,
}

impl Normalizer {
    /// Creates the normaliser of a frame whose separator is empty or [can be broken up](Self::can_break_up), or, with an
    /// empty one, of texts without a frame.
    pub fn new(rules: Normalize, separator: &str) -> Self {
        Self {
            rules,
            separator: Separator::new(separator),
        }
    }

    /// Returns whether a space can break up the separator, which takes at least two characters.
    pub fn can_break_up(separator: &str) -> bool {
        separator.trim().chars().count() >= 2
    }

    /// Returns the text as it is scored.
    ///
    /// The separator is broken up last, so that no other rule can complete it.
    pub fn normalize<'a>(&self, text: &'a str) -> Cow<'a, str> {
        match self.rules {
            Normalize::None => Cow::Borrowed(text),
            Normalize::Nfc => {
                let (text, _) = apply(&[invisible::removed, composed], Cow::Borrowed(text));
                self.separator.broken_up(text)
            }
            Normalize::Full => {
                let mut text = Cow::Borrowed(text);
                if plain::is_plain(&text) {
                    return self.separator.broken_up(text);
                }
                for _ in 0..MAX_PASSES {
                    let is_changed;
                    (text, is_changed) = apply(&RULES, text);
                    if !is_changed {
                        break;
                    }
                }
                self.separator.broken_up(text)
            }
        }
    }
}

/// Applies rules in their order. Returns the text, and whether one of them has changed it.
fn apply<'a>(rules: &[Rule], mut text: Cow<'a, str>) -> (Cow<'a, str>, bool) {
    let mut is_changed = false;
    for rule in rules {
        if let Some(changed) = rule(&text) {
            text = Cow::Owned(changed);
            is_changed = true;
        }
    }
    (text, is_changed)
}

/// Returns the composed text (NFC), or `None` if it is composed already.
fn composed(text: &str) -> Option<String> {
    // Most texts are composed already, and this check takes far less time than the rule.
    match is_nfc_quick(text.chars()) {
        IsNormalized::Yes => None,
        IsNormalized::No | IsNormalized::Maybe => {
            let composed: String = text.nfc().collect();
            (composed != text).then_some(composed)
        }
    }
}
