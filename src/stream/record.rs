//! One input record on its way through the stages, and what became of it.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use super::in_flight::Permit;
use super::ownership::Epoch;
use crate::decide::Judge;
use crate::message::{Comment, Scored};

/// Where a record stands, and under which assignment it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordPosition {
    /// Partition of the comments topic.
    pub partition: i32,
    /// The assignment under which it was read.
    pub epoch: Epoch,
    /// Counts the records read under this assignment from 0, without the holes that offsets have.
    pub sequence: u64,
    /// Offset in the partition.
    pub offset: i64,
}

/// One header of a record: name and value.
pub type Header = (String, Option<Vec<u8>>);

/// An input record with everything that an output repeats of it.
pub struct Record {
    /// Where it stands.
    pub position: RecordPosition,
    /// The key, carried over to the output.
    pub key: Option<Vec<u8>>,
    /// The event; none is a tombstone.
    pub value: Option<Vec<u8>>,
    /// Carried over to the output.
    pub headers: Vec<Header>,
    /// Its headers could not be read, and are left out.
    pub has_broken_headers: bool,
    /// Milliseconds since 1970, as the topic gives it: of creation or of the append.
    pub timestamp: Option<i64>,
    /// Its share of what may be in flight; given back when the record is dropped.
    pub permit: Permit,
}

impl Record {
    /// Bytes that the record holds, roughly what it costs to keep.
    pub fn size(key: Option<&[u8]>, value: Option<&[u8]>, headers: &[Header]) -> usize {
        let header = |(name, value): &Header| name.len() + value.as_ref().map_or(0, Vec::len);
        key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len) + headers.iter().map(header).sum::<usize>()
    }
}

impl fmt::Debug for Record {
    /// Leaves key, value and headers out: they are the users'.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

/// A comment whose rows wait for the model.
#[derive(Debug)]
pub struct Pending {
    /// Its record.
    pub record: Record,
    /// The comment.
    pub comment: Comment,
    /// Its windows, each one row.
    pub windows: usize,
    /// It has more windows than are scored.
    pub truncated: bool,
}

/// A record whose fate is known.
#[derive(Debug)]
pub struct Finished {
    /// The record.
    pub record: Record,
    /// Its fate.
    pub outcome: Outcome,
}

/// What became of a record.
#[derive(Debug)]
pub enum Outcome {
    /// The model has scored it.
    Scored {
        /// The comment.
        comment: Comment,
        /// What the model said.
        scored: Scored,
        /// Policy, calibration and model that were in service when it was scored.
        judge: Arc<Judge>,
        /// When.
        at: SystemTime,
    },
    /// Deleted upstream: a decision without a score.
    Deleted(Comment),
    /// A null value, passed through.
    Tombstone,
    /// It cannot be decided.
    Rejected(Rejection),
}

/// Why a record became a dead letter. Never quotes the record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// Stable name: the label of the metric, and `exception.class.name` of the dead letter.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// Where it failed.
    pub stage: RejectionStage,
}

/// The stage that gave up, under Kafka Connect's name for it.
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
    /// As in Kafka Connect's `org.apache.kafka.connect.runtime.errors.Stage`.
    pub fn connect_name(self) -> &'static str {
        match self {
            Self::Decode => "VALUE_CONVERTER",
            Self::Score => "TRANSFORMATION",
            Self::Emit => "KAFKA_PRODUCE",
        }
    }
}
