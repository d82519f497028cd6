//! How good scores are, measured on labelled rows: figures, intervals, communities, curves.
//!
//! Pure and exact: the same rows give the same numbers, equal to scikit-learn's where it has them.
//! Ranking figures look at the margin, everything else at the calibrated probability. Which rows may
//! judge, and what their weights mean, is the caller's business.

mod bootstrap;
mod communities;
mod curves;
mod figures;
mod ranking;

use serde::{Deserialize, Serialize};

pub use bootstrap::{Bootstrap, quantile, resample};
pub use communities::CommunityFigures;
pub use curves::{Curves, Histogram, Point, ReliabilityBin};
pub use figures::{Confusion, Estimate, Figures};
pub use ranking::{Areas, Ranking};

use figures::Prepared;

/// Bins of the expected calibration error: the number of Guo et al., "On calibration of modern neural
/// networks", 2017.
pub const CALIBRATION_BINS: usize = 15;

/// One labelled row and what the model says of it.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredRow {
    /// Logit of the hateful label minus the other's: what ranks the rows.
    pub margin: f64,
    /// Calibrated probability of being hateful: what thresholds look at.
    pub probability: f64,
    /// The label, made hard by [`SoftLabels::round`].
    pub hateful: bool,
    /// How many rows of the traffic it stands for; 1 where nothing is known.
    pub weight: f64,
    /// The community it was posted in.
    pub community: Option<String>,
}

/// What a label between 0 and 1 counts as. `hateful_from` is looked at first.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SoftLabels {
    /// At or above: hateful.
    pub hateful_from: f64,
    /// At or below: not hateful. What lies between the two does not judge.
    pub ok_to: f64,
}

impl SoftLabels {
    /// The likelier of the two classes; one half is hateful, as in the split.
    pub const LIKELIER: Self = Self {
        hateful_from: 0.5,
        ok_to: 0.5,
    };

    /// The hard label, or nothing where the row does not judge.
    pub fn round(self, hateful: f64) -> Option<bool> {
        if hateful >= self.hateful_from {
            Some(true)
        } else {
            (hateful <= self.ok_to).then_some(false)
        }
    }
}

/// How an evaluation is made.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EvaluationConfig {
    /// Probability from which on a row counts as called hateful.
    pub threshold: f64,
    /// How the intervals are found.
    pub bootstrap: Bootstrap,
}

/// How good scores are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Rows that judged.
    pub rows: usize,
    /// Hateful ones among them.
    pub hateful: usize,
    /// Threshold and resampling.
    pub config: EvaluationConfig,
    /// Each figure with its interval.
    pub figures: Figures<Estimate>,
    /// Rows by label and call at the threshold, unweighted.
    pub confusion: Confusion,
    /// The same as sums of weights: what the figures were computed from.
    pub weighted_confusion: Confusion,
    /// By community, largest first.
    pub communities: Vec<CommunityFigures>,
}

/// Why rows cannot be judged by.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EvaluationError {
    /// Nothing to judge by.
    #[error("there are no rows of positive weight to judge by")]
    Empty,
    /// A number outside of its range.
    #[error("row {row}: {what} is {value}, expected {expected}")]
    Row {
        /// From zero.
        row: usize,
        /// Margin, probability or weight.
        what: &'static str,
        /// What it is.
        value: f64,
        /// What would do.
        expected: &'static str,
    },
    /// A threshold that is no probability.
    #[error("the threshold is {0}, expected a number from 0 to 1")]
    Threshold(f64),
}

