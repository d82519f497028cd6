//! Builds the four stages, joins them with channels, and ends them in order.
//!
//! ```text
//! ingest ─► encode ─► score ─► emit
//!    │        └─────────────────▲        records that need no model
//!    └── changes of assignment ─┘
//! ```
//!
//! Each stage is a thread. A stage ends when the one before it has ended and its channel is empty, so a drain runs from
//! upstream to downstream. When a stage fails, all of them end.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use crossbeam_channel::{Receiver, bounded};
use rdkafka::config::FromClientConfigAndContext;
use tracing::info;

use super::batch::{Limits, MicroBatch};
use super::cache::ScoreCache;
use super::committed::CommittedOffsets;
use super::control::{Control, StreamError};
use super::emit::{EmitStage, OutputProducer};
use super::encode::{EncodeStage, RecordEncoder};
use super::group::{GroupConsumer, Membership, SharedConsumer};
use super::in_flight::InFlight;
use super::ingest::IngestStage;
use super::ownership::Ownership;
use super::score::{Lanes, Replacement, ScoreRequest, ScoreStage};
use super::status::{ClientStatus, StreamMonitor};
use crate::config::{BatchConfig, CacheConfig, InputConfig, LimitsConfig, StreamConfig};
use crate::decide::CurrentJudge;
use crate::kafka::client::{Role, Timeouts, client_id, config};
use crate::kafka::topics::TopicFacts;
use crate::ops::health::Health;
use crate::prompt::Prompter;
use crate::scorer::{Row, Scorer};

/// Capacity of the channel to the score stage. A micro-batch is handed over only when that stage waits for one, so that
/// until then it fills up: otherwise, the first comment that arrives while the scorer is busy would be a batch of its own.
const BATCH_CAPACITY: usize = 0;

/// Capacity of the channel to the emit stage, in micro-batches. The scorer does not wait for a commit unless it takes
/// longer than this many. The limits on what is in flight bound the records in the channel.
const FINISHED_CAPACITY: usize = 32;

/// Capacity of the channel from the rebalance callback to the emit stage: several messages for each of many partitions.
const REBALANCE_CAPACITY: usize = 1024;

/// The settings of a stream.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Brokers, topics, consumer group and delivery guarantee.
    pub stream: StreamConfig,
    /// What the brokers reported about the topics.
    pub topics: TopicFacts,
    /// Where to find the fields of an event, and its largest size.
    pub input: InputConfig,
    /// The limits of a micro-batch.
    pub batch: BatchConfig,
    /// The cache of margins.
    pub cache: CacheConfig,
    /// How many records and bytes may be in flight.
    pub limits: LimitsConfig,
}

/// The model side of a stream: the scorer with everything that belongs to it.
pub struct Model {
    /// Computes the margins of rows.
    pub scorer: Box<dyn Scorer>,
    /// Rows that the scorer is known to be able to score.
    pub canary: Vec<Row>,
    /// Turns comments into rows.
    pub prompter: Arc<Prompter>,
    /// The policy, calibration and model identity; the model's part changes when the scorer is replaced.
    pub judge: Arc<CurrentJudge>,
    /// Delivers new scorers while the stream runs; may be a channel without a sender.
    pub swap: Receiver<Replacement>,
}

/// Texts from outside the stream, which its scorer also scores.
pub(crate) struct RequestLane {
    /// From whoever gathers the texts. No more come when it is closed.
    pub batches: Receiver<MicroBatch<ScoreRequest>>,
    /// The share of the device for them while the stream has work as well, between 0 and 1.
    pub share: f64,
    /// The margins of recent texts, which both share.
    pub cache: Arc<ScoreCache>,
}

/// A running stream: its stages' threads, and the state that controls them.
pub struct Pipeline {
    control: Arc<Control>,
    ownership: Arc<Ownership>,
    threads: Vec<JoinHandle<()>>,
}

impl Pipeline {
    /// Starts the stages and joins the consumer group. From then on, `health` also judges the stream.
    ///
    /// # Errors
    /// Returns an error if a Kafka client cannot be created, or if transactions cannot be initialised.
    pub fn start(settings: &Settings, model: Model, health: &Arc<Health>) -> Result<Self, StreamError> {
        Self::start_with_requests(settings, model, health, None)
    }

    /// Starts only the scorer, for the texts of requests, and ends when no more come.
    pub(crate) fn start_without_stream(model: Model, health: &Arc<Health>, requests: RequestLane) -> Self {
        let control = Arc::new(Control::default());
        let score = ScoreStage {
            lanes: Lanes::of_requests(requests.batches),
            // Nothing is sent, because no comment comes from a stream.
            finished: bounded(0).0,
            scorer: model.scorer,
            canary: model.canary,
            judge: model.judge,
            cache: requests.cache,
            swap: model.swap,
            health: Arc::clone(health),
            control: Arc::clone(&control),
        };
        let mut pipeline = Self {
            control,
            ownership: Arc::default(),
            threads: Vec::new(),
        };
        pipeline.spawn("score", move || score.run());
        pipeline
    }

