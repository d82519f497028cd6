//! `run`, put together: the stages, the channels between them, and their end.
//!
//! ```text
//! ingest ─► encode ─► score ─► emit
//!    ▲        └─────────────────▲        what needs no model
//!    └── rebalance: commands ───┘
//! ```
//!
//! Four threads, one a stage. A stage ends when the one before it has ended and its channel is empty, so
//! a drain goes from upstream to downstream; when a stage fails, all end.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::{Builder, JoinHandle};
use std::time::{Instant, SystemTime};

use crossbeam_channel::{Receiver, bounded};
use metrics::gauge;
use rdkafka::config::FromClientConfigAndContext;
use tracing::info;

use super::batch::Limits;
use super::emit::{EmitStage, OutputProducer};
use super::encode::EncodeStage;
use super::group::{GroupConsumer, Membership};
use super::ingest::IngestStage;
use crate::config::{BatchConfig, InputConfig, LimitsConfig, StreamConfig};
use crate::decide::CurrentJudge;
use crate::kafka::client::{Role, Timeouts, config};
use crate::kafka::topics::Partitions;
use crate::ops::health::Health;
use crate::ops::metrics as names;
use crate::prompt::Prompter;

use super::committed::CommittedOffsets;
use super::control::{Control, StreamError};
use super::in_flight::InFlight;
use super::ownership::Ownership;
use super::record::Record;
use super::score::{Replacement, ScoreStage};
use crate::scorer::{Row, Scorer};

/// Micro-batches between two stages: one that waits while one is worked on.
const PREPARED_BATCHES: usize = 1;

/// Rebalance events that may wait for the emitter: several for each of many partitions.
const REBALANCES: usize = 1024;

/// The settings of a stream.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Brokers, topics, group, delivery.
    pub stream: StreamConfig,
    /// Partitions of the topics, as the brokers have them.
    pub partitions: Partitions,
    /// How an event is read.
    pub input: InputConfig,
    /// What a micro-batch is bounded by.
    pub batch: BatchConfig,
    /// What may be in flight.
    pub limits: LimitsConfig,
}

/// The model side of a stream: what scores, and what belongs to it.
pub struct Model {
    /// What scores.
    pub scorer: Box<dyn Scorer>,
    /// Rows that it has scored before.
    pub canary: Vec<Row>,
    /// How a comment is framed.
    pub prompter: Arc<Prompter>,
    /// Policy, calibration and identity; may be replaced while the stream runs.
    pub judge: Arc<CurrentJudge>,
    /// Where another scorer may come from while the stream runs; a channel without a sender for none.
    pub swap: Receiver<Replacement>,
}

/// A running stream.
pub struct Pipeline {
    control: Arc<Control>,
    ownership: Arc<Ownership>,
    threads: Vec<JoinHandle<()>>,
}

