//! The second stage: decodes events into comments, encodes them as rows, and gathers the rows into micro-batches.
//!
//! The stage is one thread, which shares long queues with threads of its own. The threads that compute the model on a
//! CPU never work for this stage, so the scorer does not wait behind texts. Records that need no model (dead letters,
//! deletions and tombstones) go directly to the emit stage, which restores their order. A micro-batch continues to fill
//! while the scorer is busy, and is handed over as soon as the scorer is free. Beyond that micro-batch, at most
//! [`CHUNK_BYTES`] and one more record are encoded ahead of the scorer.

mod encoder;

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender};
use metrics::{counter, gauge, histogram};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::batch::{Batcher, Limits, MicroBatch};
use super::control::{Control, StreamError};
use super::hand_over::{Waited, wait};
use super::ownership::Ownership;
use super::record::{Finished, Pending, Record};
use crate::ops::metrics as names;
use encoder::Encoded;
pub use encoder::RecordEncoder;

/// The most records that are taken from the queue at once. A scorer that becomes free waits until they are encoded, which
/// takes one thread about ten milliseconds.
const CHUNK_RECORDS: usize = 64;

/// No more records are taken at once as soon as they have this many bytes together, so that the scorer does not wait
/// long for large ones either.
const CHUNK_BYTES: usize = 256 << 10;

/// The fewest records for which distributing the work over several threads saves more time than it costs.
const MIN_PARALLEL_RECORDS: usize = 16;

/// Turns records into micro-batches.
pub struct EncodeStage {
    pub encoder: RecordEncoder,
    /// Used to drop records of partitions that are no longer owned.
    pub ownership: Arc<Ownership>,
    pub control: Arc<Control>,
    pub limits: Limits,
    /// From the ingest stage.
    pub records: Receiver<Record>,
    /// To the score stage.
    pub batches: Sender<MicroBatch<Pending>>,
    /// To the emit stage: records that need no model, and comments whose margin is known.
    pub finished: Sender<Vec<Finished>>,
}

/// Counts how comments were found in the cache.
#[derive(Default)]
struct LookupCounts {
    hits: u64,
    coalesced: u64,
    misses: u64,
}

impl LookupCounts {
    fn record(self) {
        for (result, count) in [("hit", self.hits), ("coalesced", self.coalesced), ("miss", self.misses)] {
            counter!(names::CACHE_LOOKUPS, "result" => result).increment(count);
        }
    }
}

