//! How a running stream is told to end: by draining, or because a stage failed.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use rdkafka::error::KafkaError;

use crate::kafka::errors::{ErrorClass, reason};

/// Why a stream ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// Committed offsets have fallen out of the topic: somebody must decide what that means.
    #[error("{}; to go on regardless set kafka.on_gap = \"continue\"", list(.0))]
    Gap(Vec<Gap>),
    /// Another process took this one's place; it will not come back by trying.
    #[error("fenced while {doing}: {reason}; is another process running as the same kafka.instance?")]
    Fenced {
        /// What was being done.
        doing: &'static str,
        /// What the client said.
        reason: String,
    },
    /// Kafka refuses for good.
    #[error("cannot {doing}: {reason}")]
    Kafka {
        /// What was being done.
        doing: &'static str,
        /// What the client said.
        reason: String,
    },
    /// The scorer fails on a comment that is known to be good.
    #[error("the scorer fails on a known good comment: {0}")]
    Device(String),
    /// A client cannot be made of the settings.
    #[error("cannot make a kafka client: {0}")]
    Client(String),
    /// The brokers do not let us.
    #[error("not allowed to {doing}: {reason}")]
    Forbidden {
        /// What was being done.
        doing: &'static str,
        /// What the client said.
        reason: String,
    },
    /// A bug.
    #[error("the {stage} stage ended unexpectedly")]
    Died {
        /// Its name.
        stage: &'static str,
    },
}

impl StreamError {
    /// The error of a call to Kafka that failed while `doing` something, by what it means for the stream.
    pub(crate) fn kafka(doing: &'static str, error: &KafkaError) -> Self {
        let reason = reason(error);
        match ErrorClass::of_error(error) {
            ErrorClass::Fenced => Self::Fenced { doing, reason },
            ErrorClass::Forbidden => Self::Forbidden { doing, reason },
            _ => Self::Kafka { doing, reason },
        }
    }

    /// Whether starting again cannot help until somebody has acted.
    pub fn needs_a_person(&self) -> bool {
        matches!(self, Self::Gap(_) | Self::Client(_) | Self::Forbidden { .. })
    }
}

/// Where a partition is read next, which the topic may no longer hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The partition.
    pub partition: i32,
    /// The next offset to read, as committed or as the consumer stood.
    pub next: i64,
    /// The oldest offset that there is.
    pub low: i64,
    /// The next offset to be written.
    pub high: i64,
}

impl Gap {
    /// Whether the next offset cannot be read.
    pub fn is_gap(&self) -> bool {
        !(self.low..=self.high).contains(&self.next)
    }
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            partition,
            next,
            low,
            high,
        } = self;
        if next < low {
            let lost = low - next;
            write!(
                f,
                "partition {partition}: offset {next} is next, but retention has removed all before {low} ({lost} offsets)"
            )
        } else {
            write!(
                f,
                "partition {partition}: offset {next} is next, but the topic ends at {high} (was it recreated?)"
            )
        }
    }
}

fn list(gaps: &[Gap]) -> String {
    let gaps: Vec<String> = gaps.iter().map(ToString::to_string).collect();
    gaps.join("; ")
}

/// Shared by all stages and whoever started them.
#[derive(Debug, Default)]
pub struct Control {
    draining: AtomicBool,
    deadline: Mutex<Option<Instant>>,
    failure: OnceLock<StreamError>,
}

impl Control {
    /// Finish what is in flight, read nothing more; what is unfinished at the deadline is given up and
    /// will be read again by whoever comes next.
    pub fn drain(&self, deadline: Instant) {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = Some(deadline);
        self.draining.store(true, Ordering::Release);
    }

    /// Whether the stream is draining.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Until when what is in flight may take, once the stream is draining.
    pub fn deadline(&self) -> Option<Instant> {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether unfinished work must be given up.
    pub fn gives_up(&self, now: Instant) -> bool {
        self.has_failed() || self.deadline().is_some_and(|deadline| deadline <= now)
    }

    /// A stage cannot go on; the first to say so is the reason.
    pub fn fail(&self, error: StreamError) {
        // Later failures are consequences of the first.
        let _ = self.failure.set(error);
    }

    /// Whether a stage has failed.
    pub fn has_failed(&self) -> bool {
        self.failure.get().is_some()
    }

    /// Whether the stream is on its way to the end, either way.
    pub fn is_ending(&self) -> bool {
        self.is_draining() || self.has_failed()
    }

    /// The first failure, once all stages have ended.
    pub fn into_failure(self) -> Option<StreamError> {
        self.failure.into_inner()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_first_failure_is_the_reason() {
        let (control, now) = (Control::default(), Instant::now());
        assert!(!control.is_ending() && !control.gives_up(now));
        control.drain(now + Duration::from_secs(1));
        assert!(control.is_draining() && !control.gives_up(now) && control.gives_up(now + Duration::from_secs(1)));
        control.fail(StreamError::Device("first".into()));
        control.fail(StreamError::Died { stage: "score" });
        assert!(control.gives_up(now));
        assert_eq!(
            control.into_failure().unwrap().to_string(),
            "the scorer fails on a known good comment: first"
        );
    }

    #[test]
    fn a_gap_is_named() {
        let gap = |next, low, high| Gap {
            partition: 3,
            next,
            low,
            high,
        };
        let error = StreamError::Gap(vec![gap(120, 500, 900), gap(700, 0, 500)]);
        assert!(error.needs_a_person());
        assert_eq!(
            error.to_string(),
            "partition 3: offset 120 is next, but retention has removed all before 500 (380 offsets); \
             partition 3: offset 700 is next, but the topic ends at 500 (was it recreated?); \
             to go on regardless set kafka.on_gap = \"continue\""
        );
    }
}