impl Pipeline {
    /// Starts the stages and joins the group.
    ///
    /// # Errors
    /// What Kafka refuses: the clients, or the transactional id.
    pub fn start(settings: &Settings, model: Model, health: &Arc<Health>) -> Result<Self, StreamError> {
        let control = Arc::new(Control::default());
        let ownership = Arc::new(Ownership::default());
        let committed = Arc::new(CommittedOffsets::default());
        let in_flight = Arc::new(InFlight::new(settings.limits.events, settings.limits.bytes));
        let stream = &settings.stream;
        let topic = &stream.topics.comments;

        // Room for all that may be in flight, so that the thread that polls never waits.
        let (record, records) = bounded(settings.limits.events + 1);
        let (batch, batches) = bounded(PREPARED_BATCHES);
        let (done, finished) = bounded(PREPARED_BATCHES);
        let (rebalance, rebalances) = bounded(REBALANCES);
        let (emit_ended, emitted) = bounded(0);

        let membership = Membership {
            topic: topic.clone(),
            start: stream.start,
            on_gap: stream.on_gap,
            timeouts: Timeouts::of(&stream.properties),
            ownership: Arc::clone(&ownership),
            committed: Arc::clone(&committed),
            control: Arc::clone(&control),
            rebalances: rebalance,
            paused: AtomicBool::new(false),
        };
        let consumer = GroupConsumer::from_config_and_context(&config(stream, Role::Consumer), membership)
            .map_err(|error| StreamError::Client(error.to_string()))?;
        let consumer = Arc::new(consumer);
        let ingest = IngestStage {
            consumer: Arc::clone(&consumer),
            topic: topic.clone(),
            ownership: Arc::clone(&ownership),
            in_flight: Arc::clone(&in_flight),
            control: Arc::clone(&control),
            tick: Box::new(report_queues(in_flight, records.clone())),
            records: record,
            emitted,
        };
        let encode = EncodeStage {
            input: settings.input.clone(),
            prompter: model.prompter,
            ownership: Arc::clone(&ownership),
            control: Arc::clone(&control),
            limits: Limits {
                max_tokens: settings.batch.max_tokens,
                linger: settings.batch.linger,
            },
            records,
            batches: batch,
            finished: done.clone(),
        };
        let score = ScoreStage {
            scorer: model.scorer,
            canary: model.canary,
            judge: model.judge,
            swap: model.swap,
            health: Arc::clone(health),
            control: Arc::clone(&control),
            batches,
            finished: done,
        };
        let emit = EmitStage {
            producer: OutputProducer::connect(stream, settings.partitions)?,
            consumer,
            ownership: Arc::clone(&ownership),
            committed,
            control: Arc::clone(&control),
            finished,
            rebalances,
            ended: emit_ended,
        };

        let mut pipeline = Self {
            control,
            ownership,
            threads: Vec::new(),
        };
        // From the last to the first, so that each stage finds its reader at work.
        pipeline.spawn("emit", move || emit.run());
        pipeline.spawn("score", move || score.run());
        pipeline.spawn("encode", move || encode.run());
        pipeline.spawn("ingest", move || ingest.run());
        Ok(pipeline)
    }

    fn spawn(&mut self, stage: &'static str, run: impl FnOnce() -> Result<(), StreamError> + Send + 'static) {
        let control = Arc::clone(&self.control);
        let guarded = move || {
            let guard = PanicGuard {
                stage,
                control: &control,
            };
            let ended = run();
            std::mem::forget(guard);
            if let Err(error) = ended {
                control.fail(error);
            }
        };
        match Builder::new().name(stage.to_owned()).spawn(guarded) {
            Ok(thread) => self.threads.push(thread),
            Err(_) => self.control.fail(StreamError::Died { stage }),
        }
    }

    /// Reads nothing more, and gives what is in flight until `deadline` to finish.
    pub fn drain(&self, deadline: Instant) {
        info!("draining");
        self.control.drain(deadline);
    }

    /// Whether any partition is ours.
    pub fn is_assigned(&self) -> bool {
        !self.ownership.partitions().is_empty()
    }

    /// Whether the stream is on its way to the end.
    pub fn is_ending(&self) -> bool {
        self.control.is_ending()
    }

    /// Whether every stage has ended.
    pub fn has_ended(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Waits for every stage.
    ///
    /// # Errors
    /// What ended the stream, unless it was a drain.
    pub fn join(self) -> Result<(), StreamError> {
        for thread in self.threads {
            // A panic has been noted by the thread's guard.
            drop(thread.join());
        }
        let failure = Arc::into_inner(self.control).and_then(Control::into_failure);
        failure.map_or(Ok(()), Err)
    }
}

/// Fails the stream when its stage panics.
struct PanicGuard<'a> {
    stage: &'static str,
    control: &'a Control,
}

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        self.control.fail(StreamError::Died { stage: self.stage });
    }
}

/// What is told of the queues every second.
fn report_queues(in_flight: Arc<InFlight>, records: Receiver<Record>) -> impl Fn() {
    move || {
        let (events, bytes) = in_flight.load();
        gauge!(names::QUEUE_EVENTS, "queue" => "in_flight").set(events as f64);
        gauge!(names::QUEUE_BYTES, "queue" => "in_flight").set(bytes as f64);
        gauge!(names::QUEUE_EVENTS, "queue" => "read").set(records.len() as f64);
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0.0, |now| now.as_secs_f64());
        let age = in_flight
            .oldest()
            .map_or(0.0, |oldest| (now - oldest as f64 / 1e3).max(0.0));
        gauge!(names::OLDEST_UNFINISHED).set(age);
    }
}
