//! The second stage: decodes events into comments, encodes them as rows, and gathers the rows into micro-batches.
//!
//! The stage is one thread, which tokenises long queues on all cores. Records that need no model (dead letters,
//! deletions and tombstones) go directly to the emit stage, which restores their order. A micro-batch continues to fill
//! while the scorer is busy, so the next one is ready when the scorer is.

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

/// The most records that are taken from the queue at once.
const CHUNK_RECORDS: usize = 256;

/// The fewest records for which distributing the work over all cores saves more time than it costs.
const MIN_PARALLEL_RECORDS: usize = 16;

/// The longest wait, which limits how late the stage notices that the stream is ending.
const MAX_WAIT: Duration = Duration::from_millis(100);

/// Turns records into micro-batches.
pub struct EncodeStage {
    pub input: InputConfig,
    pub prompter: Arc<Prompter>,
    /// Used to drop records of partitions that are no longer owned.
    pub ownership: Arc<Ownership>,
    pub control: Arc<Control>,
    pub limits: Limits,
    /// From the ingest stage.
    pub records: Receiver<Record>,
    /// To the score stage.
    pub batches: Sender<MicroBatch<Pending>>,
    /// To the emit stage: records that need no model.
    pub finished: Sender<Vec<Finished>>,
}

/// The result of encoding one record.
enum Encoded {
    Rows(Comment, Prompt),
    /// The record needs no model.
    Done(Outcome),
}

impl EncodeStage {
    /// Encodes until the ingest stage has ended, then passes on the remaining rows.
    ///
    /// Never fails: a record that cannot be encoded becomes a dead letter.
    pub fn run(self) -> Result<(), StreamError> {
        let mut batcher = Batcher::new(self.limits);
        let mut is_open = true;
        while is_open {
            let now = Instant::now();
            if self.control.must_stop(now) {
                return Ok(());
            }
            // A batch that is due waits for the scorer. Until it is full, more records can be added to it.
            if batcher.is_due(now) {
                let mut select = Select::new();
                let to_scorer = select.send(&self.batches);
                if !batcher.is_full() {
                    select.recv(&self.records);
                }
                match select.ready_timeout(MAX_WAIT) {
                    Ok(index) if index == to_scorer => {
                        if !self.send_batch(&mut batcher) {
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
                .map_or(MAX_WAIT, |due| due.saturating_duration_since(now).min(MAX_WAIT));
            match self.records.recv_timeout(wait) {
                Ok(first) => {
                    let mut chunk = vec![first];
                    chunk.extend(self.records.try_iter().take(CHUNK_RECORDS - 1));
                    if !self.encode_chunk(chunk, &mut batcher) {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => is_open = false,
            }
        }
        while let Some(batch) = batcher.take() {
            // If the score stage has ended, it has reported the reason.
            if self.batches.send(batch).is_err() || self.control.must_stop(Instant::now()) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Sends a micro-batch to the score stage, whose channel has room for it. Returns false if that stage has ended.
    fn send_batch(&self, batcher: &mut Batcher<Pending>) -> bool {
        let Some(batch) = batcher.take() else { return true };
        match self.batches.try_send(batch) {
            Ok(()) => true,
            // Should not happen, because no other thread sends on this channel.
            Err(TrySendError::Full(batch)) => self.batches.send(batch).is_ok(),
            Err(TrySendError::Disconnected(_)) => false,
        }
    }

    /// Encodes records and passes on those that need no model. Returns false if a later stage has ended.
    fn encode_chunk(&self, mut chunk: Vec<Record>, batcher: &mut Batcher<Pending>) -> bool {
        chunk.retain(|record| self.ownership.owns(record.position.partition, record.position.epoch));
        let start = Instant::now();
        let encoded: Vec<Encoded> = if chunk.len() < MIN_PARALLEL_RECORDS {
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

    /// Encodes one record. A panic in a library turns that record into a dead letter, and the daemon continues.
    fn encode(&self, record: &Record) -> Encoded {
        catch_unwind(AssertUnwindSafe(|| self.encode_unguarded(record))).unwrap_or_else(|_| {
            Encoded::Done(Outcome::Rejected(Rejection {
                reason: "encoder_panicked",
                message: "decoding or tokenising the event panicked, which is a bug".to_owned(),
                stage: RejectionStage::Decode,
            }))
        })
    }

    fn encode_unguarded(&self, record: &Record) -> Encoded {
        if record.has_broken_headers {
            return Encoded::Done(Outcome::Rejected(Rejection {
                reason: "bad_headers",
                message: "the name of a header is not UTF-8".to_owned(),
                stage: RejectionStage::Decode,
            }));
        }
        let Some(value) = &record.value else {
            return Encoded::Done(Outcome::Tombstone);
        };
        let fields = &self.input.fields;
        let decoded = decode(value, fields, self.input.max_bytes)
            .and_then(|comment| require_content_id(&comment, fields).map(|()| comment));
        let comment = match decoded {
            Ok(comment) => comment,
            Err(error) => return Encoded::Done(Outcome::Rejected(undecodable(&error))),
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

fn undecodable(error: &DecodeError) -> Rejection {
    Rejection {
        reason: error.reason(),
        message: error.to_string(),
        stage: RejectionStage::Decode,
    }
}
