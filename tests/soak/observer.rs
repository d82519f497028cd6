//! Notes when comments were appended and when their outputs became visible.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::load::PARTITIONS;
use crate::broker::Broker;

/// A partition and an offset of the comments topic.
type Source = (i32, i64);

/// One that answers comments, such as the daemons: its name and its output topics.
pub struct Contender {
    pub name: &'static str,
    pub outputs: Vec<String>,
}

/// What was seen of one contender.
#[derive(Default)]
struct Answers {
    /// When the first output of a comment was seen, in milliseconds since 1970.
    seen: HashMap<Source, i64>,
    /// The coordinates of all outputs. A reader may see an output again after a fail-over.
    outputs: HashSet<(String, i32, i64)>,
}

#[derive(Default)]
struct Notes {
    /// When each comment was appended to the topic, by the clock of the broker.
    comments: HashMap<Source, i64>,
    answers: Vec<Answers>,
}

/// Reads the comments and the outputs of all contenders with one `read_committed` client, so that its own fail-overs
/// delay all contenders alike.
///
/// The comments topic must have the time of the append as its timestamps.
pub struct Observer {
    contenders: Vec<Contender>,
    notes: Arc<Mutex<Notes>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Observer {
    pub fn start(broker: &Broker, comments: &str, contenders: Vec<Contender>) -> Self {
        let mut config = broker.client();
        config
            .set("group.id", "observer")
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "earliest")
            .set("fetch.wait.max.ms", "50")
            .set("reconnect.backoff.max.ms", "1000")
            .set("topic.metadata.refresh.interval.ms", "1000");
        let consumer: BaseConsumer = config.create().unwrap();
        let mut list = TopicPartitionList::new();
        for topic in contenders.iter().flat_map(|contender| &contender.outputs) {
            list.add_partition_range(topic, 0, PARTITIONS - 1);
        }
        list.add_partition_range(comments, 0, PARTITIONS - 1);
        list.set_all_offsets(Offset::Beginning).unwrap();
        consumer.assign(&list).unwrap();

        let notes = Arc::new(Mutex::new(Notes {
            answers: contenders.iter().map(|_| Answers::default()).collect(),
            ..Notes::default()
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let by_topic: HashMap<String, usize> = contenders
            .iter()
            .enumerate()
            .flat_map(|(index, contender)| contender.outputs.iter().map(move |topic| (topic.clone(), index)))
            .collect();
        let thread = {
            let (notes, stop) = (Arc::clone(&notes), Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // An error is that of a broker that is down.
                    if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
                        let contender = by_topic.get(message.topic()).copied();
                        notes.lock().unwrap().add(&message, contender);
                    }
                }
            })
        };
        Self {
            contenders,
            notes,
            stop,
            thread: Some(thread),
        }
    }

    pub fn contenders(&self) -> impl Iterator<Item = (usize, &'static str)> {
        self.contenders.iter().map(|contender| contender.name).enumerate()
    }

    /// Returns how many comments were appended.
    pub fn comments(&self) -> usize {
        self.notes.lock().unwrap().comments.len()
    }

    /// Returns how many comments have no output of a contender yet.
    pub fn unfinished(&self, contender: usize) -> usize {
        let notes = self.notes.lock().unwrap();
        let seen = &notes.answers[contender].seen;
        notes
            .comments
            .keys()
            .filter(|source| !seen.contains_key(source))
            .count()
    }

    /// Returns how many outputs a contender wrote beyond the first one of a comment.
    pub fn duplicated(&self, contender: usize) -> usize {
        let notes = self.notes.lock().unwrap();
        let Answers { seen, outputs } = &notes.answers[contender];
        outputs.len() - seen.len()
    }

    /// Returns the greatest age that a contender's oldest unfinished comment had between two times, in milliseconds
    /// since 1970.
    pub fn oldest_unfinished(&self, contender: usize, from: i64, to: i64) -> Duration {
        let notes = self.notes.lock().unwrap();
        let seen = &notes.answers[contender].seen;
        let ages = notes.comments.iter().filter_map(|(source, &appended)| {
            let finished = seen.get(source).copied().unwrap_or(i64::MAX);
            (finished >= from && appended <= to).then(|| finished.min(to) - appended)
        });
        Duration::from_millis(u64::try_from(ages.max().unwrap_or(0)).unwrap_or(0))
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Notes {
    fn add(&mut self, message: &BorrowedMessage<'_>, contender: Option<usize>) {
        let Some(contender) = contender else {
            let appended = message.timestamp().to_millis().unwrap();
            self.comments.insert((message.partition(), message.offset()), appended);
            return;
        };
        let answers = &mut self.answers[contender];
        answers.seen.entry(source(message)).or_insert_with(now);
        let coordinates = (message.topic().to_owned(), message.partition(), message.offset());
        answers.outputs.insert(coordinates);
    }
}

/// Returns the time in milliseconds since 1970.
pub fn now() -> i64 {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    i64::try_from(now.as_millis()).unwrap()
}

/// Returns the comment that an output's headers name.
fn source(message: &BorrowedMessage<'_>) -> Source {
    let headers = message.headers().unwrap();
    let number = |name: &str| -> i64 {
        // The last one counts: headers of the comment come first.
        let header = headers.iter().filter(|header| header.key == name).last().unwrap();
        std::str::from_utf8(header.value.unwrap()).unwrap().parse().unwrap()
    };
    let partition = i32::try_from(number("moderatord.source.partition")).unwrap();
    (partition, number("moderatord.source.offset"))
}
