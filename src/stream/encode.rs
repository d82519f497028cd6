//! The second stage: events to comments to rows, gathered into micro-batches.
//!
//! One thread; a long queue is tokenised on all cores. What needs no model (dead letters, deletions,
//! tombstones) goes straight to the emitter, which puts it back in order. While the scorer is busy a
//! micro-batch goes on filling up, so the next one is ready when it is done.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Select, Sender, TrySendError};
use metrics::{gauge, histogram};
use rayon::prelude::*;

use super::batch::{Batcher, Limits, MicroBatch};
use super::control::{Control, StreamError};
use super::decode::{DecodeError, decode, require_content_id};
use super::ownership::Ownership;
use super::record::{Finished, Outcome, Pending, Record, Rejection, RejectionStage};
use crate::config::InputConfig;
use crate::message::{Comment, Op};
use crate::ops::metrics as names;
use crate::prompt::{Prompt, Prompter};

/// Records taken from the queue in one go.
const CHUNK: usize = 256;

/// Below this many, handing work to other cores costs more than it saves.
const PARALLEL: usize = 16;

/// How soon the stage notices that the stream is ending.
const TICK: Duration = Duration::from_millis(100);

/// The stage.
pub struct EncodeStage {
    /// How an event is read.
    pub input: InputConfig,
    /// How a comment is framed.
    pub prompter: Arc<Prompter>,
    /// Records of partitions that have left are dropped.
    pub ownership: Arc<Ownership>,
    /// How the stream ends.
    pub control: Arc<Control>,
    /// What a micro-batch is bounded by.
    pub limits: Limits,
    /// From the ingest stage.
    pub records: Receiver<Record>,
    /// To the score stage.
    pub batches: Sender<MicroBatch<Pending>>,
    /// To the emit stage: what needs no model.
    pub finished: Sender<Vec<Finished>>,
}

enum Encoded {
    Rows(Comment, Prompt),
    Done(Outcome),
}

impl EncodeStage {
    /// Encodes until the ingest stage has ended, then hands out what is left.
    ///
    /// # Errors
    /// None: what cannot be encoded becomes a dead letter.
    pub fn run(self) -> Result<(), StreamError> {
        let mut batcher = Batcher::new(self.limits);
        let mut is_open = true;
        while is_open {
            let now = Instant::now();
            if self.control.gives_up(now) {
                return Ok(());
            }
            // Full: the scorer must take one first. Due: it may, and until it does more can be added.
            if batcher.is_due(now) {
                let mut select = Select::new();
                let to_scorer = select.send(&self.batches);
                if !batcher.is_full() {
                    select.recv(&self.records);
                }
                match select.ready_timeout(TICK) {
                    Ok(index) if index == to_scorer => {
                        if !self.hand_over(&mut batcher) {
                            return Ok(());
                        }
                        continue;
                    }
                    Ok(_) => {}
                    Err(_) => continue,
                }
            }
            let wait = batcher
                .due()
                .map_or(TICK, |due| due.saturating_duration_since(now).min(TICK));
            match self.records.recv_timeout(wait) {
                Ok(first) => {
                    let mut chunk = vec![first];
                    chunk.extend(self.records.try_iter().take(CHUNK - 1));
                    if !self.take(chunk, &mut batcher) {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => is_open = false,
            }
        }
        while let Some(batch) = batcher.take() {
            // A scorer that has ended has said why.
            if self.batches.send(batch).is_err() || self.control.gives_up(Instant::now()) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Gives the scorer a micro-batch, which it has room for; false when it has ended.
    fn hand_over(&self, batcher: &mut Batcher<Pending>) -> bool {
        let Some(batch) = batcher.take() else { return true };
        match self.batches.try_send(batch) {
            Ok(()) => true,
            // Nobody else sends: room that was there still is.
            Err(TrySendError::Full(batch)) => self.batches.send(batch).is_ok(),
            Err(TrySendError::Disconnected(_)) => false,
        }
    }

    /// False when a later stage has ended.
    fn take(&self, mut chunk: Vec<Record>, batcher: &mut Batcher<Pending>) -> bool {
        chunk.retain(|record| self.ownership.owns(record.position.partition, record.position.epoch));
        let start = Instant::now();
        let encoded: Vec<Encoded> = if chunk.len() < PARALLEL {
            chunk.iter().map(|record| self.encode(record)).collect()
        } else {
            chunk.par_iter().map(|record| self.encode(record)).collect()
        };
        let mut done = Vec::new();
        for (record, encoded) in chunk.into_iter().zip(encoded) {
            match encoded {
                Encoded::Rows(comment, Prompt { rows, truncated }) => {
                    let pending = Pending {
                        record,
                        comment,
                        windows: rows.len(),
                        truncated,
                    };
                    batcher.push(pending, rows, start);
                }
                Encoded::Done(outcome) => done.push(Finished { record, outcome }),
            }
        }
        histogram!(names::STAGE_SECONDS, "stage" => "encode").record(start.elapsed());
        let (items, tokens) = batcher.waiting();
        gauge!(names::QUEUE_EVENTS, "queue" => "batch").set(items as f64);
        gauge!(names::QUEUE_BYTES, "queue" => "batch").set((tokens * size_of::<u32>()) as f64);
        done.is_empty() || self.finished.send(done).is_ok()
    }

    /// A panic in a library takes one record along, not the daemon.
    fn encode(&self, record: &Record) -> Encoded {
        catch_unwind(AssertUnwindSafe(|| self.read(record))).unwrap_or_else(|_| {
            Encoded::Done(Outcome::Rejected(Rejection {
                reason: "encoder_panicked",
                message: "reading or tokenising the event panicked, which is a bug".to_owned(),
                stage: RejectionStage::Decode,
            }))
        })
    }

    fn read(&self, record: &Record) -> Encoded {
        if record.has_broken_headers {
            return Encoded::Done(Outcome::Rejected(Rejection {
                reason: "bad_headers",
                message: "a header's name is not UTF-8".to_owned(),
                stage: RejectionStage::Decode,
            }));
        }
        let Some(value) = &record.value else {
            return Encoded::Done(Outcome::Tombstone);
        };
        let fields = &self.input.fields;
        let read = decode(value, fields, self.input.max_bytes)
            .and_then(|comment| require_content_id(&comment, fields).map(|()| comment));
        let comment = match read {
            Ok(comment) => comment,
            Err(error) => return Encoded::Done(Outcome::Rejected(unreadable(&error))),
        };
        if comment.op == Op::Delete {
            return Encoded::Done(Outcome::Deleted(comment));
        }
        match self.prompter.encode(&comment.text) {
            Ok(prompt) => Encoded::Rows(comment, prompt),
            Err(error) => Encoded::Done(Outcome::Rejected(Rejection {
                reason: "unscorable",
                message: error.to_string(),
                stage: RejectionStage::Score,
            })),
        }
    }
}

fn unreadable(error: &DecodeError) -> Rejection {
    Rejection {
        reason: error.reason(),
        message: error.to_string(),
        stage: RejectionStage::Decode,
    }
}
