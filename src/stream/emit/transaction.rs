//! Kafka transactions: outputs and the offsets that they cover become visible together, or not at all.

use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::Producer;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tracing::warn;

use super::group::CommitGroup;
use super::outbox::{Outbox, Undelivered, permanent_failure};
use crate::kafka::errors::{reason, reason_of_code};
use crate::stream::committed::OffsetMetadata;
use crate::stream::control::{Control, StreamError};
use crate::stream::group::GroupConsumer;
use crate::stream::ownership::Ownership;

/// The timeout of one call. A call that times out is made again and resumes where it was.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest wait for the transaction coordinator at the start.
const INIT_TIMEOUT: Duration = Duration::from_secs(60);

/// The reason why a transaction was not committed.
#[derive(Debug)]
pub(super) enum TransactionError {
    /// The transaction must be aborted, after which its outputs can be produced again.
    Abort {
        reason: String,
        /// The messages that failed.
        undelivered: Vec<Undelivered>,
    },
    /// The producer can no longer be used.
    Fatal(StreamError),
}

/// Makes the calls of a transaction, and repeats them until their result is known.
pub(super) struct Transaction<'a> {
    pub outbox: &'a Outbox,
    pub consumer: &'a GroupConsumer,
    pub control: &'a Control,
    /// Committed with each offset.
    pub offset_metadata: OffsetMetadata,
}

impl Transaction<'_> {
    /// Fences earlier producers with the same transactional id, and completes or aborts the transactions they left
    /// open.
    pub fn initialise(outbox: &Outbox) -> Result<(), StreamError> {
        let deadline = Instant::now() + INIT_TIMEOUT;
        loop {
            match outbox.producer().init_transactions(CALL_TIMEOUT) {
                Ok(()) => return Ok(()),
                Err(error) if is_retriable(&error) && Instant::now() < deadline => {
                    warn!(reason = reason(&error), "cannot begin transactions yet");
                }
                Err(error) => return Err(StreamError::kafka("begin transactions", &error)),
            }
        }
    }

    pub fn begin(&self) -> Result<(), StreamError> {
        let begun = self.outbox.producer().begin_transaction();
        begun.map_err(|error| StreamError::kafka("begin a transaction", &error))
    }

    /// Commits the messages that were sent, together with the offsets of the group.
    pub fn commit(
        &self,
        topic: &str,
        group: &CommitGroup,
        ownership: &Ownership,
        deadline: Instant,
    ) -> Result<(), TransactionError> {
        let abort = |reason: String| TransactionError::Abort {
            reason,
            undelivered: Vec::new(),
        };
        if !self.outbox.wait(deadline) {
            return Err(abort("messages are not acknowledged yet".to_owned()));
        }
        let undelivered = self.outbox.take_undelivered();
        if let Some(error) = permanent_failure(&undelivered) {
            return Err(TransactionError::Fatal(error));
        }
        if let Some(&(_, code)) = undelivered.first() {
            return Err(TransactionError::Abort {
                reason: reason_of_code(code),
                undelivered,
            });
        }
        // The metadata must be read before the check: if the assignment changes in between, they belong to an earlier
        // generation of the group, and the broker refuses them.
        let metadata = self.consumer.group_metadata();
        let Some(metadata) = metadata.filter(|_| group.is_owned(ownership)) else {
            return Err(abort("partitions are no longer owned".to_owned()));
        };
        let offsets = offsets_to_commit(topic, group, &self.offset_metadata)
            .map_err(|error| TransactionError::Fatal(StreamError::kafka("list offsets", &error)))?;
        self.retry(Some(deadline), "add offsets to a transaction", || {
            self.outbox
                .producer()
                .send_offsets_to_transaction(&offsets, &metadata, CALL_TIMEOUT)
        })?;
        // From here on the transaction may be committed, so the call is repeated until its result is known.
        self.retry(None, "commit a transaction", || {
            self.outbox.producer().commit_transaction(CALL_TIMEOUT)
        })
    }

    /// Aborts the transaction, so that none of its messages becomes visible.
    pub fn abort(&self) -> Result<(), StreamError> {
        let aborted = self.retry(None, "abort a transaction", || {
            self.outbox.producer().abort_transaction(CALL_TIMEOUT)
        });
        // Discards the reports of the messages that the abort has purged.
        self.outbox.wait(Instant::now() + CALL_TIMEOUT);
        drop(self.outbox.take_undelivered());
        match aborted {
            Ok(()) => Ok(()),
            Err(TransactionError::Fatal(error)) => Err(error),
            Err(TransactionError::Abort { reason, .. }) => Err(StreamError::Kafka {
                doing: "abort a transaction",
                reason,
            }),
        }
    }

    /// Repeats a call until it succeeds or fails for a reason that retrying cannot fix.
    ///
    /// A call with a deadline that passes fails with [`TransactionError::Abort`].
    fn retry(
        &self,
        deadline: Option<Instant>,
        doing: &'static str,
        call: impl Fn() -> KafkaResult<()>,
    ) -> Result<(), TransactionError> {
        loop {
            let error = match call() {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let now = Instant::now();
            if requires_abort(&error) {
                return Err(TransactionError::Abort {
                    reason: format!("cannot {doing}: {}", reason(&error)),
                    undelivered: Vec::new(),
                });
            } else if !is_retriable(&error) || self.control.must_stop(now) {
                return Err(TransactionError::Fatal(StreamError::kafka(doing, &error)));
            } else if deadline.is_some_and(|deadline| deadline <= now) {
                return Err(TransactionError::Abort {
                    reason: format!("cannot {doing} in time: {}", reason(&error)),
                    undelivered: Vec::new(),
                });
            }
            warn!(reason = reason(&error), "cannot {doing} yet");
        }
    }
}

fn requires_abort(error: &KafkaError) -> bool {
    matches!(error, KafkaError::Transaction(error) if error.txn_requires_abort())
}

fn is_retriable(error: &KafkaError) -> bool {
    matches!(error, KafkaError::Transaction(error) if error.is_retriable())
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
