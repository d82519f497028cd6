//! The embedded broker: librdkafka's mock cluster, for `demo` and the tests.
//!
//! It lives in memory, on loopback, and keeps 5 MiB a partition. Its transactions are a facade: offsets
//! sent to one are dropped and aborted messages are visible. So a stream on it must be
//! `at_least_once`.

use rdkafka::error::KafkaError;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;

/// What a client needs to set there, beside the address: a join waits for the session timeout, and a
/// fetch that waits is not woken by new data.
pub const PROPERTIES: [(&str, &str); 2] = [("session.timeout.ms", "6000"), ("fetch.wait.max.ms", "10")];

/// A running embedded broker; gone when dropped.
pub struct EmbeddedBroker {
    cluster: MockCluster<'static, DefaultProducerContext>,
}

impl EmbeddedBroker {
    /// Starts one node on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// librdkafka's.
    pub fn start() -> Result<Self, KafkaError> {
        Ok(Self {
            cluster: MockCluster::new(1)?,
        })
    }

    /// `host:port`.
    pub fn address(&self) -> String {
        self.cluster.bootstrap_servers()
    }

    /// Creates a topic.
    ///
    /// # Errors
    /// The name is taken or no name, or the count is none.
    pub fn create_topic(&self, name: &str, partitions: i32) -> Result<(), KafkaError> {
        self.cluster.create_topic(name, partitions, 1)
    }

    /// For tests that make it fail.
    pub fn cluster(&self) -> &MockCluster<'static, DefaultProducerContext> {
        &self.cluster
    }
}
