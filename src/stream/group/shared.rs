//! The consumer as the stages share it, so that it can be replaced while they run.

use std::sync::{Arc, PoisonError, RwLock};

use rdkafka::error::KafkaResult;

use super::GroupConsumer;

/// Creates a consumer with the same settings and the same context as the one before it.
pub type NewConsumer = Box<dyn Fn() -> KafkaResult<GroupConsumer> + Send + Sync>;

/// The consumer of a stream. The ingest stage polls and replaces it; the emit stage commits offsets through it.
pub struct SharedConsumer {
    current: RwLock<Arc<GroupConsumer>>,
    create: NewConsumer,
}

impl SharedConsumer {
    /// Creates the first consumer.
    ///
    /// # Errors
    /// Returns an error if the client library rejects its settings.
    pub fn new(create: NewConsumer) -> KafkaResult<Self> {
        Ok(Self {
            current: RwLock::new(Arc::new(create()?)),
            create,
        })
    }

    /// Returns the present consumer. It must be held only for as long as it is used, and longer than any list of
    /// partitions that it has been given: the client library waits for both before it closes a consumer.
    pub fn get(&self) -> Arc<GroupConsumer> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the consumer. The old one is closed once no stage uses it.
    ///
    /// # Errors
    /// Returns an error if the client library rejects its settings; the old consumer then stays.
    pub fn replace(&self) -> KafkaResult<()> {
        let new = Arc::new((self.create)()?);
        let old = std::mem::replace(&mut *self.current.write().unwrap_or_else(PoisonError::into_inner), new);
        // Closed outside of the lock, because that may take a moment.
        drop(old);
        Ok(())
    }
}
