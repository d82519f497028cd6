//! Writes feedback to its topic.

use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::{FutureProducer, FutureRecord};
use tracing::warn;

use super::QuietContext;
use super::errors::reason;
use crate::config::FeedbackTopic;

/// The most KiB of records that wait for the brokers.
const QUEUE_KBYTES: &str = "16384";

/// Why a record may not have been written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotWritten {
    #[error("the brokers did not acknowledge it in time")]
    TimedOut,
    #[error("{0}")]
    Failed(String),
}

/// Writes records to the feedback topic.
pub(crate) struct FeedbackWriter {
    producer: FutureProducer<QuietContext>,
    topic: String,
}

impl FeedbackWriter {
    /// Creates a writer, which gives a record up after `timeout`. It connects to the brokers on its own threads.
    ///
    /// # Errors
    /// Returns the client library's reason if its settings are not valid.
    pub(crate) fn new(topic: &FeedbackTopic, timeout: Duration) -> Result<Self, String> {
        let mut config = ClientConfig::new();
        for (name, value) in topic.properties.iter() {
            config.set(name, value);
        }
        config
            .set("bootstrap.servers", topic.brokers.join(","))
            .set("enable.idempotence", "true")
            // While no broker answers, records must not pile up for callers that have gone.
            .set("message.timeout.ms", timeout.as_millis().to_string())
            .set("queue.buffering.max.kbytes", QUEUE_KBYTES)
            .set("compression.type", "lz4");
        let producer = FutureProducer::from_config_and_context(&config, QuietContext);
        Ok(Self {
            producer: producer.map_err(|error| reason(&error))?,
            topic: topic.topic.clone(),
        })
    }

    /// Writes a record, and waits until all in-sync replicas have it.
    ///
    /// # Errors
    /// Returns an error if the record is not acknowledged until the deadline. It may be written in spite of that.
    pub(crate) async fn write(&self, key: &str, value: &str, deadline: Instant) -> Result<(), NotWritten> {
        let record = FutureRecord::to(&self.topic).key(key).payload(value);
        let queue = deadline.saturating_duration_since(Instant::now());
        let error = match tokio::time::timeout_at(deadline.into(), self.producer.send(record, queue)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err((error, _))) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageTimedOut) => {
                NotWritten::TimedOut
            }
            Ok(Err((error, _))) => NotWritten::Failed(reason(&error)),
            Err(_) => NotWritten::TimedOut,
        };
        warn!(topic = self.topic, reason = %error, "cannot write feedback");
        Err(error)
    }
}
