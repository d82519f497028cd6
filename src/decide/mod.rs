//! Margin, calibration and policy in, [`Decision`] out.
//!
//! Pure: no clock, no I/O. Whatever the margin, the probability is finite and in `0..=1`, and a
//! decision that the arithmetic or the length of the text leaves in doubt goes to a human.

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
    Action, AutomatedDecision, Comment, DECISION_SCHEMA, Decision, Label, ModelIdentity, Scored, Scoring, SourceRecord,
    Thresholds,
};

/// Which thresholds apply to whom.
#[derive(Debug, Clone)]
pub struct Policy {
    thresholds: Thresholds,
    communities: BTreeMap<String, Thresholds>,
    canonical: String,
    content_hash: String,
}

impl Policy {
    /// The policy that the settings describe.
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

    /// Where a community's bands begin.
    pub fn thresholds(&self, community_id: Option<&str>) -> Thresholds {
        community_id
            .and_then(|id| self.communities.get(id))
            .copied()
            .unwrap_or(self.thresholds)
    }

    /// What its hash is of.
    pub fn canonical(&self) -> &str {
        &self.canonical
    }

    /// Hash of the thresholds of all.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }
}

/// Thresholds that were derived for an adapter; where one is missing, the settings' stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct DerivedThresholds {
    /// Where review begins.
    pub review: Option<f64>,
    /// Where blocking begins.
    pub block: Option<f64>,
    /// Whether they hold for the traffic, or only for what was labelled.
    pub representative: bool,
}

/// Everything that a decision rests on beside the comment and its score.
#[derive(Debug, Clone)]
pub struct Judge {
    /// Which thresholds apply.
    pub policy: Policy,
    /// From margin to probability.
    pub calibration: Calibration,
    /// What computes the scores.
    pub model: ModelIdentity,
}

impl Judge {
    /// Puts them together; the identity names the calibration from now on.
    pub fn new(policy: Policy, calibration: Calibration, mut model: ModelIdentity) -> Self {
        model.calibration = calibration.name().into_owned();
        Self {
            policy,
            calibration,
            model,
        }
    }

    /// The decision about a scored comment; `source` where it came from a topic.
    pub fn decide(
        &self,
        comment: &Comment,
        scored: Scored,
        source: Option<&SourceRecord>,
        now: SystemTime,
    ) -> Decision {
        let thresholds = self.policy.thresholds(comment.community_id.as_deref());
        let probability = self.calibration.probability(scored.margin);
        // Nobody has read the rest of a truncated text, and a margin that is no number says nothing.
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

/// The judge in service. Each batch is decided by the one that was current when it was scored.
///
/// Policy and model change apart from each other, and neither undoes a change of the other.
#[derive(Debug)]
pub struct CurrentJudge(Mutex<Parts>);

#[derive(Debug)]
struct Parts {
    policy: PolicyConfig,
    derived: DerivedThresholds,
    judge: Arc<Judge>,
}

/// What comes with a model.
#[derive(Debug, Clone)]
pub struct JudgedModel {
    /// What computes the scores.
    pub identity: ModelIdentity,
    /// From margin to probability.
    pub calibration: Calibration,
    /// Thresholds that were derived for it.
    pub derived: DerivedThresholds,
}

impl CurrentJudge {
    /// Begins with these.
    pub fn new(policy: PolicyConfig, model: JudgedModel) -> Self {
        let judge = Judge::new(effective(&policy, model.derived), model.calibration, model.identity);
        Self(Mutex::new(Parts {
            policy,
            derived: model.derived,
            judge: Arc::new(judge),
        }))
    }

    /// The judge.
    pub fn get(&self) -> Arc<Judge> {
        Arc::clone(&self.lock().judge)
    }

    /// Other thresholds, from the next batch on.
    pub fn set_policy(&self, policy: PolicyConfig) {
        let mut parts = self.lock();
        let (calibration, identity) = (parts.judge.calibration, parts.judge.model.clone());
        parts.judge = Arc::new(Judge::new(effective(&policy, parts.derived), calibration, identity));
        parts.policy = policy;
    }

    /// Another model, from the next batch on.
    pub fn set_model(&self, model: JudgedModel) {
        let mut parts = self.lock();
        parts.derived = model.derived;
        let policy = effective(&parts.policy, model.derived);
        parts.judge = Arc::new(Judge::new(policy, model.calibration, model.identity));
    }

    fn lock(&self) -> MutexGuard<'_, Parts> {
        // What is computed before a change cannot leave it half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The policy, with what was derived for an adapter where the settings want that.
fn effective(config: &PolicyConfig, derived: DerivedThresholds) -> Policy {
    let mut config = config.clone();
    if config.from_adapter {
        let own = config.thresholds;
        let block = derived.block.unwrap_or(own.block);
        let review = derived.review.unwrap_or(own.review).min(block);
        config.thresholds = Thresholds { review, block };
    }
    Policy::new(&config)
}

/// The decision about a comment that was deleted upstream: nothing to score.
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
        action,
        scoring,
        source: source.cloned(),
        automated_detection: true,
        automated_decision: match action {
            Action::Allow | Action::Block => AutomatedDecision::Fully,
            // A deletion was somebody else's decision.
            Action::Review | Action::Delete => AutomatedDecision::Not,
        },
    }
}

/// JSON has no infinities. The scorer refuses such margins; this is the second net.
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
        }
    }

    fn decide(community: Option<&str>, margin: f32, truncated: bool) -> Decision {
        let scored = Scored {
            margin,
            windows: 1,
            truncated,
        };
        let now = SystemTime::UNIX_EPOCH + NOW;
        judge().decide(&comment(community), scored, None, now)
    }

    #[test]
    fn bands_begin_at_their_thresholds() {
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
        // A community's own bands; the label does not move with them.
        check(Some("garden"), -3.0, false, Allow, Ok, Fully);
        check(Some("garden"), -2.0, false, Review, Ok, Not);
        check(Some("garden"), -1.0, false, Block, Ok, Fully);
        check(Some("elsewhere"), -1.0, false, Allow, Ok, Fully);
        // What was not read whole is never allowed by a machine alone, and may still be blocked.
        check(None, -9.0, true, Review, Ok, Not);
        check(None, 9.0, true, Block, Hateful, Fully);
        // No number is no reason to block.
        check(None, f32::NAN, false, Review, Hateful, Not);
        check(Some("garden"), f32::NAN, false, Review, Hateful, Not);
        check(None, f32::NEG_INFINITY, false, Review, Ok, Not);
    }

    #[test]
    fn a_deletion_is_passed_on_unscored() {
        let source = SourceRecord {
            topic: "comments".into(),
            partition: 0,
            offset: 7,
        };
        let decision = deleted(&comment(None), Some(&source));
        assert_eq!((decision.action, decision.scoring), (Action::Delete, None));
        assert_eq!(decision.decision_id, Some(source.decision_id()));
    }

    #[test]
    fn the_policy_hash_follows_every_threshold() {
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
    fn time_is_an_argument_and_the_text_is_named_by_its_hash() {
        let scoring = decide(None, 0.0, false).scoring.unwrap();
        assert_eq!(scoring.scored_at, "2023-11-14T22:13:20.123Z");
        assert_eq!(
            scoring.text_sha256,
            "ff23dac3f565ddda0edb67d98c52c0be335dcee26d9c1f85ff8e2c65bd2de96c"
        );
    }

    proptest! {
        #[test]
        fn any_margin_gives_a_decision_that_json_can_hold(bits in any::<u32>(), truncated: bool) {
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
