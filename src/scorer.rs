//! The interface between the stream and the model: rows of token ids in, one margin for each row out.
//!
//! [`Scorer`] is the only trait of the daemon that exists for substitution. The model implements it, and so do the
//! scripted scorers in the tests of the stream.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::message::{CommentMargin, TextFacts};
use crate::plural::Count;

/// One prompt as the model sees it: the frame around one window of one comment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The token ids of the whole prompt, which begin with `<bos>`.
    pub tokens: Arc<[u32]>,
    /// The number of leading ids that equal the cached prefix. Their keys and values are reused.
    pub shared: usize,
}

impl Row {
    /// Returns the number of own tokens, which the model has to compute and which count against the token budget.
    pub fn own_tokens(&self) -> usize {
        self.tokens.len() - self.shared
    }
}

/// The reason why rows could not be scored.
///
/// The error alone does not distinguish a bad comment from a device fault. The score stage does so by scoring the
/// canary.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ScoreError {
    /// The device or the arithmetic failed, which does not show whether a row caused the failure.
    #[error("cannot score {}: {reason}", Count(*rows, "row"))]
    Failed {
        /// The number of rows in the failed call.
        rows: usize,
        /// The message of the model or the device, which never contains a comment's text.
        reason: String,
    },
    /// The margin of a row is not a finite number.
    #[error("row {row} has margin {margin}, expected a finite number")]
    NotFinite {
        /// The index of the row in the call.
        row: usize,
        /// The margin that was computed.
        margin: f32,
    },
}

/// Computes the margin of each row: the logit of the hateful label minus the logit of the other.
///
/// A row's margin does not depend on the other rows of the call. One thread owns the scorer.
pub trait Scorer: Send {
    /// Returns one finite margin for each row, in order. Blocks until all are computed.
    ///
    /// # Errors
    /// Returns an error if any row has no finite margin. There are no partial results.
    fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError>;

    /// Begins to score rows. A scorer with an asynchronous device returns [`Begun::Running`] without waiting, so that
    /// the next rows can be begun in the meantime; any other scorer returns the margins.
    ///
    /// Rows are computed in the order in which they were begun, and [`Scorer::score`] waits for earlier ones.
    ///
    /// # Errors
    /// Returns an error under the same conditions as [`Scorer::score`]. If the device fails later, [`Running::margins`]
    /// returns the error.
    fn begin(&mut self, rows: &[Row]) -> Result<Begun, ScoreError> {
        self.score(rows).map(Begun::Done)
    }

    /// Returns how many own tokens the device has memory for in one call, or `None` if its memory is not a limit.
    fn token_capacity(&self) -> Option<usize> {
        None
    }
}

/// The result of [`Scorer::begin`].
pub enum Begun {
    /// The rows are scored. Holds one margin for each row, in order.
    Done(Vec<f32>),
    /// A device is computing the rows.
    Running(Box<dyn Running>),
}

/// Rows that a device is computing.
pub trait Running {
    /// Returns whether [`Running::margins`] would return without blocking.
    fn is_done(&self) -> bool;

    /// Returns one finite margin for each row, in order. Blocks until all are computed.
    ///
    /// # Errors
    /// Returns an error under the same conditions as [`Scorer::score`].
    fn margins(self: Box<Self>) -> Result<Vec<f32>, ScoreError>;
}

/// Returns the largest of the margins of windows; `None` if there are no windows.
pub(crate) fn largest_margin(windows: impl IntoIterator<Item = f32>) -> Option<f32> {
    windows.into_iter().reduce(f32::max)
}

/// Returns the margin of a comment, which is the largest of its windows' margins less the correction for their number; `None`
/// if there are no windows.
///
/// A single hateful window thus makes the comment hateful, regardless of the length of the rest. Everything that decides about
/// comments, or measures how well that works, uses this margin.
pub fn comment_margin(windows: impl IntoIterator<Item = f32>, facts: TextFacts) -> Option<CommentMargin> {
    largest_margin(windows).map(|largest| facts.scored(largest))
}

/// Calls [`Scorer::score`] and returns an error if the scorer panics, or does not return one finite margin for each
/// row.
pub(crate) fn score_checked(scorer: &mut dyn Scorer, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
    let margins = guarded(rows.len(), || scorer.score(rows))?;
    checked(rows.len(), margins)
}

/// Calls [`Scorer::begin`] and returns an error if the scorer panics.
pub(crate) fn begin_checked(scorer: &mut dyn Scorer, rows: &[Row]) -> Result<Begun, ScoreError> {
    guarded(rows.len(), || scorer.begin(rows))
}

/// Waits for `rows` rows that were begun, with the same checks as [`score_checked`].
pub(crate) fn wait_checked(begun: Begun, rows: usize) -> Result<Vec<f32>, ScoreError> {
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
        let reason = format!("the scorer returned {} margins", margins.len());
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
