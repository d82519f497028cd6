//! The data that passes between stages and topics, and its JSON form.
//!
//! This module contains plain data: it depends on neither Kafka nor the model, and never reads a clock.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use crate::hash::hex;

/// The value of `schema` in every decision.
pub const DECISION_SCHEMA: &str = "moderatord.decision.v1";

/// The topic, partition and offset of an input record.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub struct SourceRecord {
    /// The name of the topic.
    pub topic: String,
    /// Kafka's id of the topic; absent if the brokers have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topic_id: Option<String>,
    /// The number of the partition in the topic.
    pub partition: i32,
    /// The offset of the record itself, which is one less than the offset to commit.
    pub offset: i64,
}

impl SourceRecord {
    /// Returns the id of the decision about this record: the first 16 bytes of a SHA-256 hash, in hexadecimal digits.
    ///
    /// The hash covers only the topic with its id, the partition and the offset: a topic that is recreated has other
    /// ids, although its offsets begin again. The hash does not depend on the model or the policy, so that
    /// consumers can deduplicate decisions by their id.
    pub fn decision_id(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.topic.as_bytes());
        // A topic name contains no NUL, so different records cannot produce the same input.
        hash.update([0]);
        if let Some(id) = &self.topic_id {
            // The id makes the input longer, so it cannot equal the input for a topic without an id.
            hash.update(id.as_bytes());
            hash.update([0]);
        }
        hash.update(self.partition.to_be_bytes());
        hash.update(self.offset.to_be_bytes());
        hex(&hash.finalize()[..16])
    }
}

/// The offset that a consumer group reads next: one past the last finished record.
///
/// Kafka calls this a committed offset. Only [`NextOffset::after`] adds one to the offset of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NextOffset(i64);

impl NextOffset {
    /// Returns the offset to read after the record at `offset`.
    pub fn after(offset: i64) -> Self {
        Self(offset + 1)
    }

    /// Wraps a committed offset from the broker, which is already the next offset to read.
    pub fn from_committed(position: i64) -> Self {
        Self(position)
    }

    /// Returns the offset to commit.
    pub fn get(self) -> i64 {
        self.0
    }
}

/// What happened to the content on the platform.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// A comment was posted.
    #[default]
    Create,
    /// The text of an existing comment was changed.
    Edit,
    /// The comment was deleted; its decision is published without scoring.
    Delete,
}

/// A decoded comment event.
#[derive(Clone, PartialEq, Eq)]
pub struct Comment {
    /// The platform's id of the event, if it provides one.
    pub event_id: Option<String>,
    /// The platform's id of the content, if it provides one.
    pub content_id: Option<String>,
    /// The revision of the content, if the platform counts revisions.
    pub revision: Option<i64>,
    /// What happened to the content.
    pub op: Op,
    /// The community in which it was posted, which selects the thresholds of the policy.
    pub community_id: Option<String>,
    /// The text to score; empty for [`Op::Delete`].
    pub text: String,
    /// The number of halves of surrogate pairs in the text and the ids, each of which was read as U+FFFD.
    pub replaced_surrogates: usize,
}

impl std::fmt::Debug for Comment {
    /// Omits the text, because comment text is never logged.
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

/// What is known of a comment's text before it is scored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TextFacts {
    /// The number of windows, each of which is one row.
    pub windows: usize,
    /// Whether the text has more windows than are scored.
    pub truncated: bool,
    /// What is subtracted from the largest margin, because of the number of windows.
    pub correction: f32,
    /// Whether the model can judge the text; `None` if the model does not say which languages it was trained for.
    pub competence: Option<Competence>,
}

impl TextFacts {
    /// Returns the result of scoring the text, from the largest margin of its windows.
    pub fn scored(self, largest: f32) -> CommentMargin {
        CommentMargin {
            margin: largest - self.correction,
            windows: self.windows,
            truncated: self.truncated,
            competence: self.competence,
        }
    }
}

/// Whether a text is in a language that the model was trained for, from the most to the least likely.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Competence {
    /// Nothing shows that the text is in another language. Texts of a few words mostly count as in scope.
    InScope,
    /// The text seems to be in another language, or a part of it is, or the vocabulary lacks many of its characters.
    Unsure,
    /// The text is in another script, or clearly in another language.
    OutOfScope,
}

impl Competence {
    /// Returns the name that decisions and metrics use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InScope => "in_scope",
            Self::Unsure => "unsure",
            Self::OutOfScope => "out_of_scope",
        }
    }
}

/// The result of scoring a comment: the largest margin of its windows, less the correction for their number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CommentMargin {
    /// The logit of the hateful label minus the logit of the other label, less the correction.
    pub margin: f32,
    /// The number of windows that were scored.
    pub windows: usize,
    /// Whether only part of the text was scored, because it has more windows than `prompt.max_windows`.
    pub truncated: bool,
    /// Whether the model can judge the text, if it says which languages it was trained for.
    pub competence: Option<Competence>,
}

/// The class that the model assigns to a comment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Label {
    /// The probability of being hateful is at least one half.
    Hateful,
    /// The probability of being hateful is less than one half.
    Ok,
}

