//! Membership in the consumer group: what happens when partitions are assigned and revoked.
//!
//! This code runs inside librdkafka's rebalance callback, on the thread that polls. An assigned partition is read from
//! the group's committed offset, or from the offset that the settings choose. When a partition is revoked, its finished
//! records are committed first, and its unfinished ones are dropped.

mod lookup;
mod shared;
mod start;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Sender, bounded};
use metrics::counter;
use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaRespErr;
use tracing::{info, warn};

use super::committed::CommittedOffsets;
use super::control::{Control, StreamError};
use super::ownership::{Epoch, Ownership};
use super::rebalance::Rebalance;
use super::status::ClientStatus;
use crate::config::{OnGap, Start};
use crate::kafka::client::Timeouts;
use crate::kafka::errors::{ErrorClass, reason};
use crate::kafka::{group_members, log};
use crate::message::NextOffset;
use crate::ops::metrics::REBALANCES;
pub use lookup::{ConsumerPosition, TopicState};
pub use shared::SharedConsumer;

use start::StartOffset;

/// The consumer of a stream.
pub type GroupConsumer = BaseConsumer<Membership>;

/// The context of a [`GroupConsumer`]: what its callbacks need.
pub struct Membership {
    /// The comments topic.
    pub topic: String,
    /// The consumer group.
    pub group: String,
    /// The name by which the brokers list this process among the members of the group.
    pub client_id: String,
    /// Where to start in partitions for which the group has no committed offset.
    pub start: Start,
    pub on_gap: OnGap,
    /// Whether the brokers give topics ids, so that a topic that is recreated is recognised.
    pub has_topic_ids: bool,
    /// Limits how long a callback may take.
    pub timeouts: Timeouts,
    pub ownership: Arc<Ownership>,
    pub committed: Arc<CommittedOffsets>,
    /// Where the client's reports go.
    pub client: Arc<ClientStatus>,
    pub control: Arc<Control>,
    /// To the emit stage, which owns the transaction.
    pub rebalances: Sender<Rebalance>,
    /// The id of the member of the group to which the partitions that this process owns were assigned.
    pub member_id: Mutex<Option<String>>,
    /// Set when the client holds partitions that are not owned: their offsets could not be looked up because of an
    /// outage, or the group has expelled the member to which they were assigned. Nothing is read from them until the
    /// consumer joins the group again.
    pub must_rejoin: AtomicBool,
    /// Set while reading is paused, so that newly assigned partitions start paused.
    pub is_paused: AtomicBool,
}

impl ClientContext for Membership {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log::line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        log::client_error(&error, reason);
    }

    fn stats(&self, statistics: Statistics) {
        let partitions = statistics.topics.get(&self.topic).map(|topic| &topic.partitions);
        let lags = partitions.into_iter().flatten().filter_map(|(&partition, found)| {
            // The end that a reader of committed records sees; it is negative until the first fetch.
            let end = if found.ls_offset >= 0 {
                found.ls_offset
            } else {
                found.hi_offset
            };
            let lag = self.committed.lag(partition, found.app_offset, end)?;
            Some((partition, (end >= 0).then_some(lag)))
        });
        self.client.record_report(&statistics, lags, Instant::now());
    }
}

impl ConsumerContext for Membership {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, code: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let partitions: Vec<i32> = list.elements().iter().map(|element| element.partition()).collect();
        self.check_membership(consumer);
        let result = match code {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => self.assign(consumer, list, &partitions),
            _ => self.unassign(consumer, list, &partitions),
        };
        if let Err(error) = result {
            match fence(consumer, &error) {
                // The reader finds out when it joins again, and replaces the consumer.
                Some(_) => self.must_rejoin.store(true, Ordering::Relaxed),
                None => self.control.fail(StreamError::kafka("change the assignment", &error)),
            }
        }
    }
}

impl Membership {
    /// Gives up all partitions if the group has expelled this consumer without the client's noticing it.
    ///
    /// If a static member finds out that it was expelled when it joins again, librdkafka (2.12) joins as a new member and
    /// keeps the partitions of the old one, at its old position, although others may have read and committed them in the
    /// meantime.
    fn check_membership(&self, consumer: &BaseConsumer<Self>) {
        if self.ownership.partitions().is_empty() {
            *self.lock_member_id() = group_members::member_id(consumer);
        } else if !consumer.assignment_lost() && !self.is_same_member(consumer) {
            warn_lost(&self.ownership.partitions());
            self.lose_all();
            self.must_rejoin.store(true, Ordering::Relaxed);
        }
    }

    /// Returns whether the consumer is still the member of the group to which the partitions were assigned that this
    /// process owns. Once it is not, it never is again.
    pub fn is_same_member(&self, consumer: &BaseConsumer<Self>) -> bool {
        let owner = self.lock_member_id().clone();
        owner.is_some() && owner == group_members::member_id(consumer)
    }

    /// Classifies the error of a call of the consumer, and names the process that has fenced it.
    pub fn failure(&self, consumer: &BaseConsumer<Self>, doing: &'static str, error: &KafkaError) -> StreamError {
        match fence(consumer, error) {
            Some(reason) => StreamError::Fenced {
                doing,
                reason,
                other: self.other_process(consumer),
            },
            None => StreamError::kafka(doing, error),
        }
    }