impl EncodeStage {
    /// Encodes until the ingest stage has ended, then passes on the remaining rows.
    ///
    /// Never fails: a record that cannot be encoded becomes a dead letter.
    pub fn run(self) -> Result<(), StreamError> {
        let mut batcher = Batcher::new(self.limits);
        let pool = encoding_threads();
        loop {
            let now = Instant::now();
            if self.control.must_stop(now) {
                return Ok(());
            }
            match wait(&mut batcher, &self.records, &self.batches, now) {
                Waited::Input(first) => {
                    let chunk = self.take_chunk(first);
                    if !self.encode_chunk(chunk, pool.as_ref(), &mut batcher) {
                        return Ok(());
                    }
                }
                Waited::Nothing => {}
                Waited::InputEnded => break,
                // The score stage has reported the reason.
                Waited::ScorerEnded => return Ok(()),
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
        let (start, now) = (Instant::now(), SystemTime::now());
        let encoded: Vec<Encoded> = match pool {
            Some(pool) if chunk.len() >= MIN_PARALLEL_RECORDS => {
                let encode = |record| self.encoder.encode(record, now);
                pool.install(|| chunk.into_par_iter().map(encode).collect())
            }
            _ => chunk
                .into_iter()
                .map(|record| self.encoder.encode(record, now))
                .collect(),
        };
        let (mut done, mut counts) = (Vec::new(), LookupCounts::default());
        for encoded in encoded {
            match encoded {
                Encoded::Rows(pending, rows) => {
                    counts.misses += u64::from(pending.first.is_some());
                    batcher.push(pending, rows, start);
                }
                Encoded::Waits => counts.coalesced += 1,
                Encoded::Known(finished) => {
                    counts.hits += 1;
                    done.push(finished);
                }
                Encoded::Done(finished) => done.push(finished),
                Encoded::Failed(comment, waiting, rejection) => {
                    let all = std::iter::once(comment).chain(waiting);
                    done.extend(all.map(|comment| comment.rejected(rejection.clone())));
                }
            }
        }
        histogram!(names::STAGE_SECONDS, "stage" => "encode").record(start.elapsed());
        if self.encoder.cache.is_on() {
            counts.record();
        }
        let (items, tokens) = batcher.waiting();
        gauge!(names::QUEUE_EVENTS, "queue" => "batch").set(items as f64);
        gauge!(names::QUEUE_BYTES, "queue" => "batch").set((tokens * size_of::<u32>()) as f64);
        done.is_empty() || self.finished.send(done).is_ok()
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crossbeam_channel::bounded;

    use super::super::cache::ScoreCache;
    use super::super::cache::tests::current_judge;
    use super::super::record::Outcome;
    use super::super::record::tests::record;
    use super::*;
    use crate::config::{InputConfig, InputFields, Markup, Normalize, PromptConfig};
    use crate::message::CommentMargin;
    use crate::prompt::Prompter;

    /// The time limit of everything that a test waits for.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// The other ends of a stage's channels, and what it shares.
    struct Ends {
        record: Sender<Record>,
        records: Receiver<Record>,
        batches: Receiver<MicroBatch<Pending>>,
        finished: Receiver<Vec<Finished>>,
        ownership: Arc<Ownership>,
        cache: Arc<ScoreCache>,
        next: u64,
    }

    impl Ends {
        /// Sends the next record to the stage, with a comment on this text.
        fn send(&mut self, partition: i32, text: &str) {
            self.send_event(partition, serde_json::json!({"content_id": "c", "text": text}));
        }

        /// Sends a deletion, and waits until it is passed on. Everything that was sent before is in the batcher then.
        fn send_deletion(&mut self, partition: i32) {
            self.send_event(partition, serde_json::json!({"content_id": "c", "op": "delete"}));
            self.finished.recv_timeout(PATIENCE).unwrap();
        }

        fn send_event(&mut self, partition: i32, event: serde_json::Value) {
            let epoch = self.ownership.epoch(partition).unwrap();
            let value = Some(serde_json::to_vec(&event).unwrap());
            self.record.send(record(partition, epoch, self.next, value)).unwrap();
            self.next += 1;
        }

        fn receive(&self) -> MicroBatch<Pending> {
            self.batches.recv_timeout(PATIENCE).unwrap()
        }
    }

    /// Returns a stage that owns two partitions, and the ends of its channels. The cache is for so many texts.
    fn stage(max_texts: usize) -> (EncodeStage, Ends) {
        let path = crate::test_files::test_file("tests/fixtures/gemma3/tokenizer.json");
        let prompt = PromptConfig {
            labels: ["Positive".into(), "Negative".into()],
            hateful_label: "Negative".into(),
            instructions: "Classify the following text into one of the following classes:[{labels}]".into(),
            separator: "<separator>".into(),
            template: None,
            markup: Markup::None,
            normalize: Normalize::Full,
            max_window_tokens: Some(64),
            max_windows: Some(4),
            windows: None,
        };
        let prompter = Prompter::new(&path, &std::fs::read(&path).unwrap(), &prompt, 1024, 8192).unwrap();
        let ownership = Arc::new(Ownership::default());
        for partition in 0..2 {
            ownership.assign(partition);
        }
        let cache = Arc::new(ScoreCache::new(max_texts, Arc::new(current_judge("base"))));
        let (record, records) = bounded(1000);
        let (batch, batches) = bounded(0);
        let (finish, finished) = bounded(1000);
        let stage = EncodeStage {
            encoder: RecordEncoder {
                input: InputConfig {
                    fields: InputFields::default(),
                    max_bytes: 1 << 20,
                },
                prompter: Arc::new(prompter),
                cache: Arc::clone(&cache),
            },
            ownership: Arc::clone(&ownership),
            control: Arc::default(),
            limits: Limits {
                max_tokens: 256,
                linger: Duration::ZERO,
            },
            records: records.clone(),
            batches: batch,
            finished: finish,
        };
        let ends = Ends {
            record,
            records,
            batches,
            finished,
            ownership,
            cache,
            next: 0,
        };
        (stage, ends)
    }

    #[test]
    fn encoding_stays_close_ahead_of_the_scorer() {
        let text = "this is a fine day and we all like it. ".repeat(2500);
        let count = 120;
        let (stage, mut ends) = stage(0);
        (0..count).for_each(|_| ends.send(0, &text));
        let Ends {
            record,
            records,
            batches,
            ..
        } = ends;
        drop(record);
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

    #[test]
    fn what_arrives_while_the_scorer_is_busy_forms_one_batch() {
        let (stage, mut ends) = stage(0);
        let thread = std::thread::spawn(|| stage.run());
        // No batch is asked for, as if the scorer were busy.
        for _ in 0..5 {
            ends.send(0, "hello");
            ends.send_deletion(0);
        }
        assert_eq!(ends.receive().items.len(), 5);
        // An idle scorer gets a single comment at once.
        ends.send(0, "hello");
        assert_eq!(ends.receive().items.len(), 1);
        drop(ends);
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn of_identical_texts_only_the_first_reaches_the_scorer() {
        let (stage, mut ends) = stage(100);
        let thread = std::thread::spawn(|| stage.run());
        // The last two differ only in what the normaliser removes.
        for text in ["one", "two", "one", "one\u{200b}"] {
            ends.send(0, text);
        }
        ends.send_deletion(0);
        let batch = ends.receive();
        let sequences = |items: &[(Pending, usize)]| -> Vec<u64> {
            items
                .iter()
                .map(|(one, _)| one.source.record.position.sequence)
                .collect()
        };
        assert_eq!(sequences(&batch.items), [0, 1]);
        let margin = CommentMargin {
            margin: 1.0,
            windows: 1,
            truncated: false,
            competence: None,
        };
        let finish = |index: usize| {
            let first = batch.items[index].0.first.as_ref().unwrap();
            assert_eq!(first.rows, batch.rows[index..=index]);
            ends.cache.finish(first.key, Some(margin))
        };
        assert_eq!((finish(0).len(), finish(1).len()), (2, 0));
        // From then on, the margin is known.
        ends.send(0, "one");
        let known = ends.finished.recv_timeout(PATIENCE).unwrap();
        assert!(matches!(known[0].outcome, Outcome::Scored { scored, .. } if scored == margin));
        drop(ends);
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn a_comment_is_scored_even_if_the_partition_of_the_first_with_its_text_is_revoked() {
        let (stage, mut ends) = stage(100);
        let thread = std::thread::spawn(|| stage.run());
        ends.send(0, "one");
        ends.send_deletion(1);
        ends.ownership.revoke(&[0]);
        ends.send(1, "one");
        ends.send_deletion(1);
        // The first one is still scored, although its decision will be dropped, and the other one waits for it.
        let batch = ends.receive();
        assert_eq!((batch.rows.len(), batch.items.len()), (1, 1));
        let first = batch.items[0].0.first.as_ref().unwrap();
        let waited = ends.cache.finish(first.key, None);
        assert_eq!(waited.len(), 1);
        assert_eq!(waited[0].record.position.partition, 1);
        drop(ends);
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
        (0..threads).for_each(|_| starts.recv_timeout(PATIENCE).unwrap());
        let count = 4 * MIN_PARALLEL_RECORDS;
        let (stage, mut ends) = stage(0);
        (0..count).for_each(|_| ends.send(0, "hello"));
        let thread = std::thread::spawn(|| stage.run());
        let mut scored = 0;
        while scored < count {
            scored += ends.receive().items.len();
        }
        drop((ends, release));
        thread.join().unwrap().unwrap();
    }
}
