//! Everything in a topic up to its end as it stood at the start: bounded, whatever is written meanwhile.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;

use super::{QuietContext, reason};
use crate::config::{FeedbackTopic, KafkaProperties};
use crate::message::SourceRecord;

/// Nothing arrives for this long although the end is not reached: the brokers are away.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the topic {topic}: {reason}")]
pub struct SnapshotError {
    topic: String,
    reason: String,
}

/// One record of the topic.
#[derive(Debug)]
pub struct SnapshotRecord<'a> {
    /// Partition.
    pub partition: i32,
    /// Offset in it.
    pub offset: i64,
    /// Key.
    pub key: Option<&'a [u8]>,
    /// Value; none is a tombstone.
    pub value: Option<&'a [u8]>,
}

/// Reads a topic and hands each record over, in order within each partition; gives the end of each
/// partition, which is the offset after the last one read.
///
/// Only committed records are seen. A partition ends where the client says so, not where an offset
/// was: transaction markers take offsets of their own.
///
/// # Errors
/// [`SnapshotError`].
pub fn read(
    source: &FeedbackTopic,
    mut each: impl FnMut(SnapshotRecord<'_>),
) -> Result<Vec<(i32, i64)>, SnapshotError> {
    let topic = source.topic.as_str();
    let failed = |reason: String| SnapshotError {
        topic: topic.to_owned(),
        reason,
    };
    let refused = |error: KafkaError| failed(reason(&error));
    let consumer: BaseConsumer<QuietContext> = client(source)
        .create_with_context(QuietContext)
        .map_err(|error| failed(error.to_string()))?;
    let metadata = consumer.fetch_metadata(Some(topic), PATIENCE / 4).map_err(refused)?;
    let found = metadata
        .topics()
        .first()
        .ok_or_else(|| failed("no such topic".to_owned()))?;
    if let Some(code) = found.error() {
        return Err(refused(KafkaError::MetadataFetch(code.into())));
    }
    let mut ends = Vec::new();
    for partition in found.partitions() {
        let (_, high) = consumer
            .fetch_watermarks(topic, partition.id(), PATIENCE / 4)
            .map_err(refused)?;
        ends.push((partition.id(), high));
    }
    let mut list = TopicPartitionList::new();
    for &(partition, _) in &ends {
        list.add_partition_offset(topic, partition, Offset::Beginning)
            .map_err(refused)?;
    }
    consumer.assign(&list).map_err(refused)?;
    drop(list);
    let mut open: BTreeSet<i32> = ends.iter().map(|&(partition, _)| partition).collect();
    let end_of = |partition: i32| ends.iter().find(|end| end.0 == partition).map_or(0, |end| end.1);
    let mut heard = Instant::now();
    while !open.is_empty() {
        match consumer.poll(Duration::from_millis(200)) {
            None if heard.elapsed() > PATIENCE => {
                return Err(failed(format!("{} partitions do not end", open.len())));
            }
            None => {}
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                open.remove(&partition);
            }
            Some(Err(error)) if heard.elapsed() > PATIENCE => return Err(refused(error)),
            // The client tries again by itself.
            Some(Err(_)) => {}
            Some(Ok(message)) => {
                heard = Instant::now();
                let end = end_of(message.partition());
                if message.offset() < end && open.contains(&message.partition()) {
                    each(record(&message));
                }
                if message.offset() + 1 >= end {
                    open.remove(&message.partition());
                }
            }
        }
    }
    Ok(ends)
}

fn record<'a>(message: &'a BorrowedMessage<'_>) -> SnapshotRecord<'a> {
    SnapshotRecord {
        partition: message.partition(),
        offset: message.offset(),
        key: message.key(),
        value: message.payload(),
    }
}

/// Member of no group: it needs no permission but to read the topic. The client wants a group's name
/// all the same before it hands out a queue to read from.
fn client(source: &FeedbackTopic) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("client.id", "moderatord-retrain")
        .set("fetch.wait.max.ms", "50");
    for (name, value) in source.properties.iter() {
        config.set(name, value);
    }
    config
        .set("bootstrap.servers", source.brokers.join(","))
        .set("group.id", "moderatord-reader")
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true");
    config
}

/// One record's value, read again.
///
/// # Errors
/// [`SnapshotError`]: it is not there any more, or is a tombstone.
pub fn record_at(
    brokers: &[String],
    properties: &KafkaProperties,
    source: &SourceRecord,
) -> Result<Vec<u8>, SnapshotError> {
    let failed = |reason: String| SnapshotError {
        topic: source.topic.clone(),
        reason: format!("partition {} offset {}: {reason}", source.partition, source.offset),
    };
    let refused = |error: KafkaError| failed(reason(&error));
    let topic = FeedbackTopic {
        brokers: brokers.to_vec(),
        properties: properties.clone(),
        topic: source.topic.clone(),
    };
    let consumer: BaseConsumer<QuietContext> = client(&topic)
        .set("auto.offset.reset", "error")
        .create_with_context(QuietContext)
        .map_err(|error| failed(error.to_string()))?;
    let mut list = TopicPartitionList::new();
    let offset = Offset::Offset(source.offset);
    list.add_partition_offset(&source.topic, source.partition, offset)
        .map_err(refused)?;
    consumer.assign(&list).map_err(refused)?;
    drop(list);
    let deadline = Instant::now() + PATIENCE / 4;
    while Instant::now() < deadline {
        match consumer.poll(Duration::from_millis(200)) {
            Some(Ok(message)) if message.offset() == source.offset => {
                let value = message.payload().map(<[u8]>::to_vec);
                return value.ok_or_else(|| failed("the record has no value".to_owned()));
            }
            Some(Ok(_)) | Some(Err(KafkaError::PartitionEOF(_))) => {
                return Err(failed("the record is gone".to_owned()));
            }
            Some(Err(KafkaError::MessageConsumption(
                RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange,
            ))) => return Err(failed("retention has removed the record".to_owned())),
            _ => {}
        }
    }
    Err(failed("no broker answers".to_owned()))
}
