//! The producer, and which of its messages are acknowledged.

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
use crate::kafka::topics::Partitions;
use crate::stream::control::StreamError;

/// Sends outputs and waits for their acknowledgements.
pub(super) struct Outbox {
    producer: ThreadedProducer<Acknowledgements>,
    topics: Topics,
    partitions: Partitions,
}

/// A message that was not delivered: its output's number, and why.
pub(super) type Undelivered = (usize, RDKafkaErrorCode);

/// Counts messages on their way. Written by the producer's own thread.
///
/// The producer must be polled by another thread than the one that commits: a flush inside of commit
/// or abort waits for reports that only polling hands out.
#[derive(Clone, Default)]
pub(super) struct Acknowledgements(Arc<Shared>);

#[derive(Default)]
struct Shared {
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
        // Two plain fields; nothing between their changes can panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientContext for Acknowledgements {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log::line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        log::condition(&error, reason);
    }

    fn stats(&self, _: Statistics) {}
}

impl ProducerContext for Acknowledgements {
    /// The output's number.
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
    pub fn new(stream: &StreamConfig, partitions: Partitions) -> KafkaResult<Self> {
        let config = config(stream, Role::Producer);
        Ok(Self {
            producer: ThreadedProducer::from_config_and_context(&config, Acknowledgements::default())?,
            topics: stream.topics.clone(),
            partitions,
        })
    }

    /// The producer, for its transactions.
    pub fn producer(&self) -> &impl Producer<Acknowledgements> {
        &self.producer
    }

    /// Hands an output to the producer; waits for room in its queue until `deadline`.
    pub fn send(&self, output: &Output, deadline: Instant) -> KafkaResult<()> {
        let (topic, partitions) = match output.destination {
            Destination::Decisions => (&self.topics.decisions, self.partitions.decisions),
            Destination::DeadLetters => (&self.topics.dead_letters, self.partitions.dead_letters),
        };
        let mut record: BaseRecord<'_, [u8], [u8], usize> =
            BaseRecord::with_opaque_to(topic, output.number).headers(output.headers());
        record.key = output.record.key.as_deref();
        record.payload = output.payload();
        record.timestamp = output.timestamp();
        if partitions == self.partitions.comments {
            record.partition = Some(output.record.position.partition);
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

    /// Waits until nothing is on its way; false when something still is at the deadline.
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

    /// Why a message was not delivered, if any was not.
    pub fn refusal(&self) -> Option<String> {
        let state = self.acknowledgements().lock();
        let refused = state.undelivered.first();
        refused.map(|&(_, code)| reason_of_code(code))
    }

    /// Takes the messages that were not delivered since the last call.
    pub fn undelivered(&self) -> Vec<Undelivered> {
        std::mem::take(&mut self.acknowledgements().lock().undelivered)
    }

    fn acknowledgements(&self) -> &Acknowledgements {
        self.producer.context()
    }
}

/// Returns the error that ends the stream if an output was refused for lack of permission or of its topic.
pub(super) fn forbidden(undelivered: &[Undelivered]) -> Option<StreamError> {
    let is_forbidden = |code| matches!(ErrorClass::of(code), ErrorClass::Forbidden | ErrorClass::Missing);
    let &(_, code) = undelivered.iter().find(|&&(_, code)| is_forbidden(code))?;
    Some(StreamError::kafka(
        "write an output",
        &KafkaError::MessageProduction(code),
    ))
}
