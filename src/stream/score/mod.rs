//! The third stage: the thread that owns the scorer.
//!
//! Where a device works by itself, the next micro-batch is begun while it works on the one before, so it
//! never waits for the CPU at full load; two are begun at most. The stage feeds the health that the watchdog
//! and the probes ask for, by scored batches alone; an idle one scores a canary.

#[cfg(test)]
mod out_of_memory;
pub mod search;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender};
use metrics::{counter, histogram};
use tracing::{error, warn};

use super::batch::MicroBatch;
use super::control::{Control, StreamError};
use super::record::Pending;
use super::record::{Finished, Outcome, Rejection, RejectionStage};
use crate::decide::{CurrentJudge, Judge, JudgedModel};
use crate::message::Scored;
use crate::ops::health::Health;
use crate::ops::metrics as names;
use crate::scorer::{Begun, Row, ScoreError, Scorer, begin, call, finish as wait_for, largest_margin};
use search::Search;

/// How often an idle scorer proves that it works: several times within any sensible stall limit.
pub const CANARY_EVERY: Duration = Duration::from_secs(5);

/// Where a swap is handed to the scoring thread.
pub struct Replacement {
    /// The new scorer.
    pub scorer: Box<dyn Scorer>,
    /// Rows that it has scored.
    pub canary: Vec<Row>,
    /// What its scores are judged by from the next batch on.
    pub judged: JudgedModel,
}

/// The stage.
pub struct ScoreStage {
    /// What scores.
    pub scorer: Box<dyn Scorer>,
    /// Rows that it has scored before.
    pub canary: Vec<Row>,
    /// The one that is current travels with what is scored.
    pub judge: Arc<CurrentJudge>,
    /// A new scorer, taken unfinished two batches.
    pub swap: Receiver<Replacement>,
    /// Told of every scored batch.
    pub health: Arc<Health>,
    /// How the stream ends.
    pub control: Arc<Control>,
    /// From the encode stage.
    pub batches: Receiver<MicroBatch<Pending>>,
    /// To the emit stage.
    pub finished: Sender<Vec<Finished>>,
}

/// How long a running micro-batch is left alone before it is asked whether it is done: short beside the
/// milliseconds that a pass takes, long beside the asking.
const ASK_EVERY: Duration = Duration::from_micros(200);

/// The largest margin of a comment whose last window is still to come.
type Carried = Option<Result<f32, ScoreError>>;

/// A micro-batch that was begun.
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
        let begun = begin(scorer, &batch.rows);
        Self { batch, begun, since }
    }

    fn is_done(&self) -> bool {
        match &self.begun {
            Ok(Begun::Running(running)) => running.is_done(),
            _ => true,
        }
    }
}

/// What the stage keeps from one micro-batch to the next.
struct Unfinished {
    carried: Carried,
    /// When the last micro-batch was handed over: the time of one that was begun before counts from there.
    free_since: Instant,
}

