//! Texts that are scored for a caller outside the stream.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use crate::decide::Judge;
use crate::message::{CommentMargin, TextFacts};
use crate::stream::text_key::TextKey;

/// A text whose rows wait to be scored, and who is told its margin.
pub struct ScoreRequest {
    /// What is known of the text, from which the largest margin of its rows becomes its result.
    pub facts: TextFacts,
    /// The key under which the margin is remembered, if it is.
    pub key: Option<TextKey>,
    /// Called once, on the thread of the scorer, so it must not block.
    pub answer: Box<dyn FnOnce(ScoreAnswer) + Send>,
}

/// The answer to a [`ScoreRequest`].
#[derive(Debug, Clone)]
pub struct ScoreAnswer {
    /// The margin, or the reason why the text has none, which never quotes it.
    pub result: Result<CommentMargin, String>,
    /// The policy, calibration and model in service when the text was scored.
    pub judge: Arc<Judge>,
    /// When the text was scored.
    pub at: SystemTime,
}

impl fmt::Debug for ScoreRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScoreRequest")
            .field("facts", &self.facts)
            .finish_non_exhaustive()
    }
}
