//! Every threshold that rows allow, and what is at or above it.

use super::{Band, BandFigures, NoBand};
use crate::retrain::judge::sampling::wilson_lower;

/// Sums at or above each distinct probability, highest first.
pub(super) struct Cuts(Vec<Cut>);

#[derive(Clone, Copy)]
struct Cut {
    value: f64,
    rows: usize,
    weight: f64,
    squares: f64,
    hateful: f64,
}

impl Cut {
    fn precision(&self) -> f64 {
        self.hateful / self.weight
    }

    fn precision_bound(&self) -> f64 {
        wilson_lower(self.precision(), self.weight * self.weight / self.squares)
    }
}

impl Cuts {
    /// Of rows of probability, label and weight.
    pub(super) fn new(rows: &[(f64, bool, f64)]) -> Self {
        let mut rows = rows.to_vec();
        rows.sort_by(|one, other| other.0.total_cmp(&one.0));
        let mut cuts: Vec<Cut> = Vec::new();
        let (mut weight, mut squares, mut hateful) = (0.0, 0.0, 0.0);
        for (count, (value, is_hateful, own)) in (1..).zip(rows) {
            weight += own;
            squares += own * own;
            hateful += if is_hateful { own } else { 0.0 };
            let cut = Cut {
                value,
                rows: count,
                weight,
                squares,
                hateful,
            };
            match cuts.last_mut() {
                Some(last) if last.value == value => *last = cut,
                _ => cuts.push(cut),
            }
        }
        Self(cuts)
    }

    /// The lowest cut that is surely precise enough.
    pub(super) fn block(&self, target: f64) -> Result<usize, NoBand> {
        let bound = |cut: &Cut| cut.precision_bound();
        let lowest = self.0.iter().rposition(|cut| bound(cut) >= target);
        lowest.ok_or_else(|| NoBand::Imprecise {
            target,
            best: self.0.iter().map(bound).fold(0.0, f64::max),
        })
    }

    /// The highest cut that reaches the recall; the last one does.
    pub(super) fn recall(&self, target: f64) -> usize {
        let all = self.0.last().map_or(0.0, |cut| cut.hateful);
        self.0.partition_point(|cut| cut.hateful < target * all)
    }

    /// The lowest cut that keeps to the share.
    pub(super) fn share(&self, target: f64) -> Result<usize, NoBand> {
        let all = self.0.last().map_or(0.0, |cut| cut.weight);
        let kept = self.0.partition_point(|cut| cut.weight <= target * all);
        kept.checked_sub(1).ok_or_else(|| NoBand::TooMany {
            target,
            least: self.0.first().map_or(0.0, |cut| cut.weight / all),
        })
    }

    /// The band that begins at a cut, moved down to `at_least`.
    pub(super) fn band(&self, found: Result<usize, NoBand>, at_least: usize) -> Band {
        let index = match found {
            Ok(index) => index,
            Err(reason) => return Band::None { reason },
        };
        let cut = self.0[index.max(at_least)];
        let all = self.0[self.0.len() - 1];
        Band::Derived {
            value: cut.value,
            figures: BandFigures {
                rows: cut.rows,
                precision: cut.precision(),
                precision_bound: cut.precision_bound(),
                recall: (all.hateful > 0.0).then(|| cut.hateful / all.hateful),
                share: cut.weight / all.weight,
            },
            limited_by_block: index < at_least,
        }
    }
}
