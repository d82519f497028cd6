//! The second stage: decodes events into comments, encodes them as rows, and gathers the rows into micro-batches.
//!
//! The stage is one thread, which shares long queues with threads of its own. The threads that compute the model on a
//! CPU never work for this stage, so the scorer does not wait behind texts. Records that need no model (dead letters,
//! deletions and tombstones) go directly to the emit stage, which restores their order. A micro-batch continues to fill
//! while the scorer is busy, and is handed over as soon as the scorer is free. Beyond that micro-batch, at most
//! [`CHUNK_BYTES`] and one more record are encoded ahead of the scorer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Select, Sender};
use metrics::{gauge, histogram};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::batch::{Batcher, Limits, MicroBatch};
use super::control::{Control, StreamError};
use super::decode::{DecodeError, decode, require_content_id};
use super::ownership::Ownership;
use super::record::{Finished, Outcome, Pending, Record, Rejection, RejectionStage};
use crate::config::InputConfig;
use crate::message::{Comment, Op};
use crate::ops::metrics as names;
use crate::prompt::{Prompt, Prompter};

/// The most records that are taken from the queue at once. A scorer that becomes free waits until they are encoded, which
/// takes one thread about ten milliseconds.
const CHUNK_RECORDS: usize = 64;

/// No more records are taken at once as soon as they have this many bytes together, so that the scorer does not wait
/// long for large ones either.
const CHUNK_BYTES: usize = 256 << 10;