/// What the platform should do with the comment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Publish the comment.
    Allow,
    /// Show the comment to a moderator.
    Review,
    /// Hold the comment back.
    Block,
    /// The comment was deleted on the platform and was not scored.
    Delete,
}

impl Action {
    /// Returns the name of the action, as in decisions and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Review => "review",
            Self::Block => "block",
            Self::Delete => "delete",
        }
    }
}

/// Whether the decision was taken without a human, in the terms of the EU's Digital Services Act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AutomatedDecision {
    /// The decision is fully automated.
    Fully,
    /// A human takes or has taken the decision.
    Not,
}

/// The thresholds that divide the calibrated probability into allow, review and block, both from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Thresholds {
    /// The probability at or above which a comment is reviewed, unless it is blocked.
    pub review: f64,
    /// The probability at or above which a comment is blocked.
    pub block: f64,
}

/// Identifies everything that a score depends on, mostly by content hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelIdentity {
    /// The hash of the files of the base checkpoint.
    pub base: String,
    /// The hash of the files of the adapter, or `none`.
    pub adapter: String,
    /// The version of the adapter in the registry, if it comes from one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_version: Option<String>,
    /// The hash of the frame, the labels and the window settings.
    pub prompt: String,
    /// The hash of the calibration, or `identity`.
    pub calibration: String,
    /// The name and version of the normaliser, or `none`.
    pub normalizer: String,
    /// The device that computed the score: `cpu` or `cuda:N`.
    pub device: String,
    /// The data type of the arithmetic: `f32` or `bf16`.
    pub dtype: String,
    /// The quantisation of the frozen weights, or `none`.
    pub quantization: String,
}

/// The part of a decision that exists only if the comment was scored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Scoring {
    /// The calibrated probability that the comment is hateful.
    pub probability: f64,
    /// The softmax probability of the hateful label over the two labels, before calibration: the sigmoid of the margin.
    pub score: f64,
    /// The logit of the hateful label minus the logit of the other label, of the window where that is largest, less the
    /// correction for the number of windows.
    pub margin: f32,
    /// The class, with a probability of one half as the boundary. Thresholds do not change it, so a comment that is
    /// blocked at a threshold below one half has the label `ok`; what to do is the action.
    pub label: Label,
    /// Whether the model can judge the text; absent if the model does not say which languages it was trained for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub competence: Option<Competence>,
    /// The thresholds that apply to the community of the comment.
    pub thresholds: Thresholds,
    /// The hash of the policy that contains the thresholds.
    pub policy: String,
    /// Identifies the model that computed the score.
    pub model: ModelIdentity,
    /// The SHA-256 hash of the text as received, in hexadecimal digits.
    pub text_sha256: String,
    /// The number of windows that were scored.
    pub windows: usize,
    /// The time of scoring in UTC, as in RFC 3339.
    pub scored_at: String,
}

/// The daemon's decision about a comment, as published to the decisions topic or printed by `score`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Decision {
    /// The name and version of this format, `moderatord.decision.v1`.
    pub schema: String,
    /// The id of the decision, made of its source; absent if the comment was not read from a topic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision_id: Option<String>,
    /// The id of the comment's event, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_id: Option<String>,
    /// The id of the content, if the comment has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_id: Option<String>,
    /// The revision of the content, if the comment has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<i64>,
    /// The community of the comment, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub community_id: Option<String>,
    /// The number of halves of surrogate pairs (`\ud83d` without its other half) in the text and the ids of the event,
    /// each of which was read as U+FFFD; absent if there are none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub replaced_surrogates: usize,
    /// What the platform should do with the comment.
    pub action: Action,
    /// The score and what it depends on; absent for deletions.
    #[serde(flatten, default, skip_serializing_if = "Option::is_none")]
    pub scoring: Option<Scoring>,
    /// The record that contained the comment; absent if the comment was not read from a topic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceRecord>,
    /// Always true, because every event is first examined by this daemon.
    pub automated_detection: bool,
    /// `fully` for allow and block, `not` for review and delete.
    pub automated_decision: AutomatedDecision,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_id_depends_only_on_topic_partition_and_offset() {
        let source = |topic: &str, partition, offset| SourceRecord {
            topic: topic.into(),
            topic_id: None,
            partition,
            offset,
        };
        assert_eq!(source("c", 1, 2).decision_id(), source("c", 1, 2).decision_id());
        for other in [source("d", 1, 2), source("c", 2, 2), source("c", 1, 3)] {
            assert_ne!(source("c", 1, 2).decision_id(), other.decision_id());
        }
        assert_eq!(source("c", 1, 2).decision_id().len(), 32);
        let with_id = |id: &str| SourceRecord {
            topic_id: Some(id.into()),
            ..source("c", 1, 2)
        };
        assert_eq!(with_id("first").decision_id(), with_id("first").decision_id());
        for other in [source("c", 1, 2), with_id("second")] {
            assert_ne!(with_id("first").decision_id(), other.decision_id());
        }
    }

    #[test]
    fn the_next_offset_is_one_past_the_record() {
        assert_eq!(NextOffset::after(41).get(), 42);
        assert_eq!(NextOffset::from_committed(42), NextOffset::after(41));
    }
}
