//! An adapter's results on the test part, under its own calibration and thresholds.

use crate::config::RetrainConfig;
use crate::decide::{Calibration, DerivedThresholds};
use crate::message::Thresholds;
use crate::retrain::data::dataset::LabelledRow;
use crate::retrain::judge::evaluation::{Bootstrap, Curves, Evaluation, EvaluationConfig, evaluate};
use crate::retrain::judge::gate::{GateConfig, Prediction};
use crate::retrain::judge::measure;

/// Number of bootstrap resamples behind every interval.
const RESAMPLES: usize = 1000;

/// The evaluation counts rows with at least this probability as predicted hateful, for both adapters.
const EVALUATION_THRESHOLD: f64 = 0.5;

/// The settings under which champion and challenger are measured and compared.
pub(super) struct TestSettings {
    pub(super) gate: GateConfig,
    /// The thresholds of the policy, used if none were derived for an adapter.
    policy: Thresholds,
}

/// The results of one adapter on the test part.
pub(super) struct MeasuredAdapter {
    pub(super) evaluation: Evaluation,
    pub(super) curves: Curves,
    calibration: Calibration,
    thresholds: Thresholds,
    /// One margin for each row of the test part.
    margins: Vec<f64>,
}

impl TestSettings {
    pub(super) fn new(config: &RetrainConfig, policy: Thresholds) -> Self {
        Self {
            gate: GateConfig {
                bootstrap: Bootstrap {
                    resamples: RESAMPLES,
                    seed: config.seed,
                },
                min_growth: config.min_growth,
            },
            policy,
        }
    }

    /// Evaluates an adapter's margins, one for each row of the test part.
    pub(super) fn measure(
        &self,
        test: &[LabelledRow],
        margins: Vec<f64>,
        calibration: Calibration,
        derived: DerivedThresholds,
    ) -> anyhow::Result<MeasuredAdapter> {
        let scored = measure::scored_rows(test, &margins, calibration);
        let config = EvaluationConfig {
            threshold: EVALUATION_THRESHOLD,
            bootstrap: self.gate.bootstrap,
        };
        Ok(MeasuredAdapter {
            evaluation: evaluate(&scored, config)?,
            curves: Curves::new(&scored)?,
            calibration,
            thresholds: effective_thresholds(derived, self.policy),
            margins,
        })
    }
}

impl MeasuredAdapter {
    /// Returns the margin of a row of the test part, and whether the adapter would have the row reviewed or blocked.
    pub(super) fn prediction(&self, row: usize) -> Prediction {
        self.predict(self.margins[row])
    }

    /// Returns the prediction for a margin.
    pub(super) fn predict(&self, margin: f64) -> Prediction {
        Prediction {
            margin,
            flagged: self.calibration.probability(margin as f32) >= self.thresholds.review,
        }
    }
}

/// Returns the derived thresholds, with those of the policy in place of missing ones. The review threshold never
/// exceeds the block threshold.
fn effective_thresholds(derived: DerivedThresholds, policy: Thresholds) -> Thresholds {
    let block = derived.block.unwrap_or(policy.block);
    let review = derived.review.unwrap_or(policy.review).min(block);
    Thresholds { review, block }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_policy_replaces_missing_thresholds_and_review_never_exceeds_block() {
        let policy = Thresholds {
            review: 0.6,
            block: 0.9,
        };
        let check = |review, block, expected: [f64; 2]| {
            let derived = DerivedThresholds {
                review,
                block,
                representative: true,
                provisional: false,
            };
            let [review, block] = expected;
            assert_eq!(effective_thresholds(derived, policy), Thresholds { review, block });
        };
        check(None, None, [0.6, 0.9]);
        check(Some(0.3), None, [0.3, 0.9]);
        check(None, Some(0.5), [0.5, 0.5]);
        check(Some(0.2), Some(0.7), [0.2, 0.7]);
        check(Some(0.95), None, [0.9, 0.9]);
    }

    proptest! {
        #[test]
        fn review_never_begins_above_block(
            review in prop::option::of(0.0..=1.0f64),
            block in prop::option::of(0.0..=1.0f64),
            policy in (0.0..=1.0f64, 0.0..=1.0f64),
        ) {
            let derived = DerivedThresholds { review, block, representative: true, provisional: false };
            let policy = Thresholds { review: policy.0.min(policy.1), block: policy.1 };
            let effective = effective_thresholds(derived, policy);
            prop_assert!(effective.review <= effective.block);
        }
    }
}