    fn lock_member_id(&self) -> MutexGuard<'_, Option<String>> {
        self.member_id.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn assign(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &mut TopicPartitionList,
        partitions: &[i32],
    ) -> KafkaResult<()> {
        // A stream that is ending reads nothing more, so it needs no offsets, and one that is about to join again gets
        // other partitions.
        let is_of_use = !self.control.is_ending() && !self.must_rejoin.load(Ordering::Relaxed);
        if is_of_use && !partitions.is_empty() {
            self.client.record_starting(Instant::now());
            match self.start_offsets(consumer, list) {
                Ok(starts) => {
                    for (partition, start) in starts {
                        list.set_partition_offset(&self.topic, partition, Offset::Offset(start.offset))?;
                        self.own(partition, &start);
                    }
                }
                // The group's protocol still requires the assignment below, although nothing will be read.
                Err(error) if error.requires_operator() => self.control.fail(error),
                Err(error) => {
                    warn!(%error, "cannot begin to read the assigned partitions; joining the group again");
                    self.must_rejoin.store(true, Ordering::Relaxed);
                }
            }
        }
        match consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => consumer.incremental_assign(list)?,
            _ => consumer.assign(list)?,
        }
        // Resuming is necessary too: a partition that was revoked while paused is still paused when it is assigned
        // again.
        match self.is_paused.load(Ordering::Relaxed) {
            _ if partitions.is_empty() => {}
            true => consumer.pause(list)?,
            false => consumer.resume(list)?,
        }
        counter!(REBALANCES, "kind" => "assigned").increment(1);
        info!(?partitions, "assigned");
        Ok(())
    }

    fn own(&self, partition: i32, start: &StartOffset) {
        let epoch = self.ownership.assign(partition);
        let next = NextOffset::from_committed(start.offset);
        let pending_since = (!start.is_committed).then(Instant::now);
        self.committed.start(partition, next, pending_since);
        if !start.is_committed {
            // The offset is committed even if no record follows: with `start = "latest"`, a restart would otherwise
            // skip the records written in the meantime.
            let assigned = Rebalance::Assigned { partition, epoch, next };
            // Sending fails if the stream is ending, and then the offset no longer matters.
            let _ = self.rebalances.send_timeout(assigned, self.timeouts.revoke());
        }
    }

    fn unassign(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &TopicPartitionList,
        partitions: &[i32],
    ) -> KafkaResult<()> {
        let is_lost = consumer.assignment_lost();
        if is_lost {
            warn_lost(partitions);
            let lost = Rebalance::Lost(self.with_epochs(partitions));
            self.ownership.revoke(partitions);
            let _ = self.rebalances.send_timeout(lost, self.timeouts.revoke());
        } else if !partitions.is_empty() {
            self.commit_finished(partitions);
            self.ownership.revoke(partitions);
        }
        self.committed.remove(partitions);
        self.client.forget_lags(partitions);
        match consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => consumer.incremental_unassign(list)?,
            _ => consumer.unassign()?,
        }
        counter!(REBALANCES, "kind" => if is_lost { "lost" } else { "revoked" }).increment(1);
        info!(?partitions, "revoked");
        Ok(())
    }

    /// Gives up all partitions, because this consumer has been expelled from the group and will be replaced. Their records
    /// in flight are read again.
    pub fn lose_all(&self) {
        let partitions = self.ownership.partitions();
        let lost = Rebalance::Lost(self.with_epochs(&partitions));
        self.ownership.revoke(&partitions);
        let _ = self.rebalances.send_timeout(lost, self.timeouts.revoke());
        self.committed.remove(&partitions);
        self.client.forget_lags(&partitions);
        counter!(REBALANCES, "kind" => "lost").increment(1);
    }

    /// Returns those of the partitions that this process owns, with their epochs.
    fn with_epochs(&self, partitions: &[i32]) -> Vec<(i32, Epoch)> {
        let with_epoch = |&partition: &i32| Some((partition, self.ownership.epoch(partition)?));
        partitions.iter().filter_map(with_epoch).collect()
    }

    /// Asks the emit stage to commit finished records, and waits for it up to a deadline.
    ///
    /// If the deadline passes first, the transaction still succeeds or fails as a whole, and the partitions' next owner
    /// waits for its outcome.
    fn commit_finished(&self, partitions: &[i32]) {
        let deadline = Instant::now() + self.timeouts.revoke();
        let (done, reply) = bounded(1);
        let revoked = Rebalance::Revoked {
            partitions: self.with_epochs(partitions),
            done,
        };
        // Sending also fails if the emit stage has ended, which has then already committed or aborted.
        if self.rebalances.send_deadline(revoked, deadline).is_ok() && reply.recv_deadline(deadline).is_err() {
            warn!(?partitions, "revoked before finished records could be committed");
        }
    }
}

fn warn_lost(partitions: &[i32]) {
    warn!(
        ?partitions,
        "assignment lost: records in flight will be read again by their new owner"
    );
}

/// Returns why the consumer was fenced, if it was. After a fatal error every call fails, often without naming it.
fn fence(consumer: &BaseConsumer<Membership>, error: &KafkaError) -> Option<String> {
    if ErrorClass::of_error(error) == ErrorClass::Fenced {
        return Some(reason(error));
    }
    let (code, reason) = consumer.client().fatal_error()?;
    (ErrorClass::of(code) == ErrorClass::Fenced).then_some(reason)
}
