//! Derives the block and review thresholds from rows that the adapter was not trained on.
//!
//! The block threshold is the lowest one whose precision reaches a target at its lower bound: that of Wilson's
//! one-sided 95 % score interval over the effective number of rows. The bound holds for each threshold separately, so
//! the precision of the lowest one that passes is slightly overestimated; the test part shows the precision on other
//! rows. The review threshold is the highest one that reaches a target recall, or the lowest one that keeps within a
//! target share of the traffic. Both count every row at or above the threshold, whether reviewed or blocked.
//!
//! Only feedback that was sampled at random with a known probability is representative of the traffic. Each sampled row
//! is weighted by the inverse of that probability. If there are enough sampled rows, only they are used. Otherwise, all
//! labelled rows are used with equal weights, and both thresholds are marked as not representative: hateful comments
//! that nobody looked at are missing from the labels, so their precision and recall are those of the labelled comments.
//!
//! A threshold that cannot be derived in this way is estimated instead, unless
//! [`ThresholdTargets::provisional`] is off, and marked as provisional. For the block threshold, the precision then has
//! to reach the target by its estimate, which `posterior` describes, and not by its bound. For the review threshold by
//! recall, the same applies to the recall, also without a sample. A share of the traffic is never estimated without one,
//! because the labelled comments say nothing about it. The precision and recall of every threshold have intervals.

mod candidates;
mod posterior;

use serde::{Deserialize, Serialize};

use candidates::Candidates;
pub use posterior::PRIOR_ROWS;

use super::sampling::effective_rows;
use crate::decide::DerivedThresholds;

/// Minimum effective number of sampled rows for thresholds that are representative of the traffic. A share of 0.1 then
/// has a standard error of 0.03.
pub const MIN_SAMPLED: f64 = 100.0;

/// Minimum effective number of hateful sampled rows for a review threshold by recall. A recall of 0.9 then has a
/// standard error of 0.07.
pub const MIN_HATEFUL: f64 = 20.0;

/// Minimum effective number of hateful rows for an estimated threshold. With fewer, it would follow from the calibration
/// alone, which is not fitted either (see [`MIN_TEMPERATURE`](super::calibration::MIN_TEMPERATURE)).
pub const MIN_PROVISIONAL: f64 = 5.0;

/// One labelled row with its probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ThresholdRow {
    /// The calibrated probability that the row is hateful.
    pub probability: f64,
    /// Whether the row is labelled hateful.
    pub hateful: bool,
    /// The probability with which the comment was sampled for labelling, above 0; absent if it was not sampled.
    pub inclusion: Option<f64>,
}

/// The targets that the thresholds have to reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ThresholdTargets {
    /// Minimum precision of the block threshold, above 0.
    pub block_precision: f64,
    /// The target of the review threshold.
    pub review: ReviewTarget,
    /// Whether thresholds may be estimated if there are too few rows to be sure of them.
    #[serde(default)]
    pub provisional: bool,
}

/// The target of the review threshold, above 0 and at most 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReviewTarget {
    /// At least this share of all hateful comments is reviewed or blocked.
    Recall(f64),
    /// At most this share of all comments is reviewed or blocked.
    Share(f64),
}

/// The derived thresholds, with the evidence for them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ThresholdDerivation {
    /// Which rows were used.
    pub basis: ThresholdBasis,
    /// Number of rows used.
    pub rows: usize,
    /// Number of these rows that are labelled hateful.
    pub hateful: usize,
    /// The targets of the derivation.
    pub targets: ThresholdTargets,
    /// The block threshold.
    pub block: ThresholdOutcome,
    /// The review threshold, which is never above the block threshold.
    pub review: ThresholdOutcome,
}

/// The rows that thresholds are derived from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ThresholdBasis {
    /// Sampled rows, weighted, which are representative of the traffic.
    Sampled,
    /// All labelled rows, unweighted, which are not representative of the traffic.
    AsLabelled,
}

/// A derived threshold, or the reason that there is none.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum ThresholdOutcome {
    /// A threshold was found.
    Derived {
        /// The threshold, a calibrated probability.
        value: f64,
        /// Statistics of the rows at or above the threshold.
        figures: ThresholdFigures,
        /// Whether the review threshold was lowered to the block threshold, because the target alone would be met by a
        /// higher one.
        limited_by_block: bool,
        /// Whether the threshold reaches its target only by an estimate, because there are too few rows, or too few
        /// sampled ones, to be sure of it.
        #[serde(default)]
        provisional: bool,
    },
    /// No threshold was derived, and the one in the settings applies.
    None {
        /// Why no threshold was derived.
        reason: NoThreshold,
    },
}

