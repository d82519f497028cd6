//! The candidate thresholds: one at each distinct probability of the rows.

use super::posterior::Posterior;
use super::{NoThreshold, ThresholdFigures, ThresholdOutcome};
use crate::retrain::judge::sampling::wilson_lower;

/// The candidate thresholds, from the highest to the lowest. There is at least one row at each.
pub(super) struct Candidates {
    candidates: Vec<Candidate>,
    /// Effective number of hateful rows.
    effective_hateful: f64,
}

/// A threshold, with sums over the rows at or above it.
#[derive(Clone, Copy)]
struct Candidate {
    value: f64,
    rows: usize,
    weight: f64,
    squared_weight: f64,
    hateful_weight: f64,
    /// Sum of the rows' probabilities times their weights: the hateful weight that the calibration expects.
    expected_weight: f64,
}

impl Candidate {
    fn precision(&self) -> f64 {
        self.hateful_weight / self.weight
    }

    /// Returns the lower bound of the precision for the effective number of rows.
    fn precision_bound(&self) -> f64 {
        wilson_lower(self.precision(), self.effective_rows())
    }

    fn effective_rows(&self) -> f64 {
        self.weight * self.weight / self.squared_weight
    }

    fn precision_posterior(&self) -> Posterior {
        Posterior::new(
            self.precision(),
            self.effective_rows(),
            self.expected_weight / self.weight,
        )
    }
}

impl Candidates {
    /// Takes the probability, label and weight of each row, and the effective number of hateful rows.
    pub(super) fn new(rows: &[(f64, bool, f64)], effective_hateful: f64) -> Self {
        let mut rows = rows.to_vec();
        rows.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut candidates: Vec<Candidate> = Vec::new();
        let (mut weight, mut squared_weight, mut hateful_weight, mut expected_weight) = (0.0, 0.0, 0.0, 0.0);
        for (count, (value, is_hateful, row_weight)) in (1..).zip(rows) {
            weight += row_weight;
            squared_weight += row_weight * row_weight;
            hateful_weight += if is_hateful { row_weight } else { 0.0 };
            expected_weight += row_weight * value;
            let candidate = Candidate {
                value,
                rows: count,
                weight,
                squared_weight,
                hateful_weight,
                expected_weight,
            };
            match candidates.last_mut() {
                Some(last) if last.value == value => *last = candidate,
                _ => candidates.push(candidate),
            }
        }
        Self {
            candidates,
            effective_hateful,
        }
    }

    /// Returns the lowest candidate whose lower bound of the precision reaches `target`.
    pub(super) fn block(&self, target: f64) -> Result<usize, NoThreshold> {
        let lowest = self
            .candidates
            .iter()
            .rposition(|candidate| candidate.precision_bound() >= target);
        lowest.ok_or_else(|| NoThreshold::Imprecise {
            target,
            best: self
                .candidates
                .iter()
                .map(Candidate::precision_bound)
                .fold(0.0, f64::max),
        })
    }

    /// Returns the lowest candidate whose estimated precision reaches `target`.
    pub(super) fn provisional_block(&self, target: f64) -> Option<usize> {
        let mut estimates = self.candidates.iter();
        estimates.rposition(|candidate| candidate.precision_posterior().mean() >= target)
    }

    /// Returns the highest candidate whose recall reaches `target`. The lowest candidate has a recall of 1.
    pub(super) fn recall(&self, target: f64) -> usize {
        let all = self.candidates.last().map_or(0.0, |lowest| lowest.hateful_weight);
        self.candidates
            .partition_point(|candidate| candidate.hateful_weight < target * all)
    }

    /// Returns the highest candidate whose estimated recall reaches `target`, or `None` if there are no hateful rows.
    pub(super) fn provisional_recall(&self, target: f64) -> Option<usize> {
        let reaches = |candidate: &Candidate| Some(self.recall_posterior(candidate)?.mean() >= target);
        self.candidates
            .iter()
            .position(|candidate| reaches(candidate) == Some(true))
    }

    /// Returns the lowest candidate with at most a share of `target` of the weight at or above it.
    pub(super) fn share(&self, target: f64) -> Result<usize, NoThreshold> {
        let all = self.candidates.last().map_or(0.0, |lowest| lowest.weight);
        let count = self
            .candidates
            .partition_point(|candidate| candidate.weight <= target * all);
        count.checked_sub(1).ok_or_else(|| NoThreshold::TooMany {
            target,
            least: self.candidates.first().map_or(0.0, |highest| highest.weight / all),
        })
    }

    /// Describes the candidate at index `found`, or at index `limit` if that one is lower.
    pub(super) fn outcome(&self, found: usize, limit: usize, provisional: bool) -> ThresholdOutcome {
        let candidate = self.candidates[found.max(limit)];
        let all = self.candidates[self.candidates.len() - 1];
        ThresholdOutcome::Derived {
            value: candidate.value,
            figures: ThresholdFigures {
                rows: candidate.rows,
                precision: candidate.precision(),
                precision_bound: candidate.precision_bound(),
                precision_interval: Some(candidate.precision_posterior().interval()),
                recall: (all.hateful_weight > 0.0).then(|| candidate.hateful_weight / all.hateful_weight),
                recall_interval: self.recall_posterior(&candidate).map(Posterior::interval),
                share: candidate.weight / all.weight,
            },
            limited_by_block: found < limit,
            provisional,
        }
    }

    fn recall_posterior(&self, candidate: &Candidate) -> Option<Posterior> {
        let all = self.candidates.last()?;
        (all.hateful_weight > 0.0 && all.expected_weight > 0.0).then(|| {
            let recall = candidate.hateful_weight / all.hateful_weight;
            Posterior::new(
                recall,
                self.effective_hateful,
                candidate.expected_weight / all.expected_weight,
            )
        })
    }
}
