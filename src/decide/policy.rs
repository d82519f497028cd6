//! The thresholds of a deployment, and the hash by which decisions name them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::classifier::defaults::ModelDefaults;
use crate::config::{DEFAULT_THRESHOLDS, NotInScope, PolicyConfig, ThresholdSettings};
use crate::hash::content_hash;
use crate::message::Thresholds;

/// The name and version of the rules by which texts are judged to be in the scope of a model (`prompt/scope`).
const SCOPE_VERSION: &str = "scope-1";

/// The thresholds of the deployment and of single communities, and what becomes of comments that the model cannot
/// judge.
#[derive(Debug, Clone)]
pub struct Policy {
    thresholds: Thresholds,
    communities: BTreeMap<String, Thresholds>,
    /// Whether comments that are not in the scope of the model are reviewed.
    pub(super) reviews_not_in_scope: bool,
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
            // Left out if the model lists no languages, so that the hashes of such policies stay as they were.
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

/// Returns the policy of the settings, with the thresholds that were derived for the adapter if `policy.from_adapter`
/// is set.
pub(super) fn effective_policy(config: &PolicyConfig, model: &ModelDefaults, derived: DerivedThresholds) -> Policy {
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