/// Statistics of the rows at or above a threshold. Everything except the number of rows is weighted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ThresholdFigures {
    /// Number of rows.
    pub rows: usize,
    /// Share of these rows that are hateful.
    pub precision: f64,
    /// One-sided 95 % lower bound of the precision.
    pub precision_bound: f64,
    /// Interval that contains the precision with a probability of 90 %, given the rows and the calibration.
    #[serde(default)]
    pub precision_interval: Option<[f64; 2]>,
    /// Share of all hateful rows that are at or above the threshold; absent if there are none.
    pub recall: Option<f64>,
    /// Interval that contains the recall with a probability of 90 %, given the rows and the calibration; absent if
    /// there are no hateful rows.
    #[serde(default)]
    pub recall_interval: Option<[f64; 2]>,
    /// Share of all rows that are at or above the threshold.
    pub share: f64,
}

/// Why no threshold was derived.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum NoThreshold {
    /// No row was sampled with a known probability.
    #[error("no feedback was sampled with a known rate, so recall and share of the traffic are unknown")]
    NoSample,
    /// Too few rows were sampled.
    #[error("the sampled feedback has {effective:.0} effective rows, expected at least {MIN_SAMPLED}")]
    SmallSample {
        /// Effective number of sampled rows.
        effective: f64,
    },
    /// Too few hateful rows were sampled.
    #[error("the sampled feedback has {effective:.0} effective hateful rows, expected at least {MIN_HATEFUL}")]
    FewHateful {
        /// Effective number of hateful sampled rows.
        effective: f64,
    },
    /// No threshold reaches the target precision at its lower bound.
    #[error("no threshold has a precision of {target} with 95 % confidence; the best lower bound is {best:.3}")]
    Imprecise {
        /// The target precision.
        target: f64,
        /// The highest lower bound of any threshold.
        best: f64,
    },
    /// Even the highest threshold has a larger share of the traffic at or above it.
    #[error("no threshold keeps the share of the traffic within {target}; at the highest one, it is {least:.4}")]
    TooMany {
        /// The target share.
        target: f64,
        /// The share at the highest threshold.
        least: f64,
    },
}

/// A row or a target has a number outside its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ThresholdError {
    /// A probability of a row is outside its range.
    #[error("row {row}: {what} is {value}, expected {expected}")]
    Row {
        /// Index of the row, from 0.
        row: usize,
        /// Which number it is: probability or inclusion.
        what: &'static str,
        /// The value.
        value: f64,
        /// Description of valid values.
        expected: &'static str,
    },
    /// A target is outside its range.
    #[error("the target {what} is {value}, expected a number above 0 and at most 1")]
    Target {
        /// Which target it is: precision, recall or share.
        what: &'static str,
        /// The value.
        value: f64,
    },
}

impl ThresholdDerivation {
    /// Derives both thresholds. The module's documentation describes the method.
    ///
    /// # Errors
    /// Returns an error if a probability or a target is outside its range.
    pub fn derive(rows: &[ThresholdRow], targets: ThresholdTargets) -> Result<Self, ThresholdError> {
        check(rows, targets)?;
        let sampled: Vec<(f64, bool, f64)> = rows
            .iter()
            .filter_map(|row| Some((row.probability, row.hateful, 1.0 / row.inclusion?)))
            .collect();
        let effective_sampled = effective_rows(sampled.iter().map(|&(_, _, weight)| (weight, 1.0)));
        let (basis, rows) = if effective_sampled >= MIN_SAMPLED {
            (ThresholdBasis::Sampled, sampled)
        } else {
            let all = rows.iter().map(|row| (row.probability, row.hateful, 1.0));
            (ThresholdBasis::AsLabelled, all.collect())
        };
        let hateful = rows.iter().filter(|(_, hateful, _)| *hateful);
        let effective_hateful = effective_rows(hateful.clone().map(|&(_, _, weight)| (weight, 1.0)));
        let candidates = Candidates::new(&rows, effective_hateful);
        let block = candidates.block(targets.block_precision);
        let review = match basis {
            ThresholdBasis::AsLabelled if effective_sampled == 0.0 => Err(NoThreshold::NoSample),
            ThresholdBasis::AsLabelled => Err(NoThreshold::SmallSample {
                effective: effective_sampled,
            }),
            ThresholdBasis::Sampled => match targets.review {
                ReviewTarget::Recall(_) if effective_hateful < MIN_HATEFUL => Err(NoThreshold::FewHateful {
                    effective: effective_hateful,
                }),
                ReviewTarget::Recall(target) => Ok(candidates.recall(target)),
                ReviewTarget::Share(target) => candidates.share(target),
            },
        };
        let provisional_block = || candidates.provisional_block(targets.block_precision);
        let provisional_review = || match targets.review {
            ReviewTarget::Recall(target) => candidates.provisional_recall(target),
            ReviewTarget::Share(_) => None,
        };
        let enough = targets.provisional && effective_hateful >= MIN_PROVISIONAL;
        let block = Found::new(block, || provisional_block().filter(|_| enough));
        let review = Found::new(review, || provisional_review().filter(|_| enough));
        // Candidates are sorted from the highest down, so a larger index is a lower threshold.
        let limit = block.index().unwrap_or(0);
        Ok(Self {
            basis,
            rows: rows.len(),
            hateful: hateful.count(),
            targets,
            block: block.outcome(&candidates, 0),
            review: review.outcome(&candidates, limit),
        })
    }

