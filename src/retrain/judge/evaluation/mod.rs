//! Evaluates scores on labelled rows: figures with intervals, figures by community, and curves.
//!
//! The same rows always give the same numbers, which equal those of scikit-learn if it defines them. Ranking figures
//! are computed from the margins, all others from the calibrated probabilities. The caller chooses the rows and their
//! weights. This module does no I/O.

mod bootstrap;
mod communities;
mod curves;
mod figures;
mod ranking;

use serde::{Deserialize, Serialize};

pub use bootstrap::{Bootstrap, quantile};
pub(crate) use bootstrap::{DEFINED_SHARE, resample};
pub use communities::CommunityFigures;
pub use curves::{Curves, Histogram, Point, ReliabilityBin};
pub use figures::{Confusion, Estimate, Figures};
pub(crate) use ranking::{Ranking, SMOOTHING};

use figures::PreparedRows;

/// Number of bins of the expected calibration error, as in Guo et al., "On Calibration of Modern Neural Networks"
/// (2017).
pub const CALIBRATION_BINS: usize = 15;

/// One labelled row with the model's prediction.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredRow {
    /// The logit of the hateful label minus the logit of the other label, by which rows are ranked.
    pub margin: f64,
    /// The calibrated probability that the row is hateful, which thresholds are compared with.
    pub probability: f64,
    /// Whether the row is labelled hateful.
    pub hateful: bool,
    /// The number of comments in the traffic that the row represents; 1 if that is not known.
    pub weight: f64,
    /// The community that the comment was posted in, if known.
    pub community: Option<String>,
}

/// Settings of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EvaluationConfig {
    /// The threshold: rows with at least this probability are predicted hateful. From 0 to 1.
    pub threshold: f64,
    /// How the intervals are estimated.
    pub bootstrap: Bootstrap,
}

/// The result of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Number of rows.
    pub rows: usize,
    /// Number of rows that are labelled hateful.
    pub hateful: usize,
    /// The settings of the evaluation.
    pub config: EvaluationConfig,
    /// The figures with their intervals, weighted.
    pub figures: Figures<Estimate>,
    /// The confusion matrix at the threshold, unweighted.
    pub confusion: Confusion,
    /// The confusion matrix as sums of weights, from which the figures are computed.
    pub weighted_confusion: Confusion,
    /// The figures of each community, those with the most rows first.
    pub communities: Vec<CommunityFigures>,
}

/// Why rows cannot be evaluated.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EvaluationError {
    /// No row has a positive weight.
    #[error("no row has a positive weight")]
    Empty,
    /// A number of a row is outside its range.
    #[error("row {row}: {what} is {value}, expected {expected}")]
    Row {
        /// Index of the row, from 0.
        row: usize,
        /// Which number it is: margin, probability or weight.
        what: &'static str,
        /// The value.
        value: f64,
        /// Description of valid values.
        expected: &'static str,
    },
    /// The threshold is not a probability.
    #[error("the threshold is {0}, expected a number from 0 to 1")]
    Threshold(f64),
}

/// Evaluates scored rows against their labels.
///
/// # Errors
/// Returns an error if a number or the threshold is outside its range, or no row has a positive weight.
pub fn evaluate(rows: &[ScoredRow], config: EvaluationConfig) -> Result<Evaluation, EvaluationError> {
    check(rows)?;
    if !(0.0..=1.0).contains(&config.threshold) {
        return Err(EvaluationError::Threshold(config.threshold));
    }
    let prepared = PreparedRows::new(rows, config.threshold);
    let weights: Vec<f64> = rows.iter().map(|row| row.weight).collect();
    let ones = vec![1.0; rows.len()];
    Ok(Evaluation {
        rows: rows.len(),
        hateful: rows.iter().filter(|row| row.hateful).count(),
        config,
        figures: bootstrap::estimate(&prepared, &weights, config.bootstrap),
        confusion: prepared.confusion(&ones),
        weighted_confusion: prepared.confusion(&weights),
        communities: communities::by_community(rows, config.threshold),
    })
}

