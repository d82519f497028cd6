//! Turns a comment's margin into a [`Decision`], with a calibration and a policy.
//!
//! This module reads no clock and does no I/O. For every margin, the probability is finite and in `0..=1`. If the
//! margin is not finite, or the text was scored only in part, the comment is reviewed or blocked, but never allowed.

mod calibration;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use calibration::{Calibration, CalibrationError};

use calibration::sigmoid;

use crate::config::PolicyConfig;
use crate::hash::{content_hash, hex};
use crate::message::{
    Action, AutomatedDecision, Comment, CommentMargin, DECISION_SCHEMA, Decision, Label, ModelIdentity, Scoring,
    SourceRecord, Thresholds,
};

/// The thresholds of the deployment and of single communities.
#[derive(Debug, Clone)]
pub struct Policy {
    thresholds: Thresholds,
    communities: BTreeMap<String, Thresholds>,
    canonical: String,
    content_hash: String,
}

impl Policy {
    /// Creates the policy that the settings describe.
    pub fn new(config: &PolicyConfig) -> Self {
        #[derive(Serialize)]
        struct CanonicalPolicy<'a> {
            format: u32,
            thresholds: &'a Thresholds,
            communities: &'a BTreeMap<String, Thresholds>,
        }
        let canonical = CanonicalPolicy {
            format: 1,
            thresholds: &config.thresholds,
            communities: &config.communities,
        };
        let canonical = serde_json::to_string(&canonical).expect("numbers and text keys always have a JSON form");
        Self {
            thresholds: config.thresholds,
            communities: config.communities.clone(),
            content_hash: content_hash(canonical.as_bytes()),
            canonical,
        }
    }

    /// Returns the thresholds for a community, or the general ones if it has none of its own.
    pub fn thresholds(&self, community_id: Option<&str>) -> Thresholds {
        community_id
            .and_then(|id| self.communities.get(id))
            .copied()
            .unwrap_or(self.thresholds)
    }

    /// Returns the canonical JSON form of the policy, of which [`Policy::content_hash`] is the hash.
    pub fn canonical(&self) -> &str {
        &self.canonical
    }

    /// Returns the hash of all thresholds, by which decisions name the policy.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }
}

/// The thresholds that were derived for an adapter. If one is `None`, the threshold in the settings applies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct DerivedThresholds {
    /// The probability from which comments are reviewed.
    pub review: Option<f64>,
    /// The probability from which comments are blocked.
    pub block: Option<f64>,
    /// Whether the thresholds hold for the traffic, because they were derived from a random sample of it, and not only
    /// for the comments that were labelled.
    pub representative: bool,
    /// Whether a threshold was only estimated, because there were too few labels to be sure that it reaches its target.
    #[serde(default)]
    pub provisional: bool,
}

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
        // Part of a truncated text was not scored, and a margin that is not finite has no meaning.
        let doubtful = scored.truncated || !scored.margin.is_finite();
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

/// The judge in service. Each batch is decided by the judge that was current when the batch was scored.
///
/// The policy and the model are replaced independently, and neither replacement undoes the other.
#[derive(Debug)]
pub struct CurrentJudge(Mutex<JudgeState>);

#[derive(Debug)]
struct JudgeState {
    policy: PolicyConfig,
    derived: DerivedThresholds,
    judge: Arc<Judge>,
}

/// The properties of a model that decisions depend on.
#[derive(Debug, Clone)]
pub struct JudgedModel {
    /// The identity of the model.
    pub identity: ModelIdentity,
    /// The calibration that turns its margins into probabilities.
    pub calibration: Calibration,
    /// The thresholds that were derived for it.
    pub derived: DerivedThresholds,
}

impl CurrentJudge {
    /// Creates the judge of a policy and a model.
    pub fn new(policy: PolicyConfig, model: JudgedModel) -> Self {
        let effective = effective_policy(&policy, model.derived);
        let judge = Judge::new(effective, model.calibration, model.identity);
        Self(Mutex::new(JudgeState {
            policy,
            derived: model.derived,
            judge: Arc::new(judge),
        }))
    }

