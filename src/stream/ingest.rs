//! The first stage: one thread owns the consumer, polls it continuously, and reads records while there is room.
//!
//! The number of records in flight in all stages limits how much is read. The stage waits out a short stall, because
//! pausing discards the records that the client has prefetched. In a long stall it pauses the partitions and keeps
//! polling, so that the group does not expel this member.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use metrics::counter;
use rdkafka::consumer::Consumer;
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tracing::{debug, info, warn};

use super::control::{Control, Gap, MAX_TOPIC_ABSENCE, StreamError};
use super::group::{ConsumerPosition, GroupConsumer, Membership, SharedConsumer, TopicState};
use super::in_flight::InFlight;
use super::ownership::{Epoch, Ownership};
use super::record::{Header, Record, RecordPosition};
use crate::config::OnGap;
use crate::kafka::errors::{ErrorClass, reason};
use crate::message::NextOffset;
use crate::ops::metrics::GAP_RECORDS;

/// How long to wait for room before pausing the partitions. The consumer is not polled meanwhile, so this is far below
/// any poll interval, and longer than a micro-batch usually takes.
const MAX_STALL: Duration = Duration::from_millis(500);

/// The longest wait for a record, which limits how late this thread notices anything else.
const POLL_TIMEOUT: Duration = Duration::from_millis(100);

/// How long one seek after a gap may take.
const SEEK_TIMEOUT: Duration = Duration::from_secs(5);

/// How often the reader checks whether the topic was recreated.
const TOPIC_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// How many times within [`FENCE_INTERVAL`] the consumer is replaced after it was fenced.
const MAX_FENCES: usize = 2;

const FENCE_INTERVAL: Duration = Duration::from_secs(60);

/// Reads records from the comments topic and hands them to the encode stage.
pub struct IngestStage {
    /// Shared with the emit stage, which commits offsets.
    pub consumer: Arc<SharedConsumer>,
    /// The comments topic.
    pub topic: String,
    pub ownership: Arc<Ownership>,
    pub in_flight: Arc<InFlight>,
    pub control: Arc<Control>,
    /// To the encode stage. Never full, because it has room for all records that may be in flight.
    pub records: Sender<Record>,
    /// Disconnected once the emit stage has ended.
    pub emit_ended: Receiver<()>,
}

impl IngestStage {
    /// Reads until the stream ends, then stays in the group until the emit stage has ended.
    ///
    /// A failure is reported through [`Control`], so that the other stages end while this one still polls.
    pub fn run(self) -> Result<(), StreamError> {
        let mut fences = Vec::new();
        loop {
            let consumer = self.consumer.get();
            let reader = self.reader(&consumer);
            match reader.read(&self.records) {
                Ok(()) => break,
                Err(StreamError::Fenced { reason, .. }) if may_be_own(&mut fences, Instant::now()) => {
                    info!(reason, "replacing the consumer");
                    reader.membership().lose_all();
                }
                Err(error) => {
                    self.control.fail(error);
                    break;
                }
            }
            drop(consumer);
            if let Err(error) = self.consumer.replace() {
                self.control.fail(StreamError::Client(error.to_string()));
                break;
            }
        }
        drop(self.records);
        info!("stopped reading");
        let consumer = self.consumer.get();
        let reader = RecordReader {
            consumer: &consumer,
            topic: &self.topic,
            ownership: &self.ownership,
            in_flight: &self.in_flight,
            control: &self.control,
        };
        if let Err(error) = reader.pause() {
            // Harmless: records read from here on are discarded.
            debug!(%error, "cannot pause at the end");
        }
        // Rebalance callbacks must be served until the last commit, because a revocation still has to commit finished
        // records. This thread also has to be the one that drops the consumer last.
        while !matches!(self.emit_ended.try_recv(), Err(TryRecvError::Disconnected)) {
            // Errors no longer matter.
            drop(consumer.poll(Duration::from_millis(20)));
        }
        Ok(())
    }

    fn reader<'a>(&'a self, consumer: &'a GroupConsumer) -> RecordReader<'a> {
        RecordReader {
            consumer,
            topic: &self.topic,
            ownership: &self.ownership,
            in_flight: &self.in_flight,
            control: &self.control,
        }
    }
}

/// Returns whether a consumer that is fenced at `now` may have been fenced by a request of its own, which was answered
/// while its connection was down and which it then repeated. Another process with the same instance name fences again
/// and again.
fn may_be_own(fences: &mut Vec<Instant>, now: Instant) -> bool {
    fences.retain(|&fence| now.saturating_duration_since(fence) < FENCE_INTERVAL);
    fences.push(now);
    fences.len() <= MAX_FENCES
}