    /// Returns whether the thresholds are representative of the traffic.
    pub fn is_representative(&self) -> bool {
        self.basis == ThresholdBasis::Sampled
    }

    /// Returns the thresholds alone, as a version stores them.
    pub fn derived(&self) -> DerivedThresholds {
        DerivedThresholds {
            review: self.review.value(),
            block: self.block.value(),
            representative: self.is_representative(),
            provisional: self.block.is_provisional() || self.review.is_provisional(),
        }
    }
}

/// The index of a threshold among the candidates, or why there is none.
enum Found {
    Sure(usize),
    Provisional(usize),
    None(NoThreshold),
}

impl Found {
    fn new(sure: Result<usize, NoThreshold>, provisional: impl FnOnce() -> Option<usize>) -> Self {
        match sure {
            Ok(index) => Self::Sure(index),
            Err(reason) => provisional().map_or(Self::None(reason), Self::Provisional),
        }
    }

    fn index(&self) -> Option<usize> {
        match *self {
            Self::Sure(index) | Self::Provisional(index) => Some(index),
            Self::None(_) => None,
        }
    }

    fn outcome(&self, candidates: &Candidates, limit: usize) -> ThresholdOutcome {
        match *self {
            Self::Sure(index) => candidates.outcome(index, limit, false),
            Self::Provisional(index) => candidates.outcome(index, limit, true),
            Self::None(reason) => ThresholdOutcome::None { reason },
        }
    }
}

impl ThresholdOutcome {
    /// Returns the threshold, if one was derived.
    pub fn value(&self) -> Option<f64> {
        match self {
            Self::Derived { value, .. } => Some(*value),
            Self::None { .. } => None,
        }
    }

    /// Returns whether the threshold was only estimated.
    pub fn is_provisional(&self) -> bool {
        matches!(self, Self::Derived { provisional: true, .. })
    }
}

