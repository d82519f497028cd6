//! Comments that every model must be able to score. Their margins have no meaning, but they must be finite.

use crate::prompt::{PromptError, Prompter};
use crate::scorer::Row;

/// The canary: harmless texts of different lengths.
pub const TEXTS: [&str; 3] = [
    "See you at the garden.",
    "Thanks, that was helpful!",
    "I planted two rows of beans on Sunday, and by the end of the week the first leaves had come up already.",
];

/// Returns the rows of the canary.
///
/// # Errors
/// Returns an error if the tokenizer fails.
pub fn rows(prompter: &Prompter) -> Result<Vec<Row>, PromptError> {
    let mut rows = Vec::new();
    for text in TEXTS {
        rows.extend(prompter.encode(text)?.rows);
    }
    Ok(rows)
}
