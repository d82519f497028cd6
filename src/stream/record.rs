//! An input record on its way through the stages, and its outcome.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use super::in_flight::InFlightGuard;
use super::ownership::Epoch;
use super::text_key::TextKey;
use crate::decide::Judge;
use crate::message::{Comment, CommentMargin, TextFacts};
use crate::scorer::Row;

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

/// A comment with the record that it was read from.
#[derive(Debug)]
pub struct CommentRecord {
    pub record: Record,
    pub comment: Comment,
}

impl CommentRecord {
    /// Finishes a comment that was scored at `at`. The judge is that of the model that computed the margin.
    pub fn scored(self, scored: CommentMargin, judge: Arc<Judge>, at: SystemTime) -> Finished {
        let Self { record, comment } = self;
        let outcome = Outcome::Scored {
            comment,
            scored,
            judge,
            at,
        };
        Finished { record, outcome }
    }

    /// Finishes a comment about which no decision can be made.
    pub fn rejected(self, rejection: Rejection) -> Finished {
        Finished {
            record: self.record,
            outcome: Outcome::Rejected(rejection),
        }
    }
}

/// A comment whose rows wait to be scored.
#[derive(Debug)]
pub struct Pending {
    pub source: CommentRecord,
    /// Set if other comments with the same text may wait for its margin.
    pub first: Option<FirstOfText>,
    /// What is known of its text.
    pub facts: TextFacts,
}

/// The text of the first comment in flight that has it.
#[derive(Debug)]
pub struct FirstOfText {
    pub key: TextKey,
    /// Its rows, to score the comments that wait if this one cannot be scored.
    pub rows: Vec<Row>,
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

#[cfg(test)]
pub(super) mod tests {
    use super::super::in_flight::InFlight;
    use super::*;

    /// Returns a record with this value at the given position.
    pub fn record(partition: i32, epoch: Epoch, sequence: u64, value: Option<Vec<u8>>) -> Record {
        Record {
            position: RecordPosition {
                partition,
                epoch,
                sequence,
                offset: sequence as i64,
            },
            key: None,
            value,
            headers: Vec::new(),
            has_broken_headers: false,
            timestamp: None,
            _in_flight: Arc::new(InFlight::new(1, 1)).add(0, None, std::time::Instant::now()),
        }
    }

    /// Returns the comment with this text at the given position, with its record.
    pub fn comment(partition: i32, epoch: Epoch, sequence: u64, text: &str) -> CommentRecord {
        CommentRecord {
            record: record(partition, epoch, sequence, None),
            comment: Comment {
                event_id: None,
                content_id: None,
                revision: None,
                op: crate::message::Op::Create,
                community_id: None,
                text: text.to_owned(),
                replaced_surrogates: 0,
            },
        }
    }
}