/// Measures scores against labels.
///
/// # Errors
/// [`EvaluationError`].
pub fn evaluate(rows: &[ScoredRow], config: EvaluationConfig) -> Result<Evaluation, EvaluationError> {
    check(rows)?;
    if !(0.0..=1.0).contains(&config.threshold) {
        return Err(EvaluationError::Threshold(config.threshold));
    }
    let prepared = Prepared::new(rows, config.threshold);
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

/// What every measurement rests on: finite margins, probabilities, weights that are not negative.
fn check(rows: &[ScoredRow]) -> Result<(), EvaluationError> {
    for (row, scored) in rows.iter().enumerate() {
        let fault = |what, value, expected| EvaluationError::Row {
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
            return Err(fault("margin", margin, "a finite number"));
        }
        if !(0.0..=1.0).contains(&probability) {
            return Err(fault("probability", probability, "a number from 0 to 1"));
        }
        if !(weight >= 0.0 && weight.is_finite()) {
            return Err(fault("weight", weight, "a finite number, not negative"));
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
    fn soft_labels_are_rounded_by_the_callers_rule() {
        let strict = SoftLabels {
            hateful_from: 0.8,
            ok_to: 0.2,
        };
        for (rule, hateful, expected) in [
            (SoftLabels::LIKELIER, 0.5, Some(true)),
            (SoftLabels::LIKELIER, 0.49, Some(false)),
            (strict, 0.8, Some(true)),
            (strict, 0.2, Some(false)),
            (strict, 0.5, None),
        ] {
            assert_eq!(rule.round(hateful), expected, "{hateful} under {rule:?}");
        }
    }

    #[test]
    fn what_cannot_be_judged_by_is_named() {
        let check = |rows: &[ScoredRow], threshold, expected: &str| {
            let error = evaluate(rows, EvaluationConfig { threshold, ..CONFIG }).unwrap_err();
            assert_eq!(error.to_string(), expected);
        };
        let good = row(1.0, true, 1.0);
        check(&[], 0.5, "there are no rows of positive weight to judge by");
        check(
            &[row(1.0, true, 0.0)],
            0.5,
            "there are no rows of positive weight to judge by",
        );
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
            "row 0: weight is -1, expected a finite number, not negative",
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
    fn one_class_has_no_ranking() {
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
    fn an_evaluation_reads_back_from_json() {
        let rows: Vec<_> = (0..50)
            .map(|index| row(f64::from(index % 7) - 3.0, index % 3 == 0, 1.0))
            .collect();
        let evaluation = evaluate(&rows, CONFIG).unwrap();
        let json = serde_json::to_string(&evaluation).unwrap();
        assert_eq!(serde_json::from_str::<Evaluation>(&json).unwrap(), evaluation);
    }

    fn rows() -> impl Strategy<Value = Vec<ScoredRow>> {
        // Few distinct margins, so that ties are common.
        let one = (-8i32..8, any::<bool>(), 0u8..5)
            .prop_map(|(margin, hateful, weight)| row(f64::from(margin) / 2.0, hateful, f64::from(weight)));
        prop::collection::vec(one, 1..60).prop_filter("some weight", |rows| rows.iter().any(|row| row.weight > 0.0))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_figure_is_in_its_range_and_inside_its_interval_order(rows in rows()) {
            let evaluation = evaluate(&rows, CONFIG).unwrap();
            for (name, estimate) in evaluation.figures.iter() {
                let bounded = name != "log_loss";
                for value in estimate.value.into_iter().chain(estimate.interval.into_iter().flatten()) {
                    prop_assert!(value >= 0.0 && value.is_finite() && (!bounded || value <= 1.0 + 1e-12), "{} {}", name, value);
                }
                if let Some([low, high]) = estimate.interval {
                    prop_assert!(low <= high);
                }
            }
        }

        /// A row of weight three is three rows, and the order of rows does not matter.
        #[test]
        fn a_weight_is_a_count(rows in rows(), turn in 0usize..60) {
            let mut repeated: Vec<_> = rows
                .iter()
                .flat_map(|one| std::iter::repeat_n(ScoredRow { weight: 1.0, ..one.clone() }, one.weight as usize))
                .collect();
            let turn = turn % repeated.len();
            repeated.rotate_left(turn);
            let (weighted, repeated) = (evaluate(&rows, CONFIG).unwrap(), evaluate(&repeated, CONFIG).unwrap());
            for ((name, one), (_, other)) in weighted.figures.iter().zip(repeated.figures.iter()) {
                match (one.value, other.value) {
                    (Some(one), Some(other)) => prop_assert!((one - other).abs() < 1e-12, "{}: {} and {}", name, one, other),
                    (one, other) => prop_assert_eq!(one, other, "{}", name),
                }
            }
        }

        /// Flipping labels and margins mirrors the ROC area.
        #[test]
        fn the_roc_area_is_symmetric(rows in rows()) {
            let flipped: Vec<_> = rows.iter().map(|one| row(-one.margin, !one.hateful, one.weight)).collect();
            let area = |rows: &[ScoredRow]| evaluate(rows, CONFIG).unwrap().figures.roc_auc.value;
            match (area(&rows), area(&flipped)) {
                (Some(one), Some(other)) => prop_assert!((one - other).abs() < 1e-12),
                (one, other) => prop_assert_eq!(one, other),
            }
        }
    }
}