fn check(rows: &[ThresholdRow], targets: ThresholdTargets) -> Result<(), ThresholdError> {
    let (name, review) = match targets.review {
        ReviewTarget::Recall(target) => ("recall", target),
        ReviewTarget::Share(target) => ("share", target),
    };
    for (what, value) in [("precision", targets.block_precision), (name, review)] {
        if !(value > 0.0 && value <= 1.0) {
            return Err(ThresholdError::Target { what, value });
        }
    }
    for (row, labelled) in rows.iter().enumerate() {
        let error = |what, value, expected| ThresholdError::Row {
            row,
            what,
            value,
            expected,
        };
        if !(0.0..=1.0).contains(&labelled.probability) {
            return Err(error("probability", labelled.probability, "a number from 0 to 1"));
        }
        if let Some(inclusion) = labelled.inclusion
            && !(inclusion > 0.0 && inclusion <= 1.0)
        {
            return Err(error("inclusion", inclusion, "a number above 0 and at most 1"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::retrain::judge::sampling::wilson_lower;

    const TARGETS: ThresholdTargets = ThresholdTargets {
        block_precision: 0.9,
        review: ReviewTarget::Recall(0.8),
        provisional: false,
    };

    fn row(probability: f64, hateful: bool, inclusion: Option<f64>) -> ThresholdRow {
        ThresholdRow {
            probability,
            hateful,
            inclusion,
        }
    }

    /// Returns rows with probabilities from 0.001 to 0.999, of which those from `from` on are hateful.
    fn separated(from: f64, inclusion: Option<f64>) -> Vec<ThresholdRow> {
        let probabilities = (1..1000).map(|index| f64::from(index) / 1000.0);
        probabilities
            .map(|probability| row(probability, probability >= from, inclusion))
            .collect()
    }

    #[test]
    fn sampled_rows_give_both_thresholds() {
        let derivation = ThresholdDerivation::derive(&separated(0.8, Some(0.1)), TARGETS).unwrap();
        assert!(derivation.is_representative());
        assert_eq!((derivation.rows, derivation.hateful), (999, 200));
        let ThresholdOutcome::Derived { value, figures, .. } = derivation.block else {
            panic!("{:?}", derivation.block);
        };
        // Below 0.8, the precision falls, and so does its bound.
        assert!(
            figures.precision_bound >= 0.9 && (0.785..0.8).contains(&value),
            "{value}"
        );
        assert_eq!(figures.recall, Some(1.0));
        // The recall is reached at 0.84, which is above the block threshold.
        assert!(
            matches!(derivation.review, ThresholdOutcome::Derived { value: review, limited_by_block: true, .. } if review == value)
        );
    }

    #[test]
    fn the_review_threshold_keeps_within_a_share_of_the_traffic() {
        let rows = separated(0.8, Some(0.1));
        let check = |share, expected: f64| {
            let targets = ThresholdTargets {
                review: ReviewTarget::Share(share),
                ..TARGETS
            };
            let value = ThresholdDerivation::derive(&rows, targets).unwrap().review.value();
            assert!((value.unwrap() - expected).abs() < 0.0011, "{share}: {value:?}");
        };
        check(0.5, 0.5);
        check(0.3, 0.7);
        let one_value: Vec<_> = (0..200).map(|index| row(0.5, index % 2 == 0, Some(1.0))).collect();
        let targets = ThresholdTargets {
            review: ReviewTarget::Share(0.5),
            ..TARGETS
        };
        let reason = NoThreshold::TooMany {
            target: 0.5,
            least: 1.0,
        };
        assert_eq!(
            ThresholdDerivation::derive(&one_value, targets).unwrap().review,
            ThresholdOutcome::None { reason }
        );
    }

    #[test]
    fn sampled_rows_are_weighted_by_their_inverse_probability() {
        // Of the rows above 0.5, half are hateful among the labelled ones, but one in eleven in the traffic.
        let mut rows = vec![row(0.9, true, Some(1.0)); 200];
        rows.extend(vec![row(0.9, false, Some(0.1)); 200]);
        rows.extend(vec![row(0.1, false, Some(0.1)); 200]);
        let targets = ThresholdTargets {
            block_precision: 0.05,
            ..TARGETS
        };
        let derivation = ThresholdDerivation::derive(&rows, targets).unwrap();
        let ThresholdOutcome::Derived { value, figures, .. } = derivation.block else {
            panic!("{:?}", derivation.block);
        };
        assert_eq!(value, 0.9);
        assert!((figures.precision - 200.0 / 2200.0).abs() < 1e-12);
        assert!((figures.share - 2200.0 / 4200.0).abs() < 1e-12);
    }

    #[test]
    fn without_enough_sampled_rows_no_review_threshold_is_derived() {
        let check = |rows: &[ThresholdRow], expected: NoThreshold| {
            for review in [ReviewTarget::Recall(0.8), ReviewTarget::Share(0.1)] {
                let derivation = ThresholdDerivation::derive(rows, ThresholdTargets { review, ..TARGETS }).unwrap();
                assert_eq!(derivation.review, ThresholdOutcome::None { reason: expected });
                assert!(!derivation.is_representative());
            }
        };
        check(&separated(0.8, None), NoThreshold::NoSample);
        let mut some = separated(0.8, None);
        some.iter_mut().take(99).for_each(|row| row.inclusion = Some(0.5));
        check(&some, NoThreshold::SmallSample { effective: 99.0 });
        assert!(
            ThresholdDerivation::derive(&some, TARGETS)
                .unwrap()
                .block
                .value()
                .is_some()
        );
        let few = separated(0.99, Some(0.5));
        let derivation = ThresholdDerivation::derive(&few, TARGETS).unwrap();
        let reason = NoThreshold::FewHateful { effective: 10.0 };
        assert_eq!(derivation.review, ThresholdOutcome::None { reason });
    }

    const PROVISIONAL: ThresholdTargets = ThresholdTargets {
        provisional: true,
        ..TARGETS
    };

    /// Returns rows with evenly spread probabilities whose labels agree with them.
    fn calibrated(count: u32) -> Vec<ThresholdRow> {
        let one = |index: u32| {
            let probability = (f64::from(index) + 0.5) / f64::from(count);
            // A low-discrepancy sequence, so that the share of hateful rows follows the probability closely.
            let draw = (f64::from(index) * 0.618_033_988_749_895).fract();
            row(probability, draw < probability, None)
        };
        (0..count).map(one).collect()
    }

    #[test]
    fn few_rows_give_provisional_thresholds_with_intervals() {
        let rows = calibrated(30);
        let strict = ThresholdDerivation::derive(&rows, TARGETS).unwrap();
        assert_eq!((strict.block.value(), strict.review.value()), (None, None));
        let derivation = ThresholdDerivation::derive(&rows, PROVISIONAL).unwrap();
        assert!(derivation.block.is_provisional() && derivation.review.is_provisional());
        assert!(derivation.derived().provisional && !derivation.derived().representative);
        // The mean of the probabilities from 0.8 on is 0.9, and the part of all probability from 0.45 on is 0.8.
        let [block, review] = [&derivation.block, &derivation.review].map(|outcome| outcome.value().unwrap());
        assert!(
            (0.7..0.9).contains(&block) && (0.35..0.55).contains(&review),
            "{block} {review}"
        );
        let ThresholdOutcome::Derived { figures, .. } = derivation.review else {
            panic!("{:?}", derivation.review);
        };
        let [low, high] = figures.recall_interval.unwrap();
        assert!(low > 0.5 && low < 0.8 && high > 0.8 && high < 1.0, "{low} {high}");
    }

    #[test]
    fn intervals_narrow_as_rows_are_added() {
        let width = |count| {
            let derivation = ThresholdDerivation::derive(&calibrated(count), PROVISIONAL).unwrap();
            let ThresholdOutcome::Derived { figures, .. } = derivation.block else {
                panic!("{:?}", derivation.block);
            };
            let [low, high] = figures.precision_interval.unwrap();
            high - low
        };
        let widths = [30, 300, 3000].map(width);
        assert!(widths[0] > 1.3 * widths[1] && widths[1] > 1.3 * widths[2], "{widths:?}");
    }

    /// With enough rows, the block threshold reaches its target by the bound whether estimates are allowed or not.
    #[test]
    fn an_estimate_never_replaces_a_threshold_that_reaches_its_bound() {
        let rows = separated(0.8, Some(0.1));
        let [strict, lenient] =
            [TARGETS, PROVISIONAL].map(|targets| ThresholdDerivation::derive(&rows, targets).unwrap());
        assert_eq!((strict.block, strict.review), (lenient.block, lenient.review));
        assert!(!lenient.derived().provisional);
    }

    #[test]
    fn nothing_is_estimated_from_a_handful_of_rows_and_no_share_without_a_sample() {
        let few = [vec![row(0.9, true, None); 4], vec![row(0.1, false, None); 40]].concat();
        let derivation = ThresholdDerivation::derive(&few, PROVISIONAL).unwrap();
        assert_eq!((derivation.block.value(), derivation.review.value()), (None, None));
        let share = ThresholdTargets {
            review: ReviewTarget::Share(0.1),
            ..PROVISIONAL
        };
        let derivation = ThresholdDerivation::derive(&calibrated(300), share).unwrap();
        let reason = NoThreshold::NoSample;
        assert_eq!(derivation.review, ThresholdOutcome::None { reason });
    }

    /// Derivations in manifests have no intervals and are not provisional.
    #[test]
    fn a_derivation_of_an_earlier_release_can_be_read() {
        let json = r#"{"basis": "as_labelled", "rows": 700, "hateful": 300,
            "targets": {"block_precision": 0.95, "review": {"recall": 0.9}},
            "block": {"kind": "derived", "value": 0.93, "limited_by_block": false, "figures":
                {"rows": 80, "precision": 0.99, "precision_bound": 0.951, "recall": 0.26, "share": 0.11}},
            "review": {"kind": "none", "reason": {"kind": "no_sample"}}}"#;
        let derivation: ThresholdDerivation = serde_json::from_str(json).unwrap();
        assert!(derivation.block.value() == Some(0.93) && !derivation.block.is_provisional());
    }

    #[test]
    fn an_unreachable_precision_reports_the_best_lower_bound() {
        let rows = vec![row(0.9, true, None); 20];
        let derivation = ThresholdDerivation::derive(&rows, TARGETS).unwrap();
        let ThresholdOutcome::None { reason } = derivation.block else {
            panic!("{:?}", derivation.block);
        };
        assert_eq!(
            reason.to_string(),
            "no threshold has a precision of 0.9 with 95 % confidence; the best lower bound is 0.881"
        );
        let nothing = ThresholdDerivation::derive(&[], TARGETS).unwrap();
        assert_eq!((nothing.block.value(), nothing.review.value()), (None, None));
    }

    #[test]
    fn numbers_outside_their_range_are_errors() {
        let check = |rows: &[ThresholdRow], targets, expected: &str| {
            assert_eq!(
                ThresholdDerivation::derive(rows, targets).unwrap_err().to_string(),
                expected
            );
        };
        check(
            &[row(f64::NAN, true, None)],
            TARGETS,
            "row 0: probability is NaN, expected a number from 0 to 1",
        );
        check(
            &[row(0.5, true, Some(0.0))],
            TARGETS,
            "row 0: inclusion is 0, expected a number above 0 and at most 1",
        );
        let targets = ThresholdTargets {
            review: ReviewTarget::Share(1.5),
            ..TARGETS
        };
        check(
            &[],
            targets,
            "the target share is 1.5, expected a number above 0 and at most 1",
        );
    }

    fn rows() -> impl Strategy<Value = Vec<ThresholdRow>> {
        let inclusion = prop_oneof![Just(None), (1u8..=10).prop_map(|tenths| Some(f64::from(tenths) / 10.0))];
        let one = (0u8..=50, any::<bool>(), inclusion)
            .prop_map(|(step, hateful, inclusion)| row(f64::from(step) / 50.0, hateful || step > 40, inclusion));
        prop::collection::vec(one, 0..600)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn the_thresholds_meet_their_targets(
            rows in rows(),
            block_precision in 0.05f64..=1.0,
            target in 0.05f64..=1.0,
            recall: bool,
        ) {
            let review = if recall { ReviewTarget::Recall(target) } else { ReviewTarget::Share(target) };
            let derivation = ThresholdDerivation::derive(&rows, ThresholdTargets { block_precision, review, provisional: false }).unwrap();
            if let (Some(review), Some(block)) = (derivation.review.value(), derivation.block.value()) {
                prop_assert!(review <= block);
            }
            // Computed again from the definition, over the rows that were used.
            let sampled = derivation.is_representative();
            let used: Vec<_> = rows.iter().filter(|row| !sampled || row.inclusion.is_some()).collect();
            let weight = |row: &ThresholdRow| if sampled { 1.0 / row.inclusion.unwrap_or(1.0) } else { 1.0 };
            let bound = |threshold: f64| {
                let above = used.iter().filter(|row| row.probability >= threshold);
                let effective = effective_rows(above.clone().map(|row| (weight(row), 1.0)));
                let sum: f64 = above.clone().map(|row| weight(row)).sum();
                let hateful: f64 = above.filter(|row| row.hateful).map(|row| weight(row)).sum();
                wilson_lower(hateful / sum, effective)
            };
            let precise = used.iter().map(|row| row.probability).filter(|&value| bound(value) >= block_precision);
            let lowest = precise.reduce(f64::min);
            prop_assert_eq!(derivation.block.value(), lowest);
            if let ThresholdOutcome::Derived { figures, limited_by_block, .. } = derivation.review {
                match review {
                    ReviewTarget::Recall(target) => prop_assert!(figures.recall.unwrap() >= target - 1e-12),
                    ReviewTarget::Share(target) => prop_assert!(limited_by_block || figures.share <= target + 1e-12),
                }
            }
            let json = serde_json::to_string(&derivation).unwrap();
            prop_assert_eq!(serde_json::from_str::<ThresholdDerivation>(&json).unwrap(), derivation);
        }
    }
}
