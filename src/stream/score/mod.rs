//! The third stage: the thread that owns the scorer.
//!
//! On a device that computes asynchronously, the stage begins the next micro-batch while the device works on the
//! previous one, so that the device never waits for the CPU under full load; at most two are begun at a time. Every
//! scored batch is reported to the health checks behind the watchdog and the probes. An idle stage scores the canary to
//! show that scoring still works.
//!
//! Besides the comments of the stream, the stage scores texts of [requests](ScoreRequest) from outside it, in micro-batches
//! of their own. While both wait, each gets its share of the device (`share`).

mod request;
mod share;
mod lanes;
mod search;
#[cfg(test)]
mod out_of_memory;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, SendTimeoutError, Sender};
use metrics::{counter, gauge, histogram};
use tracing::{error, warn};

use super::batch::MicroBatch;
use super::cache::ScoreCache;
use super::control::{Control, StreamError};
use super::record::{CommentRecord, Finished, FirstOfText, Pending, Rejection, RejectionStage};
use crate::decide::{CurrentJudge, JudgedModel};
use crate::message::TextFacts;
use crate::ops::health::Health;
use crate::ops::metrics as names;
use crate::scorer::{Begun, Row, ScoreError, Scorer, begin_checked, largest_margin, score_checked, wait_checked};
pub(crate) use lanes::Lanes;
use lanes::{Batch, Received};
pub use request::{ScoreAnswer, ScoreRequest};
use search::FailureSearch;
use share::Work;

/// How often an idle scorer scores the canary: several times within any reasonable stall limit.
const CANARY_INTERVAL: Duration = Duration::from_secs(5);

/// How often a running micro-batch is polled for completion: short compared with the milliseconds that a pass takes,
/// and long compared with the cost of polling.
const POLL_INTERVAL: Duration = Duration::from_micros(200);

/// A scorer that replaces the one in service.
pub struct Replacement {
    /// The new scorer.
    pub scorer: Box<dyn Scorer>,
    /// Rows that the new scorer has already scored.
    pub canary: Vec<Row>,
    /// The calibration, thresholds and identity that belong to the new scorer's margins.
    pub judged: JudgedModel,
}

/// Computes the margins of comments.
pub(crate) struct ScoreStage {
    /// Where work comes from. The channels come first, so that they are closed before the model is freed.
    pub lanes: Lanes,
    /// To the emit stage.
    pub finished: Sender<Vec<Finished>>,
    pub scorer: Box<dyn Scorer>,
    /// Rows that the scorer is known to be able to score.
    pub canary: Vec<Row>,
    /// Every scored comment carries the judge that was current when it was scored.
    pub judge: Arc<CurrentJudge>,
    /// Holds the comments that wait for the margin of another one with the same text.
    pub cache: Arc<ScoreCache>,
    /// Delivers new scorers, which are taken between two batches.
    pub swap: Receiver<Replacement>,
    pub health: Arc<Health>,
    pub control: Arc<Control>,
}

/// The largest margin so far of a comment whose last window is in a later micro-batch, or the error of a window.
type CarriedMargin = Option<Result<f32, ScoreError>>;

/// A micro-batch that the scorer has begun.
struct BegunBatch {
    batch: Batch,
    begun: Result<Begun, ScoreError>,
    since: Instant,
}

impl BegunBatch {
    fn begin(scorer: &mut dyn Scorer, batch: Batch) -> Self {
        histogram!(names::BATCH_TOKENS).record(batch.tokens() as f64);
        histogram!(names::BATCH_ROWS).record(batch.rows().len() as f64);
        let since = Instant::now();
        let begun = begin_checked(scorer, batch.rows());
        Self { batch, begun, since }
    }

    fn is_done(&self) -> bool {
        match &self.begun {
            Ok(Begun::Running(running)) => running.is_done(),
            _ => true,
        }
    }
}

/// A text that could not be scored for the first comment that has it.
struct FailedText {
    first: FirstOfText,
    /// Further comments with the text.
    waiting: Vec<CommentRecord>,
    facts: TextFacts,
}

/// The state that the stage carries from one micro-batch to the next.
struct ScoreState {
    /// By kind of work.
    carried: [CarriedMargin; 2],
    /// When the previous micro-batch was passed on. The time of one that was begun earlier is measured from here.
    free_since: Instant,
}

impl ScoreState {
    /// Returns a kind of work of which a text is incomplete, if there is one.
    fn incomplete(&self) -> Option<Work> {
        let incomplete = |work: &Work| self.carried[*work as usize].is_some();
        [Work::Stream, Work::Requests].into_iter().find(incomplete)
    }
}

