//! The third stage: the thread that owns the scorer.
//!
//! On a device that computes asynchronously, the stage begins the next micro-batch while the device works on the
//! previous one, so that the device never waits for the CPU under full load; at most two are begun at a time. Every
//! scored batch is reported to the health checks behind the watchdog and the probes. An idle stage scores the canary to
//! show that scoring still works.

#[cfg(test)]
mod out_of_memory;
mod search;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender};
use metrics::{counter, histogram};
use tracing::{error, warn};

use super::batch::MicroBatch;
use super::control::{Control, StreamError};
use super::record::{Finished, Outcome, Pending, Rejection, RejectionStage};
use crate::decide::{CurrentJudge, Judge, JudgedModel};
use crate::message::CommentMargin;
use crate::ops::health::Health;
use crate::ops::metrics as names;
use crate::scorer::{Begun, Row, ScoreError, Scorer, begin_checked, largest_margin, score_checked, wait_checked};
use search::FailureSearch;

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
    /// From the encode stage. The channels come first, so that they are closed before the model is freed.
    pub batches: Receiver<MicroBatch<Pending>>,
    /// To the emit stage.
    pub finished: Sender<Vec<Finished>>,
    pub scorer: Box<dyn Scorer>,
    /// Rows that the scorer is known to be able to score.
    pub canary: Vec<Row>,
    /// Every scored comment carries the judge that was current when it was scored.
    pub judge: Arc<CurrentJudge>,
    /// Delivers new scorers, which are taken between two batches.
    pub swap: Receiver<Replacement>,
    pub health: Arc<Health>,
    pub control: Arc<Control>,
}

/// The largest margin so far of a comment whose last window is in a later micro-batch, or the error of a window.
type CarriedMargin = Option<Result<f32, ScoreError>>;

/// A micro-batch that the scorer has begun.
struct BegunBatch {
    batch: MicroBatch<Pending>,
    begun: Result<Begun, ScoreError>,
    since: Instant,
}

impl BegunBatch {
    fn begin(scorer: &mut dyn Scorer, batch: MicroBatch<Pending>) -> Self {
        histogram!(names::BATCH_TOKENS).record(batch.tokens() as f64);
        histogram!(names::BATCH_ROWS).record(batch.rows.len() as f64);
        let since = Instant::now();
        let begun = begin_checked(scorer, &batch.rows);
        Self { batch, begun, since }
    }

    fn is_done(&self) -> bool {
        match &self.begun {
            Ok(Begun::Running(running)) => running.is_done(),
            _ => true,
        }
    }
}

/// The state that the stage carries from one micro-batch to the next.
struct ScoreState {
    carried: CarriedMargin,
    /// When the previous micro-batch was passed on. The time of one that was begun earlier is measured from here.
    free_since: Instant,
}

impl ScoreStage {
    /// Scores until the encode stage has ended.
    ///
    /// # Errors
    /// Returns an error if the scorer fails on the canary.
    pub fn run(mut self) -> Result<(), StreamError> {
        let mut state = ScoreState {
            carried: None,
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
            // All windows of a comment must be scored by the same scorer.
            if state.carried.is_none()
                && let Some(replacement) = replacement.take()
            {
                self.scorer = replacement.scorer;
                self.canary = replacement.canary;
                self.judge.set_model(replacement.judged);
            }
            let (idle_since, timeout) = match in_progress {
                Some(_) => (None, POLL_INTERVAL),
                None => (Some(Instant::now()), CANARY_INTERVAL),
            };
            match self.batches.recv_timeout(timeout) {
                Ok(batch) => {
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
                Err(RecvTimeoutError::Timeout) if in_progress.is_none() => self.score_canary()?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
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

    /// Waits for a micro-batch and passes its comments on. Returns false if the stage should end.
    fn finish(&mut self, in_progress: BegunBatch, state: &mut ScoreState) -> Result<bool, StreamError> {
        let BegunBatch { batch, begun, since } = in_progress;
        let first_attempt = begun.and_then(|begun| wait_checked(begun, batch.rows.len()));
        let mut search = FailureSearch {
            scorer: &mut *self.scorer,
            canary: &self.canary,
            failures: 0,
        };
        let margins = search.resolve(&batch.rows, first_attempt);
        let failures = search.failures;
        let margins = margins.map_err(|fault| device_error(&fault.0))?;
        if failures > 0 {
            counter!(names::SCORE_FAILURES, "verdict" => "record").increment(failures);
        }
        let done = Instant::now();
        self.health.record_scored(done);
        histogram!(names::STAGE_SECONDS, "stage" => "score").record(done - since.max(state.free_since));
        let (at, judge) = (SystemTime::now(), self.judge.get());
        let mut margins = margins.into_iter();
        let items = batch.items.into_iter();
        let scored = items.map(|(pending, rows)| {
            let margin = with_carried(state.carried.take(), margins.by_ref().take(rows));
            finished(pending, margin, &judge, at)
        });
        let scored = scored.collect();
        // The remaining margins belong to a comment that a later batch completes.
        if margins.len() > 0 {
            state.carried = with_carried(state.carried.take(), margins);
        }
        let sent = self.send(scored);
        state.free_since = Instant::now();
        sent
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

fn finished(pending: Pending, margin: CarriedMargin, judge: &Arc<Judge>, at: SystemTime) -> Finished {
    let Pending {
        record,
        comment,
        windows,
        truncated,
    } = pending;
    let outcome = match margin {
        Some(Ok(margin)) => Outcome::Scored {
            scored: CommentMargin {
                margin,
                windows,
                truncated,
            },
            comment,
            judge: Arc::clone(judge),
            at,
        },
        failed => {
            let (partition, offset) = (record.position.partition, record.position.offset);
            let reason = match failed {
                Some(Err(error)) => error.to_string(),
                _ => "the comment has no window".to_owned(),
            };
            warn!(partition, offset, reason, "a comment cannot be scored");
            Outcome::Rejected(Rejection {
                reason: "unscorable",
                message: reason,
                stage: RejectionStage::Score,
            })
        }
    };
    Finished { record, outcome }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_margin_is_used_unless_one_is_missing() {
        let error = || ScoreError::NotFinite {
            row: 0,
            margin: f32::NAN,
        };
        let check = |carried: CarriedMargin, margins: Vec<Result<f32, ScoreError>>, expected: Option<f32>| {
            let found = with_carried(carried, margins.into_iter());
            assert_eq!(found.and_then(Result::ok), expected);
        };
        check(None, vec![Ok(-1.0), Ok(2.0), Ok(1.0)], Some(2.0));
        check(Some(Ok(3.0)), vec![Ok(2.0)], Some(3.0));
        check(Some(Ok(3.0)), vec![], Some(3.0));
        check(Some(Err(error())), vec![Ok(2.0)], None);
        check(None, vec![Ok(2.0), Err(error()), Ok(3.0)], None);
    }

    #[test]
    fn a_comment_that_fails_takes_its_own_margins_and_no_others() {
        let error = || ScoreError::NotFinite {
            row: 0,
            margin: f32::NAN,
        };
        for carried in [None, Some(Ok(1.0)), Some(Err(error()))] {
            let mut margins = [Err(error()), Ok(9.0), Ok(-1.0), Ok(-2.0)].into_iter();
            assert!(with_carried(carried, margins.by_ref().take(2)).is_some_and(|margin| margin.is_err()));
            let next = with_carried(None, margins.by_ref().take(1));
            assert_eq!(next.and_then(Result::ok), Some(-1.0));
            assert_eq!(margins.len(), 1);
        }
    }
}
