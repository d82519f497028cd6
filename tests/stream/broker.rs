//! A broker for the tests: the embedded one, or the Apache Kafka that `MODERATORD_TEST_BROKERS` names.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use moderatord::config::Delivery;
use moderatord::kafka::embedded::EmbeddedBroker;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Header, Headers, Message, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;

use crate::common::process::Start;

/// The longest wait for anything in these tests.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// As many replicas as the cluster has nodes.
const BROKER_DEFAULT: TopicReplication<'static> = TopicReplication::Fixed(-1);

pub enum Broker {
    Embedded(EmbeddedBroker),
    Apache(String),
}

/// A record as seen by a reader of committed records.
#[derive(Debug, Clone)]
pub struct OutputRecord {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: BTreeMap<String, String>,
    /// In milliseconds since 1970.
    pub timestamp: i64,
}

impl OutputRecord {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(self.value.as_deref().unwrap()).unwrap()
    }

    /// Returns the partition and offset of the input record that it was written for.
    pub fn source(&self) -> (i32, i64) {
        let number = |name: &str| self.headers[name].parse::<i64>().unwrap();
        let partition = number("moderatord.source.partition");
        (i32::try_from(partition).unwrap(), number("moderatord.source.offset"))
    }
}

/// Returns a name that no other test and no earlier run on the same broker uses.
pub fn unique(name: &str) -> String {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis();
    format!("{name}-{now}-{}-{count}", std::process::id())
}

/// Returns the value of a variable that the script that starts Apache Kafka exports.
pub fn variable(name: &str) -> String {
    let name = format!("MODERATORD_TEST_{name}");
    std::env::var(&name).unwrap_or_else(|_| panic!("{name} is not set: run this test with tests/kafka/suite"))
}

