//! A steady load of comments.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};

use crate::broker::PATIENCE;

/// How many partitions the topics of these tests have.
pub const PARTITIONS: i32 = 6;

/// Writes events at a steady rate, and bursts in between, until it is stopped.
pub struct Load<E> {
    topic: String,
    rate: u32,
    /// Returns the key and the value of the event with a number.
    event: Mutex<E>,
    extra: AtomicUsize,
    is_stopped: AtomicBool,
    written: AtomicUsize,
}

impl<E: FnMut(usize) -> (String, Option<Vec<u8>>)> Load<E> {
    pub fn new(topic: &str, rate: u32, event: E) -> Self {
        Self {
            topic: topic.to_owned(),
            rate,
            event: Mutex::new(event),
            extra: AtomicUsize::new(0),
            is_stopped: AtomicBool::new(false),
            written: AtomicUsize::new(0),
        }
    }

    /// Has that many events written at once, besides those of the steady rate.
    pub fn burst(&self, events: usize) {
        self.extra.fetch_add(events, Ordering::Relaxed);
    }

    pub fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    /// Returns how many events were handed to the producer.
    pub fn written(&self) -> usize {
        self.written.load(Ordering::Relaxed)
    }

    /// Writes until [`Self::stop`] is called, and then until everything is acknowledged.
    pub fn run(&self, mut config: ClientConfig) {
        config
            .set("linger.ms", "5")
            .set("enable.idempotence", "true")
            // Never gives an event up, so that each is in the topic exactly once.
            .set("message.timeout.ms", "0")
            .set("topic.metadata.refresh.interval.ms", "1000");
        let producer: ThreadedProducer<DefaultProducerContext> = config.create().unwrap();
        let (start, mut due) = (Instant::now(), 0);
        let mut next = 0;
        while !self.is_stopped.load(Ordering::Relaxed) {
            due += self.extra.swap(0, Ordering::Relaxed);
            let steady = (start.elapsed().as_secs_f64() * f64::from(self.rate)) as usize;
            while next < steady + due {
                let (key, value) = (self.event.lock().unwrap())(next);
                let partition = i32::try_from(next).unwrap() % PARTITIONS;
                let mut record = BaseRecord::to(&self.topic).partition(partition).key(&key);
                record.payload = value.as_deref();
                producer.send(record).map_err(|(error, _)| error).unwrap();
                next += 1;
            }
            self.written.store(next, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(5));
        }
        producer.flush(2 * PATIENCE).unwrap();
    }
}
