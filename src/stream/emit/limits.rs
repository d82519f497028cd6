//! Predicts which outputs a topic refuses, because a refusal costs the whole transaction.

use std::time::{Duration, Instant};

use tracing::debug;

use super::output::{Destination, Output};
use crate::config::StreamConfig;
use crate::kafka::client::{Role, config};
use crate::kafka::errors::reason;
use crate::kafka::topic_limits::{self, TopicLimits};
use crate::kafka::topics::TopicFacts;

/// How old the limits may be when an output is not written in full because of them. An operator may have raised them.
const MAX_AGE: Duration = Duration::from_secs(60);

/// The timeout of a request for the limits; the stage waits for it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// A prediction must exceed the limit by this factor, because our compressor and the client's differ slightly. An output
/// in between is sent, and the topic decides.
const TOLERANCE: f64 = 1.05;

/// librdkafka compresses a batch in independent blocks of this size.
const LZ4_BLOCK: usize = 64 << 10;

/// What the client does to a batch before it sends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Lz4,
    /// A codec whose result is not predicted.
    Other,
}

/// What each output topic accepts, as far as that is known.
#[derive(Debug)]
pub(super) struct OutputLimits {
    stream: StreamConfig,
    decisions: KnownLimits,
    dead_letters: KnownLimits,
    compression: Compression,
    read_at: Instant,
}

/// What is known about one topic.
#[derive(Debug, Clone, Copy, Default)]
struct KnownLimits {
    settings: TopicLimits,
    /// The smallest size that the topic has refused, in bytes after compression.
    refused_bytes: Option<usize>,
}

impl From<TopicLimits> for KnownLimits {
    fn from(settings: TopicLimits) -> Self {
        Self {
            settings,
            refused_bytes: None,
        }
    }
}

impl OutputLimits {
    pub fn new(stream: &StreamConfig, topics: &TopicFacts, now: Instant) -> Self {
        let producer = config(stream, Role::Producer);
        let codec = ["compression.codec", "compression.type"]
            .into_iter()
            .find_map(|name| producer.get(name));
        Self {
            stream: stream.clone(),
            decisions: topics.decision_limits.into(),
            dead_letters: topics.dead_letter_limits.into(),
            compression: match codec {
                Some("none") | None => Compression::None,
                Some("lz4") => Compression::Lz4,
                Some(_) => Compression::Other,
            },
            read_at: now,
        }
    }

    /// Returns the size up to which both topics accept a batch, if it is known.
    pub fn max_batch_bytes(&self) -> Option<usize> {
        let limits = [self.decisions, self.dead_letters];
        limits.iter().filter_map(|limits| limits.settings.max_bytes).min()
    }

    /// Returns whether its topic is certain to refuse the output. Limits that are not recent are read again, or, if they
    /// cannot be read, tried again.
    pub fn refuse(&mut self, output: &Output, now: Instant) -> bool {
        if !self.of(output).refuse(output, self.compression) {
            return false;
        }
        if now.saturating_duration_since(self.read_at) < MAX_AGE {
            return true;
        }
        self.read_at = now;
        match topic_limits::of_outputs(&self.stream, REQUEST_TIMEOUT) {
            Ok(limits) => [self.decisions, self.dead_letters] = limits.map(KnownLimits::from),
            Err(error) => {
                debug!(
                    reason = reason(&error),
                    "cannot read the settings of the output topics again"
                );
                (self.decisions.refused_bytes, self.dead_letters.refused_bytes) = (None, None);
            }
        }
        self.of(output).refuse(output, self.compression)
    }

    /// Remembers that the topic of an output refuses records without a key.
    pub fn require_key(&mut self, destination: Destination) {
        self.of_mut(destination).settings.requires_key = true;
    }

    /// Remembers that a topic has refused an output for its size.
    pub fn exceeded_by(&mut self, output: &Output) {
        let bytes = sent_bytes(output, self.compression);
        let limits = self.of_mut(output.destination);
        limits.refused_bytes = Some(limits.refused_bytes.map_or(bytes, |refused| refused.min(bytes)));
    }

