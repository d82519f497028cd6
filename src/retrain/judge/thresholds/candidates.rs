//! The candidate thresholds: one at each distinct probability of the rows.

use super::{NoThreshold, ThresholdFigures, ThresholdOutcome};
use crate::retrain::judge::sampling::wilson_lower;

/// The candidate thresholds, from the highest to the lowest. There is at least one row at each.
pub(super) struct Candidates(Vec<Candidate>);

/// A threshold, with sums over the rows at or above it.
#[derive(Clone, Copy)]
struct Candidate {
    value: f64,
    rows: usize,
    weight: f64,
    squared_weight: f64,
    hateful_weight: f64,
}

impl Candidate {
    fn precision(&self) -> f64 {
        self.hateful_weight / self.weight
    }

    /// Returns the lower bound of the precision for the effective number of rows.
    fn precision_bound(&self) -> f64 {
        wilson_lower(self.precision(), self.weight * self.weight / self.squared_weight)
    }
}

impl Candidates {
    /// Takes the probability, label and weight of each row.
    pub(super) fn new(rows: &[(f64, bool, f64)]) -> Self {
        let mut rows = rows.to_vec();
        rows.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut candidates: Vec<Candidate> = Vec::new();
        let (mut weight, mut squared_weight, mut hateful_weight) = (0.0, 0.0, 0.0);
        for (count, (value, is_hateful, row_weight)) in (1..).zip(rows) {
            weight += row_weight;
            squared_weight += row_weight * row_weight;
            hateful_weight += if is_hateful { row_weight } else { 0.0 };
            let candidate = Candidate {
                value,
                rows: count,
                weight,
                squared_weight,
                hateful_weight,
            };
            match candidates.last_mut() {
                Some(last) if last.value == value => *last = candidate,
                _ => candidates.push(candidate),
            }
        }
        Self(candidates)
    }

    /// Returns the lowest candidate whose lower bound of the precision reaches `target`.
    pub(super) fn block(&self, target: f64) -> Result<usize, NoThreshold> {
        let lowest = self
            .0
            .iter()
            .rposition(|candidate| candidate.precision_bound() >= target);
        lowest.ok_or_else(|| NoThreshold::Imprecise {
            target,
            best: self.0.iter().map(Candidate::precision_bound).fold(0.0, f64::max),
        })
    }

    /// Returns the highest candidate whose recall reaches `target`. The lowest candidate has a recall of 1.
    pub(super) fn recall(&self, target: f64) -> usize {
        let all = self.0.last().map_or(0.0, |lowest| lowest.hateful_weight);
        self.0
            .partition_point(|candidate| candidate.hateful_weight < target * all)
    }

    /// Returns the lowest candidate with at most a share of `target` of the weight at or above it.
    pub(super) fn share(&self, target: f64) -> Result<usize, NoThreshold> {
        let all = self.0.last().map_or(0.0, |lowest| lowest.weight);
        let count = self.0.partition_point(|candidate| candidate.weight <= target * all);
        count.checked_sub(1).ok_or_else(|| NoThreshold::TooMany {
            target,
            least: self.0.first().map_or(0.0, |highest| highest.weight / all),
        })
    }

    /// Describes the candidate at index `found`, or at index `limit` if that one is lower.
    pub(super) fn outcome(&self, found: Result<usize, NoThreshold>, limit: usize) -> ThresholdOutcome {
        let index = match found {
            Ok(index) => index,
            Err(reason) => return ThresholdOutcome::None { reason },
        };
        let candidate = self.0[index.max(limit)];
        let all = self.0[self.0.len() - 1];
        ThresholdOutcome::Derived {
            value: candidate.value,
            figures: ThresholdFigures {
                rows: candidate.rows,
                precision: candidate.precision(),
                precision_bound: candidate.precision_bound(),
                recall: (all.hateful_weight > 0.0).then(|| candidate.hateful_weight / all.hateful_weight),
                share: candidate.weight / all.weight,
            },
            limited_by_block: index < limit,
        }
    }
}