    /// Returns the judge in service.
    pub fn get(&self) -> Arc<Judge> {
        Arc::clone(&self.lock().judge)
    }

    /// Replaces the policy, starting with the next batch.
    pub fn set_policy(&self, policy: PolicyConfig) {
        let mut state = self.lock();
        let (calibration, identity) = (state.judge.calibration, state.judge.model.clone());
        let effective = effective_policy(&policy, state.derived);
        state.judge = Arc::new(Judge::new(effective, calibration, identity));
        state.policy = policy;
    }

    /// Replaces the model, starting with the next batch.
    pub fn set_model(&self, model: JudgedModel) {
        let mut state = self.lock();
        state.derived = model.derived;
        let effective = effective_policy(&state.policy, model.derived);
        state.judge = Arc::new(Judge::new(effective, model.calibration, model.identity));
    }

    fn lock(&self) -> MutexGuard<'_, JudgeState> {
        // A thread that panics while it holds the lock leaves a judge that is still usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the policy of the settings, with the thresholds that were derived for the adapter if `policy.from_adapter`
/// is set.
fn effective_policy(config: &PolicyConfig, derived: DerivedThresholds) -> Policy {
    let mut config = config.clone();
    if config.from_adapter {
        let own = config.thresholds;
        let block = derived.block.unwrap_or(own.block);
        let review = derived.review.unwrap_or(own.review).min(block);
        config.thresholds = Thresholds { review, block };
    }
    Policy::new(&config)
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::message::Op;

    const NOW: Duration = Duration::from_millis(1_700_000_000_123);

    fn judge() -> Judge {
        let config = PolicyConfig {
            from_adapter: false,
            thresholds: Thresholds {
                review: 0.5,
                block: 0.9,
            },
            communities: [(
                "garden".to_owned(),
                Thresholds {
                    review: 0.1,
                    block: 0.2,
                },
            )]
            .into(),
        };
        let none = || "none".to_owned();
        Judge {
            policy: Policy::new(&config),
            calibration: Calibration::Identity,
            model: ModelIdentity {
                base: "sha256:base".into(),
                adapter: none(),
                adapter_version: None,
                prompt: "sha256:prompt".into(),
                calibration: Calibration::Identity.name().into(),
                normalizer: none(),
                device: "cpu".into(),
                dtype: "f32".into(),
                quantization: none(),
            },
        }
    }

    fn comment(community_id: Option<&str>) -> Comment {
        Comment {
            event_id: Some("e".into()),
            content_id: Some("c".into()),
            revision: Some(2),
            op: Op::Create,
            community_id: community_id.map(str::to_owned),
            text: "a comment".into(),
            replaced_surrogates: 0,
        }
    }

    fn decide(community: Option<&str>, margin: f32, truncated: bool) -> Decision {
        let scored = CommentMargin {
            margin,
            windows: 1,
            truncated,
        };
        let now = SystemTime::UNIX_EPOCH + NOW;
        judge().decide(&comment(community), scored, None, now)
    }

    #[test]
    fn each_action_begins_at_its_threshold() {
        let check = |community, margin, truncated, action, label, automated| {
            let decision = decide(community, margin, truncated);
            let found = decision.scoring.as_ref().map(|scoring| scoring.label);
            assert_eq!(
                (decision.action, found, decision.automated_decision),
                (action, Some(label), automated),
                "{community:?} {margin} {truncated}"
            );
        };
        use {Action::*, AutomatedDecision::*, Label::*};
        check(None, -3.0, false, Allow, Ok, Fully);
        check(None, -1e-6, false, Allow, Ok, Fully);
        check(None, 0.0, false, Review, Hateful, Not);
        check(None, 2.19, false, Review, Hateful, Not);
        check(None, 2.2, false, Block, Hateful, Fully);
        check(None, f32::INFINITY, false, Block, Hateful, Fully);
        // A community's own thresholds do not change the label.
        check(Some("garden"), -3.0, false, Allow, Ok, Fully);
        check(Some("garden"), -2.0, false, Review, Ok, Not);
        check(Some("garden"), -1.0, false, Block, Ok, Fully);
        check(Some("elsewhere"), -1.0, false, Allow, Ok, Fully);
        // A comment that was scored in part is never allowed without a review, but can be blocked.
        check(None, -9.0, true, Review, Ok, Not);
        check(None, 9.0, true, Block, Hateful, Fully);
        // A margin that is NaN never blocks a comment.
        check(None, f32::NAN, false, Review, Hateful, Not);
        check(Some("garden"), f32::NAN, false, Review, Hateful, Not);
        check(None, f32::NEG_INFINITY, false, Review, Ok, Not);
    }

    #[test]
    fn a_deletion_is_not_scored() {
        let source = SourceRecord {
            topic_id: None,
            topic: "comments".into(),
            partition: 0,
            offset: 7,
        };
        let decision = deleted(&comment(None), Some(&source));
        assert_eq!((decision.action, decision.scoring), (Action::Delete, None));
        assert_eq!(decision.decision_id, Some(source.decision_id()));
    }

    #[test]
    fn every_threshold_changes_the_policy_hash() {
        let hash = |review, block, garden: Option<f64>| {
            let communities = garden.map(|review| ("garden".to_owned(), Thresholds { review, block }));
            let config = PolicyConfig {
                from_adapter: false,
                thresholds: Thresholds { review, block },
                communities: communities.into_iter().collect(),
            };
            Policy::new(&config).content_hash().to_owned()
        };
        let hashes = [
            hash(0.5, 0.9, None),
            hash(0.4, 0.9, None),
            hash(0.5, 0.8, None),
            hash(0.5, 0.9, Some(0.1)),
            hash(0.5, 0.9, Some(0.2)),
        ];
        for (index, one) in hashes.iter().enumerate() {
            assert!(hashes[..index].iter().all(|other| other != one), "{index}");
        }
        assert_eq!(hash(0.5, 0.9, None), hashes[0]);
    }

    #[test]
    fn a_decision_records_the_given_time_and_the_hash_of_the_text() {
        let scoring = decide(None, 0.0, false).scoring.unwrap();
        assert_eq!(scoring.scored_at, "2023-11-14T22:13:20.123Z");
        assert_eq!(
            scoring.text_sha256,
            "ff23dac3f565ddda0edb67d98c52c0be335dcee26d9c1f85ff8e2c65bd2de96c"
        );
    }

    proptest! {
        #[test]
        fn every_margin_gives_a_decision_that_json_can_represent(bits in any::<u32>(), truncated: bool) {
            let decision = decide(None, f32::from_bits(bits), truncated);
            let scoring = decision.scoring.clone().unwrap();
            prop_assert!((0.0..=1.0).contains(&scoring.probability) && (0.0..=1.0).contains(&scoring.score));
            let json = serde_json::to_string(&decision).unwrap();
            let back = serde_json::from_str::<Decision>(&json).unwrap();
            prop_assert_eq!((back.action, back.scoring.unwrap().margin), (decision.action, scoring.margin));
        }

        #[test]
        fn a_larger_margin_is_never_less_hateful(one in -200f32..200.0, other in -200f32..200.0) {
            let rank = |decision: &Decision| [Action::Allow, Action::Review, Action::Block]
                .iter()
                .position(|&action| action == decision.action);
            let (low, high) = (decide(None, one.min(other), false), decide(None, one.max(other), false));
            let probability = |decision: &Decision| decision.scoring.as_ref().unwrap().probability;
            prop_assert!(probability(&low) <= probability(&high));
            prop_assert!(rank(&low) <= rank(&high));
        }
    }
}
