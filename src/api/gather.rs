//! Turns the texts of requests into micro-batches, on a thread of its own.
//!
//! As in the stream, a micro-batch fills up while the scorer is busy, and is handed over as soon as the scorer is free.
//! A text whose caller has gone, or whose deadline has passed, is dropped before it costs anything.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use crossbeam_channel::Sender;
use metrics::counter;

use super::intake::{Submission, Submissions};
use crate::decide::{CurrentJudge, Judge};
use crate::message::CommentMargin;
use crate::ops::metrics as names;
use crate::prompt::{Prompt, PromptError, Prompter};
use crate::scorer::Row;
use crate::stream::batch::{Batcher, Limits, MicroBatch};
use crate::stream::cache::ScoreCache;
use crate::stream::hand_over::{Waited, wait};
use crate::stream::score::{ScoreAnswer, ScoreRequest};
use crate::stream::text_key::TextKey;

/// The thread that gathers texts.
pub(super) struct Gatherer {
    pub prompter: Arc<Prompter>,
    pub judge: Arc<CurrentJudge>,
    pub cache: Arc<ScoreCache>,
    pub limits: Limits,
    pub submissions: Submissions,
    /// To the scorer.
    pub batches: Sender<MicroBatch<ScoreRequest>>,
}

impl Gatherer {
    /// Gathers until the intake or the scorer has ended.
    pub fn run(self) {
        let mut batcher = Batcher::new(self.limits);
        loop {
            match wait(&mut batcher, self.submissions.arrivals(), &self.batches, Instant::now()) {
                Waited::Input(()) => {
                    if let Some(submission) = self.submissions.take() {
                        self.add(submission, &mut batcher);
                    }
                }
                Waited::Nothing => {}
                Waited::InputEnded => break,
                Waited::ScorerEnded => return,
            }
        }
        while let Some(batch) = batcher.take() {
            if self.batches.send(batch).is_err() {
                return;
            }
        }
    }

    /// Encodes a text and adds its rows, unless its margin is known or it cannot be encoded.
    fn add(&self, submission: Submission, batcher: &mut Batcher<ScoreRequest>) {
        let now = Instant::now();
        if submission.is_obsolete(now) {
            counter!(names::API_DROPPED).increment(1);
            return;
        }
        let Submission {
            text, answer, place, ..
        } = submission;
        let caller = Arc::clone(place.caller());
        let answer = move |scored: ScoreAnswer| {
            drop(place);
            // The caller may have gone.
            let _ = answer.send(scored);
        };
        match guarded(|| self.encode(&text)) {
            Ok(Encoded::Known(margin, judge)) => answer(ScoreAnswer {
                result: Ok(margin),
                judge,
                at: SystemTime::now(),
            }),
            Ok(Encoded::Rows(key, prompt)) => {
                self.submissions
                    .charge(&caller, prompt.rows.iter().map(Row::own_tokens).sum());
                let request = ScoreRequest {
                    facts: prompt.facts(),
                    key,
                    answer: Box::new(answer),
                };
                batcher.push(request, prompt.rows, now);
            }
            Err(reason) => answer(ScoreAnswer {
                result: Err(reason),
                judge: self.judge.get(),
                at: SystemTime::now(),
            }),
        }
    }

    /// Looks a text up, and encodes it if its margin is not known.
    fn encode(&self, text: &str) -> Result<Encoded, PromptError> {
        let text = self.prompter.normalize(text);
        let key = self.cache.is_on().then(|| TextKey::of(&text));
        if let Some(key) = key {
            let known = self.cache.known(key);
            let result = if known.is_some() { "hit" } else { "miss" };
            counter!(names::CACHE_LOOKUPS, "result" => result).increment(1);
            if let Some((margin, judge)) = known {
                return Ok(Encoded::Known(margin, judge));
            }
        }
        Ok(Encoded::Rows(key, self.prompter.encode_normalized(&text)?))
    }
}

/// A text that was looked up.
enum Encoded {
    /// Its margin is known, with the judge that belongs to it.
    Known(CommentMargin, Arc<Judge>),
    /// It must be scored, and its margin is remembered under the key.
    Rows(Option<TextKey>, Prompt),
}

/// Returns what a text is encoded as, or the reason why it cannot be. A bug in the encoder must not end the thread.
fn guarded<T>(encode: impl FnOnce() -> Result<T, PromptError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(encode)) {
        Ok(encoded) => encoded.map_err(|error| error.to_string()),
        Err(_) => Err("tokenising the text panicked, which is a bug".to_owned()),
    }
}
