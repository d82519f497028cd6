//! Sends outputs through the producer and tracks their acknowledgements.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use rdkafka::statistics::Statistics;
use rdkafka::types::RDKafkaErrorCode;

use super::output::{Destination, Output};
use crate::config::{StreamConfig, Topics};
use crate::kafka::client::{Role, config};
use crate::kafka::errors::{ErrorClass, reason_of_code};
use crate::kafka::log;
use crate::kafka::topics::PartitionCounts;
use crate::stream::control::StreamError;

/// Sends outputs and waits for their acknowledgements.
pub(super) struct Outbox {
    producer: ThreadedProducer<Acknowledgements>,
    topics: Topics,
    partitions: PartitionCounts,
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
    none_outstanding: Condvar,
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
        if state.outstanding == 0 {
            self.0.none_outstanding.notify_all();
        }
    }
}

impl Outbox {
    pub fn new(stream: &StreamConfig, partitions: PartitionCounts) -> KafkaResult<Self> {
        let config = config(stream, Role::Producer);
        Ok(Self {
            producer: ThreadedProducer::from_config_and_context(&config, Acknowledgements::default())?,
            topics: stream.topics.clone(),
            partitions,
        })
    }

    /// Returns the producer, for its transactions.
    pub fn producer(&self) -> &impl Producer<Acknowledgements> {
        &self.producer
    }

    /// Sends an output. Waits for room in the producer's queue until `deadline`.
    pub fn send(&self, output: &Output, deadline: Instant) -> KafkaResult<()> {
        let (topic, partitions) = match output.destination {
            Destination::Decisions => (&self.topics.decisions, self.partitions.decisions),
            Destination::DeadLetters => (&self.topics.dead_letters, self.partitions.dead_letters),
        };
        let mut record: BaseRecord<'_, [u8], [u8], usize> =
            BaseRecord::with_opaque_to(topic, output.number).headers(output.headers());
        record.key = output.record.key.as_deref();
        record.payload = output.payload();
        // The comments topic may have grown since the start. Outputs of the partitions that only it has go by their key.
        let partition = output.record.position.partition;
        if partitions == self.partitions.comments && partition < partitions {
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

    /// Waits until every message is acknowledged or has failed. Returns false if the deadline passes first.
    pub fn wait(&self, deadline: Instant) -> bool {
        let acknowledgements = self.acknowledgements();
        let timeout = deadline.saturating_duration_since(Instant::now());
        let waited =
            acknowledgements
                .0
                .none_outstanding
                .wait_timeout_while(acknowledgements.lock(), timeout, |state| state.outstanding > 0);
        let (_state, result) = waited.unwrap_or_else(PoisonError::into_inner);
        !result.timed_out()
    }

    /// Returns the reason why the first undelivered message failed, if any has failed.
    pub fn first_failure(&self) -> Option<String> {
        let state = self.acknowledgements().lock();
        state.undelivered.first().map(|&(_, code)| reason_of_code(code))
    }

    /// Takes the messages that have failed since the last call.
    pub fn take_undelivered(&self) -> Vec<Undelivered> {
        std::mem::take(&mut self.acknowledgements().lock().undelivered)
    }

    fn acknowledgements(&self) -> &Acknowledgements {
        self.producer.context()
    }
}

/// Returns the error that ends the stream if an output failed because access is denied or its topic does not exist.
pub(super) fn permanent_failure(undelivered: &[Undelivered]) -> Option<StreamError> {
    let is_permanent = |code| matches!(ErrorClass::of(code), ErrorClass::Forbidden | ErrorClass::Missing);
    let &(_, code) = undelivered.iter().find(|&&(_, code)| is_permanent(code))?;
    Some(StreamError::kafka(
        "write an output",
        &KafkaError::MessageProduction(code),
    ))
}