    fn of(&self, output: &Output) -> KnownLimits {
        match output.destination {
            Destination::Decisions => self.decisions,
            Destination::DeadLetters => self.dead_letters,
        }
    }

    fn of_mut(&mut self, destination: Destination) -> &mut KnownLimits {
        match destination {
            Destination::Decisions => &mut self.decisions,
            Destination::DeadLetters => &mut self.dead_letters,
        }
    }
}

impl KnownLimits {
    fn refuse(self, output: &Output, compression: Compression) -> bool {
        if self.settings.requires_key && output.record.key.is_none() {
            return true;
        }
        if compression == Compression::Other {
            return false;
        }
        let tolerated = |max_bytes: usize| (max_bytes as f64 * TOLERANCE) as usize;
        let limits = [self.settings.max_bytes.map(tolerated), self.refused_bytes];
        // Compression can only make an output smaller, so most need not be compressed here.
        let reaches = |limit| output.content_bytes() >= limit && sent_bytes(output, compression) >= limit;
        limits.into_iter().flatten().min().is_some_and(reaches)
    }
}

/// Returns roughly how many bytes an output takes in a batch of its own.
fn sent_bytes(output: &Output, compression: Compression) -> usize {
    match compression {
        Compression::None | Compression::Other => output.content_bytes(),
        Compression::Lz4 => {
            let block = |block: &[u8]| lz4_flex::block::compress(block).len().min(block.len());
            output.content().chunks(LZ4_BLOCK).map(block).sum()
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::output::tests::dead_letter;
    use super::*;

    /// Limits of topics about which nothing is known.
    pub(in super::super) fn limits(now: Instant) -> OutputLimits {
        OutputLimits {
            stream: crate::kafka::client::tests::stream(&[]),
            decisions: KnownLimits::default(),
            dead_letters: KnownLimits::default(),
            compression: Compression::Lz4,
            read_at: now,
        }
    }

    /// Letters that compress to no less than about three quarters.
    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1u64;
        let letter = || {
            // A linear congruential generator with the constants of Knuth's MMIX.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"[(state >> 58) as usize]
        };
        std::iter::repeat_with(letter).take(length).collect()
    }

    #[test]
    fn only_what_is_too_large_after_compression_is_refused() {
        let check = |value: Vec<u8>, compression, expected| {
            let limits = KnownLimits::from(TopicLimits {
                max_bytes: Some(100_000),
                requires_key: false,
            });
            let output = dead_letter(Some(&value), Some(b"key"));
            assert_eq!(limits.refuse(&output, compression), expected, "{}", value.len());
        };
        check(vec![b'a'; 10_000_000], Compression::Lz4, false);
        check(vec![b'a'; 10_000_000], Compression::None, true);
        check(vec![b'a'; 10_000_000], Compression::Other, false);
        check(noise(200_000), Compression::Lz4, true);
        check(noise(90_000), Compression::Lz4, false);
        // Too close to the limit to be certain.
        check(noise(101_000), Compression::None, false);
    }

    #[test]
    fn a_compacted_topic_refuses_outputs_without_a_key() {
        let limits = KnownLimits::from(TopicLimits {
            max_bytes: None,
            requires_key: true,
        });
        assert!(limits.refuse(&dead_letter(Some(b"value"), None), Compression::Lz4));
        assert!(!limits.refuse(&dead_letter(Some(b"value"), Some(b"")), Compression::Lz4));
        assert!(!KnownLimits::default().refuse(&dead_letter(None, None), Compression::Lz4));
    }

    #[test]
    fn what_was_refused_once_is_not_tried_again_for_a_while() {
        let now = Instant::now();
        let mut limits = limits(now);
        let output = |length| dead_letter(Some(&noise(length)), Some(b"key"));
        assert!(!limits.refuse(&output(9000), now));
        limits.exceeded_by(&output(9000));
        limits.exceeded_by(&output(9500));
        assert!(limits.refuse(&output(9000), now) && limits.refuse(&output(9100), now));
        assert!(!limits.refuse(&output(8500), now));
    }
}
