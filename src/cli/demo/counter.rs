//! An independent consumer that counts the outputs of the daemon and measures how long they took.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde_json::Value;

use crate::kafka::QuietContext;

/// Header with the time at which an event was sent, in microseconds since 1970. The daemon copies it to the output.
pub(super) const SENT_AT: &str = "demo-sent-at";

/// Number of recent latencies from which the percentiles are computed.
const MAX_LATENCIES: usize = 100_000;

/// Number of recent outputs kept for the view.
const MAX_LATEST: usize = 10;

/// The outputs counted so far.
#[derive(Debug, Default)]
pub(super) struct Count {
    pub decided: u64,
    pub dead_lettered: u64,
    pub duplicated: u64,
    pub actions: BTreeMap<String, u64>,
    /// Recent outputs, newest last.
    pub latest: VecDeque<DemoOutput>,
    latencies_us: VecDeque<u64>,
    partitions: BTreeMap<i64, SeenOffsets>,
}

/// A decision, dead letter or tombstone, as shown in the view.
#[derive(Debug, Clone)]
pub(super) struct DemoOutput {
    pub key: String,
    pub action: String,
    pub probability: Option<f64>,
}

/// The source offsets seen for one partition: all below `next`, and those in `above`.
#[derive(Debug, Default)]
struct SeenOffsets {
    next: i64,
    above: BTreeSet<i64>,
}

impl SeenOffsets {
    /// Adds an offset. Returns whether it is new.
    fn insert(&mut self, offset: i64) -> bool {
        if offset < self.next || !self.above.insert(offset) {
            return false;
        }
        while self.above.remove(&self.next) {
            self.next += 1;
        }
        true
    }
}

impl Count {
    /// Returns the number of input records that have an output.
    pub fn finished(&self) -> u64 {
        self.decided + self.dead_lettered
    }

    /// Returns a quantile, from 0 to 1, of the recent latencies between sending an event and reading its output, in
    /// milliseconds.
    pub fn latency_ms(&self, quantile: f64) -> f64 {
        let mut sorted: Vec<u64> = self.latencies_us.iter().copied().collect();
        sorted.sort_unstable();
        let index = (quantile * sorted.len() as f64).ceil() as usize;
        let latency = sorted.get(index.saturating_sub(1).min(sorted.len().saturating_sub(1)));
        latency.map_or(0.0, |&micros| micros as f64 / 1e3)
    }

    fn add(&mut self, message: &BorrowedMessage<'_>, is_dead_letter: bool) {
        let headers = headers(message);
        let number = |name: &str| headers.get(name).and_then(|text| text.parse::<i64>().ok());
        let (Some(partition), Some(offset)) = (
            number("moderatord.source.partition"),
            number("moderatord.source.offset"),
        ) else {
            return;
        };
        if !self.partitions.entry(partition).or_default().insert(offset) {
            self.duplicated += 1;
            return;
        }
        if let Some(sent_at) = number(SENT_AT).and_then(|micros| u64::try_from(micros).ok()) {
            self.latencies_us.push_back(now_us().saturating_sub(sent_at));
            if self.latencies_us.len() > MAX_LATENCIES {
                self.latencies_us.pop_front();
            }
        }
        let decision: Option<Value> = message.payload().and_then(|json| serde_json::from_slice(json).ok());
        let field = |name: &str| decision.as_ref().and_then(|decision| decision.get(name));
        let action = if is_dead_letter {
            self.dead_lettered += 1;
            "dead letter".to_owned()
        } else {
            self.decided += 1;
            field("action")
                .and_then(Value::as_str)
                .unwrap_or("tombstone")
                .to_owned()
        };
        *self.actions.entry(action.clone()).or_default() += 1;
        self.latest.push_back(DemoOutput {
            key: String::from_utf8_lossy(message.key().unwrap_or_default()).into_owned(),
            probability: field("probability").and_then(Value::as_f64),
            action,
        });
        if self.latest.len() > MAX_LATEST {
            self.latest.pop_front();
        }
    }
}

/// A consumer that counts the outputs in the topics of decisions and dead letters.
#[derive(Debug, Default)]
pub(super) struct OutputCounter {
    count: Mutex<Count>,
    stop: AtomicBool,
}

impl OutputCounter {
    pub fn count(&self) -> MutexGuard<'_, Count> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Reads both topics from the beginning until [`OutputCounter::stop`] is called.
    pub fn run(&self, brokers: &str, decisions: &str, dead_letters: &str, partitions: i32) -> anyhow::Result<()> {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", brokers)
            .set("group.id", "moderatord-demo-counter")
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "10");
        let consumer: BaseConsumer<QuietContext> = config
            .create_with_context(QuietContext)
            .context("cannot create the counting consumer")?;
        let mut all = TopicPartitionList::new();
        for topic in [decisions, dead_letters] {
            for partition in 0..partitions {
                all.add_partition_offset(topic, partition, Offset::Beginning)?;
            }
        }
        consumer.assign(&all)?;
        drop(all);
        while !self.stop.load(Ordering::Relaxed) {
            if let Some(Ok(message)) = consumer.poll(Duration::from_millis(20)) {
                self.count().add(&message, message.topic() == dead_letters);
            }
        }
        Ok(())
    }
}

pub(super) fn now_us() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |now| u64::try_from(now.as_micros()).unwrap_or(u64::MAX))
}

fn headers(message: &BorrowedMessage<'_>) -> BTreeMap<String, String> {
    let Some(headers) = message.headers() else {
        return BTreeMap::new();
    };
    let text = |value: Option<&[u8]>| String::from_utf8_lossy(value.unwrap_or_default()).into_owned();
    headers
        .iter()
        .map(|header| (header.key.to_owned(), text(header.value)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_counts_once_in_any_order() {
        let mut offsets = SeenOffsets::default();
        let seen: Vec<bool> = [0, 2, 2, 1, 0, 3, 1].map(|offset| offsets.insert(offset)).into();
        assert_eq!(seen, [true, true, false, true, false, true, false]);
        assert_eq!((offsets.next, offsets.above.len()), (4, 0));
    }

    #[test]
    fn percentiles_are_computed_from_the_latencies() {
        let mut count = Count::default();
        assert_eq!(count.latency_ms(0.5), 0.0);
        count.latencies_us = (1..=100).rev().map(|millis| millis * 1000).collect();
        assert_eq!((count.latency_ms(0.5), count.latency_ms(0.99)), (50.0, 99.0));
        assert_eq!(count.latency_ms(1.0), 100.0);
    }
}
