//! Kafka transactions: outputs and the offsets that they cover become visible together, or not at all.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::Producer;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tracing::debug;

use super::group::CommitGroup;
use super::outage::Outage;
use super::outbox::{CALL_TIMEOUT, Delivered, Outbox, TransactionalProducer};
use crate::kafka::describe;
use crate::kafka::errors::{ErrorClass, reason};
use crate::stream::committed::OffsetMetadata;
use crate::stream::control::{Control, StreamError};
use crate::stream::group::GroupConsumer;
use crate::stream::ownership::Ownership;

/// How long a call may be repeated before the producer is replaced. A cluster needs about ten seconds to replace a broker
/// that dies.
const MAX_CALL_TIME: Duration = Duration::from_secs(15);

/// How long acknowledgements may be missing before the output topics are looked up, and the time between two lookups.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(3);

/// The timeout of such a lookup.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);

/// The reason why a group was not committed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The group holds partitions that this process no longer owns.
    NotOwned,
    /// Outputs were not delivered. The outbox holds which, and why.
    Undelivered,
    /// An output topic does not exist.
    MissingTopic(String),
    /// The transaction must be aborted, and then the outputs can be produced again.
    Abort(String),
    /// The producer can no longer be used.
    Producer {
        reason: String,
        /// The brokers have given the producer's transactional id to another producer, or have ended its transaction.
        is_fenced: bool,
    },
    /// Neither waiting nor another producer can help.
    Fatal(StreamError),
}

impl Failure {
    /// Returns what follows from the error of a call that is not worth repeating.
    pub fn of(doing: &'static str, error: &KafkaError) -> Self {
        let class = ErrorClass::of_error(error);
        let reason = || format!("cannot {doing}: {}", reason(error));
        match error {
            _ if class == ErrorClass::Forbidden => Self::Fatal(StreamError::kafka(doing, error)),
            KafkaError::Transaction(error) if error.txn_requires_abort() => Self::Abort(reason()),
            _ => Self::Producer {
                reason: reason(),
                is_fenced: class == ErrorClass::Fenced,
            },
        }
    }

    /// Returns what follows from the loss of partitions.
    pub fn lost() -> Self {
        Self::Producer {
            reason: "partitions were lost".to_owned(),
            is_fenced: false,
        }
    }

    /// Returns what follows from a call that does not return.
    fn stuck(doing: &'static str) -> Self {
        Self::Producer {
            reason: format!("cannot {doing}: the client library does not return from the call"),
            is_fenced: false,
        }
    }

    /// Returns the error that ends the stream if this failure is final.
    pub fn into_error(self) -> StreamError {
        let doing = "commit outputs";
        match self {
            Self::Fatal(error) => error,
            Self::MissingTopic(topic) => StreamError::MissingTopic { topic },
            Self::NotOwned => StreamError::Kafka {
                doing,
                reason: "partitions are no longer owned".to_owned(),
            },
            Self::Undelivered => StreamError::Kafka {
                doing,
                reason: "outputs were not delivered".to_owned(),
            },
            Self::Abort(reason) | Self::Producer { reason, .. } => StreamError::Kafka { doing, reason },
        }
    }
}

/// Makes the calls of a transaction, and repeats them until their result is known.
pub(super) struct Transaction<'a> {
    pub outbox: &'a Outbox,
    pub consumer: Arc<GroupConsumer>,
    pub control: &'a Control,
    pub outage: &'a mut Outage,
    /// Committed with each offset.
    pub offset_metadata: OffsetMetadata,
}

