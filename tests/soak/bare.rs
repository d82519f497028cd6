//! The plainest loop that consumes, transforms and produces exactly once, on the same client library as the daemon. It
//! shows how long the cluster and the client library alone take to continue after a fault.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{Header, Message, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

type TransactionalProducer = ThreadedProducer<DefaultProducerContext>;

/// How long one call of the client may take. A call that times out is made again.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a transaction gathers records, like the daemon's `kafka.commit_interval`.
const COMMIT_INTERVAL: Duration = Duration::from_millis(50);

/// Copies comments to a topic, as one of several members of a group.
///
/// Its threads are never joined, because a call of the client library may not return.
pub struct BareLoop {
    pub client: ClientConfig,
    pub comments: String,
    pub output: String,
    pub group: String,
    pub stop: AtomicBool,
    /// How many transactions were aborted.
    pub aborted: AtomicUsize,
    /// How many producers were replaced.
    pub rebuilt: AtomicUsize,
}

/// What has to happen before the next transaction.
enum Failure {
    Abort,
    Rebuild,
}

impl BareLoop {
    /// Runs the member with the given number until it is stopped.
    pub fn run(&self, number: usize) {
        let mut config = self.client.clone();
        config
            .set("group.id", &self.group)
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "earliest");
        let consumer: BaseConsumer = config.create().unwrap();
        consumer.subscribe(&[&self.comments]).unwrap();
        let Some(mut producer) = self.connect(number) else {
            return;
        };
        while !self.is_stopped() {
            let batch = poll(&consumer);
            if batch.is_empty() {
                continue;
            }
            let Err(failure) = self.transact(&producer, &consumer, &batch) else {
                continue;
            };
            let is_aborted = matches!(failure, Failure::Abort) && {
                self.aborted.fetch_add(1, Ordering::Relaxed);
                self.retry(|| producer.abort_transaction(CALL_TIMEOUT)).is_ok()
            };
            if !is_aborted {
                self.rebuilt.fetch_add(1, Ordering::Relaxed);
                drop(producer);
                let Some(next) = self.connect(number) else { return };
                producer = next;
            }
            self.rewind(&consumer);
        }
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Returns a producer that has fenced the earlier one, or `None` if the loop is stopped.
    fn connect(&self, number: usize) -> Option<TransactionalProducer> {
        let mut config = self.client.clone();
        config.set("transactional.id", format!("{}/{number}", self.group));
        while !self.is_stopped() {
            let producer: TransactionalProducer = config.create().unwrap();
            if self.retry(|| producer.init_transactions(CALL_TIMEOUT)).is_ok() {
                return Some(producer);
            }
        }
        None
    }

    /// Copies a batch and commits its offsets, in one transaction.
    fn transact(
        &self,
        producer: &TransactionalProducer,
        consumer: &BaseConsumer,
        batch: &[OwnedMessage],
    ) -> Result<(), Failure> {
        self.retry(|| producer.begin_transaction())?;
        let mut next = BTreeMap::new();
        for message in batch {
            next.insert(message.partition(), message.offset() + 1);
            self.retry(|| self.send(producer, message))?;
        }
        let mut offsets = TopicPartitionList::new();
        for (partition, offset) in next {
            offsets
                .add_partition_offset(&self.comments, partition, Offset::Offset(offset))
                .unwrap();
        }
        let group = consumer.group_metadata().ok_or(Failure::Abort)?;
        self.retry(|| producer.send_offsets_to_transaction(&offsets, &group, CALL_TIMEOUT))?;
        self.retry(|| producer.commit_transaction(CALL_TIMEOUT))
    }

    fn send(&self, producer: &TransactionalProducer, message: &OwnedMessage) -> KafkaResult<()> {
        let (partition, offset) = (message.partition().to_string(), message.offset().to_string());
        let mut headers = OwnedHeaders::new();
        for (key, value) in [
            ("moderatord.source.partition", &partition),
            ("moderatord.source.offset", &offset),
        ] {
            headers = headers.insert(Header {
                key,
                value: Some(value),
            });
        }
        let mut record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(&self.output)
            .partition(message.partition())
            .headers(headers);
        record.key = message.key();
        record.payload = message.payload();
        producer.send(record).map_err(|(error, _)| error)
    }

    /// Repeats a call for as long as the client says that it can be repeated.
    fn retry(&self, call: impl Fn() -> KafkaResult<()>) -> Result<(), Failure> {
        loop {
            match call() {
                Ok(()) => return Ok(()),
                Err(KafkaError::Transaction(error)) if error.is_fatal() => return Err(Failure::Rebuild),
                Err(KafkaError::Transaction(error)) if error.txn_requires_abort() => return Err(Failure::Abort),
                Err(KafkaError::Transaction(error)) if error.is_retriable() && !self.is_stopped() => {}
                // A message that cannot be sent belongs to a transaction that has failed already.
                Err(KafkaError::MessageProduction(_)) => return Err(Failure::Abort),
                Err(_) => return Err(Failure::Rebuild),
            }
        }
    }

    /// Returns to the committed offsets.
    fn rewind(&self, consumer: &BaseConsumer) {
        while !self.is_stopped() {
            let Ok(mut offsets) = consumer.committed(CALL_TIMEOUT) else {
                continue;
            };
            for mut element in offsets.elements() {
                if !matches!(element.offset(), Offset::Offset(_)) {
                    element.set_offset(Offset::Beginning).unwrap();
                }
            }
            let sought = consumer.seek_partitions(std::mem::take(&mut offsets), CALL_TIMEOUT);
            if sought.is_ok_and(|list| list.elements().iter().all(|element| element.error().is_ok())) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Gathers records for one transaction.
fn poll(consumer: &BaseConsumer) -> Vec<OwnedMessage> {
    let mut batch = Vec::new();
    let mut wait = Duration::from_millis(100);
    let mut deadline = Instant::now() + wait;
    while batch.len() < 1000 {
        // An error is that of a broker that is down; the client connects to it again by itself.
        match consumer.poll(wait) {
            Some(Ok(message)) => {
                if batch.is_empty() {
                    deadline = Instant::now() + COMMIT_INTERVAL;
                }
                batch.push(message.detach());
            }
            Some(Err(_)) => {}
            None => break,
        }
        wait = deadline.saturating_duration_since(Instant::now());
        if wait.is_zero() {
            break;
        }
    }
    batch
}
