//! Turns a comment's margin into a [`Decision`], with a calibration and a policy.
//!
//! This module reads no clock and does no I/O. For every margin, the probability is finite and in `0..=1`. If the
//! margin is not finite, or the text was scored only in part, the comment is reviewed or blocked, but never allowed.

mod calibration;
mod current;
mod policy;
#[cfg(test)]
mod tests;

use std::time::SystemTime;

use sha2::{Digest, Sha256};

pub use calibration::{Calibration, CalibrationError};
pub use current::{CurrentJudge, JudgedModel};
pub use policy::{DerivedThresholds, Policy, general_thresholds};

use calibration::sigmoid;

use crate::hash::hex;
use crate::message::{
    Action, AutomatedDecision, Comment, CommentMargin, Competence, DECISION_SCHEMA, Decision, Label, ModelIdentity,
    Scoring, SourceRecord,
};

/// Everything that a decision depends on, apart from the comment and its margin.
#[derive(Debug, Clone)]
pub struct Judge {
    /// The thresholds.
    pub policy: Policy,
    /// The calibration that turns margins into probabilities.
    pub calibration: Calibration,
    /// The identity of the model that computes the margins.
    pub model: ModelIdentity,
}

impl Judge {
    /// Creates a judge, and records the calibration in the model's identity.
    pub fn new(policy: Policy, calibration: Calibration, mut model: ModelIdentity) -> Self {
        model.calibration = calibration.name().into_owned();
        Self {
            policy,
            calibration,
            model,
        }
    }

    /// Returns the decision about a scored comment. `source` is the comment's record, if it came from a topic.
    pub fn decide(
        &self,
        comment: &Comment,
        scored: CommentMargin,
        source: Option<&SourceRecord>,
        now: SystemTime,
    ) -> Decision {
        let thresholds = self.policy.thresholds(comment.community_id.as_deref());
        let probability = self.calibration.probability(scored.margin);
        let is_in_scope = scored
            .competence
            .is_none_or(|competence| competence == Competence::InScope);
        // Part of a truncated text was not scored, a margin that is not finite has no meaning, and that of a text in another
        // language has little.
        let doubtful =
            scored.truncated || !scored.margin.is_finite() || self.policy.reviews_not_in_scope && !is_in_scope;
        let action = if probability >= thresholds.block && !scored.margin.is_nan() {
            Action::Block
        } else if probability >= thresholds.review || doubtful {
            Action::Review
        } else {
            Action::Allow
        };
        let label = if probability >= 0.5 { Label::Hateful } else { Label::Ok };
        let scoring = Scoring {
            probability,
            score: sigmoid(f64::from(scored.margin)),
            margin: finite(scored.margin),
            label,
            competence: scored.competence,
            thresholds,
            policy: self.policy.content_hash().to_owned(),
            model: self.model.clone(),
            text_sha256: hex(&Sha256::digest(comment.text.as_bytes())),
            windows: scored.windows,
            scored_at: humantime::format_rfc3339_millis(now).to_string(),
        };
        decision(comment, source, action, Some(scoring))
    }
}

/// Returns the decision about a comment that was deleted upstream, which is not scored.
pub fn deleted(comment: &Comment, source: Option<&SourceRecord>) -> Decision {
    decision(comment, source, Action::Delete, None)
}

fn decision(comment: &Comment, source: Option<&SourceRecord>, action: Action, scoring: Option<Scoring>) -> Decision {
    Decision {
        schema: DECISION_SCHEMA.to_owned(),
        decision_id: source.map(SourceRecord::decision_id),
        event_id: comment.event_id.clone(),
        content_id: comment.content_id.clone(),
        revision: comment.revision,
        community_id: comment.community_id.clone(),
        replaced_surrogates: comment.replaced_surrogates,
        action,
        scoring,
        source: source.cloned(),
        automated_detection: true,
        automated_decision: match action {
            Action::Allow | Action::Block => AutomatedDecision::Fully,
            // The deletion itself was not decided here.
            Action::Review | Action::Delete => AutomatedDecision::Not,
        },
    }
}

/// Returns a margin that JSON can represent. [`Scorer`](crate::scorer::Scorer) already rejects margins that are not
/// finite, so this is a second safeguard.
fn finite(margin: f32) -> f32 {
    if margin.is_nan() {
        0.0
    } else {
        margin.clamp(f32::MIN, f32::MAX)
    }
}
