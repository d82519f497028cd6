//! Writes feedback to its topic.

use std::time::Instant;

use rdkafka::ClientConfig;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::producer::{FutureProducer, FutureRecord};
use tracing::warn;

use super::QuietContext;
use super::errors::reason;
use crate::config::FeedbackTopic;

/// Writes records to the feedback topic.
pub(crate) struct FeedbackWriter {
    producer: FutureProducer<QuietContext>,
    topic: String,
}

impl FeedbackWriter {
    /// Creates a writer. It connects to the brokers on its own threads.
    ///
    /// # Errors
    /// Returns the client library's reason if its settings are not valid.
    pub(crate) fn new(topic: &FeedbackTopic) -> Result<Self, String> {
        let mut config = ClientConfig::new();
        for (name, value) in topic.properties.iter() {
            config.set(name, value);
        }
        config
            .set("bootstrap.servers", topic.brokers.join(","))
            .set("enable.idempotence", "true")
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
    /// Returns the reason if the record is not acknowledged until the deadline. It may be written in spite of that.
    pub(crate) async fn write(&self, key: &str, value: &str, deadline: Instant) -> Result<(), String> {
        let record = FutureRecord::to(&self.topic).key(key).payload(value);
        let queue = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout_at(deadline.into(), self.producer.send(record, queue)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err((error, _))) => {
                let reason = reason(&error);
                warn!(topic = self.topic, reason, "cannot write feedback");
                Err(reason)
            }
            Err(_) => Err("the brokers did not acknowledge it in time".to_owned()),
        }
    }
}
