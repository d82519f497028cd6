//! Asks the brokers for the offsets of partitions: where to start reading, and whether records are missing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaResult;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList, TopicPartitionListElem};
use tracing::warn;

use super::Membership;
use super::start::{KnownOffsets, StartOffset, choose_start};
use crate::kafka::errors::{ErrorClass, reason};
use crate::message::NextOffset;
use crate::stream::committed::OffsetMetadata;
use crate::stream::control::{Gap, StreamError};

/// The timeout of one request for committed offsets. They are not available while another member's transaction is
/// open, so a lookup may take several requests.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The timeout of one request for a partition's offset range. It is shorter because partitions are looked up one by
/// one.
const RANGE_TIMEOUT: Duration = Duration::from_secs(2);

/// The pause between two attempts of a lookup.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// The next offset that the consumer will read in a partition.
pub struct ConsumerPosition {
    pub partition: i32,
    pub next: i64,
    /// Present if the topic does not hold that offset.
    pub gap: Option<Gap>,
}

impl Membership {
    /// Looks up the offset from which to read each partition of the list.
    ///
    /// # Errors
    /// Returns an error if the brokers do not answer in time, or if records are missing and `on_gap` is `stop`.
    pub(super) fn start_offsets(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &TopicPartitionList,
    ) -> Result<Vec<(i32, StartOffset)>, StreamError> {
        // The group waits for this callback, so it must end even if no broker answers.
        let deadline = Instant::now() + (self.timeouts.poll_interval / 2).max(self.timeouts.transaction);
        let committed = self.retry(deadline, "read the committed offsets", || {
            let found = consumer.committed_offsets(list.clone(), REQUEST_TIMEOUT)?;
            // An error of a single partition would otherwise look as if no offset had been committed.
            found.elements().iter().try_for_each(|element| element.error())?;
            Ok(found)
        })?;
        let first_partitions = self.first_partitions(consumer, &committed, deadline)?;
        let mut starts = Vec::new();
        let mut gaps = Vec::new();
        for element in committed.elements() {
            let partition = element.partition();
            let is_new = first_partitions.is_none_or(|count| partition >= count);
            let committed = offset_of(&element);
            match self.start_offset(consumer, partition, is_new, committed, deadline)? {
                Ok(start) => {
                    if let Some(gap) = &start.skipped {
                        warn!(%gap, "continuing after a gap");
                    }
                    starts.push((partition, start));
                }
                Err(gap) => gaps.push(gap),
            }
        }
        if gaps.is_empty() {
            Ok(starts)
        } else {
            Err(StreamError::Gap(gaps))
        }
    }

    /// Returns how many partitions the topic had when the group first started, or `None` if that is not known: the
    /// group has committed offsets, but none of them records it.
    ///
    /// At the first start, which is when the group has no committed offset in any partition, that is their present
    /// number. It is committed with every offset from then on.
    fn first_partitions(
        &self,
        consumer: &BaseConsumer<Self>,
        assigned: &TopicPartitionList,
        deadline: Instant,
    ) -> Result<Option<i32>, StreamError> {
        if let Some(count) = self.committed.metadata().first_partitions {
            return Ok(Some(count));
        }
        let mut found = first_partitions_in(assigned);
        let lacks_offset = |element: &TopicPartitionListElem<'_>| offset_of(element).is_none();
        // Usually every partition has a committed offset, and then nothing depends on the other partitions.
        if found.is_none() && assigned.elements().iter().any(lacks_offset) {
            let count = self.retry(deadline, "count the partitions of the topic", || {
                let metadata = consumer.fetch_metadata(Some(&self.topic), REQUEST_TIMEOUT)?;
                let topic = metadata.topics().first();
                Ok(topic.map_or(0, |topic| i32::try_from(topic.partitions().len()).unwrap_or(i32::MAX)))
            })?;
            let mut all = TopicPartitionList::new();
            all.add_partition_range(&self.topic, 0, (count - 1).max(0));
            let all = self.retry(deadline, "read the committed offsets", || {
                consumer.committed_offsets(all.clone(), REQUEST_TIMEOUT)
            })?;
            let is_first_start = all.elements().iter().all(lacks_offset);
            found = first_partitions_in(&all).or(is_first_start.then_some(count));
        }
        if found.is_some() {
            self.committed.set_metadata(OffsetMetadata {
                first_partitions: found,
            });
        }
        Ok(found)
    }

    fn start_offset(
        &self,
        consumer: &BaseConsumer<Self>,
        partition: i32,
        is_new: bool,
        committed: Option<i64>,
        deadline: Instant,
    ) -> Result<Result<StartOffset, Gap>, StreamError> {
        let doing = "read the offset range of a partition";
        let find = || {
            let range = consumer.fetch_watermarks(&self.topic, partition, RANGE_TIMEOUT);
            let range = match (range, committed) {
                (Ok(range), _) => Some(range),
                // A partition without a leader must not delay the others.
                (Err(_), Some(_)) => None,
                (Err(error), None) => return Err(error),
            };
            let known = KnownOffsets {
                partition,
                is_new,
                committed,
                range,
            };
            Ok(choose_start(known, self.start, self.on_gap))
        };
        Ok(match self.retry(deadline, doing, find)? {
            Ok(Some(start)) => Ok(start),
            Err(gap) => Err(gap),
            Ok(None) => {
                return Err(StreamError::Kafka {
                    doing,
                    reason: "it has no leader".to_owned(),
                });
            }
        })
    }

    /// Repeats a lookup until it succeeds, fails permanently, or the deadline passes.
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
                    std::thread::sleep(RETRY_PAUSE);
                }
                Err(error) => return Err(StreamError::kafka(doing, &error)),
            }
        }
    }

    /// Returns the consumer's position in each partition that it owns.
    ///
    /// # Errors
    /// Returns an error if the brokers do not answer in time.
    pub fn positions(&self, consumer: &BaseConsumer<Self>) -> Result<Vec<ConsumerPosition>, StreamError> {
        let deadline = Instant::now() + REQUEST_TIMEOUT;
        let mut positions = Vec::new();
        let list = self.retry(deadline, "read the consumer's position", || consumer.position())?;
        for element in list.elements_for_topic(&self.topic) {
            let partition = element.partition();
            let next = match element.offset() {
                Offset::Offset(next) => Some(next),
                // Nothing has been read since the assignment.
                _ => self.committed.get(partition).map(NextOffset::get),
            };
            let Some(next) = next else { continue };
            let (low, high) = self.retry(deadline, "read the offset range of a partition", || {
                consumer.fetch_watermarks(&self.topic, partition, RANGE_TIMEOUT)
            })?;
            positions.push(ConsumerPosition {
                partition,
                next,
                gap: Gap::find(partition, next, low, high),
            });
        }
        Ok(positions)
    }
}

/// Returns the committed offset of a list's element, or `None` if nothing was committed.
fn offset_of(element: &TopicPartitionListElem<'_>) -> Option<i64> {
    match element.offset() {
        Offset::Offset(offset) => Some(offset),
        _ => None,
    }
}

/// Returns the number of partitions at the group's first start, if any committed offset records it.
fn first_partitions_in(committed: &TopicPartitionList) -> Option<i32> {
    let elements = committed.elements();
    let recorded = elements
        .iter()
        .filter(|element| offset_of(element).is_some())
        .find_map(|element| {
            // The wrapper panics if another program has committed metadata that is not UTF-8.
            let metadata = catch_unwind(AssertUnwindSafe(|| element.metadata().to_owned())).ok()?;
            OffsetMetadata::parse(&metadata).first_partitions
        });
    recorded
}
