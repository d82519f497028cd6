//! One Kafka transaction at a time: outputs and the offsets that they cover, all or nothing.

use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::Producer;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tracing::warn;

use super::group::CommitGroup;
use super::outbox::{Outbox, Undelivered, forbidden};
use crate::kafka::errors::{reason, reason_of_code};
use crate::stream::control::{Control, StreamError};
use crate::stream::group::GroupConsumer;
use crate::stream::ownership::Ownership;

/// One call; a call that times out is made again and goes on where it was.
const CALL: Duration = Duration::from_secs(5);

/// Longest wait for the coordinator at the start.
const START: Duration = Duration::from_secs(60);

/// Why a transaction was not committed.
#[derive(Debug)]
pub(super) enum Failed {
    /// It must be aborted and can be produced again.
    Abort {
        reason: String,
        /// What the broker refused.
        undelivered: Vec<Undelivered>,
    },
    /// The producer cannot go on.
    Fatal(StreamError),
}

/// The transaction of an [`Outbox`].
pub(super) struct Transaction<'a> {
    pub outbox: &'a Outbox,
    pub consumer: &'a GroupConsumer,
    pub control: &'a Control,
}

impl Transaction<'_> {
    /// Fences earlier producers of the same id and settles what they left open.
    pub fn initialise(outbox: &Outbox) -> Result<(), StreamError> {
        let deadline = Instant::now() + START;
        loop {
            match outbox.producer().init_transactions(CALL) {
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

    /// Commits what was sent, with its offsets.
    pub fn commit(
        &self,
        topic: &str,
        group: &CommitGroup,
        ownership: &Ownership,
        deadline: Instant,
    ) -> Result<(), Failed> {
        let abort = |reason: String| Failed::Abort {
            reason,
            undelivered: Vec::new(),
        };
        if !self.outbox.wait(deadline) {
            return Err(abort("deliveries are outstanding".to_owned()));
        }
        let undelivered = self.outbox.undelivered();
        if let Some(error) = forbidden(&undelivered) {
            return Err(Failed::Fatal(error));
        }
        if let Some(&(_, code)) = undelivered.first() {
            return Err(Failed::Abort {
                reason: reason_of_code(code),
                undelivered,
            });
        }
        // Read before the check: should the assignment change after it, these are the metadata of a
        // generation that is over, and the broker refuses them.
        let metadata = self.consumer.group_metadata();
        let Some(metadata) = metadata.filter(|_| group.is_owned(ownership)) else {
            return Err(abort("partitions have left".to_owned()));
        };
        let mut offsets = TopicPartitionList::new();
        for (partition, next) in group.offsets() {
            let added = offsets.add_partition_offset(topic, partition, Offset::Offset(next.get()));
            added.map_err(|error| Failed::Fatal(StreamError::kafka("list offsets", &error)))?;
        }
        self.until(Some(deadline), "add offsets to a transaction", || {
            self.outbox
                .producer()
                .send_offsets_to_transaction(&offsets, &metadata, CALL)
        })?;
        // From here on the broker decides: the call is made until its answer is known.
        self.until(None, "commit a transaction", || {
            self.outbox.producer().commit_transaction(CALL)
        })
    }

    /// Aborts what was sent; nobody will see it.
    pub fn abort(&self) -> Result<(), StreamError> {
        let aborted = self.until(None, "abort a transaction", || {
            self.outbox.producer().abort_transaction(CALL)
        });
        // Reports of what was purged.
        self.outbox.wait(Instant::now() + CALL);
        drop(self.outbox.undelivered());
        match aborted {
            Ok(()) => Ok(()),
            Err(Failed::Fatal(error)) => Err(error),
            Err(Failed::Abort { reason, .. }) => Err(StreamError::Kafka {
                doing: "abort a transaction",
                reason,
            }),
        }
    }

    fn until(
        &self,
        deadline: Option<Instant>,
        doing: &'static str,
        call: impl Fn() -> KafkaResult<()>,
    ) -> Result<(), Failed> {
        loop {
            let error = match call() {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let now = Instant::now();
            if requires_abort(&error) {
                return Err(Failed::Abort {
                    reason: format!("cannot {doing}: {}", reason(&error)),
                    undelivered: Vec::new(),
                });
            } else if !is_retriable(&error) || self.control.gives_up(now) {
                return Err(Failed::Fatal(StreamError::kafka(doing, &error)));
            } else if deadline.is_some_and(|deadline| deadline <= now) {
                return Err(Failed::Abort {
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
