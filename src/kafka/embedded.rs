//! Runs the embedded broker, which is librdkafka's mock cluster, for `demo` and the tests.
//!
//! The broker listens on the loopback interface, stores records in memory and keeps at most 5 MiB per partition. It
//! does not implement transactions: offsets sent to a transaction are dropped, and records of aborted transactions are
//! visible. A stream that uses it must therefore be `at_least_once`.

use rdkafka::error::KafkaError;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;

/// Settings of librdkafka that reduce delays with this broker: it makes a member that joins a group wait for the
/// session timeout, and does not answer a waiting fetch request early when new records arrive.
pub const CLIENT_PROPERTIES: [(&str, &str); 2] = [("session.timeout.ms", "6000"), ("fetch.wait.max.ms", "10")];

/// A running embedded broker, which is stopped on drop.
pub struct EmbeddedBroker {
    cluster: MockCluster<'static, DefaultProducerContext>,
}

impl EmbeddedBroker {
    /// Starts a broker with one node on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// Returns an error if librdkafka cannot create the mock cluster.
    pub fn start() -> Result<Self, KafkaError> {
        Ok(Self {
            cluster: MockCluster::new(1)?,
        })
    }

    /// Returns the bootstrap address as `host:port`.
    pub fn address(&self) -> String {
        self.cluster.bootstrap_servers()
    }

    /// Creates a topic with the given number of partitions.
    ///
    /// # Errors
    /// Returns an error if the topic exists, or if the name or the number of partitions is not valid.
    pub fn create_topic(&self, name: &str, partitions: i32) -> Result<(), KafkaError> {
        self.cluster.create_topic(name, partitions, 1)
    }

    /// Returns the mock cluster, for tests that make the broker fail.
    pub fn cluster(&self) -> &MockCluster<'static, DefaultProducerContext> {
        &self.cluster
    }
}
