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

use crate::classifier::defaults::ModelDefaults;
use crate::config::{DEFAULT_THRESHOLDS, NotInScope, PolicyConfig, ThresholdSettings};
use crate::hash::{content_hash, hex};
use crate::message::{
    Action, AutomatedDecision, Comment, CommentMargin, Competence, DECISION_SCHEMA, Decision, Label, ModelIdentity,
    Scoring, SourceRecord, Thresholds,
};

/// The thresholds of the deployment and of single communities, and what becomes of comments that the model cannot judge.
#[derive(Debug, Clone)]
pub struct Policy {
    thresholds: Thresholds,
    communities: BTreeMap<String, Thresholds>,
    /// Whether comments that are not in the scope of the model are reviewed.
    reviews_not_in_scope: bool,
    /// The languages of the model, if it says which these are.
    languages: Option<Vec<String>>,
    canonical: String,
    content_hash: String,
}

impl Policy {
    /// Creates the policy that the settings describe, with the model's defaults for what they leave out.
    pub fn new(config: &PolicyConfig, model: &ModelDefaults) -> Self {
        #[derive(Serialize)]
        struct CanonicalPolicy<'a> {
            format: u32,
            thresholds: &'a Thresholds,
            communities: &'a BTreeMap<String, Thresholds>,
            // A model without languages of its own has no scope, and its policies keep the hashes that they had before.
            #[serde(skip_serializing_if = "Option::is_none")]
            scope: Option<CanonicalScope<'a>>,
        }
        #[derive(Serialize)]
        struct CanonicalScope<'a> {
            rules: &'static str,
            languages: &'a [String],
            reviews_others: bool,
        }
        let defaults = model.thresholds.unwrap_or(DEFAULT_THRESHOLDS);
        let thresholds = config.thresholds.or(defaults);
        let community = |(id, own): (&String, &ThresholdSettings)| (id.clone(), own.or(defaults));
        let communities = config.communities.iter().map(community).collect();
        let reviews_not_in_scope = config.not_in_scope == NotInScope::Review;
        let canonical = CanonicalPolicy {
            format: 1,
            thresholds: &thresholds,
            communities: &communities,
            scope: model.scope.as_ref().map(|scope| CanonicalScope {
                rules: SCOPE_VERSION,
                languages: scope.codes(),
                reviews_others: reviews_not_in_scope,
            }),
        };
        let canonical = serde_json::to_string(&canonical).expect("numbers and text keys always have a JSON form");
        Self {
            thresholds,
            communities,
            reviews_not_in_scope,
            languages: model.scope.as_ref().map(|scope| scope.codes().to_vec()),
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

    /// Returns the ISO 639-1 codes of the languages that the model was trained for, if it says which these are.
    pub fn languages(&self) -> Option<&[String]> {
        self.languages.as_deref()
    }

    /// Returns the canonical JSON form of the policy, of which [`Policy::content_hash`] is the hash.
    pub fn canonical(&self) -> &str {
        &self.canonical
    }

    /// Returns the hash of all thresholds and of the scope, by which decisions name the policy.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }
}

/// The name and version of the rules by which texts are judged to be in the scope of a model (`prompt/scope`).
const SCOPE_VERSION: &str = "scope-1";

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

/// The judge in service. Each batch is decided by the judge that was current when the batch was scored.
///
/// The policy and the model are replaced independently, and neither replacement undoes the other.
#[derive(Debug)]
pub struct CurrentJudge(Mutex<JudgeState>);

#[derive(Debug)]
struct JudgeState {
    policy: PolicyConfig,
    defaults: ModelDefaults,
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
    /// The defaults that its base model brings.
    pub defaults: ModelDefaults,
}