impl Transaction<'_> {
    /// Fences earlier producers with the same transactional id, and completes or aborts the transactions they left
    /// open. Gives up after a while, or when the stream must stop.
    pub fn initialise(outbox: &Outbox, control: &Control) -> Result<(), Failure> {
        let call = || outbox.call(|producer| producer.init_transactions(CALL_TIMEOUT));
        repeat(None, control, "begin transactions", call, |_| {})
    }

    pub fn begin(outbox: &Outbox) -> Result<(), Failure> {
        match outbox.call(TransactionalProducer::begin_transaction) {
            Some(begun) => begun.map_err(|error| Failure::of("begin a transaction", &error)),
            None => Err(Failure::stuck("begin a transaction")),
        }
    }

    /// Waits until every output that was sent is acknowledged, then adds the offsets of the group to the transaction.
    /// After that, only the call that commits it is left.
    pub fn prepare(
        &mut self,
        topic: &str,
        group: &CommitGroup,
        ownership: &Ownership,
        deadline: Instant,
    ) -> Result<(), Failure> {
        self.await_acknowledgements(deadline)?;
        // The metadata must be read before the checks: if the assignment changes in between, they belong to an earlier
        // generation of the group, and the broker refuses them.
        let metadata = self.consumer.group_metadata();
        if !self.consumer.context().is_same_member(&self.consumer) {
            // The metadata may belong to a new member, whose offsets the broker would accept.
            return Err(Failure::Abort("the group has expelled this process".to_owned()));
        }
        let Some(metadata) = metadata.filter(|_| group.is_owned(ownership)) else {
            return Err(Failure::NotOwned);
        };
        let offsets = offsets_to_commit(topic, group, &self.offset_metadata)
            .map_err(|error| Failure::Fatal(StreamError::kafka("list offsets", &error)))?;
        let arguments = Arc::new((offsets, metadata));
        let call = || {
            let arguments = Arc::clone(&arguments);
            self.outbox
                .call(move |producer| producer.send_offsets_to_transaction(&arguments.0, &arguments.1, CALL_TIMEOUT))
        };
        let note = note_failures(self.outage);
        repeat(Some(deadline), self.control, "add offsets to a transaction", call, note)
    }

    /// Commits the transaction. After any failure, it may be committed or not.
    pub fn commit(&mut self) -> Result<(), Failure> {
        let call = || self.outbox.call(|producer| producer.commit_transaction(CALL_TIMEOUT));
        let note = note_failures(self.outage);
        repeat(None, self.control, "commit a transaction", call, note)
    }

    /// Aborts the transaction, so that none of its messages becomes visible.
    pub fn abort(&mut self) -> Result<(), Failure> {
        let call = || self.outbox.call(|producer| producer.abort_transaction(CALL_TIMEOUT));
        let note = note_failures(self.outage);
        let aborted = repeat(None, self.control, "abort a transaction", call, note);
        if aborted.is_ok() {
            // The abort has purged every message that was not sent, so all reports have arrived or are about to.
            self.outbox.wait(Instant::now() + CALL_TIMEOUT);
        }
        match aborted {
            // An abort that must be aborted is of no use.
            Err(Failure::Abort(reason)) => Err(Failure::Producer {
                reason,
                is_fenced: false,
            }),
            other => other,
        }
    }

    fn await_acknowledgements(&mut self, deadline: Instant) -> Result<(), Failure> {
        let start = Instant::now();
        let mut next_lookup = start + LOOKUP_INTERVAL;
        loop {
            let now = Instant::now();
            match self.outbox.wait(deadline.min(now + CALL_TIMEOUT)) {
                Delivered::All => return Ok(()),
                Delivered::NotAll => return Err(Failure::Undelivered),
                Delivered::Unknown => {}
            }
            let (now, problem) = (Instant::now(), "outputs are not acknowledged");
            if now >= next_lookup {
                next_lookup = now + LOOKUP_INTERVAL;
                if let Some(topic) = missing_topic(&self.consumer, self.outbox) {
                    return Err(Failure::MissingTopic(topic));
                }
            }
            self.outage.note_failure(start, now, problem);
            if now >= deadline || self.control.must_stop(now) {
                return Err(Failure::Abort(problem.to_owned()));
            }
        }
    }
}

/// Returns a function that notes failures which have lasted since now.
fn note_failures(outage: &mut Outage) -> impl FnMut(&str) {
    let start = Instant::now();
    move |problem| outage.note_failure(start, Instant::now(), problem)
}

/// Repeats a call until it succeeds, or fails for a reason that repeating it cannot fix, or takes too long. Each failure
/// that leads to another attempt is passed to `note`.
fn repeat(
    deadline: Option<Instant>,
    control: &Control,
    doing: &'static str,
    call: impl Fn() -> Option<KafkaResult<()>>,
    mut note: impl FnMut(&str),
) -> Result<(), Failure> {
    let last = Instant::now() + MAX_CALL_TIME;
    loop {
        let error = match call() {
            Some(Ok(())) => return Ok(()),
            Some(Err(error)) => error,
            None => return Err(Failure::stuck(doing)),
        };
        let problem = reason(&error);
        let now = Instant::now();
        let is_retriable = matches!(&error, KafkaError::Transaction(error) if error.is_retriable());
        if !is_retriable {
            return Err(Failure::of(doing, &error));
        } else if deadline.is_some_and(|deadline| deadline <= now) {
            return Err(Failure::Abort(format!("cannot {doing} in time: {problem}")));
        } else if last <= now || control.must_stop(now) {
            return Err(Failure::Producer {
                reason: format!("cannot {doing} in time: {problem}"),
                is_fenced: false,
            });
        }
        debug!(reason = problem, "cannot {doing} yet");
        note(&problem);
    }
}

/// Returns an output topic that does not exist, or `None` if both exist or the brokers do not answer.
fn missing_topic(consumer: &GroupConsumer, outbox: &Outbox) -> Option<String> {
    let described = describe::topics(consumer, &outbox.topics(), LOOKUP_TIMEOUT).ok()?;
    let is_missing = |code| ErrorClass::of(code) == ErrorClass::Missing;
    let missing = described
        .into_iter()
        .find(|topic| topic.partitions.is_err_and(is_missing));
    missing.map(|topic| topic.name)
}

/// Lists the offsets of a group for a commit, each with the metadata of its consumer group.
pub(super) fn offsets_to_commit(
    topic: &str,
    group: &CommitGroup,
    metadata: &OffsetMetadata,
) -> KafkaResult<TopicPartitionList> {
    let metadata = metadata.to_text();
    let mut offsets = TopicPartitionList::new();
    for (partition, next) in group.offsets() {
        let mut element = offsets.add_partition(topic, partition);
        element.set_offset(Offset::Offset(next.get()))?;
        if let Some(metadata) = &metadata {
            element.set_metadata(metadata);
        }
    }
    Ok(offsets)
}
