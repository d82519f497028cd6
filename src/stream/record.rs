//! An input record on its way through the stages, and its outcome.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use super::in_flight::InFlightGuard;
use super::ownership::Epoch;
use crate::decide::Judge;
use crate::message::{Comment, CommentMargin};

/// The position of a record in the comments topic, and the epoch in which it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordPosition {
    pub partition: i32,
    pub epoch: Epoch,
    /// Numbers the records read in this epoch from 0, without the holes that offsets have.
    pub sequence: u64,
    pub offset: i64,
}

/// The name and value of a record's header.
pub type Header = (String, Option<Vec<u8>>);

/// An input record, with everything that its output copies from it.
pub struct Record {
    pub position: RecordPosition,
    pub key: Option<Vec<u8>>,
    /// The event, or `None` for a tombstone.
    pub value: Option<Vec<u8>>,
    pub headers: Vec<Header>,
    /// The headers could not be read, so `headers` is empty.
    pub has_broken_headers: bool,
    /// Milliseconds since 1970. The topic's settings decide whether this is the time of creation or of the append.
    pub timestamp: Option<i64>,
    /// Counts the record as in flight for as long as it exists.
    pub _in_flight: InFlightGuard,
}

impl Record {
    /// Returns the bytes of the key, the value and the headers, which is roughly the memory that a record takes.
    pub fn size(key: Option<&[u8]>, value: Option<&[u8]>, headers: &[Header]) -> usize {
        let header = |(name, value): &Header| name.len() + value.as_ref().map_or(0, Vec::len);
        key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len) + headers.iter().map(header).sum::<usize>()
    }
}

impl fmt::Debug for Record {
    /// Leaves out the key, the value and the headers, which belong to users and must not be logged.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

/// A comment whose rows wait to be scored.
#[derive(Debug)]
pub struct Pending {
    pub record: Record,
    pub comment: Comment,
    /// The number of its windows, each of which is one row.
    pub windows: usize,
    /// The text has more windows than are scored.
    pub truncated: bool,
}

/// A record with its outcome, ready to be written.
#[derive(Debug)]
pub struct Finished {
    pub record: Record,
    pub outcome: Outcome,
}

/// The result for a record, from which its output is made.
#[derive(Debug)]
pub enum Outcome {
    /// The model has scored the comment.
    Scored {
        comment: Comment,
        scored: CommentMargin,
        /// The policy, calibration and model in service when the comment was scored.
        judge: Arc<Judge>,
        at: SystemTime,
    },
    /// The comment was deleted on the platform; its decision has no score.
    Deleted(Comment),
    /// The record has a null value, which is passed through.
    Tombstone,
    /// No decision can be made, so the record becomes a dead letter.
    Rejected(Rejection),
}

/// The reason why a record becomes a dead letter. Never quotes the record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// A stable name: the label of the metric, and the `exception.class.name` header of the dead letter.
    pub reason: &'static str,
    /// A description for people.
    pub message: String,
    pub stage: RejectionStage,
}

/// The part of processing in which a record was rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RejectionStage {
    /// Reading the event.
    Decode,
    /// Prompting or scoring the comment.
    Score,
    /// Writing the decision.
    Emit,
}

impl RejectionStage {
    /// Returns the closest stage in Kafka Connect's `org.apache.kafka.connect.runtime.errors.Stage`.
    pub fn connect_name(self) -> &'static str {
        match self {
            Self::Decode => "VALUE_CONVERTER",
            Self::Score => "TRANSFORMATION",
            Self::Emit => "KAFKA_PRODUCE",
        }
    }
}
