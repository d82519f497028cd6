//! The first stage: one thread owns the consumer, always polls, and reads while there is room.
//!
//! What it reads is bounded by what is in flight in all stages. A short stall is waited out, since a
//! pause throws away what the client has fetched ahead; a long one pauses the partitions and goes on
//! polling, so that the group never misses this member.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use rdkafka::consumer::Consumer;
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tracing::{debug, info, warn};

use super::control::{Control, Gap, StreamError};
use super::group::{GroupConsumer, Membership};
use super::in_flight::InFlight;
use super::ownership::{Epoch, Ownership};
use super::record::{Header, Record, RecordPosition};
use crate::config::OnGap;
use crate::kafka::errors::{ErrorClass, reason};

/// How long the consumer may go unpolled while there is no room: far below any poll interval, and
/// longer than a micro-batch usually takes.
const STALL: Duration = Duration::from_millis(500);

/// Longest wait for a record: how soon this thread notices anything else.
const POLL: Duration = Duration::from_millis(100);

/// The stage.
pub struct IngestStage {
    /// Shared with the emitter, which commits for it.
    pub consumer: Arc<GroupConsumer>,
    /// The topic that is read.
    pub topic: String,
    /// Who owns what.
    pub ownership: Arc<Ownership>,
    /// Bounds what is read.
    pub in_flight: Arc<InFlight>,
    /// How the stream ends.
    pub control: Arc<Control>,
    /// To the encoder. Never full: it has room for all that may be in flight.
    pub records: Sender<Record>,
    /// Closed once the emitter has ended.
    pub emitted: Receiver<()>,
    /// Called about every second, for gauges.
    pub tick: Box<dyn Fn() + Send>,
}

impl IngestStage {
    /// Reads until the stream ends, then stays in the group until the emitter has ended.
    ///
    /// # Errors
    /// What Kafka refuses for good, and gaps.
    pub fn run(self) -> Result<(), StreamError> {
        let Self {
            consumer,
            topic,
            ownership,
            in_flight,
            control,
            records,
            emitted,
            tick,
        } = self;
        let reader = RecordReader {
            consumer: &consumer,
            topic: &topic,
            ownership: &ownership,
            in_flight: &in_flight,
            control: &control,
        };
        if let Err(error) = reader.read(&records, &*tick) {
            control.fail(error);
        }
        drop(records);
        info!("reading ended");
        if let Err(error) = reader.pause() {
            // What is read from here on is thrown away.
            debug!(%error, "cannot pause for the end");
        }
        // Callbacks must be served until the last commit: a revoke now still has something to hand over,
        // and the emitter must not be the one that closes the consumer.
        while !matches!(emitted.try_recv(), Err(TryRecvError::Disconnected)) {
            // Errors change nothing any more.
            drop(consumer.poll(Duration::from_millis(20)));
        }
        Ok(())
    }
}

/// How far a partition was read under its assignment.
struct Reading {
    epoch: Epoch,
    /// The next record's.
    sequence: u64,
    /// Offsets below were read.
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
    fn read(&self, records: &Sender<Record>, tick: &dyn Fn()) -> Result<(), StreamError> {
        let mut readings = BTreeMap::new();
        let mut is_paused = false;
        let mut ticked = Instant::now();
        self.consumer
            .subscribe(&[self.topic])
            .map_err(|error| StreamError::kafka("subscribe", &error))?;
        while !self.control.is_ending() {
            if ticked.elapsed() >= Duration::from_secs(1) {
                ticked = Instant::now();
                tick();
            }
            if is_paused {
                if self.in_flight.is_half_empty() {
                    self.resume()?;
                    is_paused = false;
                }
            } else if !self.in_flight.wait_for_room(STALL) {
                self.pause()?;
                is_paused = true;
            }
            match self.consumer.poll(POLL) {
                None => {}
                Some(Ok(message)) => {
                    if let Some(record) = self.record(&message, &mut readings)
                        && records.send(record).is_err()
                    {
                        // The encoder has ended, and said why.
                        return Ok(());
                    }
                }
                Some(Err(error)) => self.handle(error, &mut readings)?,
            }
        }
        Ok(())
    }

