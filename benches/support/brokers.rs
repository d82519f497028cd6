//! Brokers for benchmarks: an Apache Kafka that is already running, or the embedded broker in a separate process, so
//! that its CPU time does not count as that of its clients.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use moderatord::kafka::embedded::EmbeddedBroker;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;

/// The time limit of each operation.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The argument that makes this binary run as a broker.
const SERVE: &str = "--serve-embedded-broker";

/// The variable with the address of the Apache Kafka to use. `tests/kafka/broker` starts one and exports it.
const APACHE: &str = "MODERATORD_TEST_BROKERS";

pub struct Broker {
    address: String,
    embedded: Option<Child>,
}

impl Broker {
    /// Returns the Apache Kafka broker that the environment names, if it names one.
    pub fn apache() -> Option<Self> {
        std::env::var(APACHE).ok().map(Self::at)
    }

    /// Returns the Apache Kafka broker at an address.
    pub fn at(address: String) -> Self {
        Self {
            address,
            embedded: None,
        }
    }

    pub fn embedded() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg(SERVE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let address = read_line(&mut child);
        Self {
            address,
            embedded: Some(child),
        }
    }

    pub fn is_apache(&self) -> bool {
        self.embedded.is_none()
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn create_topic(&mut self, name: &str, partitions: i32) {
        if let Some(child) = &mut self.embedded {
            writeln!(child.stdin.as_mut().unwrap(), "{name} {partitions}").unwrap();
            assert_eq!(read_line(child), name);
            return;
        }
        let admin: AdminClient<DefaultClientContext> = self.client().create().unwrap();
        // Shows when the broker has appended a record, whatever the clock of its producer.
        let topic =
            NewTopic::new(name, partitions, TopicReplication::Fixed(1)).set("message.timestamp.type", "LogAppendTime");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let options = AdminOptions::new().operation_timeout(Some(TIMEOUT));
        let created = runtime.block_on(admin.create_topics([&topic], &options));
        created.unwrap().remove(0).unwrap();
    }

    /// Returns the settings of a client, apart from its role.
    pub fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.address);
        config
    }

    /// Writes the keys and values to all partitions in turn.
    pub fn produce(&self, topic: &str, partitions: i32, records: &[(String, Vec<u8>)]) {
        let mut config = self.client();
        config
            .set("linger.ms", "50")
            .set("compression.type", "lz4")
            .set("enable.idempotence", "true");
        let producer: BaseProducer = config.create().unwrap();
        for ((key, value), partition) in records.iter().zip((0..partitions).cycle()) {
            let mut record = BaseRecord::to(topic).partition(partition).key(key).payload(value);
            while let Err((error, back)) = producer.send(record) {
                assert_eq!(error, KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull));
                record = back;
                producer.poll(Duration::from_millis(10));
            }
        }
        producer.flush(TIMEOUT).unwrap();
        self.assert_complete(topic, partitions);
    }

    /// Panics if records of a topic have been deleted. The embedded broker keeps only 5 MiB per partition.
    fn assert_complete(&self, topic: &str, partitions: i32) {
        let consumer: BaseConsumer = self.client().create().unwrap();
        for partition in 0..partitions {
            let (low, _) = consumer.fetch_watermarks(topic, partition, TIMEOUT).unwrap();
            assert_eq!(low, 0, "{topic} has lost its first records, use fewer --events");
        }
    }

    /// Passes every committed value of a topic to `seen` and returns at the end of the topic.
    pub fn read(&self, topic: &str, partitions: i32, mut seen: impl FnMut(&[u8])) {
        self.assert_complete(topic, partitions);
        let mut config = self.client();
        config
            .set("group.id", "reader")
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "10")
            .set("enable.partition.eof", "true");
        let consumer: BaseConsumer = config.create().unwrap();
        let mut list = TopicPartitionList::new();
        for partition in 0..partitions {
            list.add_partition_offset(topic, partition, Offset::Beginning).unwrap();
        }
        consumer.assign(&list).unwrap();
        // The list must be dropped before the consumer.
        drop(list);
        let mut open: BTreeSet<i32> = (0..partitions).collect();
        let deadline = Instant::now() + TIMEOUT;
        while !open.is_empty() {
            assert!(Instant::now() < deadline, "timed out before the end of {topic}");
            match consumer.poll(Duration::from_millis(100)) {
                None => {}
                Some(Ok(message)) => seen(message.payload().unwrap()),
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    open.remove(&partition);
                }
                Some(Err(error)) => panic!("{topic}: {error}"),
            }
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Some(child) = &mut self.embedded {
            // The child process ends when its input is closed.
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }
}

/// Reads one line of the broker process's output.
fn read_line(child: &mut Child) -> String {
    let mut line = String::new();
    // The child writes one line per request, so nothing is left in the buffer.
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    line.trim().to_owned()
}

/// If this process was started as the embedded broker, serves until the input ends and returns true.
pub fn serve_if_requested() -> bool {
    if !std::env::args().any(|argument| argument == SERVE) {
        return false;
    }
    let broker = EmbeddedBroker::start().unwrap();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", broker.address()).unwrap();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (name, partitions) = line.split_once(' ').unwrap();
        broker.create_topic(name, partitions.parse().unwrap()).unwrap();
        writeln!(out, "{name}").unwrap();
    }
    true
}