impl ScoreStage {
    /// Scores until the encoder has ended.
    ///
    /// # Errors
    /// The scorer fails on the canary.
    pub fn run(mut self) -> Result<(), StreamError> {
        let mut unfinished = Unfinished {
            carried: None,
            free_since: Instant::now(),
        };
        let mut underway: Option<BegunBatch> = None;
        let mut replacement = None;
        loop {
            replacement = replacement.or_else(|| self.swap.try_recv().ok());
            if replacement.is_some()
                && let Some(last) = underway.take()
                && !self.finish(last, &mut unfinished)?
            {
                return Ok(());
            }
            // Between two batches, but not unfinished the windows of one comment.
            if unfinished.carried.is_none()
                && let Some(replacement) = replacement.take()
            {
                self.scorer = replacement.scorer;
                self.canary = replacement.canary;
                self.judge.set_model(replacement.judged);
            }
            let (waited, patience) = match underway {
                Some(_) => (None, ASK_EVERY),
                None => (Some(Instant::now()), CANARY_EVERY),
            };
            match self.batches.recv_timeout(patience) {
                Ok(batch) => {
                    if self.control.gives_up(Instant::now()) {
                        return Ok(());
                    }
                    let waited = waited.map_or(Duration::ZERO, |since| since.elapsed());
                    histogram!(names::STAGE_SECONDS, "stage" => "wait").record(waited);
                    let next = BegunBatch::begin(&mut *self.scorer, batch);
                    if let Some(last) = underway.replace(next)
                        && !self.finish(last, &mut unfinished)?
                    {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Timeout) if underway.is_none() => self.score_canary()?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if let Some(done) = underway.take_if(|batch| batch.is_done())
                && !self.finish(done, &mut unfinished)?
            {
                return Ok(());
            }
        }
        if let Some(last) = underway {
            self.finish(last, &mut unfinished)?;
        }
        Ok(())
    }

    /// Waits for a micro-batch and hands it over; false when nobody takes it any more.
    fn finish(&mut self, underway: BegunBatch, unfinished: &mut Unfinished) -> Result<bool, StreamError> {
        let BegunBatch { batch, begun, since } = underway;
        let tried = begun.and_then(|begun| wait_for(begun, batch.rows.len()));
        let mut search = Search {
            scorer: &mut *self.scorer,
            canary: &self.canary,
            failures: 0,
        };
        let margins = search.resolve(&batch.rows, tried);
        let failures = search.failures;
        let margins = margins.map_err(|fault| device(&fault.0))?;
        if failures > 0 {
            counter!(names::SCORE_FAILURES, "verdict" => "record").increment(failures);
        }
        let done = Instant::now();
        self.health.scored(done);
        histogram!(names::STAGE_SECONDS, "stage" => "score").record(done - since.max(unfinished.free_since));
        let (at, judge) = (SystemTime::now(), self.judge.get());
        let mut margins = margins.into_iter();
        let items = batch.items.into_iter();
        let scored = items.map(|(pending, rows)| {
            let margin = with_carried(unfinished.carried.take(), margins.by_ref().take(rows));
            finished(pending, margin, &judge, at)
        });
        let scored = scored.collect();
        // What is left are windows of a comment that the next batch completes.
        if margins.len() > 0 {
            unfinished.carried = with_carried(unfinished.carried.take(), margins);
        }
        let goes_on = self.hand_over(scored);
        unfinished.free_since = Instant::now();
        goes_on
    }

    /// Waits for room at the emitter. It may have none for long, when Kafka is away; the scorer works
    /// all the same, and shows it. False when the emitter has ended.
    fn hand_over(&mut self, mut scored: Vec<Finished>) -> Result<bool, StreamError> {
        loop {
            match self.finished.send_timeout(scored, CANARY_EVERY) {
                Ok(()) => return Ok(true),
                Err(SendTimeoutError::Disconnected(_)) => return Ok(false),
                Err(SendTimeoutError::Timeout(back)) => {
                    if self.control.gives_up(Instant::now()) {
                        return Ok(false);
                    }
                    self.score_canary()?;
                    scored = back;
                }
            }
        }
    }

    fn score_canary(&mut self) -> Result<(), StreamError> {
        call(&mut *self.scorer, &self.canary).map_err(|error| device(&error))?;
        self.health.scored(Instant::now());
        Ok(())
    }
}

fn finished(pending: Pending, margin: Carried, judge: &Arc<Judge>, at: SystemTime) -> Finished {
    let Pending {
        record,
        comment,
        windows,
        truncated,
    } = pending;
    let outcome = match margin {
        Some(Ok(margin)) => Outcome::Scored {
            scored: Scored {
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
                _ => "it has no window".to_owned(),
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

fn device(error: &ScoreError) -> StreamError {
    counter!(names::SCORE_FAILURES, "verdict" => "device").increment(1);
    error!(%error, "the scorer fails on a known good comment");
    StreamError::Device(error.to_string())
}

/// Adds the margins of more windows to what was carried over; an error if any window has none.
fn with_carried(carried: Carried, margins: impl Iterator<Item = Result<f32, ScoreError>>) -> Carried {
    let margins: Result<Vec<f32>, ScoreError> = carried.into_iter().chain(margins).collect();
    margins.map(largest_margin).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_margin_counts_unless_one_is_missing() {
        let error = || ScoreError::NotFinite {
            row: 0,
            margin: f32::NAN,
        };
        let check = |carried: Carried, margins: Vec<Result<f32, ScoreError>>, expected: Option<f32>| {
            let found = with_carried(carried, margins.into_iter());
            assert_eq!(found.and_then(Result::ok), expected);
        };
        check(None, vec![Ok(-1.0), Ok(2.0), Ok(1.0)], Some(2.0));
        check(Some(Ok(3.0)), vec![Ok(2.0)], Some(3.0));
        check(Some(Ok(3.0)), vec![], Some(3.0));
        check(Some(Err(error())), vec![Ok(2.0)], None);
        check(None, vec![Ok(2.0), Err(error()), Ok(3.0)], None);
    }
}