impl CurrentJudge {
    /// Creates the judge of a policy and a model.
    pub fn new(policy: PolicyConfig, model: JudgedModel) -> Self {
        let effective = effective_policy(&policy, &model.defaults, model.derived);
        let judge = Judge::new(effective, model.calibration, model.identity);
        Self(Mutex::new(JudgeState {
            policy,
            defaults: model.defaults,
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
        let effective = effective_policy(&policy, &state.defaults, state.derived);
        state.judge = Arc::new(Judge::new(effective, calibration, identity));
        state.policy = policy;
    }

    /// Replaces the model, starting with the next batch.
    pub fn set_model(&self, model: JudgedModel) {
        let mut state = self.lock();
        state.derived = model.derived;
        state.defaults = model.defaults;
        let effective = effective_policy(&state.policy, &state.defaults, model.derived);
        state.judge = Arc::new(Judge::new(effective, model.calibration, model.identity));
    }

    fn lock(&self) -> MutexGuard<'_, JudgeState> {
        // A thread that panics while it holds the lock leaves a judge that is still usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the policy of the settings, with the thresholds that were derived for the adapter if `policy.from_adapter`
/// is set.
fn effective_policy(config: &PolicyConfig, model: &ModelDefaults, derived: DerivedThresholds) -> Policy {
    let mut config = config.clone();
    if config.from_adapter {
        let own = general_thresholds(&config, model);
        let block = derived.block.unwrap_or(own.block);
        let review = derived.review.unwrap_or(own.review).min(block);
        config.thresholds = ThresholdSettings {
            review: Some(review),
            block: Some(block),
        };
    }
    Policy::new(&config, model)
}

/// Returns the thresholds of the settings, with the model's defaults for those that are not set.
pub fn general_thresholds(config: &PolicyConfig, model: &ModelDefaults) -> Thresholds {
    config.thresholds.or(model.thresholds.unwrap_or(DEFAULT_THRESHOLDS))
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

    fn settings(review: Option<f64>, block: Option<f64>) -> ThresholdSettings {
        ThresholdSettings { review, block }
    }

    fn judge() -> Judge {
        let config = PolicyConfig {
            from_adapter: false,
            not_in_scope: NotInScope::Review,
            thresholds: ThresholdSettings::default(),
            communities: [("garden".to_owned(), settings(Some(0.1), Some(0.2)))].into(),
        };
        let none = || "none".to_owned();
        Judge {
            policy: Policy::new(&config, &ModelDefaults::default()),
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
            competence: None,
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
    fn the_models_thresholds_apply_where_the_settings_have_none() {
        let check = |own: ThresholdSettings, model: Option<[f64; 2]>, expected: [f64; 2]| {
            let config = PolicyConfig {
                from_adapter: false,
                not_in_scope: NotInScope::Review,
                thresholds: own,
                communities: [("garden".to_owned(), own)].into(),
            };
            let thresholds = model.map(|[review, block]| Thresholds { review, block });
            let defaults = ModelDefaults {
                thresholds,
                ..ModelDefaults::default()
            };
            let policy = Policy::new(&config, &defaults);
            for community in [None, Some("garden"), Some("elsewhere")] {
                let Thresholds { review, block } = policy.thresholds(community);
                assert_eq!([review, block], expected, "{own:?} {model:?} {community:?}");
            }
        };
        let model = Some([0.3, 0.7]);
        check(settings(None, None), None, [0.5, 0.9]);
        check(settings(None, None), model, [0.3, 0.7]);
        check(settings(Some(0.4), None), model, [0.4, 0.7]);
        check(settings(None, Some(0.8)), model, [0.3, 0.8]);
        check(settings(Some(0.4), Some(0.6)), model, [0.4, 0.6]);
        // The one that is not set gives way.
        check(settings(Some(0.8), None), model, [0.8, 0.8]);
        check(settings(None, Some(0.2)), model, [0.2, 0.2]);
    }

    #[test]
    fn what_is_not_in_scope_is_reviewed_unless_it_is_blocked() {
        use Action::{Allow, Block, Review};
        use Competence::{InScope, OutOfScope, Unsure};
        let defaults = ModelDefaults {
            scope: Some(crate::prompt::Scope::new(vec!["en".into()]).unwrap()),
            ..ModelDefaults::default()
        };
        let judge = |not_in_scope| {
            let config = PolicyConfig {
                from_adapter: false,
                not_in_scope,
                thresholds: ThresholdSettings::default(),
                communities: BTreeMap::new(),
            };
            Judge::new(Policy::new(&config, &defaults), Calibration::Identity, judge().model)
        };
        let action = |judge: &Judge, margin, competence| {
            let scored = CommentMargin {
                margin,
                windows: 1,
                truncated: false,
                competence,
            };
            let decision = judge.decide(&comment(None), scored, None, SystemTime::UNIX_EPOCH);
            assert_eq!(decision.scoring.unwrap().competence, competence);
            decision.action
        };
        let (reviews, decides) = (judge(NotInScope::Review), judge(NotInScope::Decide));
        for competence in [None, Some(InScope), Some(Unsure), Some(OutOfScope)] {
            let is_outside = matches!(competence, Some(Unsure | OutOfScope));
            assert_eq!(
                action(&reviews, -3.0, competence),
                if is_outside { Review } else { Allow }
            );
            assert_eq!(action(&reviews, 9.0, competence), Block);
            for (margin, expected) in [(-3.0, Allow), (0.5, Review), (9.0, Block)] {
                assert_eq!(action(&decides, margin, competence), expected);
            }
        }
        // The policy's hash names the languages and the setting, but only of a model that has languages.
        assert_ne!(reviews.policy.content_hash(), decides.policy.content_hash());
        assert!(
            reviews
                .policy
                .canonical()
                .contains(r#""languages":["en"],"reviews_others":true"#)
        );
        assert!(!self::judge().policy.canonical().contains("scope"));
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
            let communities = garden.map(|review| ("garden".to_owned(), settings(Some(review), Some(block))));
            let config = PolicyConfig {
                from_adapter: false,
                not_in_scope: NotInScope::Review,
                thresholds: settings(Some(review), Some(block)),
                communities: communities.into_iter().collect(),
            };
            Policy::new(&config, &ModelDefaults::default())
                .content_hash()
                .to_owned()
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
