//! The first stage: one thread owns the consumer, always polls, and reads while there is room.
//!
//! What it reads is bounded by what is in flight in all stages. A short stall is waited out, since a
//! pause throws away what the client has fetched ahead; a long one pauses the partitions and goes on
//! polling, so that the group never misses this member.

mod beginning;
mod membership;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use rdkafka::consumer::Consumer;
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;
use tracing::{debug, info, warn};

pub use membership::{GroupConsumer, Membership};

use crate::config::OnGap;
use crate::kafka::reason;
use crate::stream::{Control, Epoch, Header, InFlight, Ownership, Place, Record, StreamError};

/// How long the consumer may go unpolled while there is no room: far below any poll interval, and
/// longer than a micro-batch usually takes.
const STALL: Duration = Duration::from_millis(500);

/// Longest wait for a record: how soon this thread notices anything else.
const POLL: Duration = Duration::from_millis(100);

/// The stage.
pub struct Ingest {
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

impl Ingest {
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
        let reader = Reader {
            consumer: &consumer,
            topic: &topic,
            ownership: &ownership,
            in_flight: &in_flight,
        };
        let mut sequences = BTreeMap::new();
        let mut is_paused = false;
        let mut ticked = Instant::now();
        consumer
            .subscribe(&[topic.as_str()])
            .map_err(|error| kafka("subscribe", &error))?;
        while !control.is_ending() {
            if ticked.elapsed() >= Duration::from_secs(1) {
                ticked = Instant::now();
                tick();
            }
            if is_paused {
                if in_flight.is_half_empty() {
                    reader.resume()?;
                    is_paused = false;
                }
            } else if !in_flight.wait_for_room(STALL) {
                reader.pause()?;
                is_paused = true;
            }
            match consumer.poll(POLL) {
                None => {}
                Some(Ok(message)) => {
                    if let Some(record) = reader.record(&message, &mut sequences)
                        && records.send(record).is_err()
                    {
                        // The encoder has ended, and said why.
                        break;
                    }
                }
                Some(Err(error)) => reader.handle(error, &control)?,
            }
        }
        drop(records);
        info!("reading ended");
        reader.pause()?;
        // Callbacks must be served until the last commit: a revoke now still has something to hand over.
        while !matches!(emitted.try_recv(), Err(crossbeam_channel::TryRecvError::Disconnected)) {
            // Errors change nothing any more.
            drop(consumer.poll(Duration::from_millis(20)));
        }
        Ok(())
    }
}

struct Reader<'a> {
    consumer: &'a GroupConsumer,
    topic: &'a str,
    ownership: &'a Ownership,
    in_flight: &'a Arc<InFlight>,
}

impl Reader<'_> {
    /// The record, unless its partition left while it was on its way.
    fn record(&self, message: &BorrowedMessage<'_>, sequences: &mut BTreeMap<i32, (Epoch, u64)>) -> Option<Record> {
        let partition = message.partition();
        let epoch = self.ownership.epoch(partition)?;
        let (of, next) = sequences.entry(partition).or_insert((epoch, 0));
        if *of != epoch {
            (*of, *next) = (epoch, 0);
        }
        let sequence = *next;
        *next += 1;
        let headers = message.headers().map(headers).unwrap_or_default();
        let timestamp = message.timestamp().to_millis();
        let size = Record::size(message.key(), message.payload(), &headers);
        Some(Record {
            place: Place {
                partition,
                epoch,
                sequence,
                offset: message.offset(),
            },
            permit: self.in_flight.admit(size, timestamp),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            headers,
            timestamp,
        })
    }

    fn pause(&self) -> Result<(), StreamError> {
        self.membership().paused.store(true, Ordering::Relaxed);
        debug!("no room: pausing");
        let paused = self.consumer.pause(&self.owned());
        paused.map_err(|error| kafka("pause", &error))
    }

    fn resume(&self) -> Result<(), StreamError> {
        self.membership().paused.store(false, Ordering::Relaxed);
        debug!("room again: resuming");
        let resumed = self.consumer.resume(&self.owned());
        resumed.map_err(|error| kafka("resume", &error))
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

    fn handle(&self, error: KafkaError, control: &Control) -> Result<(), StreamError> {
        match error.rdkafka_error_code() {
            _ if control.is_ending() => Ok(()),
            Some(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange) => self.gap(),
            Some(RDKafkaErrorCode::FencedInstanceId) => Err(StreamError::Fenced {
                doing: "reading",
                reason: reason(&error),
            }),
            _ if matches!(error, KafkaError::MessageConsumptionFatal(_)) || membership::is_permanent(&error) => {
                Err(kafka("read", &error))
            }
            // The client goes on by itself; what lasts is told as a condition.
            _ => {
                debug!(reason = reason(&error), "reading is disturbed");
                Ok(())
            }
        }
    }

    /// Retention has overtaken the consumer.
    fn gap(&self) -> Result<(), StreamError> {
        let gaps = self.membership().gaps(self.consumer)?;
        if self.membership().on_gap == OnGap::Stop && !gaps.is_empty() {
            return Err(StreamError::Gap(gaps));
        }
        for gap in gaps {
            warn!(%gap, "going on after a gap");
            let sought = self
                .consumer
                .seek(self.topic, gap.partition, Offset::Offset(gap.low), POLL * 50);
            sought.map_err(|error| kafka("seek", &error))?;
        }
        Ok(())
    }
}

fn headers(headers: &impl Headers) -> Vec<Header> {
    headers
        .iter()
        .map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
        .collect()
}

fn kafka(doing: &'static str, error: &KafkaError) -> StreamError {
    StreamError::Kafka {
        doing,
        reason: reason(error),
    }
}
