//! Asks the brokers for the offsets of partitions: where to start reading, and whether records are missing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use metrics::counter;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList, TopicPartitionListElem};
use tracing::{debug, warn};

use super::Membership;
use super::start::{KnownOffsets, StartOffset, choose_start};
use crate::kafka::describe::{self, TopicDescription};
use crate::kafka::errors::{ErrorClass, reason};
use crate::kafka::group_members::{self, GroupMember};
use crate::message::NextOffset;
use crate::ops::metrics::GAP_RECORDS;
use crate::stream::committed::OffsetMetadata;
use crate::stream::control::{Gap, StreamError};

/// The timeout of one request for committed offsets. They are not available while another member's transaction is
/// open, so a lookup may take several requests.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The timeout of one request for a partition's offset range. It is shorter because partitions are looked up one by
/// one.
const RANGE_TIMEOUT: Duration = Duration::from_secs(2);

/// The timeout of a request for the members of the group.
const GROUP_TIMEOUT: Duration = Duration::from_secs(2);

/// The pause between two attempts of a lookup.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// The timeout of a request for the topic's id while records are read. It delays the poll of the consumer, so it is far
/// below any poll interval.
const TOPIC_ID_TIMEOUT: Duration = Duration::from_secs(2);

/// The next offset that the consumer will read of a partition, and the offsets that the partition holds.
pub struct ConsumerPosition {
    pub partition: i32,
    pub next: i64,
    low: i64,
    high: i64,
}

impl ConsumerPosition {
    /// Returns the gap if the partition does not hold the next offset.
    pub fn gap(&self) -> Option<Gap> {
        Gap::find(self.partition, self.next, self.low, self.high)
    }

    /// Returns the gap that arises if the topic was recreated.
    pub fn gap_to_new_topic(&self) -> Gap {
        Gap {
            partition: self.partition,
            next: self.next,
            low: self.low,
            high: self.high,
            is_new_topic: true,
        }
    }
}

