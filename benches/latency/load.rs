//! An open load: comments are sent when they are due, whatever has become of earlier ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, unbounded};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{BorrowedMessage, Header, Headers, Message, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, ThreadedProducer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::daemon::{PARTITIONS, Topics};
use crate::support::Random;
use crate::support::brokers::Broker;
use crate::support::comments::{event, texts};

/// The header with the time at which a comment was due, in microseconds since 1970. The daemon copies it to the output.
const DUE_AT: &str = "due_at_us";

/// The header in which an output names the timestamp of its comment.
const APPENDED_AT: &str = "moderatord.source.timestamp";

/// The time limit of waiting for the daemon.
const TIMEOUT: Duration = Duration::from_secs(180);

/// The number of different texts. With duplicates, the first few of them are those that are repeated.
const TEXTS: usize = 200_000;
const REPEATED_TEXTS: u32 = 10;

/// Comments that arrive at a mean rate per second for some time.
pub struct Phase {
    pub rate: f64,
    pub time: Duration,
}

/// What became of one comment.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// When it was due, after the start of the run.
    pub due: Duration,
    /// From when it was due until its decision was read by a consumer that reads only what is committed.
    pub visible: Duration,
    /// From the append of the comment to the append of its decision, if the broker notes both. In milliseconds.
    pub append: Option<i64>,
}

/// The decision about a comment, as it was read.
struct Seen {
    due_us: u64,
    seen_us: u64,
    append_ms: Option<i64>,
}

pub struct Load {
    producer: ThreadedProducer<DefaultProducerContext>,
    topics: Topics,
    texts: Vec<String>,
    duplicates: f64,
    sent: usize,
    random: Random,
    seen: Receiver<Seen>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Load {
    /// Starts reading decisions. A share of the comments that are sent are `duplicates`.
    pub fn start(broker: &Broker, topics: &Topics, duplicates: f64) -> Self {
        let producer = broker.client().set("linger.ms", "0").create().unwrap();
        let (found, seen) = unbounded();
        let stop = Arc::new(AtomicBool::new(false));
        let consumer: BaseConsumer = broker
            .client()
            .set("group.id", "reader")
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "5")
            .create()
            .unwrap();
        let mut list = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            list.add_partition_offset(&topics.decisions, partition, Offset::Beginning)
                .unwrap();
        }
        consumer.assign(&list).unwrap();
        let (stopped, log_append_time) = (Arc::clone(&stop), broker.is_apache());
        let read = move || {
            while !stopped.load(Ordering::Relaxed) {
                if let Some(message) = consumer.poll(Duration::from_millis(20)) {
                    found.send(Seen::of(&message.unwrap(), log_append_time)).unwrap();
                }
            }
        };
        Self {
            producer,
            topics: topics.clone(),
            texts: texts(TEXTS),
            duplicates,
            sent: 0,
            random: Random::new(5),
            seen,
            stop,
            reader: Some(std::thread::spawn(read)),
        }
    }

    /// Sends one comment and waits for its decision, so that the daemon has loaded its model and joined the group.
    pub fn wait_until_ready(&mut self) {
        self.send(now_us());
        drop(self.receive(1));
    }

    /// Measures how many comments per second the daemon decides if it always has some to read.
    pub fn capacity(&mut self, time: Duration) -> f64 {
        // Repeated until a run is long enough for the rate of it to be the rate.
        let mut count = 500;
        loop {
            let now = now_us();
            (0..count).for_each(|_| self.send(now));
            let mut seen: Vec<u64> = self.receive(count).iter().map(|seen| seen.seen_us).collect();
            seen.sort_unstable();
            // The first tenth is left out, in which the pipeline fills up.
            let tenth = count / 10;
            let elapsed = Duration::from_micros(seen[count - 1] - seen[tenth]).as_secs_f64();
            let rate = (count - 1 - tenth) as f64 / elapsed;
            if elapsed >= 0.6 * time.as_secs_f64() {
                return rate;
            }
            count = (rate * time.as_secs_f64()) as usize;
        }
    }

    /// Sends comments for the time of all phases, and returns what became of them in the order in which they were due.
    pub fn run(&mut self, phases: &[Phase]) -> Vec<Sample> {
        let (start, start_us) = (Instant::now(), now_us());
        let mut due = Duration::ZERO;
        let mut end = Duration::ZERO;
        let mut count = 0;
        for phase in phases {
            end += phase.time;
            loop {
                due += Duration::from_secs_f64(self.random.exponential() / phase.rate);
                if due >= end {
                    due = end;
                    break;
                }
                std::thread::sleep((start + due).saturating_duration_since(Instant::now()));
                self.send(start_us + due.as_micros() as u64);
                count += 1;
            }
        }
        let mut samples: Vec<Sample> = self.receive(count).iter().map(|seen| seen.sample(start_us)).collect();
        samples.sort_unstable_by_key(|sample| sample.due);
        samples
    }

    fn send(&mut self, due_us: u64) {
        let is_duplicate = self.random.uniform() < self.duplicates;
        let text = if is_duplicate {
            (self.random.next() % u64::from(REPEATED_TEXTS)) as usize
        } else {
            REPEATED_TEXTS as usize + self.sent % (TEXTS - REPEATED_TEXTS as usize)
        };
        let (key, value) = event(self.sent, &self.texts[text]);
        let due = due_us.to_string();
        let headers = OwnedHeaders::new().insert(Header {
            key: DUE_AT,
            value: Some(&due),
        });
        let record = BaseRecord::to(&self.topics.comments)
            .partition(self.sent as i32 % PARTITIONS)
            .key(&key)
            .payload(&value)
            .headers(headers);
        self.producer
            .send(record)
            .unwrap_or_else(|(error, _)| panic!("{error}"));
        self.sent += 1;
    }

    fn receive(&self, count: usize) -> Vec<Seen> {
        let receive = |index| {
            let seen = self.seen.recv_timeout(TIMEOUT);
            seen.unwrap_or_else(|_| panic!("timed out after {index} of {count} decisions"))
        };
        (0..count).map(receive).collect()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.reader.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || ended.is_some_and(|ended| ended.is_ok()));
    }
}

impl Seen {
    fn of(message: &BorrowedMessage<'_>, log_append_time: bool) -> Self {
        let headers = message.headers().unwrap();
        let header = |name: &str| {
            let found = headers.iter().find(|header| header.key == name);
            let value = found.unwrap_or_else(|| panic!("no header {name}")).value.unwrap();
            std::str::from_utf8(value).unwrap().to_owned()
        };
        let appended_at: i64 = header(APPENDED_AT).parse().unwrap();
        Self {
            due_us: header(DUE_AT).parse().unwrap(),
            seen_us: now_us(),
            append_ms: log_append_time.then(|| message.timestamp().to_millis().unwrap() - appended_at),
        }
    }

    fn sample(&self, start_us: u64) -> Sample {
        Sample {
            due: Duration::from_micros(self.due_us - start_us),
            visible: Duration::from_micros(self.seen_us.saturating_sub(self.due_us)),
            append: self.append_ms,
        }
    }
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64
}
