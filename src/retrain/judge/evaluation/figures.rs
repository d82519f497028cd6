//! The figures and their definitions.
//!
//! A figure whose denominator is 0 is absent, rather than 0 or 1 by convention.

use serde::{Deserialize, Serialize};

use super::ranking::Ranking;
use super::{CALIBRATION_BINS, ScoredRow};

/// One value for each figure.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Figures<T> {
    /// F1 score of the hateful class at the threshold.
    pub f1: T,
    /// Mean F1 score of both classes, or the F1 score of one class if the other is neither labelled nor predicted.
    pub macro_f1: T,
    /// Share of the rows predicted hateful that are labelled hateful.
    pub precision: T,
    /// Share of the rows labelled hateful that are predicted hateful.
    pub recall: T,
    /// Share of the rows whose predicted class is the labelled one.
    pub accuracy: T,
    /// Area under the ROC curve; absent if there is a single class.
    pub roc_auc: T,
    /// Average precision; absent if there is a single class.
    pub pr_auc: T,
    /// Mean negative log-likelihood of the labels, in nats.
    pub log_loss: T,
    /// Brier score: mean squared difference between probability and label.
    pub brier: T,
    /// Expected calibration error: the mean over all rows of the absolute difference, in the row's bin, between mean
    /// probability and share of hateful rows. The [`CALIBRATION_BINS`] bins divide the probability of the hateful class
    /// into equal widths; each includes its lower edge, and the last one also includes 1.
    pub ece: T,
}

/// A figure with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The figure on all rows; absent if it is not defined.
    pub value: Option<f64>,
    /// The bootstrap interval; absent if the figure is undefined on more than 5 % of the resamples.
    pub interval: Option<[f64; 2]>,
}

/// A confusion matrix, of counts or of sums of weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Confusion {
    /// Labelled hateful and predicted hateful.
    pub true_positives: f64,
    /// Not labelled hateful, but predicted hateful.
    pub false_positives: f64,
    /// Labelled hateful, but not predicted hateful.
    pub false_negatives: f64,
    /// Neither labelled nor predicted hateful.
    pub true_negatives: f64,
}

impl<T> Figures<T> {
    /// Iterates over the figures with their names in JSON.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &T)> {
        [
            ("f1", &self.f1),
            ("macro_f1", &self.macro_f1),
            ("precision", &self.precision),
            ("recall", &self.recall),
            ("accuracy", &self.accuracy),
            ("roc_auc", &self.roc_auc),
            ("pr_auc", &self.pr_auc),
            ("log_loss", &self.log_loss),
            ("brier", &self.brier),
            ("ece", &self.ece),
        ]
        .into_iter()
    }

    /// Applies `f` to each value, in the order of [`Figures::iter`].
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Figures<U> {
        Figures {
            f1: f(self.f1),
            macro_f1: f(self.macro_f1),
            precision: f(self.precision),
            recall: f(self.recall),
            accuracy: f(self.accuracy),
            roc_auc: f(self.roc_auc),
            pr_auc: f(self.pr_auc),
            log_loss: f(self.log_loss),
            brier: f(self.brier),
            ece: f(self.ece),
        }
    }
}

impl Confusion {
    /// Returns the sum of all four entries.
    pub fn total(self) -> f64 {
        self.true_positives + self.false_positives + self.false_negatives + self.true_negatives
    }

    /// Returns the F1 score of the hateful class.
    pub fn f1(self) -> Option<f64> {
        let errors = self.false_positives + self.false_negatives;
        ratio(2.0 * self.true_positives, 2.0 * self.true_positives + errors)
    }

    /// Returns the share of the rows predicted hateful that are labelled hateful.
    pub fn precision(self) -> Option<f64> {
        ratio(self.true_positives, self.true_positives + self.false_positives)
    }

    /// Returns the share of the rows labelled hateful that are predicted hateful.
    pub fn recall(self) -> Option<f64> {
        ratio(self.true_positives, self.true_positives + self.false_negatives)
    }

    /// Returns the share of the rows not labelled hateful that are predicted hateful.
    pub fn false_positive_rate(self) -> Option<f64> {
        ratio(self.false_positives, self.false_positives + self.true_negatives)
    }

    fn accuracy(self) -> Option<f64> {
        ratio(self.true_positives + self.true_negatives, self.total())
    }

    fn macro_f1(self) -> Option<f64> {
        let swapped = Self {
            true_positives: self.true_negatives,
            false_positives: self.false_negatives,
            false_negatives: self.false_positives,
            true_negatives: self.true_positives,
        };
        match (self.f1(), swapped.f1()) {
            (Some(hateful), Some(other)) => Some(0.5 * (hateful + other)),
            (hateful, other) => hateful.or(other),
        }
    }

