//! Turns the texts of requests into micro-batches, on a thread of its own.
//!
//! As in the stream, a micro-batch fills up while the scorer is busy, and is handed over as soon as the scorer is free.
//! A text whose caller has gone, or whose deadline has passed, is dropped before it costs anything.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, Select, Sender};
use metrics::counter;

use super::intake::Submission;
use crate::decide::CurrentJudge;
use crate::ops::metrics as names;
use crate::prompt::{Prompt, PromptError, Prompter};
use crate::stream::batch::{Batcher, Limits, MicroBatch};
use crate::stream::cache::ScoreCache;
use crate::stream::score::{ScoreAnswer, ScoreRequest};
use crate::stream::text_key::TextKey;

/// The longest wait, which limits how late a micro-batch that is due is handed over.
const MAX_WAIT: Duration = Duration::from_millis(100);

/// The thread that gathers texts.
pub(super) struct Gatherer {
    pub prompter: Arc<Prompter>,
    pub judge: Arc<CurrentJudge>,
    pub cache: Arc<ScoreCache>,
    pub limits: Limits,
    pub submissions: Receiver<Submission>,
    /// To the scorer.
    pub batches: Sender<MicroBatch<ScoreRequest>>,
}

impl Gatherer {
    /// Gathers until the intake or the scorer has ended.
    pub fn run(self) {
        let mut batcher = Batcher::new(self.limits);
        loop {
            let now = Instant::now();
            let received = if batcher.is_due(now) {
                // The micro-batch waits for the scorer. Until it is full, more texts can be added to it.
                let mut select = Select::new_biased();
                let to_scorer = select.send(&self.batches);
                if !batcher.is_full() {
                    select.recv(&self.submissions);
                }
                match select.select_timeout(MAX_WAIT) {
                    Ok(operation) if operation.index() == to_scorer => {
                        let batch = batcher.take().expect("a batch that is due has rows");
                        if operation.send(&self.batches, batch).is_err() {
                            return;
                        }
                        continue;
                    }
                    Ok(operation) => operation.recv(&self.submissions).map_err(RecvTimeoutError::from),
                    Err(_) => Err(RecvTimeoutError::Timeout),
                }
            } else {
                let until_due = batcher.due().map(|due| due.saturating_duration_since(now));
                let wait = until_due.map_or(MAX_WAIT, |until_due| until_due.min(MAX_WAIT));
                self.submissions.recv_timeout(wait)
            };
            match received {
                Ok(submission) => self.add(submission, &mut batcher),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
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
        let text = self.prompter.normalize(&text);
        let key = self.cache.is_on().then(|| TextKey::of(&text));
        let known = key.and_then(|key| self.cache.known(key));
        let answer = move |scored: ScoreAnswer| {
            drop(place);
            // The caller may have gone.
            let _ = answer.send(scored);
        };
        if let Some((margin, judge)) = known {
            return answer(ScoreAnswer {
                result: Ok(margin),
                judge,
                at: SystemTime::now(),
            });
        }
        match guarded(|| self.prompter.encode_normalized(&text)) {
            Ok(prompt) => {
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
}

/// Returns the rows, or the reason why there are none. A bug in the encoder must not end the thread.
fn guarded(encode: impl FnOnce() -> Result<Prompt, PromptError>) -> Result<Prompt, String> {
    match catch_unwind(AssertUnwindSafe(encode)) {
        Ok(encoded) => encoded.map_err(|error| error.to_string()),
        Err(_) => Err("tokenising the text panicked, which is a bug".to_owned()),
    }
}