/// Runs a script from `tests/kafka` and returns its output.
pub fn script(name: &str, arguments: &[&str]) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/kafka")
        .join(name);
    let output = std::process::Command::new(path).args(arguments).finish().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{name} {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

type Keyed<'a> = (i32, &'a str, Option<&'a [u8]>);

fn with_key((partition, key, value): Keyed<'_>) -> (i32, Option<&str>, Option<&[u8]>) {
    (partition, Some(key), value)
}

fn options() -> AdminOptions {
    AdminOptions::new().operation_timeout(Some(PATIENCE))
}

fn wait<T>(request: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(request)
}

impl Broker {
    pub fn start() -> Self {
        match std::env::var("MODERATORD_TEST_BROKERS") {
            Ok(brokers) => Self::Apache(brokers),
            Err(_) => Self::embedded(),
        }
    }

    pub fn embedded() -> Self {
        Self::Embedded(EmbeddedBroker::start().unwrap())
    }

    /// Returns the Apache Kafka broker, for tests of features that the embedded one does not have.
    pub fn apache() -> Self {
        Self::Apache(variable("BROKERS"))
    }

    pub fn address(&self) -> String {
        match self {
            Self::Embedded(broker) => broker.address(),
            Self::Apache(brokers) => brokers.clone(),
        }
    }

    /// Returns the strongest delivery guarantee that the broker supports.
    pub fn delivery(&self) -> Delivery {
        match self {
            Self::Embedded(_) => Delivery::AtLeastOnce,
            Self::Apache(_) => Delivery::ExactlyOnce,
        }
    }

    pub fn is_apache(&self) -> bool {
        matches!(self, Self::Apache(_))
    }

    pub fn create_topic(&self, name: &str, partitions: i32) {
        self.create_topic_with(name, partitions, &[]);
    }

    pub fn create_topic_with(&self, name: &str, partitions: i32, settings: &[(&str, &str)]) {
        match self {
            Self::Embedded(broker) => {
                assert!(settings.is_empty(), "the embedded broker has no topic settings");
                broker.create_topic(name, partitions).unwrap();
            }
            Self::Apache(_) => {
                let mut topic = NewTopic::new(name, partitions, BROKER_DEFAULT);
                for (name, value) in settings {
                    topic = topic.set(name, value);
                }
                let deadline = Instant::now() + PATIENCE;
                // A request to a bootstrap address fails if the client learns the broker's real address meanwhile.
                let mut created = loop {
                    match wait(self.admin().create_topics([&topic], &options())) {
                        Ok(created) => break created,
                        Err(error) => assert!(Instant::now() < deadline, "cannot create {name}: {error}"),
                    }
                };
                // Only a failed request can have created the topic before, because no test uses the name of another.
                if let Err((_, code)) = created.remove(0) {
                    assert_eq!(code, RDKafkaErrorCode::TopicAlreadyExists, "{name}");
                }
                self.await_leaders(name, partitions);
            }
        }
    }

    /// Deletes a topic and creates it again.
    pub fn recreate_topic(&self, name: &str, partitions: i32) {
        self.delete_topic(name);
        self.create_deleted_topic(name, partitions);
    }

    pub fn delete_topic(&self, name: &str) {
        let deleted = wait(self.admin().delete_topics(&[name], &options()));
        deleted.unwrap().remove(0).unwrap();
    }

    /// Creates a topic whose name belonged to a topic that was deleted.
    pub fn create_deleted_topic(&self, name: &str, partitions: i32) {
        let deadline = Instant::now() + PATIENCE;
        // The name is taken until the deletion has finished.
        while wait(
            self.admin()
                .create_topics([&NewTopic::new(name, partitions, BROKER_DEFAULT)], &options()),
        )
        .unwrap()
        .remove(0)
        .is_err()
        {
            assert!(Instant::now() < deadline, "cannot create {name} again");
            std::thread::sleep(Duration::from_millis(50));
        }
        self.await_leaders(name, partitions);
    }

    /// Adds partitions to a topic, so that it has `partitions`.
    pub fn grow_topic(&self, name: &str, partitions: i32) {
        let count = usize::try_from(partitions).unwrap();
        wait(
            self.admin()
                .create_partitions(&[NewPartitions::new(name, count)], &options()),
        )
        .unwrap()
        .remove(0)
        .unwrap();
        self.await_leaders(name, partitions);
    }

    /// Deletes all records of a partition before an offset, as retention would.
    pub fn delete_before(&self, topic: &str, partition: i32, offset: i64) {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(topic, partition, Offset::Offset(offset))
            .unwrap();
        wait(self.admin().delete_records(&list, &options())).unwrap();
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.client().create().unwrap()
    }

    fn await_leaders(&self, name: &str, partitions: i32) {
        let consumer: BaseConsumer = self.client().create().unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let metadata = consumer.fetch_metadata(Some(name), PATIENCE).unwrap();
            let topic = &metadata.topics()[0];
            let led = topic.partitions().iter().filter(|partition| partition.leader() >= 0);
            if led.count() == usize::try_from(partitions).unwrap() {
                return;
            }
            assert!(Instant::now() < deadline, "no leaders for {name}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.address());
        config
    }

    /// Writes records, each given as partition, key and value.
    pub fn produce<'a>(&self, topic: &str, records: impl IntoIterator<Item = (i32, &'a str, Option<&'a [u8]>)>) {
        self.produce_with(topic, records, &OwnedHeaders::new());
    }

    /// Writes records, some of which have no key.
    pub fn produce_keyed<'a>(
        &self,
        topic: &str,
        records: impl IntoIterator<Item = (i32, Option<&'a str>, Option<&'a [u8]>)>,
    ) {
        self.produce_all(topic, records, &OwnedHeaders::new(), None);
    }

    /// Produces records that were created at `timestamp`, in milliseconds since 1970.
    pub fn produce_at<'a>(
        &self,
        topic: &str,
        records: impl IntoIterator<Item = (i32, &'a str, Option<&'a [u8]>)>,
        timestamp: i64,
    ) {
        self.produce_all(
            topic,
            records.into_iter().map(with_key),
            &OwnedHeaders::new(),
            Some(timestamp),
        );
    }

    pub fn produce_with<'a>(
        &self,
        topic: &str,
        records: impl IntoIterator<Item = (i32, &'a str, Option<&'a [u8]>)>,
        headers: &OwnedHeaders,
    ) {
        self.produce_all(topic, records.into_iter().map(with_key), headers, None);
    }

    fn produce_all<'a>(
        &self,
        topic: &str,
        records: impl IntoIterator<Item = (i32, Option<&'a str>, Option<&'a [u8]>)>,
        headers: &OwnedHeaders,
        timestamp: Option<i64>,
    ) {
        let mut config = self.client();
        config
            .set("linger.ms", "5")
            .set("message.max.bytes", "20000000")
            .set("acks", "all");
        let producer: BaseProducer = config.create().unwrap();
        for (partition, key, value) in records {
            let mut record: BaseRecord<'_, str, [u8]> =
                BaseRecord::to(topic).partition(partition).headers(headers.clone());
            (record.key, record.payload) = (key, value);
            record.timestamp = timestamp;
            while let Err((error, refused)) = producer.send(record) {
                assert_eq!(error, KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull));
                record = refused;
                producer.poll(Duration::from_millis(10));
            }
        }
        producer.flush(PATIENCE).unwrap();
    }

    /// Returns all committed records of a topic, sorted by partition and offset.
    pub fn read(&self, topic: &str) -> Vec<OutputRecord> {
        self.read_at("read_committed", topic)
    }

    /// Returns the number of records of a topic that belong to aborted transactions.
    pub fn count_aborted(&self, topic: &str) -> usize {
        self.read_at("read_uncommitted", topic).len() - self.read(topic).len()
    }

    fn read_at(&self, isolation: &str, topic: &str) -> Vec<OutputRecord> {
        let mut config = self.client();
        config
            .set("group.id", "reader")
            .set("isolation.level", isolation)
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "earliest")
            .set("fetch.wait.max.ms", "10")
            .set("enable.partition.eof", "true");
        let consumer: BaseConsumer = config.create().unwrap();
        let partitions = consumer.fetch_metadata(Some(topic), PATIENCE).unwrap().topics()[0]
            .partitions()
            .len();
        let mut list = TopicPartitionList::new();
        for partition in 0..partitions {
            let partition = i32::try_from(partition).unwrap();
            list.add_partition_offset(topic, partition, Offset::Beginning).unwrap();
        }
        consumer.assign(&list).unwrap();
        drop(list);
        let mut open: std::collections::BTreeSet<i32> = (0..i32::try_from(partitions).unwrap()).collect();
        let mut records = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while !open.is_empty() {
            assert!(Instant::now() < deadline, "{topic}: the end was not reached");
            match consumer.poll(Duration::from_millis(100)) {
                None => {}
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    open.remove(&partition);
                }
                Some(Err(error)) => panic!("{topic}: {error}"),
                Some(Ok(message)) => {
                    let text = |header: Header<'_, &[u8]>| {
                        let value = String::from_utf8(header.value.unwrap_or_default().to_vec()).unwrap();
                        (header.key.to_owned(), value)
                    };
                    records.push(OutputRecord {
                        partition: message.partition(),
                        offset: message.offset(),
                        key: message.key().map(<[u8]>::to_vec),
                        value: message.payload().map(<[u8]>::to_vec),
                        headers: message
                            .headers()
                            .map(|headers| headers.iter().map(text).collect())
                            .unwrap_or_default(),
                        timestamp: message.timestamp().to_millis().unwrap(),
                    });
                }
            }
        }
        records.sort_by_key(|record| (record.partition, record.offset));
        records
    }

    /// Returns the offset after the last one of a partition, whether a record or a transaction's marker has it.
    pub fn end(&self, topic: &str, partition: i32) -> i64 {
        let consumer: BaseConsumer = self.client().create().unwrap();
        consumer.fetch_watermarks(topic, partition, PATIENCE).unwrap().1
    }

    /// Returns the committed offset of each partition, or 0 for a partition without one.
    pub fn committed(&self, group: &str, topic: &str, partitions: i32) -> Vec<i64> {
        let mut config = self.client();
        config.set("group.id", group).set("isolation.level", "read_committed");
        let consumer: BaseConsumer = config.create().unwrap();
        let mut list = TopicPartitionList::new();
        list.add_partition_range(topic, 0, partitions - 1);
        let deadline = Instant::now() + PATIENCE;
        // A broker that has just restarted is not a group coordinator yet.
        let found = loop {
            match consumer.committed_offsets(list.clone(), Duration::from_secs(10)) {
                Ok(found) => break found,
                Err(error) => assert!(Instant::now() < deadline, "{group}: {error}"),
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        let offset = |offset| match offset {
            Offset::Offset(offset) => offset,
            _ => 0,
        };
        found
            .elements()
            .iter()
            .map(|element| offset(element.offset()))
            .collect()
    }
}