    pub(super) fn add(&mut self, hateful: bool, predicted: bool, weight: f64) {
        *match (hateful, predicted) {
            (true, true) => &mut self.true_positives,
            (false, true) => &mut self.false_positives,
            (true, false) => &mut self.false_negatives,
            (false, false) => &mut self.true_negatives,
        } += weight;
    }
}

fn ratio(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

/// Returns the index of a probability's bin, for bins of equal width.
pub(super) fn bin(probability: f64, bins: usize) -> usize {
    ((probability * bins as f64) as usize).min(bins - 1)
}

/// What the figures need and does not depend on the weights of the rows. It is computed once, so that every resample
/// takes a single pass over the rows.
pub(super) struct PreparedRows {
    ranking: Ranking,
    hateful: Vec<bool>,
    rows: Vec<PreparedRow>,
}

struct PreparedRow {
    hateful: bool,
    predicted: bool,
    bin: u8,
    /// Probability minus label.
    difference: f64,
    log_loss: f64,
}

impl PreparedRows {
    pub(super) fn new(rows: &[ScoredRow], threshold: f64) -> Self {
        let margins: Vec<f64> = rows.iter().map(|row| row.margin).collect();
        let prepared = rows.iter().map(|row| {
            let label = f64::from(u8::from(row.hateful));
            // As in scikit-learn: the loss of a wrong prediction with probability 1 is 36 nats instead of infinite.
            let likelihood = row.probability.clamp(f64::EPSILON, 1.0 - f64::EPSILON);
            PreparedRow {
                hateful: row.hateful,
                predicted: row.probability >= threshold,
                bin: bin(row.probability, CALIBRATION_BINS) as u8,
                difference: row.probability - label,
                log_loss: -(if row.hateful { likelihood } else { 1.0 - likelihood }).ln(),
            }
        });
        Self {
            ranking: Ranking::new(&margins),
            hateful: rows.iter().map(|row| row.hateful).collect(),
            rows: prepared.collect(),
        }
    }

    pub(super) fn confusion(&self, weights: &[f64]) -> Confusion {
        let mut confusion = Confusion::default();
        for (row, &weight) in self.rows.iter().zip(weights) {
            confusion.add(row.hateful, row.predicted, weight);
        }
        confusion
    }

    pub(super) fn figures(&self, weights: &[f64]) -> Figures<Option<f64>> {
        let confusion = self.confusion(weights);
        let total = confusion.total();
        let (mut log_loss, mut brier) = (0.0, 0.0);
        let mut bins = [0.0; CALIBRATION_BINS];
        for (row, &weight) in self.rows.iter().zip(weights) {
            log_loss += weight * row.log_loss;
            brier += weight * row.difference * row.difference;
            bins[usize::from(row.bin)] += weight * row.difference;
        }
        let areas = self.ranking.areas(&self.hateful, weights);
        Figures {
            f1: confusion.f1(),
            macro_f1: confusion.macro_f1(),
            precision: confusion.precision(),
            recall: confusion.recall(),
            accuracy: confusion.accuracy(),
            roc_auc: areas.map(|areas| areas.roc_auc),
            pr_auc: areas.map(|areas| areas.pr_auc),
            log_loss: ratio(log_loss, total),
            brier: ratio(brier, total),
            ece: ratio(bins.iter().map(|sum| sum.abs()).sum(), total),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_with_a_denominator_of_zero_is_absent() {
        let check = |[tp, fp, fn_, tn]: [f64; 4], expected: [Option<f64>; 5]| {
            let confusion = Confusion {
                true_positives: tp,
                false_positives: fp,
                false_negatives: fn_,
                true_negatives: tn,
            };
            let found = [
                confusion.f1(),
                confusion.macro_f1(),
                confusion.precision(),
                confusion.recall(),
                confusion.false_positive_rate(),
            ];
            assert_eq!(found, expected, "{confusion:?}");
        };
        check(
            [1.0, 1.0, 1.0, 1.0],
            [Some(0.5), Some(0.5), Some(0.5), Some(0.5), Some(0.5)],
        );
        check([0.0, 0.0, 0.0, 2.0], [None, Some(1.0), None, None, Some(0.0)]);
        check([0.0, 0.0, 3.0, 0.0], [Some(0.0), Some(0.0), None, Some(0.0), None]);
        check([0.0; 4], [None; 5]);
    }

    #[test]
    fn map_visits_the_figures_in_the_order_of_iter() {
        let prepared = PreparedRows::new(&[], 0.5).figures(&[]);
        let mut count = 0;
        let numbered = prepared.map(|_| {
            count += 1;
            count
        });
        assert!(numbered.iter().map(|(_, &number)| number).eq(1..=count));
    }

    #[test]
    fn a_bin_includes_its_lower_edge_and_the_last_one_also_includes_one() {
        for (probability, expected) in [(0.0, 0), (0.0999, 1), (0.1, 2), (0.5, 10), (0.95, 19), (1.0, 19)] {
            assert_eq!(bin(probability, 20), expected, "{probability}");
        }
    }
}