/// The fewest records for which distributing the work over several threads saves more time than it costs.
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
        let pool = encoding_threads();
        let mut is_open = true;
        while is_open {
            let now = Instant::now();
            if self.control.must_stop(now) {
                return Ok(());
            }
            let received = if batcher.is_due(now) {
                // The batch waits for the scorer. Until it is full, more records can be added to it.
                let mut select = Select::new_biased();
                let to_scorer = select.send(&self.batches);
                if !batcher.is_full() {
                    select.recv(&self.records);
                }
                match select.select_timeout(MAX_WAIT) {
                    Ok(operation) if operation.index() == to_scorer => {
                        let batch = batcher.take().expect("a batch that is due has rows");
                        if operation.send(&self.batches, batch).is_err() {
                            // The score stage has ended and has reported the reason.
                            return Ok(());
                        }
                        continue;
                    }
                    Ok(operation) => operation.recv(&self.records).map_err(RecvTimeoutError::from),
                    Err(_) => Err(RecvTimeoutError::Timeout),
                }
            } else {
                let until_due = batcher.due().map(|due| due.saturating_duration_since(now));
                let wait = until_due.map_or(MAX_WAIT, |until_due| until_due.min(MAX_WAIT));
                self.records.recv_timeout(wait)
            };
            match received {
                Ok(first) => {
                    let chunk = self.take_chunk(first);
                    if !self.encode_chunk(chunk, pool.as_ref(), &mut batcher) {
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

    /// Returns a record and those behind it in the queue, up to the limits of a chunk.
    fn take_chunk(&self, first: Record) -> Vec<Record> {
        let bytes = |record: &Record| record.value.as_ref().map_or(0, Vec::len);
        let (mut total, mut chunk) = (bytes(&first), vec![first]);
        while total < CHUNK_BYTES && chunk.len() < CHUNK_RECORDS {
            let Ok(next) = self.records.try_recv() else { break };
            total += bytes(&next);
            chunk.push(next);
        }
        chunk
    }

    /// Encodes records and passes on those that need no model. Returns false if a later stage has ended.
    fn encode_chunk(&self, mut chunk: Vec<Record>, pool: Option<&ThreadPool>, batcher: &mut Batcher<Pending>) -> bool {
        chunk.retain(|record| self.ownership.owns(record.position.partition, record.position.epoch));
        let start = Instant::now();
        let encoded: Vec<Encoded> = match pool {
            Some(pool) if chunk.len() >= MIN_PARALLEL_RECORDS => {
                pool.install(|| chunk.par_iter().map(|record| self.encode(record)).collect())
            }
            _ => chunk.iter().map(|record| self.encode(record)).collect(),
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

/// Returns the threads that encode long queues: half as many as there are cores, so that a model on the CPU keeps the
/// larger share. Returns `None` if the stage's own thread is enough, or if no other can be started.
fn encoding_threads() -> Option<ThreadPool> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from) / 2;
    let builder = ThreadPoolBuilder::new().thread_name(|index| format!("encode-{index}"));
    (threads > 1)
        .then(|| builder.num_threads(threads).build().ok())
        .flatten()
}

fn undecodable(error: &DecodeError) -> Rejection {
    Rejection {
        reason: error.reason(),
        message: error.to_string(),
        stage: RejectionStage::Decode,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crossbeam_channel::bounded;

    use super::super::in_flight::InFlight;
    use super::super::record::RecordPosition;
    use super::*;
    use crate::config::{InputFields, PromptConfig};

    /// Returns a stage whose queue holds this many comments with a text, and the other ends of its channels.
    fn stage(text: &str, count: usize) -> (EncodeStage, Receiver<Record>, Receiver<MicroBatch<Pending>>) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gemma3/tokenizer.json");
        let prompt = PromptConfig {
            labels: ["Positive".into(), "Negative".into()],
            hateful_label: "Negative".into(),
            instructions: "Classify the following text into one of the following classes:[{labels}]".into(),
            separator: "<separator>".into(),
            normalize: true,
            max_window_tokens: 64,
            max_windows: 4,
        };
        let prompter = Prompter::new(&path, &std::fs::read(&path).unwrap(), &prompt, 1024, 8192).unwrap();
        let field = |name: &str| format!("/{name}");
        let ownership = Arc::new(Ownership::default());
        let (epoch, in_flight) = (ownership.assign(0), Arc::new(InFlight::new(count + 1, usize::MAX)));
        let (record, records) = bounded(count);
        let event = serde_json::json!({"event_id": "e", "content_id": "c", "text": text});
        for sequence in 0..count {
            let record_with_text = Record {
                position: RecordPosition {
                    partition: 0,
                    epoch,
                    sequence: sequence as u64,
                    offset: sequence as i64,
                },
                key: None,
                value: Some(serde_json::to_vec(&event).unwrap()),
                headers: Vec::new(),
                has_broken_headers: false,
                timestamp: None,
                _in_flight: in_flight.add(0, None, std::time::Instant::now()),
            };
            record.send(record_with_text).unwrap();
        }
        let (batch, batches) = bounded(0);
        let (finished, _) = bounded(1);
        let stage = EncodeStage {
            input: InputConfig {
                fields: InputFields {
                    event_id: field("event_id"),
                    content_id: field("content_id"),
                    revision: field("revision"),
                    op: field("op"),
                    community_id: field("community_id"),
                    text: field("text"),
                },
                max_bytes: 1 << 20,
            },
            prompter: Arc::new(prompter),
            ownership,
            control: Arc::default(),
            limits: Limits {
                max_tokens: 256,
                linger: Duration::from_millis(20),
            },
            records: records.clone(),
            batches: batch,
            finished,
        };
        (stage, records, batches)
    }

    #[test]
    fn encoding_stays_close_ahead_of_the_scorer() {
        let text = "this is a fine day and we all like it. ".repeat(2500);
        let count = 120;
        let (stage, records, batches) = stage(&text, count);
        let thread = std::thread::spawn(|| stage.run());
        // A chunk, and one record each in the batch that was received and in the one that fills up.
        let most_ahead = CHUNK_BYTES / text.len() + 1 + 2;
        let mut scored = 0;
        for batch in &batches {
            let taken = count - records.len();
            assert!(taken <= scored + most_ahead, "{taken} records taken, {scored} scored");
            scored += batch.items.len();
        }
        assert_eq!(scored, count);
        thread.join().unwrap().unwrap();
    }

    /// Keeps every thread that computes models on the CPU busy, and checks that the stage needs none of them.
    #[test]
    fn encoding_uses_no_thread_of_the_scorer() {
        let threads = rayon::current_num_threads();
        let (started, starts) = bounded(threads);
        let (release, released) = bounded::<()>(0);
        for _ in 0..threads {
            let (started, released) = (started.clone(), released.clone());
            rayon::spawn(move || {
                started.send(()).unwrap();
                // Ends when `release` is dropped.
                let _ = released.recv();
            });
        }
        let deadline = Duration::from_secs(60);
        (0..threads).for_each(|_| starts.recv_timeout(deadline).unwrap());
        let count = 4 * MIN_PARALLEL_RECORDS;
        let (stage, _records, batches) = stage("hello", count);
        let thread = std::thread::spawn(|| stage.run());
        let mut scored = 0;
        while scored < count {
            scored += batches.recv_timeout(deadline).unwrap().items.len();
        }
        drop(release);
        thread.join().unwrap().unwrap();
    }
}
