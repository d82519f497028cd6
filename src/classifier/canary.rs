//! Comments that any model must be able to score: their margins mean nothing, that they are numbers
//! does.

use crate::prompt::{PromptError, Prompter};
use crate::scorer::Row;

/// Harmless texts of different lengths.
pub const TEXTS: [&str; 3] = [
    "See you at the garden.",
    "Thanks, that was helpful!",
    "I planted two rows of beans on Sunday, and by the end of the week the first leaves had come up already.",
];

/// The texts as rows.
///
/// # Errors
/// The tokenizer fails on them.
pub fn rows(prompter: &Prompter) -> Result<Vec<Row>, PromptError> {
    let mut rows = Vec::new();
    for text in TEXTS {
        rows.extend(prompter.encode(text)?.rows);
    }
    Ok(rows)
}
