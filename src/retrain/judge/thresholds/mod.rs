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
#[cfg(test)]
mod tests;

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