    /// Starts the stages as [`Pipeline::start`] does, and scores texts of requests beside the stream.
    ///
    /// # Errors
    /// Fails like [`Pipeline::start`].
    pub(crate) fn start_with_requests(
        settings: &Settings,
        model: Model,
        health: &Arc<Health>,
        requests: Option<RequestLane>,
    ) -> Result<Self, StreamError> {
        let control = Arc::new(Control::default());
        let ownership = Arc::new(Ownership::default());
        let committed = Arc::new(CommittedOffsets::default());
        let in_flight = Arc::new(InFlight::new(settings.limits.events, settings.limits.bytes));
        let client = Arc::new(ClientStatus::default());
        let cache = match &requests {
            Some(requests) => Arc::clone(&requests.cache),
            None => Arc::new(ScoreCache::new(settings.cache.entries, Arc::clone(&model.judge))),
        };
        let requests = requests.map(|requests| (requests.batches, requests.share));
        let stream = &settings.stream;
        let topic = &stream.topics.comments;

        // This channel has room for all records that may be in flight, so that the thread that polls never waits.
        let (record, records) = bounded(settings.limits.events + 1);
        let (batch, batches) = bounded(BATCH_CAPACITY);
        let (done, finished) = bounded(FINISHED_CAPACITY);
        let (rebalance, rebalances) = bounded(REBALANCE_CAPACITY);
        let (ended, emit_ended) = bounded(0);

        let new_membership = {
            let (stream, has_topic_ids) = (stream.clone(), settings.topics.has_topic_ids);
            let (ownership, committed) = (Arc::clone(&ownership), Arc::clone(&committed));
            let (client, control) = (Arc::clone(&client), Arc::clone(&control));
            move || Membership {
                topic: stream.topics.comments.clone(),
                group: stream.group.clone(),
                client_id: client_id(&stream),
                start: stream.start,
                on_gap: stream.on_gap,
                has_topic_ids,
                timeouts: Timeouts::of(&stream.properties),
                ownership: Arc::clone(&ownership),
                committed: Arc::clone(&committed),
                client: Arc::clone(&client),
                control: Arc::clone(&control),
                rebalances: rebalance.clone(),
                member_id: Mutex::new(None),
                must_rejoin: AtomicBool::new(false),
                is_paused: AtomicBool::new(false),
            }
        };
        let consumer_config = config(stream, Role::Consumer);
        let new_consumer = move || GroupConsumer::from_config_and_context(&consumer_config, new_membership());
        let consumer =
            SharedConsumer::new(Box::new(new_consumer)).map_err(|error| StreamError::Client(error.to_string()))?;
        let consumer = Arc::new(consumer);
        let monitor = StreamMonitor {
            ownership: Arc::clone(&ownership),
            committed: Arc::clone(&committed),
            in_flight: Arc::clone(&in_flight),
            client,
            records: records.clone(),
        };
        let ingest = IngestStage {
            consumer: Arc::clone(&consumer),
            topic: topic.clone(),
            ownership: Arc::clone(&ownership),
            in_flight: Arc::clone(&in_flight),
            control: Arc::clone(&control),
            records: record,
            emit_ended,
        };
        let encode = EncodeStage {
            encoder: RecordEncoder {
                input: settings.input.clone(),
                prompter: model.prompter,
                cache: Arc::clone(&cache),
            },
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
            cache,
            swap: model.swap,
            health: Arc::clone(health),
            control: Arc::clone(&control),
            lanes: Lanes::of_stream(batches, requests),
            finished: done,
        };
        let emit = EmitStage {
            producer: OutputProducer::connect(stream, settings.topics, &control)?,
            consumer,
            ownership: Arc::clone(&ownership),
            in_flight,
            committed,
            control: Arc::clone(&control),
            finished,
            rebalances,
            ended,
        };

        let mut pipeline = Self {
            control,
            ownership,
            threads: Vec::new(),
        };
        health.watch(move || monitor.work());
        // The stages start from the last to the first, so that each one's output is already being read.
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

    /// Stops reading, and gives the records in flight until `deadline` to finish.
    pub fn drain(&self, deadline: Instant) {
        info!("draining");
        self.control.drain(deadline);
    }

    /// Returns whether this process owns any partition.
    pub fn is_assigned(&self) -> bool {
        !self.ownership.partitions().is_empty()
    }

    /// Returns whether the stream is draining or has failed.
    pub fn is_ending(&self) -> bool {
        self.control.is_ending()
    }

    /// Returns whether every stage has ended.
    pub fn has_ended(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Waits until every stage has ended.
    ///
    /// # Errors
    /// Returns the first failure, if the stream ended for any reason other than a drain.
    pub fn join(self) -> Result<(), StreamError> {
        for thread in self.threads {
            // The thread's guard has already reported a panic.
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
