//! Ends a running stream, either by draining it or because a stage has failed.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::error::KafkaError;

use crate::kafka::errors::{ErrorClass, reason};

/// How long a topic may be missing before the stream ends, because an operator may be about to create it again.
pub(crate) const MAX_TOPIC_ABSENCE: Duration = Duration::from_secs(300);

/// The reason why a stream ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// Records that the group has not read are missing from the topic, and `kafka.on_gap` is `stop`.
    #[error("{}; to continue from the oldest offset available, set kafka.on_gap = \"continue\"", join(.0))]
    Gap(Vec<Gap>),
    /// Another process uses the same instance name, so retrying cannot succeed.
    #[error(
        "cannot {doing}: fenced ({reason}) because another process runs with the same kafka.instance{}; \
         give each process a name of its own",
        of_other(other.as_deref())
    )]
    Fenced {
        /// The operation that failed, as a verb phrase.
        doing: &'static str,
        /// The reason given by the client library.
        reason: String,
        /// The other process: its member id in the group, and its address, if it was found.
        other: Option<String>,
    },
    /// A topic has not existed for so long that it will not be created again without an operator.
    #[error(
        "the topic `{topic}` does not exist any more, expected an existing topic (moderatord does not create topics)"
    )]
    MissingTopic {
        /// The name of the topic.
        topic: String,
    },
    /// A call to Kafka failed, and retrying did not help or cannot help.
    #[error("cannot {doing}: {reason}")]
    Kafka {
        /// The operation that failed, as a verb phrase.
        doing: &'static str,
        /// The reason given by the client library.
        reason: String,
    },
    /// The scorer failed on the canary, so the device cannot be trusted with any comment.
    #[error("the scorer fails on a known good comment: {0}")]
    Device(String),
    /// librdkafka rejected the settings of a client.
    #[error("cannot create a Kafka client: {0}")]
    Client(String),
    /// The brokers denied access; an ACL must be changed.
    #[error("not allowed to {doing}: {reason}")]
    Forbidden {
        /// The operation that failed, as a verb phrase.
        doing: &'static str,
        /// The reason given by the client library.
        reason: String,
    },
    /// A stage panicked, or its thread could not be started.
    #[error("the {stage} stage ended unexpectedly")]
    Died {
        /// The name of the stage.
        stage: &'static str,
    },
}

impl StreamError {
    /// Classifies the error of a call to Kafka.
    ///
    /// `doing` completes the sentence "cannot ...".
    pub(crate) fn kafka(doing: &'static str, error: &KafkaError) -> Self {
        let reason = reason(error);
        match ErrorClass::of_error(error) {
            ErrorClass::Fenced => Self::Fenced {
                doing,
                reason,
                other: None,
            },
            ErrorClass::Forbidden => Self::Forbidden { doing, reason },
            _ => Self::Kafka { doing, reason },
        }
    }

    /// Returns whether a restart cannot help until the operator has changed something.
    pub fn requires_operator(&self) -> bool {
        matches!(
            self,
            Self::Gap(_) | Self::Client(_) | Self::Forbidden { .. } | Self::Fenced { .. } | Self::MissingTopic { .. }
        )
    }
}

/// A partition whose next offset to read is missing from the topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The partition of the comments topic.
    pub partition: i32,
    /// The next offset to read: the committed offset, or the position of the consumer.
    pub next: i64,
    /// The oldest offset in the partition.
    pub low: i64,
    /// The offset that the next record written to the partition gets.
    pub high: i64,
    /// The topic was deleted and recreated, so the next offset belongs to a topic that no longer exists.
    pub is_new_topic: bool,
}

impl Gap {
    /// Returns the gap if `next` lies outside of `low..=high`.
    pub(crate) fn find(partition: i32, next: i64, low: i64, high: i64) -> Option<Self> {
        let gap = Self {
            partition,
            next,
            low,
            high,
            is_new_topic: false,
        };
        (!(low..=high).contains(&next)).then_some(gap)
    }

