//! This process as a member of its consumer group: what happens when partitions come and go.
//!
//! Runs inside librdkafka's rebalance callback, on the thread that polls. A partition is read from
//! where its group stands, or not at all; one that leaves takes with it what is finished, committed,
//! and nothing else.

mod beginning;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaRespErr;
use tracing::{info, warn};

use super::committed::CommittedOffsets;
use super::control::{Control, Gap, StreamError};
use super::ownership::{Epoch, Ownership};
use super::rebalance::Rebalance;
use crate::config::{OnGap, Start};
use crate::kafka::client::Timeouts;
use crate::kafka::errors::{ErrorClass, reason};
use crate::kafka::log;
use crate::message::NextOffset;
use crate::ops::metrics::LAG;
use crate::stream::group::beginning::{Beginning, Extent, beginning};

/// One request of a lookup. A peer's unfinished transaction holds the committed offsets back until it
/// is settled, so a lookup may need several.
const LOOKUP: Duration = Duration::from_secs(10);

/// The consumer of a stream.
pub type GroupConsumer = BaseConsumer<Membership>;

/// The context of [`GroupConsumer`].
pub struct Membership {
    /// The topic that is read.
    pub topic: String,
    /// Where a group without committed offsets begins.
    pub start: Start,
    /// What happens when committed offsets are gone.
    pub on_gap: OnGap,
    /// Bounds the callbacks.
    pub timeouts: Timeouts,
    /// Told first.
    pub ownership: Arc<Ownership>,
    /// Told how far partitions are committed.
    pub committed: Arc<CommittedOffsets>,
    /// Told what is wrong.
    pub control: Arc<Control>,
    /// To the emitter, which has the transaction.
    pub rebalances: Sender<Rebalance>,
    /// Set while reading is paused: what is assigned then starts paused.
    pub paused: AtomicBool,
}

impl ClientContext for Membership {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log::line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        log::condition(&error, reason);
    }

    fn stats(&self, statistics: Statistics) {
        let Some(topic) = statistics.topics.get(&self.topic) else {
            return;
        };
        for (&partition, found) in &topic.partitions {
            // What a reader of committed records can see; absent until the first fetch.
            let end = if found.ls_offset >= 0 {
                found.ls_offset
            } else {
                found.hi_offset
            };
            if let (Some(next), 0..) = (self.committed.next(partition), end) {
                let lag = (end - next.get()).max(0);
                metrics::gauge!(LAG, "partition" => partition.to_string()).set(lag as f64);
            }
        }
    }
}

impl ConsumerContext for Membership {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, code: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let partitions: Vec<i32> = list.elements().iter().map(|element| element.partition()).collect();
        let done = match code {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => self.assign(consumer, list, &partitions),
            _ => self.unassign(consumer, list, &partitions),
        };
        if let Err(error) = done {
            self.control.fail(StreamError::Kafka {
                doing: "change the assignment",
                reason: reason(&error),
            });
        }
    }
}

