//! The scoring seam: rows of token ids in, one margin a row out.
//!
//! [`Scorer`] is the one trait of the daemon that exists for substitution: the model implements it,
//! and so do the scripted scorers of the pipeline's tests.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// One prompt as the model sees it: the frame around one window of one comment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Token ids of the whole prompt, `<bos>` first.
    pub tokens: Arc<[u32]>,
    /// How many leading ids equal the cached prefix's; their keys and values are reused.
    pub shared: usize,
}

impl Row {
    /// Tokens that the model must run for this row: what a micro-batch budgets.
    pub fn cost(&self) -> usize {
        self.tokens.len() - self.shared
    }
}

/// Why a micro-batch has no margins.
///
/// The pipeline decides what it means (a poison comment or a device fault) by scoring a canary.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ScoreError {
    /// The device or the arithmetic failed; nothing can be said of single rows.
    #[error("cannot score {rows} rows: {reason}")]
    Failed {
        /// Rows in the failed call.
        rows: usize,
        /// What the model or the device said; never a comment's text.
        reason: String,
    },
    /// The margin of a row is not a finite number.
    #[error("row {row} has margin {margin}, expected a finite number")]
    NotFinite {
        /// Index into the rows of the call.
        row: usize,
        /// The margin found.
        margin: f32,
    },
}

/// Gives each row its margin: the logit of the hateful label minus the logit of the other.
///
/// A row's margin does not depend on the other rows of the call. One thread owns the scorer.
pub trait Scorer: Send {
    /// One finite margin for each row, in order. Blocks.
    ///
    /// # Errors
    /// [`ScoreError`] when any row has none; no partial result is given.
    fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError>;

    /// As [`Scorer::score`], but leaves rows to a device that works by itself, so that the next ones can be
    /// begun meanwhile. What was begun first is done first; calls of [`Scorer::score`] wait their turn.
    ///
    /// # Errors
    /// As [`Scorer::score`]; what fails on the device later, [`Running::margins`] tells.
    fn begin(&mut self, rows: &[Row]) -> Result<Begun, ScoreError> {
        self.score(rows).map(Begun::Done)
    }

    /// Own tokens of one call that the device's memory has room for; none where memory is no bound.
    fn room(&self) -> Option<usize> {
        None
    }
}

/// Rows that were begun.
pub enum Begun {
    /// One margin for each row, in order.
    Done(Vec<f32>),
    /// A device works on them.
    Running(Box<dyn Running>),
}

/// Rows that a device works on.
pub trait Running {
    /// Whether [`Running::margins`] would answer at once.
    fn is_done(&self) -> bool;

    /// One finite margin for each row, in order. Blocks.
    ///
    /// # Errors
    /// As [`Scorer::score`].
    fn margins(self: Box<Self>) -> Result<Vec<f32>, ScoreError>;
}

/// Returns the margin of a comment, which is the largest of its windows' margins; `None` if there are no windows.
///
/// One hostile passage makes a comment hostile, however long the rest is.
pub fn largest_margin(windows: impl IntoIterator<Item = f32>) -> Option<f32> {
    windows.into_iter().reduce(f32::max)
}

/// One call, with whatever a scorer may do wrong as an error.
pub(crate) fn call(scorer: &mut dyn Scorer, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
    let margins = guarded(rows.len(), || scorer.score(rows))?;
    checked(rows.len(), margins)
}

/// [`Scorer::begin`] with whatever a scorer may do wrong as an error.
pub(crate) fn begin(scorer: &mut dyn Scorer, rows: &[Row]) -> Result<Begun, ScoreError> {
    guarded(rows.len(), || scorer.begin(rows))
}

/// The margins of `rows` rows that were begun, waited for; as [`call`].
pub(crate) fn finish(begun: Begun, rows: usize) -> Result<Vec<f32>, ScoreError> {
    let margins = match begun {
        Begun::Done(margins) => margins,
        Begun::Running(running) => guarded(rows, || running.margins())?,
    };
    checked(rows, margins)
}

fn guarded<T>(rows: usize, run: impl FnOnce() -> Result<T, ScoreError>) -> Result<T, ScoreError> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|_| ScoreError::Failed {
        rows,
        reason: "the scorer panicked".to_owned(),
    })?
}

fn checked(rows: usize, margins: Vec<f32>) -> Result<Vec<f32>, ScoreError> {
    if margins.len() != rows {
        let reason = format!("the scorer gave {} margins", margins.len());
        return Err(ScoreError::Failed { rows, reason });
    }
    match margins.iter().position(|margin| !margin.is_finite()) {
        None => Ok(margins),
        Some(row) => Err(ScoreError::NotFinite {
            row,
            margin: margins[row],
        }),
    }
}
