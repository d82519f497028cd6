//! The normalisers that [`Bpe`](super::Bpe) knows: decompositions, and rules for single characters.
//!
//! A decomposition (NFD, NFKD) reorders marks within the run of marks behind a character, and never moves one across an
//! ASCII character. All other rules look at one character at a time. A text can therefore be normalised in runs of ASCII
//! characters, for which a table is enough, and runs of other characters, for which the crate's own normaliser is used:
//! its version of Unicode is older than that of other crates.

use serde_json::Value;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::{NormalizedString, Normalizer};

/// Normalises texts.
pub(super) struct Characters {
    /// What each ASCII character becomes.
    ascii: Vec<String>,
    other: Other,
}

/// How characters outside ASCII are normalised.
enum Other {
    Unchanged,
    Normalized(NormalizerWrapper),
}

/// One step of a normaliser.
enum Step {
    Decompose,
    /// Removes marks or changes the case, which leaves ASCII characters in ASCII.
    EachCharacter,
    Replace(char),
}

impl Characters {
    /// Returns `None` if the normaliser has a step that is not known here.
    pub(super) fn read(normalizer: Option<&NormalizerWrapper>) -> Option<Self> {
        let mut steps = Vec::new();
        read_steps(&serde_json::to_value(normalizer).ok()?, &mut steps)?;
        // A replacement could begin with a mark, which a decomposition would move.
        let first_replacement = steps.iter().position(|step| matches!(step, Step::Replace(_)));
        let last_decomposition = steps.iter().rposition(|step| matches!(step, Step::Decompose));
        if first_replacement
            .zip(last_decomposition)
            .is_some_and(|(replacement, last)| replacement < last)
        {
            return None;
        }
        let keeps_other = steps
            .iter()
            .all(|step| matches!(step, Step::Replace(char) if char.is_ascii()));
        let other = match normalizer {
            Some(normalizer) if !keeps_other => Other::Normalized(normalizer.clone()),
            _ => Other::Unchanged,
        };
        let ascii = (0..128_u8).map(|byte| {
            let mut char = NormalizedString::from(char::from(byte).to_string());
            normalizer
                .map_or(Ok(()), |normalizer| normalizer.normalize(&mut char))
                .ok()?;
            Some(char.get().to_owned())
        });
        Some(Self {
            ascii: ascii.collect::<Option<_>>()?,
            other,
        })
    }

    /// Returns the normalised text.
    ///
    /// # Errors
    /// Returns the normaliser's error, which does not contain the text.
    pub(super) fn normalize(&self, text: &str) -> Result<String, tokenizers::Error> {
        let mut normalized = String::with_capacity(text.len() + text.len() / 2);
        let mut rest = text;
        while !rest.is_empty() {
            let end = rest.bytes().position(|byte| !byte.is_ascii()).unwrap_or(rest.len());
            self.push_ascii(&rest[..end], &mut normalized);
            rest = &rest[end..];
            let end = rest.bytes().position(|byte| byte.is_ascii()).unwrap_or(rest.len());
            match &self.other {
                Other::Normalized(normalizer) if end > 0 => {
                    let mut run = NormalizedString::from(&rest[..end]);
                    normalizer.normalize(&mut run)?;
                    normalized.push_str(run.get());
                }
                _ => normalized.push_str(&rest[..end]),
            }
            rest = &rest[end..];
        }
        Ok(normalized)
    }

    /// Returns whether all characters outside ASCII stay as they are.
    pub(super) fn keeps_other(&self) -> bool {
        matches!(self.other, Other::Unchanged)
    }

    /// Returns whether each ASCII character but the space becomes one that counts as `same`.
    pub(super) fn keeps_ascii(&self, same: impl Fn(&str, &str) -> bool) -> bool {
        let mut all = (0..128_u8).zip(&self.ascii);
        all.all(|(byte, to)| byte == b' ' || same(char::from(byte).encode_utf8(&mut [0; 4]), to))
    }

    /// Returns what a text of ASCII characters becomes.
    pub(super) fn normalize_ascii(&self, text: &str) -> String {
        let mut normalized = String::new();
        self.push_ascii(text, &mut normalized);
        normalized
    }

    fn push_ascii(&self, text: &str, normalized: &mut String) {
        for byte in text.bytes() {
            match self.ascii[usize::from(byte)].as_bytes() {
                // Faster than adding a text, and most characters stay as they are.
                [single] => normalized.push(char::from(*single)),
                _ => normalized.push_str(&self.ascii[usize::from(byte)]),
            }
        }
    }
}

/// Adds the steps of a normaliser, given as JSON.
fn read_steps(json: &Value, steps: &mut Vec<Step>) -> Option<()> {
    if json.is_null() {
        return Some(());
    }
    steps.push(match json["type"].as_str()? {
        "Sequence" => {
            return json["normalizers"]
                .as_array()?
                .iter()
                .try_for_each(|step| read_steps(step, steps));
        }
        "NFD" | "NFKD" => Step::Decompose,
        "StripAccents" | "Lowercase" => Step::EachCharacter,
        "Replace" => {
            let mut chars = json.pointer("/pattern/String")?.as_str()?.chars();
            match (chars.next(), chars.next()) {
                (Some(char), None) => Step::Replace(char),
                _ => return None,
            }
        }
        _ => return None,
    });
    Some(())
}