impl Membership {
    fn assign(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &mut TopicPartitionList,
        partitions: &[i32],
    ) -> KafkaResult<()> {
        // A stream that is ending reads nothing more, wherever it would begin.
        if !self.control.is_ending() && !partitions.is_empty() {
            match self.beginnings(consumer, list) {
                Ok(beginnings) => {
                    for (partition, beginning) in beginnings {
                        list.set_partition_offset(&self.topic, partition, Offset::Offset(beginning.offset))?;
                        self.own(partition, &beginning);
                    }
                }
                // Assigned all the same, as the group's protocol wants; nothing will be read.
                Err(error) => self.control.fail(error),
            }
        }
        match consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => consumer.incremental_assign(list)?,
            _ => consumer.assign(list)?,
        }
        // Said either way: a partition that left while it was paused comes back paused.
        match self.paused.load(Ordering::Relaxed) {
            _ if partitions.is_empty() => {}
            true => consumer.pause(list)?,
            false => consumer.resume(list)?,
        }
        info!(?partitions, "assigned");
        Ok(())
    }

    fn own(&self, partition: i32, beginning: &Beginning) {
        let epoch = self.ownership.assign(partition);
        let next = NextOffset::from_committed(beginning.offset);
        self.committed.committed(partition, next);
        if !beginning.is_committed {
            // Committed with the next transaction, so that a restart before the first record begins
            // here and not at what is the newest record then.
            let begins = Rebalance::Begins { partition, epoch, next };
            // Nobody listens any more when the stream is ending.
            let _ = self.rebalances.send_timeout(begins, self.timeouts.revoke());
        }
    }

    fn unassign(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &TopicPartitionList,
        partitions: &[i32],
    ) -> KafkaResult<()> {
        if consumer.assignment_lost() {
            warn!(
                ?partitions,
                "assignment lost: what was in flight will be read again by its new owner"
            );
            let lost = Rebalance::Lost(self.with_epochs(partitions));
            self.ownership.revoke(partitions);
            let _ = self.rebalances.send_timeout(lost, self.timeouts.revoke());
        } else if !partitions.is_empty() {
            self.hand_over(partitions);
            self.ownership.revoke(partitions);
        }
        self.committed.forget(partitions);
        for partition in partitions {
            metrics::gauge!(LAG, "partition" => partition.to_string()).set(0.0);
        }
        match consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => consumer.incremental_unassign(list)?,
            _ => consumer.unassign()?,
        }
        info!(?partitions, "revoked");
        Ok(())
    }

    /// Those of the partitions that are ours, with their assignments.
    fn with_epochs(&self, partitions: &[i32]) -> Vec<(i32, Epoch)> {
        let with_epoch = |&partition: &i32| Some((partition, self.ownership.epoch(partition)?));
        partitions.iter().filter_map(with_epoch).collect()
    }

    /// Has the emitter commit what is finished, and waits for it, but not for ever. Should the wait
    /// end first, the transaction is still all or nothing, and the next owner waits for its outcome.
    fn hand_over(&self, partitions: &[i32]) {
        let deadline = Instant::now() + self.timeouts.revoke();
        let (done, answer) = bounded(1);
        let revoked = Rebalance::Revoked {
            partitions: self.with_epochs(partitions),
            done,
        };
        if self.rebalances.send_deadline(revoked, deadline).is_ok() && answer.recv_deadline(deadline).is_err() {
            // An emitter that has ended has committed or aborted already.
            warn!(?partitions, "revoked before what was finished could be committed");
        }
    }

    /// Where each partition begins.
    fn beginnings(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &TopicPartitionList,
    ) -> Result<Vec<(i32, Beginning)>, StreamError> {
        // The group waits for this callback, whatever partitions and brokers do.
        let deadline = Instant::now() + (self.timeouts.poll_interval / 2).max(self.timeouts.transaction);
        let committed = self.retry(deadline, "read the committed offsets", || {
            let found = consumer.committed_offsets(list.clone(), LOOKUP)?;
            // A partition's own error would otherwise look like an offset that was never committed.
            found.elements().iter().try_for_each(|element| element.error())?;
            Ok(found)
        })?;
        let mut beginnings = Vec::new();
        let mut gaps = Vec::new();
        for element in committed.elements() {
            let committed = match element.offset() {
                Offset::Offset(offset) => Some(offset),
                _ => None,
            };
            match self.beginning(consumer, element.partition(), committed, deadline)? {
                Ok(beginning) => {
                    if let Some(gap) = &beginning.skipped {
                        warn!(%gap, "going on after a gap");
                    }
                    beginnings.push((element.partition(), beginning));
                }
                Err(gap) => gaps.push(gap),
            }
        }
        if gaps.is_empty() {
            Ok(beginnings)
        } else {
            Err(StreamError::Gap(gaps))
        }
    }

    fn beginning(
        &self,
        consumer: &BaseConsumer<Self>,
        partition: i32,
        committed: Option<i64>,
        deadline: Instant,
    ) -> Result<Result<Beginning, Gap>, StreamError> {
        let find = || {
            let ends = consumer.fetch_watermarks(&self.topic, partition, LOOKUP / 5);
            let ends = match (ends, committed) {
                (Ok(ends), _) => Some(ends),
                // One partition without a leader must not keep the others waiting.
                (Err(_), Some(_)) => None,
                (Err(error), None) => return Err(error),
            };
            let extent = Extent {
                partition,
                committed,
                ends,
            };
            Ok(beginning(extent, self.start, self.on_gap))
        };
        Ok(match self.retry(deadline, "read the extent of a partition", find)? {
            Ok(Some(beginning)) => Ok(beginning),
            Err(gap) => Err(gap),
            Ok(None) => {
                return Err(StreamError::Kafka {
                    doing: "read the extent of a partition",
                    reason: "no broker leads it".to_owned(),
                });
            }
        })
    }

    /// Tries a lookup until the deadline.
    fn retry<T>(
        &self,
        deadline: Instant,
        doing: &'static str,
        lookup: impl Fn() -> KafkaResult<T>,
    ) -> Result<T, StreamError> {
        loop {
            match lookup() {
                Ok(found) => return Ok(found),
                Err(error)
                    if Instant::now() < deadline
                        && !self.control.is_ending()
                        && !ErrorClass::of_error(&error).is_permanent() =>
                {
                    warn!(reason = reason(&error), "cannot {doing} yet");
                    std::thread::sleep(Duration::from_millis(200));
                }
                Err(error) => return Err(StreamError::kafka(doing, &error)),
            }
        }
    }

    /// Where each owned partition stands, and what its topic holds.
    pub fn standings(&self, consumer: &BaseConsumer<Self>) -> Result<Vec<Gap>, StreamError> {
        let deadline = Instant::now() + LOOKUP;
        let mut standings = Vec::new();
        let position = self.retry(deadline, "read the consumer's position", || consumer.position())?;
        for element in position.elements_for_topic(&self.topic) {
            let partition = element.partition();
            let next = match element.offset() {
                Offset::Offset(next) => Some(next),
                // Nothing was read since the assignment.
                _ => self.committed.next(partition).map(NextOffset::get),
            };
            let Some(next) = next else { continue };
            let (low, high) = self.retry(deadline, "read the extent of a partition", || {
                consumer.fetch_watermarks(&self.topic, partition, LOOKUP / 5)
            })?;
            standings.push(Gap {
                partition,
                next,
                low,
                high,
            });
        }
        Ok(standings)
    }
}
