//! Reads a topic up to the end that it had when reading began, so that the result is bounded even if the topic grows.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::QuietContext;
use super::errors::{ErrorClass, reason};
use crate::config::{FeedbackTopic, KafkaProperties};
use crate::message::SourceRecord;
use crate::plural::Count;

/// Reading fails if no record arrives for this long before the end is reached.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the brokers may take to answer a single request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// The error of a read that failed, with the topic and the reason.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the topic {topic}: {reason}")]
pub(crate) struct SnapshotError {
    topic: String,
    reason: String,
}

/// A record of the topic.
#[derive(Debug)]
pub(crate) struct SnapshotRecord<'a> {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<&'a [u8]>,
    /// The value; `None` for a tombstone.
    pub value: Option<&'a [u8]>,
}

/// Reads a topic and passes each record to `on_record`, in order within each partition.
///
/// Returns each partition with its end, which is the offset after the last record. Only committed records are read.
///
/// Reading a partition also stops at the client's end-of-partition event, because the last offsets may belong to
/// transaction markers, for which no record arrives.
///
/// # Errors
/// Returns an error if the topic does not exist, the brokers refuse a request or records stop arriving before the end.
pub(crate) fn read(
    source: &FeedbackTopic,
    mut on_record: impl FnMut(SnapshotRecord<'_>),
) -> Result<Vec<(i32, i64)>, SnapshotError> {
    let topic = source.topic.as_str();
    let failed = |reason: String| SnapshotError {
        topic: topic.to_owned(),
        reason,
    };
    let kafka_failed = |error: KafkaError| failed(reason(&error));
    let consumer: BaseConsumer<QuietContext> = client(source)
        .create_with_context(QuietContext)
        .map_err(|error| failed(error.to_string()))?;
    let metadata = consumer
        .fetch_metadata(Some(topic), REQUEST_TIMEOUT)
        .map_err(kafka_failed)?;
    let found = metadata
        .topics()
        .first()
        .ok_or_else(|| failed("the topic does not exist".to_owned()))?;
    if let Some(code) = found.error() {
        return Err(kafka_failed(KafkaError::MetadataFetch(code.into())));
    }
    let mut ends = Vec::new();
    for partition in found.partitions() {
        let (_, high) = consumer
            .fetch_watermarks(topic, partition.id(), REQUEST_TIMEOUT)
            .map_err(kafka_failed)?;
        ends.push((partition.id(), high));
    }
    let mut list = TopicPartitionList::new();
    for &(partition, _) in &ends {
        list.add_partition_offset(topic, partition, Offset::Beginning)
            .map_err(kafka_failed)?;
    }
    consumer.assign(&list).map_err(kafka_failed)?;
    drop(list);
    let mut unfinished: BTreeSet<i32> = ends.iter().map(|&(partition, _)| partition).collect();
    let end_of = |partition: i32| ends.iter().find(|end| end.0 == partition).map_or(0, |end| end.1);
    let mut last_record = Instant::now();
    while !unfinished.is_empty() {
        match consumer.poll(Duration::from_millis(200)) {
            None if last_record.elapsed() > STALL_TIMEOUT => {
                return Err(failed(format!(
                    "no record has arrived for {} s, and the end of {} has not been reached",
                    STALL_TIMEOUT.as_secs(),
                    Count(unfinished.len(), "partition")
                )));
            }
            None => {}
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                unfinished.remove(&partition);
            }
            Some(Err(error)) if last_record.elapsed() > STALL_TIMEOUT => return Err(kafka_failed(error)),
            // librdkafka retries by itself.
            Some(Err(_)) => {}
            Some(Ok(message)) => {
                last_record = Instant::now();
                let end = end_of(message.partition());
                if message.offset() < end && unfinished.contains(&message.partition()) {
                    on_record(record(&message));
                }
                if message.offset() + 1 >= end {
                    unfinished.remove(&message.partition());
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

/// Returns the settings of a consumer that joins no group, so that it needs only the permission to read the topic.
///
/// librdkafka nevertheless requires the name of a group.
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

/// Reads the value of a single record.
///
/// # Errors
/// Returns an error if the record no longer exists or is a tombstone, or if the brokers do not answer.
pub(crate) fn record_at(
    brokers: &[String],
    properties: &KafkaProperties,
    source: &SourceRecord,
) -> Result<Vec<u8>, SnapshotError> {
    let failed = |reason: String| SnapshotError {
        topic: source.topic.clone(),
        reason: format!("partition {} offset {}: {reason}", source.partition, source.offset),
    };
    let kafka_failed = |error: KafkaError| failed(reason(&error));
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
        .map_err(kafka_failed)?;
    consumer.assign(&list).map_err(kafka_failed)?;
    drop(list);
    let deadline = Instant::now() + REQUEST_TIMEOUT;
    while Instant::now() < deadline {
        match consumer.poll(Duration::from_millis(200)) {
            Some(Ok(message)) if message.offset() == source.offset => {
                let value = message.payload().map(<[u8]>::to_vec);
                return value.ok_or_else(|| failed("the record has no value (it is a tombstone)".to_owned()));
            }
            Some(Ok(_)) | Some(Err(KafkaError::PartitionEOF(_))) => {
                return Err(failed("the record no longer exists".to_owned()));
            }
            Some(Err(error)) if ErrorClass::of_error(&error) == ErrorClass::OffsetOutOfRange => {
                return Err(failed("retention has removed the record".to_owned()));
            }
            _ => {}
        }
    }
    Err(failed("no broker answered".to_owned()))
}