    /// The record, unless its partition left while it was on its way, or it was read before: a pause
    /// inside of the client may rewind a partition by the record that is just being handed out.
    fn record(&self, message: &BorrowedMessage<'_>, readings: &mut BTreeMap<i32, Reading>) -> Option<Record> {
        let (partition, offset) = (message.partition(), message.offset());
        let epoch = self.ownership.epoch(partition)?;
        let begin = Reading {
            epoch,
            sequence: 0,
            next: 0,
        };
        let reading = readings.entry(partition).or_insert(begin);
        if reading.epoch != epoch {
            *reading = Reading {
                epoch,
                sequence: 0,
                next: 0,
            };
        }
        if offset < reading.next {
            return None;
        }
        let sequence = reading.sequence;
        reading.sequence += 1;
        reading.next = offset + 1;
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
            permit: self.in_flight.admit(size, timestamp),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            headers,
            has_broken_headers,
            timestamp,
        })
    }

    fn pause(&self) -> Result<(), StreamError> {
        self.membership().paused.store(true, Ordering::Relaxed);
        debug!("no room: pausing");
        let paused = self.consumer.pause(&self.owned());
        paused.map_err(|error| StreamError::kafka("pause", &error))
    }

    fn resume(&self) -> Result<(), StreamError> {
        self.membership().paused.store(false, Ordering::Relaxed);
        debug!("room again: resuming");
        let resumed = self.consumer.resume(&self.owned());
        resumed.map_err(|error| StreamError::kafka("resume", &error))
    }

    /// Lists of partitions must not outlive their use: the consumer cannot be dropped before them.
    fn owned(&self) -> TopicPartitionList {
        let mut list = TopicPartitionList::new();
        for partition in self.ownership.partitions() {
            list.add_partition(self.topic, partition);
        }
        list
    }

    fn membership(&self) -> &Membership {
        self.consumer.context()
    }

    fn handle(&self, error: KafkaError, readings: &mut BTreeMap<i32, Reading>) -> Result<(), StreamError> {
        match ErrorClass::of_error(&error) {
            _ if self.control.is_ending() => Ok(()),
            ErrorClass::OffsetOutOfRange => self.gap(readings),
            class if class.is_permanent() || matches!(error, KafkaError::MessageConsumptionFatal(_)) => {
                Err(StreamError::kafka("read", &error))
            }
            // The client recovers by itself; a condition that lasts is logged by its context.
            _ => {
                debug!(reason = reason(&error), "reading is disturbed");
                Ok(())
            }
        }
    }

    /// Retention has overtaken the consumer, or the topic was cut. The client has stopped reading the
    /// partition and does not say which one it is.
    fn gap(&self, readings: &mut BTreeMap<i32, Reading>) -> Result<(), StreamError> {
        let standings = self.membership().standings(self.consumer)?;
        let gaps: Vec<Gap> = standings.iter().filter(|gap| gap.is_gap()).cloned().collect();
        if self.membership().on_gap == OnGap::Stop && !gaps.is_empty() {
            return Err(StreamError::Gap(gaps));
        }
        // One that is in range again, as when a cut topic has grown since, must be read on as well.
        for standing in standings {
            let target = if standing.is_gap() {
                warn!(gap = %standing, "going on after a gap");
                standing.low
            } else {
                standing.next
            };
            if let Some(reading) = readings.get_mut(&standing.partition) {
                reading.next = target;
            }
            let sought = self
                .consumer
                .seek(self.topic, standing.partition, Offset::Offset(target), POLL * 50);
            sought.map_err(|error| StreamError::kafka("seek", &error))?;
        }
        Ok(())
    }
}

/// Nothing where a name is not UTF-8: the wrapper panics on it, and no broker looks at names.
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
