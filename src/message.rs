//! The nouns that travel between stages and topics.
//!
//! Pure data and its JSON: knows no Kafka, no model, and reads no clock.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::hash::hex;

/// Schema tag of every decision.
pub const DECISION_SCHEMA: &str = "moderatord.decision.v1";

/// Where a record stands in its topic.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SourceRecord {
    /// Topic name.
    pub topic: String,
    /// Partition number.
    pub partition: i32,
    /// Offset of the record itself.
    pub offset: i64,
}

impl SourceRecord {
    /// Identifies the decision about this record: SHA-256 over topic, partition and offset, and
    /// nothing of the model or the policy, so that readers can deduplicate on it.
    pub fn decision_id(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.topic.as_bytes());
        // A topic name holds no NUL, so the three parts cannot run into each other.
        hash.update([0]);
        hash.update(self.partition.to_be_bytes());
        hash.update(self.offset.to_be_bytes());
        hex(&hash.finalize()[..16])
    }
}

/// The offset that a consumer group would read next: one past the last finished record.
///
/// What Kafka calls a committed offset. The one place where one is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NextOffset(i64);

impl NextOffset {
    /// The offset to read after the record at `offset`.
    pub fn after(offset: i64) -> Self {
        Self(offset + 1)
    }

    /// A position as the broker states it, which already is the next offset.
    pub fn from_committed(position: i64) -> Self {
        Self(position)
    }

    /// The number to commit.
    pub fn get(self) -> i64 {
        self.0
    }
}

/// What the platform did to the content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// A new comment.
    #[default]
    Create,
    /// A new text for an old comment.
    Edit,
    /// The comment is gone; it passes through as a decision, unscored.
    Delete,
}

/// One comment event, decoded.
#[derive(Clone, PartialEq, Eq)]
pub struct Comment {
    /// The platform's id of the event, where it gives one.
    pub event_id: Option<String>,
    /// The platform's id of the content.
    pub content_id: Option<String>,
    /// Revision of the content, where the platform counts them.
    pub revision: Option<i64>,
    /// What happened to it.
    pub op: Op,
    /// The community it was posted in; selects the policy's thresholds.
    pub community_id: Option<String>,
    /// The text to score; empty for [`Op::Delete`].
    pub text: String,
}

impl std::fmt::Debug for Comment {
    /// Leaves the text out: comment text is never logged.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Comment")
            .field("event_id", &self.event_id)
            .field("content_id", &self.content_id)
            .field("revision", &self.revision)
            .field("op", &self.op)
            .field("community_id", &self.community_id)
            .field("text_bytes", &self.text.len())
            .finish()
    }
}

/// What the model said of one comment: the largest margin over its windows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    /// Logit of the hateful label minus the logit of the other.
    pub margin: f32,
    /// Windows that were scored.
    pub windows: usize,
    /// The text has more windows than `prompt.max_windows`: it was not read whole.
    pub truncated: bool,
}

/// The class the model chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Label {
    /// Hateful.
    Hateful,
    /// Not hateful.
    Ok,
}

/// What the platform should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Publish.
    Allow,
    /// Show it to a moderator.
    Review,
    /// Hold back.
    Block,
    /// The content was deleted upstream; nothing was scored.
    Delete,
}

/// Whether a machine alone decided, in the words of the EU's Digital Services Act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AutomatedDecision {
    /// No human decides.
    Fully,
    /// A human decides.
    Not,
}

/// Band thresholds on the calibrated probability, both in `0..=1`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Thresholds {
    /// At or above: at least [`Action::Review`].
    pub review: f64,
    /// At or above: [`Action::Block`].
    pub block: f64,
}

/// Everything that a score depends on, by content hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelIdentity {
    /// Hash of the base checkpoint's files.
    pub base: String,
    /// Hash of the adapter's files, or `none`.
    pub adapter: String,
    /// The adapter's version in its registry, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_version: Option<String>,
    /// Hash of the frame, the labels and the window settings.
    pub prompt: String,
    /// Hash of the calibration, or `identity`.
    pub calibration: String,
    /// Name and version of the normaliser, or `none`.
    pub normalizer: String,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Dtype of the arithmetic.
    pub dtype: String,
    /// Quantisation of the frozen weights, or `none`.
    pub quantization: String,
}

/// The scored part of a decision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scoring {
    /// Calibrated probability that the comment is hateful.
    pub probability: f64,
    /// Softmax of the hateful label over the two labels.
    pub score: f64,
    /// Logit of the hateful label minus the logit of the other.
    pub margin: f32,
    /// The class at probability one half.
    pub label: Label,
    /// The thresholds that applied.
    pub thresholds: Thresholds,
    /// Hash of the policy that chose them.
    pub policy: String,
    /// What computed the score.
    pub model: ModelIdentity,
    /// SHA-256 of the text as received.
    pub text_sha256: String,
    /// Windows that were scored.
    pub windows: usize,
    /// RFC 3339 UTC.
    pub scored_at: String,
}

/// What the daemon says about one comment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// [`DECISION_SCHEMA`].
    pub schema: String,
    /// [`SourceRecord::decision_id`]; absent where the comment came from no topic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision_id: Option<String>,
    /// Copied from the comment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_id: Option<String>,
    /// Copied from the comment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_id: Option<String>,
    /// Copied from the comment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<i64>,
    /// Copied from the comment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub community_id: Option<String>,
    /// What to do.
    pub action: Action,
    /// Absent for [`Action::Delete`].
    #[serde(flatten, default, skip_serializing_if = "Option::is_none")]
    pub scoring: Option<Scoring>,
    /// Where the comment came from; absent where it came from no topic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceRecord>,
    /// Always true: a machine looked first.
    pub automated_detection: bool,
    /// `fully` for allow and block, `not` for review.
    pub automated_decision: AutomatedDecision,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_id_names_the_record_alone() {
        let source = |topic: &str, partition, offset| SourceRecord {
            topic: topic.into(),
            partition,
            offset,
        };
        assert_eq!(source("c", 1, 2).decision_id(), source("c", 1, 2).decision_id());
        for other in [source("d", 1, 2), source("c", 2, 2), source("c", 1, 3)] {
            assert_ne!(source("c", 1, 2).decision_id(), other.decision_id());
        }
        assert_eq!(source("c", 1, 2).decision_id().len(), 32);
    }

    #[test]
    fn the_next_offset_is_one_past_the_record() {
        assert_eq!(NextOffset::after(41).get(), 42);
        assert_eq!(NextOffset::from_committed(42), NextOffset::after(41));
    }
}
