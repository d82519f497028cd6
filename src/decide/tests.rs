//! Decisions at and around the thresholds, and the hash of a policy.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::classifier::defaults::ModelDefaults;
use crate::config::{NotInScope, PolicyConfig, ThresholdSettings};
use crate::message::{ModelIdentity, Op, Thresholds};

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