/// How far a partition was read in its current epoch.
struct ReadProgress {
    epoch: Epoch,
    /// The sequence number of the next record.
    sequence: u64,
    /// Every record before this offset was read.
    next: i64,
}

struct RecordReader<'a> {
    consumer: &'a GroupConsumer,
    topic: &'a str,
    ownership: &'a Ownership,
    in_flight: &'a Arc<InFlight>,
    control: &'a Control,
}

impl RecordReader<'_> {
    fn read(&self, records: &Sender<Record>) -> Result<(), StreamError> {
        let mut progress = BTreeMap::new();
        let mut is_paused = false;
        let mut last_topic_check = Instant::now();
        let mut missing_since = None;
        self.consumer
            .subscribe(&[self.topic])
            .map_err(|error| self.failure("subscribe to the comments topic", &error))?;
        while !self.control.is_ending() {
            if last_topic_check.elapsed() >= TOPIC_CHECK_INTERVAL {
                match self.membership().topic_state(self.consumer) {
                    TopicState::New => self.handle_new_topic()?,
                    TopicState::Missing => self.handle_missing_topic(&mut missing_since)?,
                    TopicState::Same => missing_since = None,
                    TopicState::Unknown => {}
                }
                last_topic_check = Instant::now();
            }
            if self.membership().must_rejoin.swap(false, Ordering::Relaxed) {
                self.rejoin()?;
            }
            if is_paused {
                if self.in_flight.is_half_empty() {
                    self.resume()?;
                    is_paused = false;
                }
            } else if !self.in_flight.wait_for_room(MAX_STALL) {
                self.pause()?;
                is_paused = true;
            }
            match self.consumer.poll(POLL_TIMEOUT) {
                None => {}
                Some(Ok(message)) => {
                    if let Some(record) = self.record(&message, &mut progress)
                        && records.send(record).is_err()
                    {
                        // The encode stage has ended and has reported the reason.
                        return Ok(());
                    }
                }
                Some(Err(error)) => self.handle_error(error, &mut progress)?,
            }
        }
        Ok(())
    }

    /// Copies a message into a record. Returns `None` if its partition is no longer owned, or if it was read before:
    /// when partitions are paused, the client may rewind a partition by the record that it is currently returning.
    fn record(&self, message: &BorrowedMessage<'_>, progress: &mut BTreeMap<i32, ReadProgress>) -> Option<Record> {
        let (partition, offset) = (message.partition(), message.offset());
        let epoch = self.ownership.epoch(partition)?;
        let start = || ReadProgress {
            epoch,
            sequence: 0,
            next: 0,
        };
        let progress = progress.entry(partition).or_insert_with(start);
        if progress.epoch != epoch {
            *progress = start();
        }
        if offset < progress.next {
            return None;
        }
        let sequence = progress.sequence;
        progress.sequence += 1;
        progress.next = offset + 1;
        self.membership()
            .committed
            .record_read(partition, NextOffset::after(offset));
        let (headers, has_broken_headers) = match headers(message) {
            Some(headers) => (headers, false),
            None => (Vec::new(), true),
        };
        let timestamp = message.timestamp().to_millis();
        let size = Record::size(message.key(), message.payload(), &headers);
        Some(Record {
            position: RecordPosition {
                partition,
                epoch,
                sequence,
                offset,
            },
            _in_flight: self.in_flight.add(size, timestamp, Instant::now()),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            headers,
            has_broken_headers,
            timestamp,
        })
    }

    fn pause(&self) -> Result<(), StreamError> {
        self.membership().is_paused.store(true, Ordering::Relaxed);
        debug!("too much in flight: pausing");
        let paused = self.consumer.pause(&self.owned_partitions());
        paused.map_err(|error| self.failure("pause reading", &error))
    }

    fn resume(&self) -> Result<(), StreamError> {
        self.membership().is_paused.store(false, Ordering::Relaxed);
        debug!("resuming");
        let resumed = self.consumer.resume(&self.owned_partitions());
        resumed.map_err(|error| self.failure("resume reading", &error))
    }

    /// Lists the owned partitions. The list must be dropped before the consumer.
    fn owned_partitions(&self) -> TopicPartitionList {
        let mut list = TopicPartitionList::new();
        for partition in self.ownership.partitions() {
            list.add_partition(self.topic, partition);
        }
        list
    }

    fn failure(&self, doing: &'static str, error: &KafkaError) -> StreamError {
        self.membership().failure(self.consumer, doing, error)
    }

    fn membership(&self) -> &Membership {
        self.consumer.context()
    }

    fn handle_error(&self, error: KafkaError, progress: &mut BTreeMap<i32, ReadProgress>) -> Result<(), StreamError> {
        match ErrorClass::of_error(&error) {
            _ if self.control.is_ending() => Ok(()),
            ErrorClass::OffsetOutOfRange => self.handle_gap(progress),
            // The topic may be about to be recreated; the reader checks from time to time.
            ErrorClass::Missing if self.membership().has_topic_ids => {
                warn!(reason = reason(&error), "cannot read the comments topic at the moment");
                Ok(())
            }
            class if class.is_permanent() || matches!(error, KafkaError::MessageConsumptionFatal(_)) => {
                Err(self.failure("read the comments topic", &error))
            }
            // The client recovers by itself, and its context logs conditions that persist.
            _ => {
                debug!(reason = reason(&error), "temporary error while reading");
                Ok(())
            }
        }
    }

    /// Ends the stream if the comments topic has been missing for too long.
    fn handle_missing_topic(&self, since: &mut Option<Instant>) -> Result<(), StreamError> {
        if since.get_or_insert_with(Instant::now).elapsed() < MAX_TOPIC_ABSENCE {
            return Ok(());
        }
        Err(StreamError::MissingTopic {
            topic: self.topic.to_owned(),
        })
    }

    /// Ends the stream, or continues at the beginning of the new topic, after the comments topic was recreated. Without
    /// this check, the client would read the new topic from the old offset and skip the records before it.
    fn handle_new_topic(&self) -> Result<(), StreamError> {
        let positions = self.membership().positions(self.consumer)?;
        let gaps: Vec<Gap> = positions.iter().map(ConsumerPosition::gap_to_new_topic).collect();
        if gaps.is_empty() {
            // A spare member of the group has read nothing; its next assignment looks up the offsets.
            return Ok(());
        }
        if self.membership().on_gap == OnGap::Stop {
            return Err(StreamError::Gap(gaps));
        }
        // This ends every epoch, and the next assignment finds offsets of another topic.
        self.rejoin()
    }

    fn rejoin(&self) -> Result<(), StreamError> {
        self.consumer.unsubscribe();
        self.consumer
            .subscribe(&[self.topic])
            .map_err(|error| self.failure("subscribe to the comments topic", &error))
    }

    /// Ends the stream, or continues from the oldest offset available, after retention has deleted records that were
    /// not read or the topic was truncated.
    ///
    /// The client has stopped reading the partition and does not report which one it is, so all of them are checked.
    fn handle_gap(&self, progress: &mut BTreeMap<i32, ReadProgress>) -> Result<(), StreamError> {
        if self.membership().topic_state(self.consumer) == TopicState::New {
            return self.handle_new_topic();
        }
        let positions = self.membership().positions(self.consumer)?;
        let gaps: Vec<Gap> = positions.iter().filter_map(ConsumerPosition::gap).collect();
        if self.membership().on_gap == OnGap::Stop && !gaps.is_empty() {
            return Err(StreamError::Gap(gaps));
        }
        // Seek in partitions without a gap too: a truncated one may have grown since, and the client has stopped
        // reading it.
        for position in positions {
            let target = match position.gap() {
                Some(gap) => {
                    warn!(%gap, "continuing after a gap");
                    counter!(GAP_RECORDS).increment(gap.deleted_records());
                    gap.low
                }
                None => position.next,
            };
            if let Some(progress) = progress.get_mut(&position.partition) {
                progress.next = target;
            }
            let sought = self
                .consumer
                .seek(self.topic, position.partition, Offset::Offset(target), SEEK_TIMEOUT);
            sought.map_err(|error| self.failure("seek to an offset", &error))?;
        }
        Ok(())
    }
}

/// Copies the headers of a message. Returns `None` if a header's name is not UTF-8: brokers accept such names, but
/// rdkafka panics on them.
fn headers(message: &BorrowedMessage<'_>) -> Option<Vec<Header>> {
    let Some(headers) = message.headers() else {
        return Some(Vec::new());
    };
    let copy = || {
        headers
            .iter()
            .map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
            .collect()
    };
    catch_unwind(AssertUnwindSafe(copy)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consumer_that_is_fenced_again_and_again_is_not_replaced() {
        let (mut fences, start) = (Vec::new(), Instant::now());
        for _ in 0..MAX_FENCES {
            assert!(may_be_own(&mut fences, start));
        }
        assert!(!may_be_own(&mut fences, start));
        assert!(may_be_own(&mut fences, start + FENCE_INTERVAL));
    }
}
