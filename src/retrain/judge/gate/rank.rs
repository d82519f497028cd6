//! Compares how the two adapters rank the judged rows.
//!
//! The statistic is the difference in the smoothed average precision (see
//! [`SMOOTHING`](crate::retrain::judge::evaluation::SMOOTHING)), which varies less from sample to sample than the plain
//! one. It is expressed in units of PR-AUC by a factor from the binormal model. The factor does not change its sign or
//! its significance. The plain difference is reported, and must have the required size as well, but needs no bound.
//!
//! Only rows of the same fold are ranked against each other, because the margins of different models have different
//! scales: pooling them would lower the area of the challenger, whose folds are judged by different models (Forman and
//! Scholz, "Apples-to-Apples in Cross-Validation Studies", 2010). Areas are means over the folds, weighted by the
//! hateful rows of each fold, for both adapters alike.

use serde::{Deserialize, Serialize};

use super::binormal::smoothing_factor;
use super::power::Power;
use super::{GateConfig, GateRow, Prediction, TrainingRows};
use crate::retrain::judge::evaluation::{DEFINED_SHARE, Ranking, quantile, resample};

/// Largest loss of PR-AUC, at the lower bound, that is accepted from a challenger that was trained on more rows.
///
/// New feedback tends to come from comments that the champion got wrong, so an adapter that was trained on it is
/// preferred if it ranks equally well.
pub const GROWTH_TOLERANCE: f64 = 0.01;

/// The quantiles of the resamples that bound the two-sided 95 % interval.
const INTERVAL: [f64; 2] = [0.025, 0.975];

/// What the lower bound of the difference in PR-AUC must exceed, and how sure the bound is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Requirement {
    /// 0, or minus [`GROWTH_TOLERANCE`].
    pub(super) difference: f64,
    /// The quantile of the resamples that serves as the lower bound.
    pub(super) quantile: f64,
    /// The quantile of the standard normal distribution at the same level.
    pub(super) z: f64,
}

/// The challenger must be better: with a one-sided 95 % bound, an equally good one is promoted 5 % of the time.
const BETTER: Requirement = Requirement {
    difference: 0.0,
    quantile: 0.05,
    z: 1.644_853_626_951_472_7,
};

/// The challenger must not be worse by more than the tolerance: with a one-sided 97.5 % bound, the usual level of a
/// test of non-inferiority (ICH, "E9 Statistical Principles for Clinical Trials", 1998, section 3.3.2), one that is
/// worse by the tolerance is promoted 2.5 % of the time.
const NOT_WORSE: Requirement = Requirement {
    difference: -GROWTH_TOLERANCE,
    quantile: 0.025,
    z: 1.959_963_984_540_054,
};

impl Requirement {
    pub(super) fn new(rows: TrainingRows, min_growth: usize) -> Self {
        let more = rows.challenger.saturating_sub(rows.champion);
        if more > 0 && more >= min_growth {
            NOT_WORSE
        } else {
            BETTER
        }
    }
}

/// The PR-AUC of both adapters on the judged rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RankComparison {
    /// PR-AUC of the champion.
    pub champion: f64,
    /// PR-AUC of the challenger.
    pub challenger: f64,
    /// PR-AUC of the challenger minus that of the champion.
    pub difference: f64,
    /// The same difference, estimated from the smoothed areas. Absent in verdicts from before it was introduced, whose
    /// bounds are those of the plain difference.
    #[serde(default)]
    pub smoothed_difference: Option<f64>,
    /// One-sided lower bound of the smoothed difference: a percentile of a paired bootstrap, in which both adapters are
    /// evaluated on the same resamples. The 5th, or the 2.5th if `required` is below 0.
    pub lower_bound: f64,
    /// Two-sided 95 % interval of the smoothed difference.
    pub interval: [f64; 2],
    /// What the lower bound and the plain difference must exceed: 0, or minus [`GROWTH_TOLERANCE`].
    pub required: f64,
}

impl RankComparison {
    /// Returns whether the challenger ranks well enough. False if a number is NaN.
    pub(super) fn passes(&self) -> bool {
        self.lower_bound > self.required && self.difference > self.required
    }

    /// Returns the confidence of the lower bound in per cent.
    pub fn confidence(&self) -> f64 {
        let growth = self.smoothed_difference.is_some() && self.required < 0.0;
        100.0 * (1.0 - if growth { NOT_WORSE } else { BETTER }.quantile)
    }
}

/// Compares the rankings, and returns what difference the rows can show. Returns `None` if an area is not defined, or
/// is not defined on enough resamples.
pub(super) fn compare(
    rows: &[GateRow],
    training_rows: TrainingRows,
    config: GateConfig,
) -> Option<(RankComparison, Power)> {
    let folds = Fold::all(rows);
    let weights: Vec<f64> = rows.iter().map(|row| row.weight).collect();
    let areas = Areas::mean(&folds, &weights)?;
    let mut smoothed = Vec::with_capacity(config.bootstrap.resamples);
    resample(&weights, config.bootstrap, |drawn| {
        smoothed.extend(Areas::mean(&folds, drawn).map(|areas| areas.smoothed_difference));
    });
    if (smoothed.len() as f64) < DEFINED_SHARE * config.bootstrap.resamples as f64 {
        return None;
    }
    let hateful: f64 = rows.iter().filter(|row| row.hateful).map(|row| row.weight).sum();
    let factor = smoothing_factor(areas.champion, hateful / weights.iter().sum::<f64>());
    smoothed.iter_mut().for_each(|difference| *difference *= factor);
    smoothed.sort_by(f64::total_cmp);
    let bound = |share| quantile(&smoothed, share);
    let requirement = Requirement::new(training_rows, config.min_growth);
    let comparison = RankComparison {
        champion: areas.champion,
        challenger: areas.challenger,
        difference: areas.challenger - areas.champion,
        smoothed_difference: Some(factor * areas.smoothed_difference),
        lower_bound: bound(requirement.quantile)?,
        interval: [bound(INTERVAL[0])?, bound(INTERVAL[1])?],
        required: requirement.difference,
    };
    Some((comparison, Power::new(standard_deviation(&smoothed), requirement)))
}