/// What has become of the comments topic since the last assignment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopicState {
    Same,
    /// It was deleted and recreated.
    New,
    /// It was deleted.
    Missing,
    /// The brokers have no ids, or do not answer.
    Unknown,
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
        let topic_id = self.topic_id(consumer, deadline)?;
        let is_new_topic = |element: &TopicPartitionListElem<'_>| {
            let recorded = metadata_of(element).topic_id;
            offset_of(element).is_some() && recorded.is_some() && topic_id.is_some() && recorded != topic_id
        };
        let first_partitions = if committed.elements().iter().any(is_new_topic) {
            // All partitions of the new topic were created after the group had started.
            Some(0)
        } else {
            self.first_partitions(consumer, &committed, deadline)?
        };
        let mut starts = Vec::new();
        let mut gaps = Vec::new();
        for element in committed.elements() {
            let known = KnownOffsets {
                partition: element.partition(),
                is_new: first_partitions.is_none_or(|count| element.partition() >= count),
                committed: offset_of(&element),
                is_new_topic: is_new_topic(&element),
                range: None,
            };
            match self.start_offset(consumer, known, deadline)? {
                Ok(start) => {
                    if let Some(gap) = &start.skipped {
                        warn!(%gap, "continuing after a gap");
                        counter!(GAP_RECORDS).increment(gap.deleted_records());
                    }
                    starts.push((element.partition(), start));
                }
                Err(gap) => gaps.push(gap),
            }
        }
        if !gaps.is_empty() {
            return Err(StreamError::Gap(gaps));
        }
        // Partitions that are still owned belong to the topic of the last assignment. Committing them under another id
        // would hide that their offsets mean nothing in it; the reader's next check finds the difference.
        let recorded = self.committed.metadata().topic_id;
        let keeps_partitions = !self.ownership.partitions().is_empty();
        self.committed.set_metadata(OffsetMetadata {
            topic_id: recorded.filter(|_| keeps_partitions).or(topic_id),
            first_partitions,
        });
        Ok(starts)
    }

    /// Lists the other members of the group that have the same instance name.
    pub fn other_members(&self, consumer: &BaseConsumer<Self>) -> KafkaResult<Vec<GroupMember>> {
        group_members::others(consumer, &self.group, &self.client_id, GROUP_TIMEOUT)
    }

    /// Describes another member of the group that has the same instance name, if there is one.
    pub fn other_process(&self, consumer: &BaseConsumer<Self>) -> Option<String> {
        let others = self.other_members(consumer).unwrap_or_default();
        others.first().map(ToString::to_string)
    }

    /// Returns the id of the comments topic, or `None` if the brokers have no ids.
    fn topic_id(&self, consumer: &BaseConsumer<Self>, deadline: Instant) -> Result<Option<String>, StreamError> {
        if !self.has_topic_ids {
            return Ok(None);
        }
        self.retry(deadline, "look up the id of the comments topic", || {
            let described = describe::topics(consumer, &[&self.topic], REQUEST_TIMEOUT)?;
            let topic = described.into_iter().next();
            topic.map_or(Ok(None), |topic| match topic.partitions {
                Ok(_) => Ok(topic.id),
                Err(code) => Err(KafkaError::MetadataFetch(code)),
            })
        })
    }

    /// Compares the comments topic with the one that was found at the last assignment.
    pub fn topic_state(&self, consumer: &BaseConsumer<Self>) -> TopicState {
        let Some(assigned) = self.committed.metadata().topic_id else {
            return TopicState::Unknown;
        };
        let described = describe::topics(consumer, &[&self.topic], TOPIC_ID_TIMEOUT).unwrap_or_default();
        match described.into_iter().next() {
            Some(TopicDescription { id: Some(found), .. }) if found == assigned => TopicState::Same,
            Some(TopicDescription { id: Some(_), .. }) => TopicState::New,
            Some(TopicDescription {
                partitions: Err(code), ..
            }) if ErrorClass::of(code) == ErrorClass::Missing => TopicState::Missing,
            _ => TopicState::Unknown,
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
        Ok(found)
    }

    /// Looks up the offsets that a partition holds, and chooses where to start.
    fn start_offset(
        &self,
        consumer: &BaseConsumer<Self>,
        known: KnownOffsets,
        deadline: Instant,
    ) -> Result<Result<StartOffset, Gap>, StreamError> {
        let doing = "read the offset range of a partition";
        let find = || {
            let range = match consumer.fetch_watermarks(&self.topic, known.partition, RANGE_TIMEOUT) {
                Ok(range) => Some(range),
                // A partition without a leader must not delay the others.
                Err(_) if known.committed.is_some() && !known.is_new_topic => None,
                Err(error) => return Err(error),
            };
            Ok(choose_start(KnownOffsets { range, ..known }, self.start, self.on_gap))
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

    /// Repeats a lookup until it succeeds, fails for a reason that waiting cannot fix, or the deadline passes. A topic may
    /// be missing for a moment, for example while the brokers start.
    fn retry<T>(
        &self,
        deadline: Instant,
        doing: &'static str,
        lookup: impl Fn() -> KafkaResult<T>,
    ) -> Result<T, StreamError> {
        let mut has_warned = false;
        loop {
            let error = match lookup() {
                Ok(found) => return Ok(found),
                Err(error) => error,
            };
            let class = ErrorClass::of_error(&error);
            let is_final = class.is_permanent() && class != ErrorClass::Missing;
            if is_final || Instant::now() >= deadline || self.control.is_ending() {
                return Err(StreamError::kafka(doing, &error));
            }
            if has_warned {
                debug!(reason = reason(&error), "still cannot {doing}");
            } else {
                warn!(reason = reason(&error), "cannot {doing} yet");
            }
            has_warned = true;
            std::thread::sleep(RETRY_PAUSE);
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
                low,
                high,
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

/// Returns the metadata of a committed offset.
fn metadata_of(element: &TopicPartitionListElem<'_>) -> OffsetMetadata {
    // The wrapper panics if another program has committed metadata that is not UTF-8.
    let text = catch_unwind(AssertUnwindSafe(|| element.metadata().to_owned()));
    text.map_or_else(|_| OffsetMetadata::default(), |text| OffsetMetadata::parse(&text))
}

/// Returns the number of partitions at the group's first start, if any committed offset records it.
fn first_partitions_in(committed: &TopicPartitionList) -> Option<i32> {
    let elements = committed.elements();
    let mut recorded = elements.iter().filter(|element| offset_of(element).is_some());
    recorded.find_map(|element| metadata_of(element).first_partitions)
}
