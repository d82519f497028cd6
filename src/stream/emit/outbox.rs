//! Sends outputs through the producer and tracks their acknowledgements.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use rdkafka::statistics::Statistics;
use rdkafka::types::RDKafkaErrorCode;

use super::caller::Caller;
use super::output::{Destination, Output};
use crate::config::{StreamConfig, Topics};
use crate::kafka::client::producer_config;
use crate::kafka::errors::ErrorClass;
use crate::kafka::log;
use crate::kafka::topics::TopicFacts;

/// The timeout of a call of the transactional API. A call that times out is made again and resumes where it was.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(1);

/// How long to wait for such a call to return.
const CALL_LIMIT: Duration = Duration::from_secs(3);

/// How long to wait for more failures after the first one. In a transaction that has failed, the client sends no more
/// messages, but it still receives the answers for those that it has sent.
const MORE_FAILURES: Duration = Duration::from_millis(50);

/// Sends outputs and waits for their acknowledgements.
pub(super) struct Outbox {
    caller: Caller,
    producer: Arc<TransactionalProducer>,
    topics: Topics,
    facts: TopicFacts,
    batch_bytes: usize,
    created: Instant,
}

/// A producer that reports what has become of each output. Without transactions, it has none.
pub(super) type TransactionalProducer = ThreadedProducer<Acknowledgements>;

/// What has become of the messages that were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivered {
    All,
    /// Some messages have failed.
    NotAll,
    /// No message has failed yet, and some are not acknowledged.
    Unknown,
}

/// A message that was not delivered: the number of its output, and the error code.
pub(super) type Undelivered = (usize, RDKafkaErrorCode);

/// Counts the messages that are not acknowledged yet. Updated by the producer's own thread.
///
/// A separate thread has to poll the producer: committing or aborting a transaction flushes it, and the flush waits for
/// delivery reports, which arrive only while the producer is polled.
#[derive(Clone, Default)]
pub(super) struct Acknowledgements(Arc<DeliveryTracker>);

#[derive(Default)]
struct DeliveryTracker {
    state: Mutex<DeliveryState>,
    /// Notified when no message is outstanding, and when one has failed.
    settled: Condvar,
}

#[derive(Default)]
struct DeliveryState {
    outstanding: usize,
    undelivered: Vec<Undelivered>,
}

impl Acknowledgements {
    fn lock(&self) -> MutexGuard<'_, DeliveryState> {
        // A poisoned state is still consistent: nothing between the changes of its two fields can panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientContext for Acknowledgements {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log::line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        log::client_error(&error, reason);
    }

    fn stats(&self, _: Statistics) {}
}

impl ProducerContext for Acknowledgements {
    /// The number of the output.
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, number: usize) {
        let mut state = self.lock();
        state.outstanding -= 1;
        if let Err((error, _)) = result {
            let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
            state.undelivered.push((number, code));
        }
        if state.outstanding == 0 || state.undelivered.len() == 1 {
            self.0.settled.notify_all();
        }
    }
}

impl Outbox {
    /// Creates a producer whose batches of several records have at most `max_batch_bytes`.
    pub fn new(stream: &StreamConfig, facts: TopicFacts, max_batch_bytes: usize) -> KafkaResult<Self> {
        let config = producer_config(stream, max_batch_bytes);
        let batch_bytes = config.get("batch.size").and_then(|size| size.parse().ok());
        Ok(Self {
            caller: Caller::start()?,
            producer: Arc::new(ThreadedProducer::from_config_and_context(
                &config,
                Acknowledgements::default(),
            )?),
            topics: stream.topics.clone(),
            facts,
            batch_bytes: batch_bytes.unwrap_or(max_batch_bytes),
            created: Instant::now(),
        })
    }

    /// Returns how old the producer is.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.created)
    }

    /// Returns why the producer can no longer be used, if it cannot: the code and its description.
    ///
    /// The calls and delivery reports that follow a fatal error often do not name it.
    pub fn fatal_error(&self) -> Option<(RDKafkaErrorCode, String)> {
        self.producer.client().fatal_error()
    }

    /// Returns the maximum size of a batch of several records.
    pub fn batch_bytes(&self) -> usize {
        self.batch_bytes
    }

    /// Returns the names of the topics that outputs are written to.
    pub fn topics(&self) -> [&str; 2] {
        [&self.topics.decisions, &self.topics.dead_letters]
    }

    /// Returns the name of the topic that an output is written to.
    pub fn topic_of(&self, output: &Output) -> &str {
        match output.destination {
            Destination::Decisions => &self.topics.decisions,
            Destination::DeadLetters => &self.topics.dead_letters,
        }
    }

    /// Makes a call of the producer's transactional API, with the timeout [`CALL_TIMEOUT`]. Returns `None` if the call
    /// does not return, after which only another producer can help.
    pub fn call(
        &self,
        call: impl FnOnce(&TransactionalProducer) -> KafkaResult<()> + Send + 'static,
    ) -> Option<KafkaResult<()>> {
        let producer = Arc::clone(&self.producer);
        self.caller.call(CALL_LIMIT, move || call(&producer))
    }

    /// Sends an output. Waits for room in the producer's queue until `deadline`.
    pub fn send(&self, output: &Output, deadline: Instant) -> KafkaResult<()> {
        let topic = self.topic_of(output);
        let partitions = match output.destination {
            Destination::Decisions => self.facts.decisions,
            Destination::DeadLetters => self.facts.dead_letters,
        };
        let mut record: BaseRecord<'_, [u8], [u8], usize> =
            BaseRecord::with_opaque_to(topic, output.number).headers(output.headers());
        record.key = output.record.key.as_deref();
        record.payload = output.payload();
        // The comments topic may have grown since the start. Outputs of the partitions that only it has go by their key.
        let partition = output.record.position.partition;
        if partitions == self.facts.comments && partition < partitions {
            record.partition = Some(partition);
        }
        let acknowledgements = self.acknowledgements();
        loop {
            acknowledgements.lock().outstanding += 1;
            match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((error, refused)) => {
                    acknowledgements.lock().outstanding -= 1;
                    let is_full = ErrorClass::of_error(&error) == ErrorClass::QueueFull;
                    if !is_full || Instant::now() >= deadline {
                        return Err(error);
                    }
                    record = refused;
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }

    /// Waits until every message is acknowledged, one has failed, or the deadline passes. After a failure, it waits a
    /// moment longer for others.
    pub fn wait(&self, deadline: Instant) -> Delivered {
        let wait = |deadline: Instant, is_settled: fn(&DeliveryState) -> bool| {
            let acknowledgements = self.acknowledgements();
            let timeout = deadline.saturating_duration_since(Instant::now());
            let settled = &acknowledgements.0.settled;
            let waited = settled.wait_timeout_while(acknowledgements.lock(), timeout, |state| !is_settled(state));
            let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            (state.outstanding == 0, !state.undelivered.is_empty())
        };
        match wait(deadline, |state| {
            state.outstanding == 0 || !state.undelivered.is_empty()
        }) {
            (_, true) => {
                wait(Instant::now() + MORE_FAILURES, |state| state.outstanding == 0);
                Delivered::NotAll
            }
            (true, false) => Delivered::All,
            (false, false) => Delivered::Unknown,
        }
    }

    /// Takes the messages that have failed since the last call.
    pub fn take_undelivered(&self) -> Vec<Undelivered> {
        std::mem::take(&mut self.acknowledgements().lock().undelivered)
    }

    fn acknowledgements(&self) -> &Acknowledgements {
        self.producer.context()
    }
}