/// The rows that one model judged for the challenger.
struct Fold {
    /// Indices of the rows.
    rows: Vec<usize>,
    hateful: Vec<bool>,
    champion: Ranking,
    challenger: Ranking,
}

impl Fold {
    fn all(rows: &[GateRow]) -> Vec<Self> {
        let count = rows.iter().map(|row| row.fold + 1).max().unwrap_or(0);
        let mut indices = vec![Vec::new(); count];
        for (index, row) in rows.iter().enumerate() {
            indices[row.fold].push(index);
        }
        let fold = |indices: Vec<usize>| {
            let ranking = |prediction: fn(&GateRow) -> Prediction| {
                let margins: Vec<f64> = indices.iter().map(|&row| prediction(&rows[row]).margin).collect();
                Ranking::new(&margins)
            };
            Self {
                hateful: indices.iter().map(|&row| rows[row].hateful).collect(),
                champion: ranking(|row| row.champion),
                challenger: ranking(|row| row.challenger),
                rows: indices,
            }
        };
        indices.into_iter().filter(|rows| !rows.is_empty()).map(fold).collect()
    }
}

/// Areas of both adapters.
#[derive(Default)]
struct Areas {
    champion: f64,
    challenger: f64,
    smoothed_difference: f64,
}

impl Areas {
    /// Returns the mean over the folds that have both classes, or `None` if there are none.
    fn mean(folds: &[Fold], weights: &[f64]) -> Option<Self> {
        let mut sums = Self::default();
        let mut total = 0.0;
        for fold in folds {
            let drawn: Vec<f64> = fold.rows.iter().map(|&row| weights[row]).collect();
            let areas = |ranking: &Ranking| ranking.areas(&fold.hateful, &drawn);
            let (Some(champion), Some(challenger)) = (areas(&fold.champion), areas(&fold.challenger)) else {
                continue;
            };
            let hateful = fold.hateful.iter().zip(&drawn).filter(|(hateful, _)| **hateful);
            let weight: f64 = hateful.map(|(_, weight)| weight).sum();
            total += weight;
            sums.champion += weight * champion.pr_auc;
            sums.challenger += weight * challenger.pr_auc;
            sums.smoothed_difference += weight * (challenger.smoothed_pr_auc - champion.smoothed_pr_auc);
        }
        (total > 0.0).then(|| Self {
            champion: sums.champion / total,
            challenger: sums.challenger / total,
            smoothed_difference: sums.smoothed_difference / total,
        })
    }
}

fn standard_deviation(values: &[f64]) -> f64 {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean) * (value - mean)).sum();
    (squares / (count - 1.0).max(1.0)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::retrain::judge::gate::tests::{CONFIG, SAME, drawn};

    /// The challenger's margins of one fold may be on any scale.
    #[test]
    fn the_scale_of_a_fold_makes_no_difference() {
        let mut rows = drawn(400, [1.0, 0.8], 4);
        for (index, row) in rows.iter_mut().enumerate() {
            row.fold = index / 4 % 5;
        }
        let before = compare(&rows, SAME, CONFIG).unwrap();
        for row in &mut rows {
            row.challenger.margin = row.challenger.margin * (1.0 + row.fold as f64) + 10.0 * row.fold as f64;
        }
        assert_eq!(compare(&rows, SAME, CONFIG).unwrap(), before);
    }

    #[test]
    fn a_fold_with_a_single_class_does_not_count() {
        let rows = drawn(400, [1.0, 0.8], 4);
        let mut more = rows.clone();
        more.extend(
            rows.iter()
                .filter(|row| row.hateful)
                .take(9)
                .map(|row| GateRow { fold: 3, ..row.clone() }),
        );
        let champion = |rows: &[GateRow]| compare(rows, SAME, CONFIG).unwrap().0.champion;
        assert_eq!(champion(&rows), champion(&more));
    }

    /// A challenger that ranks the bulk better but the top worse may gain in the smoothed area and lose in PR-AUC.
    #[test]
    fn a_lower_pr_auc_does_not_pass() {
        let (comparison, _) = compare(&drawn(600, [1.2, 0.5], 1), SAME, CONFIG).unwrap();
        assert!(comparison.passes());
        let lower = RankComparison {
            difference: -0.001,
            ..comparison
        };
        assert!(!lower.passes());
        let undefined = RankComparison {
            lower_bound: f64::NAN,
            ..comparison
        };
        assert!(!undefined.passes());
    }
}