/// Checks that margins are finite, that probabilities are from 0 to 1, that weights are finite and not negative, and
/// that one of them is positive.
fn check(rows: &[ScoredRow]) -> Result<(), EvaluationError> {
    for (row, scored) in rows.iter().enumerate() {
        let error = |what, value, expected| EvaluationError::Row {
            row,
            what,
            value,
            expected,
        };
        let &ScoredRow {
            margin,
            probability,
            weight,
            ..
        } = scored;
        if !margin.is_finite() {
            return Err(error("margin", margin, "a finite number"));
        }
        if !(0.0..=1.0).contains(&probability) {
            return Err(error("probability", probability, "a number from 0 to 1"));
        }
        if !(weight >= 0.0 && weight.is_finite()) {
            return Err(error("weight", weight, "a finite number of 0 or more"));
        }
    }
    if rows.iter().any(|row| row.weight > 0.0) {
        Ok(())
    } else {
        Err(EvaluationError::Empty)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONFIG: EvaluationConfig = EvaluationConfig {
        threshold: 0.5,
        bootstrap: Bootstrap {
            resamples: 200,
            seed: 1,
        },
    };

    pub(super) fn row(margin: f64, hateful: bool, weight: f64) -> ScoredRow {
        ScoredRow {
            margin,
            probability: 1.0 / (1.0 + (-margin).exp()),
            hateful,
            weight,
            community: None,
        }
    }

    #[test]
    fn rows_that_cannot_be_evaluated_are_errors() {
        let check = |rows: &[ScoredRow], threshold, expected: &str| {
            let error = evaluate(rows, EvaluationConfig { threshold, ..CONFIG }).unwrap_err();
            assert_eq!(error.to_string(), expected);
        };
        let good = row(1.0, true, 1.0);
        check(&[], 0.5, "no row has a positive weight");
        check(&[row(1.0, true, 0.0)], 0.5, "no row has a positive weight");
        let infinite = ScoredRow {
            margin: f64::INFINITY,
            ..good.clone()
        };
        check(
            &[good.clone(), infinite],
            0.5,
            "row 1: margin is inf, expected a finite number",
        );
        check(
            &[row(1.0, true, -1.0)],
            0.5,
            "row 0: weight is -1, expected a finite number of 0 or more",
        );
        let unlikely = ScoredRow {
            probability: 1.5,
            ..good.clone()
        };
        check(
            &[unlikely],
            0.5,
            "row 0: probability is 1.5, expected a number from 0 to 1",
        );
        check(&[good], f64::NAN, "the threshold is NaN, expected a number from 0 to 1");
    }

    #[test]
    fn a_single_class_has_no_ranking_figures() {
        for hateful in [false, true] {
            let rows = [row(1.0, hateful, 1.0), row(-1.0, hateful, 1.0)];
            let evaluation = evaluate(&rows, CONFIG).unwrap();
            let figures = evaluation.figures;
            assert_eq!((figures.roc_auc.value, figures.pr_auc.value), (None, None));
            assert_eq!(figures.roc_auc.interval, None);
            assert_eq!(figures.accuracy.value, Some(0.5));
        }
    }

    #[test]
    fn an_evaluation_survives_a_round_trip_through_json() {
        let rows: Vec<_> = (0..50)
            .map(|index| row(f64::from(index % 7) - 3.0, index % 3 == 0, 1.0))
            .collect();
        let evaluation = evaluate(&rows, CONFIG).unwrap();
        let json = serde_json::to_string(&evaluation).unwrap();
        assert_eq!(serde_json::from_str::<Evaluation>(&json).unwrap(), evaluation);
    }

    fn rows() -> impl Strategy<Value = Vec<ScoredRow>> {
        // There are few distinct margins, so that ties are common.
        let one = (-8i32..8, any::<bool>(), 0u8..5)
            .prop_map(|(margin, hateful, weight)| row(f64::from(margin) / 2.0, hateful, f64::from(weight)));
        prop::collection::vec(one, 1..60)
            .prop_filter("a positive weight", |rows| rows.iter().any(|row| row.weight > 0.0))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_figure_is_in_its_range_and_every_interval_is_ordered(rows in rows()) {
            let evaluation = evaluate(&rows, CONFIG).unwrap();
            for (name, estimate) in evaluation.figures.iter() {
                let highest = if name == "log_loss" { f64::MAX } else { 1.0 + 1e-12 };
                for value in estimate.value.into_iter().chain(estimate.interval.into_iter().flatten()) {
                    prop_assert!((0.0..=highest).contains(&value), "{} {}", name, value);
                }
                if let Some([low, high]) = estimate.interval {
                    prop_assert!(low <= high);
                }
            }
        }

        /// A row of weight 3 counts as three rows, and the order of the rows does not matter.
        #[test]
        fn a_weight_is_equivalent_to_repeated_rows(rows in rows(), rotation in 0usize..60) {
            let mut repeated: Vec<_> = rows
                .iter()
                .flat_map(|one| std::iter::repeat_n(ScoredRow { weight: 1.0, ..one.clone() }, one.weight as usize))
                .collect();
            let rotation = rotation % repeated.len();
            repeated.rotate_left(rotation);
            let (weighted, repeated) = (evaluate(&rows, CONFIG).unwrap(), evaluate(&repeated, CONFIG).unwrap());
            for ((name, one), (_, other)) in weighted.figures.iter().zip(repeated.figures.iter()) {
                match (one.value, other.value) {
                    (Some(one), Some(other)) => {
                        prop_assert!((one - other).abs() < 1e-12, "{}: {} and {}", name, one, other);
                    }
                    (one, other) => prop_assert_eq!(one, other, "{}", name),
                }
            }
        }

        #[test]
        fn flipping_labels_and_margins_keeps_the_roc_area(rows in rows()) {
            let flipped: Vec<_> = rows.iter().map(|one| row(-one.margin, !one.hateful, one.weight)).collect();
            let area = |rows: &[ScoredRow]| evaluate(rows, CONFIG).unwrap().figures.roc_auc.value;
            match (area(&rows), area(&flipped)) {
                (Some(one), Some(other)) => prop_assert!((one - other).abs() < 1e-12),
                (one, other) => prop_assert_eq!(one, other),
            }
        }
    }
}