    /// Returns the number of records that retention deleted before they were read. How many an earlier topic held is
    /// not known.
    pub(crate) fn deleted_records(&self) -> u64 {
        let deleted = if self.is_new_topic { 0 } else { self.low - self.next };
        u64::try_from(deleted).unwrap_or(0)
    }
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            partition,
            next,
            low,
            high,
            is_new_topic,
        } = self;
        if *is_new_topic {
            write!(
                f,
                "partition {partition}: offset {next} is next, but it belongs to an earlier topic of this name; the \
                 present one was recreated and holds offsets {low} to {high}"
            )
        } else if next < low {
            let lost = low - next;
            write!(
                f,
                "partition {partition}: offset {next} is next, but retention has deleted everything before {low} ({lost} offsets)"
            )
        } else {
            write!(
                f,
                "partition {partition}: offset {next} is next, but the topic ends at {high} (was it recreated?)"
            )
        }
    }
}

fn of_other(other: Option<&str>) -> String {
    other.map_or_else(String::new, |other| format!(" (member {other})"))
}

fn join(gaps: &[Gap]) -> String {
    let gaps: Vec<String> = gaps.iter().map(ToString::to_string).collect();
    gaps.join("; ")
}

/// Whether the stream is running, draining or failed; shared by all stages and the pipeline.
#[derive(Debug, Default)]
pub(crate) struct Control {
    is_draining: AtomicBool,
    deadline: Mutex<Option<Instant>>,
    failure: OnceLock<StreamError>,
}

impl Control {
    /// Makes the stages stop reading and finish what is in flight.
    ///
    /// Records that are unfinished at the deadline are abandoned, and read again by the partitions' next owner.
    pub fn drain(&self, deadline: Instant) {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = Some(deadline);
        self.is_draining.store(true, Ordering::Release);
    }

    fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Acquire)
    }

    /// Returns the deadline of the drain, if the stream is draining.
    pub fn deadline(&self) -> Option<Instant> {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether unfinished work must be abandoned: a stage has failed, or the drain has run out of time.
    pub fn must_stop(&self, now: Instant) -> bool {
        self.has_failed() || self.deadline().is_some_and(|deadline| deadline <= now)
    }

    /// Records that a stage has failed. The first failure is the one reported; later ones follow from it.
    pub fn fail(&self, error: StreamError) {
        let _ = self.failure.set(error);
    }

    pub fn has_failed(&self) -> bool {
        self.failure.get().is_some()
    }

    /// Returns whether the stream is draining or has failed.
    pub fn is_ending(&self) -> bool {
        self.is_draining() || self.has_failed()
    }

    pub fn into_failure(self) -> Option<StreamError> {
        self.failure.into_inner()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_failure_is_reported() {
        let (control, now) = (Control::default(), Instant::now());
        assert!(!control.is_ending() && !control.must_stop(now));
        control.drain(now + Duration::from_secs(1));
        assert!(control.is_draining() && !control.must_stop(now) && control.must_stop(now + Duration::from_secs(1)));
        control.fail(StreamError::Device("first".into()));
        control.fail(StreamError::Died { stage: "score" });
        assert!(control.must_stop(now));
        assert_eq!(
            control.into_failure().unwrap().to_string(),
            "the scorer fails on a known good comment: first"
        );
    }

    #[test]
    fn a_gap_error_lists_every_partition() {
        let gap = |next, low, high| Gap::find(3, next, low, high).unwrap();
        assert_eq!(Gap::find(3, 500, 500, 900), None);
        assert_eq!(Gap::find(3, 900, 500, 900), None);
        let new_topic = Gap {
            is_new_topic: true,
            ..gap(120, 500, 900)
        };
        let deleted = [gap(120, 500, 900), gap(700, 0, 500), new_topic].map(|gap| gap.deleted_records());
        assert_eq!(deleted, [380, 0, 0]);
        let error = StreamError::Gap(vec![gap(120, 500, 900), gap(700, 0, 500)]);
        assert!(error.requires_operator());
        assert_eq!(
            error.to_string(),
            "partition 3: offset 120 is next, but retention has deleted everything before 500 (380 offsets); \
             partition 3: offset 700 is next, but the topic ends at 500 (was it recreated?); \
             to continue from the oldest offset available, set kafka.on_gap = \"continue\""
        );
    }
}