impl ScoreStage {
    /// Scores until the stage before it has ended.
    ///
    /// # Errors
    /// Returns an error if the scorer fails on the canary.
    pub fn run(mut self) -> Result<(), StreamError> {
        let mut state = ScoreState {
            carried: [None, None],
            free_since: Instant::now(),
        };
        let mut in_progress: Option<BegunBatch> = None;
        let mut replacement = None;
        loop {
            replacement = replacement.or_else(|| self.swap.try_recv().ok());
            if replacement.is_some()
                && let Some(last) = in_progress.take()
                && !self.finish(last, &mut state)?
            {
                return Ok(());
            }
            // All windows of a text must be scored by the same scorer, so the incomplete ones are completed first.
            let incomplete = state.incomplete();
            if incomplete.is_none()
                && let Some(replacement) = replacement.take()
            {
                self.scorer = replacement.scorer;
                self.canary = replacement.canary;
                self.cache.replace_model(replacement.judged);
            }
            let (idle_since, timeout) = match in_progress {
                Some(_) => (None, POLL_INTERVAL),
                None => (Some(Instant::now()), CANARY_INTERVAL),
            };
            match self.lanes.receive(timeout, replacement.as_ref().and(incomplete)) {
                Received::Batch(batch) => {
                    if self.control.must_stop(Instant::now()) {
                        return Ok(());
                    }
                    let waited = idle_since.map_or(Duration::ZERO, |since| since.elapsed());
                    histogram!(names::STAGE_SECONDS, "stage" => "wait").record(waited);
                    let next = BegunBatch::begin(&mut *self.scorer, batch);
                    if let Some(last) = in_progress.replace(next)
                        && !self.finish(last, &mut state)?
                    {
                        return Ok(());
                    }
                }
                Received::Nothing if in_progress.is_none() => self.score_canary()?,
                Received::Nothing => {}
                Received::Ended => break,
            }
            if let Some(done) = in_progress.take_if(|batch| batch.is_done())
                && !self.finish(done, &mut state)?
            {
                return Ok(());
            }
        }
        if let Some(last) = in_progress {
            self.finish(last, &mut state)?;
        }
        Ok(())
    }

    /// Waits for a micro-batch and passes its results on. Returns false if the stage should end.
    fn finish(&mut self, in_progress: BegunBatch, state: &mut ScoreState) -> Result<bool, StreamError> {
        let BegunBatch { batch, begun, since } = in_progress;
        let first_attempt = begun.and_then(|begun| wait_checked(begun, batch.rows().len()));
        let margins = self.resolve(batch.rows(), first_attempt)?;
        let done = Instant::now();
        self.health.record_scored(done);
        histogram!(names::STAGE_SECONDS, "stage" => "score").record(done - since.max(state.free_since));
        let carried = &mut state.carried[batch.work() as usize];
        let is_open = match batch {
            Batch::Stream(batch) => self.finish_comments(batch, margins, carried)?,
            Batch::Requests(batch) => {
                self.finish_requests(batch, margins, carried);
                true
            }
        };
        state.free_since = Instant::now();
        Ok(is_open)
    }

    /// Answers the requests of a micro-batch.
    fn finish_requests(
        &self,
        batch: MicroBatch<ScoreRequest>,
        margins: Vec<Result<f32, ScoreError>>,
        carried: &mut CarriedMargin,
    ) {
        let (at, judge) = (SystemTime::now(), self.judge.get());
        let mut margins = margins.into_iter();
        for (request, rows) in batch.items {
            let margin = with_carried(carried.take(), margins.by_ref().take(rows));
            let result = margin_of_comment(margin).map(|largest| request.facts.scored(largest));
            if let (Some(key), Ok(margin)) = (request.key, &result) {
                self.cache.remember(key, *margin);
            }
            (request.answer)(ScoreAnswer {
                result,
                judge: Arc::clone(&judge),
                at,
            });
        }
        // The remaining margins belong to a text that a later batch completes.
        if margins.len() > 0 {
            *carried = with_carried(carried.take(), margins);
        }
        gauge!(names::CACHE_ENTRIES).set(self.cache.len() as f64);
    }

    /// Passes the comments of a micro-batch on. Returns false if the stage should end.
    fn finish_comments(
        &mut self,
        batch: MicroBatch<Pending>,
        margins: Vec<Result<f32, ScoreError>>,
        carried: &mut CarriedMargin,
    ) -> Result<bool, StreamError> {
        let (at, judge) = (SystemTime::now(), self.judge.get());
        let mut margins = margins.into_iter();
        let (mut scored, mut failed) = (Vec::with_capacity(batch.items.len()), Vec::new());
        for (pending, rows) in batch.items {
            let margin = with_carried(carried.take(), margins.by_ref().take(rows));
            let Pending {
                source, facts, first, ..
            } = pending;
            let result = margin_of_comment(margin).map(|largest| facts.scored(largest));
            if let Some(first) = first {
                let waiting = self.cache.finish(first.key, result.as_ref().ok().copied());
                match result {
                    Ok(margin) => scored.extend(
                        waiting
                            .into_iter()
                            .map(|one| one.scored(margin, Arc::clone(&judge), at)),
                    ),
                    Err(_) if waiting.is_empty() => {}
                    Err(_) => failed.push(FailedText { first, waiting, facts }),
                }
            }
            scored.push(match result {
                Ok(margin) => source.scored(margin, Arc::clone(&judge), at),
                Err(reason) => rejected(source, reason),
            });
        }
        // The remaining margins belong to a comment that a later batch completes.
        if margins.len() > 0 {
            *carried = with_carried(carried.take(), margins);
        }
        gauge!(names::CACHE_ENTRIES).set(self.cache.len() as f64);
        let mut is_open = self.send(scored)?;
        for text in failed {
            is_open = is_open && self.score_waiting(text)?;
        }
        Ok(is_open)
    }

    /// Scores the comments that have waited for another one, which cannot be scored. Returns false if the stage should
    /// end.
    ///
    /// They are scored one by one, because a failure must not reject a comment that was not scored itself. Once one of
    /// them is scored, its margin is that of the others.
    fn score_waiting(&mut self, text: FailedText) -> Result<bool, StreamError> {
        let mut waiting = text.waiting.into_iter();
        let mut finished = Vec::new();
        while let Some(comment) = waiting.next() {
            if self.control.must_stop(Instant::now()) {
                return Ok(false);
            }
            let rows = &text.first.rows;
            let first_attempt = score_checked(&mut *self.scorer, rows);
            let margins = self.resolve(rows, first_attempt)?;
            self.health.record_scored(Instant::now());
            match margin_of_comment(with_carried(None, margins.into_iter())) {
                Ok(largest) => {
                    let margin = text.facts.scored(largest);
                    let (judge, at) = (self.judge.get(), SystemTime::now());
                    let later = self.cache.finish(text.first.key, Some(margin));
                    let rest = std::iter::once(comment).chain(waiting).chain(later);
                    finished.extend(rest.map(|one| one.scored(margin, Arc::clone(&judge), at)));
                    break;
                }
                Err(reason) => finished.push(rejected(comment, reason)),
            }
        }
        self.send(finished)
    }

    /// Returns the margin of each row, or the reason why that row cannot be scored, given the result of the first
    /// attempt to score them together.
    fn resolve(
        &mut self,
        rows: &[Row],
        first_attempt: Result<Vec<f32>, ScoreError>,
    ) -> Result<Vec<Result<f32, ScoreError>>, StreamError> {
        let mut search = FailureSearch {
            scorer: &mut *self.scorer,
            canary: &self.canary,
            failures: 0,
        };
        let margins = search.resolve(rows, first_attempt);
        let failures = search.failures;
        let margins = margins.map_err(|fault| device_error(&fault.0))?;
        if failures > 0 {
            counter!(names::SCORE_FAILURES, "verdict" => "record").increment(failures);
        }
        Ok(margins)
    }

    /// Passes scored comments to the emit stage. Returns false if the stage should end.
    ///
    /// The emit stage may have no room for a long time while Kafka is unavailable. The canary is scored meanwhile, to
    /// show that the scorer still works.
    fn send(&mut self, mut scored: Vec<Finished>) -> Result<bool, StreamError> {
        loop {
            match self.finished.send_timeout(scored, CANARY_INTERVAL) {
                Ok(()) => return Ok(true),
                Err(SendTimeoutError::Disconnected(_)) => return Ok(false),
                Err(SendTimeoutError::Timeout(returned)) => {
                    if self.control.must_stop(Instant::now()) {
                        return Ok(false);
                    }
                    self.score_canary()?;
                    scored = returned;
                }
            }
        }
    }

    fn score_canary(&mut self) -> Result<(), StreamError> {
        score_checked(&mut *self.scorer, &self.canary).map_err(|error| device_error(&error))?;
        self.health.record_scored(Instant::now());
        Ok(())
    }
}

/// Returns the largest margin of a comment, or the reason why it has none.
fn margin_of_comment(margin: CarriedMargin) -> Result<f32, String> {
    match margin {
        Some(Ok(margin)) => Ok(margin),
        Some(Err(error)) => Err(error.to_string()),
        None => Err("the comment has no window".to_owned()),
    }
}

fn rejected(comment: CommentRecord, reason: String) -> Finished {
    let (partition, offset) = (comment.record.position.partition, comment.record.position.offset);
    warn!(partition, offset, reason, "a comment cannot be scored");
    comment.rejected(Rejection {
        reason: "unscorable",
        message: reason,
        stage: RejectionStage::Score,
    })
}

fn device_error(error: &ScoreError) -> StreamError {
    counter!(names::SCORE_FAILURES, "verdict" => "device").increment(1);
    error!(%error, "the scorer fails on a known good comment");
    StreamError::Device(error.to_string())
}

/// Combines the margins of further windows with the carried one. Returns an error if any window has no margin.
///
/// Takes every margin even after an error, because the caller's iterator continues with the next comment.
fn with_carried(carried: CarriedMargin, margins: impl Iterator<Item = Result<f32, ScoreError>>) -> CarriedMargin {
    let margins: Vec<Result<f32, ScoreError>> = carried.into_iter().chain(margins).collect();
    let margins: Result<Vec<f32>, ScoreError> = margins.into_iter().collect();
    margins.map(largest_margin).transpose()
}
