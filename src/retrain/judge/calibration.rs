//! Fits the calibration, a line that maps margins to log-odds.
//!
//! The method is that of Platt, "Probabilistic Outputs for Support Vector Machines" (1999), with the targets of its
//! section 2.2, and Newton's method as in Lin, Lin and Weng, "A Note on Platt's Probabilistic Outputs for Support
//! Vector Machines" (2007). Rows are weighted by the inverse of the probability with which they were sampled.
//!
//! What is fitted depends on the effective number of rows in the smaller class:
//!
//! - at least [`MIN_PLATT`]: slope and intercept (Platt scaling);
//! - at least [`MIN_TEMPERATURE`]: the slope alone (temperature scaling);
//! - fewer, or if the fitted line does not rise: nothing. The probability then equals the score, and the reason is
//!   reported.

use serde::{Deserialize, Serialize};

use super::logistic::{MAX_STEPS, Parameters, Regression, softplus};
use super::sampling::effective_rows;
use crate::decide::Calibration;

/// Minimum effective number of rows in each class for fitting an intercept.
///
/// The standard error of the intercept is at least `sqrt(1/n + 1/m)` for classes of n and m rows. With 15 rows in each,
/// it is 0.37, a factor of 1.4 in the odds; with fewer, a second parameter would be too uncertain.
pub const MIN_PLATT: f64 = 15.0;

/// Minimum effective number of rows in each class for fitting a slope.
///
/// Platt's targets keep the slope moderate in small samples. With fewer rows, they would influence it more than the
/// data does.
pub const MIN_TEMPERATURE: f64 = 5.0;

/// One labelled row of the validation part, with its margin.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CalibrationRow {
    /// The margin, scored with the windows and the normaliser that are used in service.
    pub margin: f64,
    /// The label: the probability that the row is hateful, from 0 to 1.
    pub hateful: f64,
    /// The number of comments in the traffic that the row represents; above 0.
    pub weight: f64,
}

/// A fitted calibration, with the evidence for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FittedCalibration {
    /// The calibration to apply in service.
    pub calibration: Calibration,
    /// How it was fitted, or why it was not.
    pub method: CalibrationMethod,
    /// Number of rows it was fitted to.
    pub rows: usize,
    /// Effective number of hateful rows, `(sum w)^2 / sum w^2` over their weights.
    pub effective_hateful: f64,
    /// Effective number of rows that are not hateful.
    pub effective_ok: f64,
    /// Mean log-loss of the uncalibrated score on these rows, in nats.
    pub log_loss_before: f64,
    /// Mean log-loss of the calibrated probability on the same rows, in nats.
    pub log_loss_after: f64,
}

/// How a calibration was fitted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum CalibrationMethod {
    /// Slope and intercept were fitted.
    Platt,
    /// The slope was fitted, with an intercept of 0.
    Temperature,
    /// Nothing was fitted, and the probability equals the score.
    Identity {
        /// Why no calibration was fitted.
        reason: UncalibratedReason,
    },
}

/// Why no calibration was fitted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum UncalibratedReason {
    /// There are too few rows of one class.
    #[error("the smaller class has {effective:.1} effective rows, expected at least {MIN_TEMPERATURE}")]
    TooFew {
        /// Effective rows of the smaller class.
        effective: f64,
    },
    /// The probability would not increase with the margin.
    #[error("the fitted slope is {slope:.3}, expected a slope above 0")]
    NotRising {
        /// The fitted slope.
        slope: f64,
    },
    /// All margins are equal, so that no line is determined.
    #[error("all margins are equal, expected different ones")]
    NoSpread,
    /// Newton's method did not converge.
    #[error("the fit did not converge in {MAX_STEPS} steps")]
    NotConverged,
}

/// A row has a margin, label or weight outside its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("row {row}: {what} is {value}, expected {expected}")]
pub struct CalibrationRowError {
    row: usize,
    what: &'static str,
    value: f64,
    expected: &'static str,
}

/// Fits a calibration. The module's documentation describes the method.
///
/// # Errors
/// Returns an error if a margin, label or weight is outside its range.
pub fn fit(rows: &[CalibrationRow]) -> Result<FittedCalibration, CalibrationRowError> {
    check(rows)?;
    let effective_hateful = effective_rows(rows.iter().map(|row| (row.weight, row.hateful)));
    let effective_ok = effective_rows(rows.iter().map(|row| (row.weight, 1.0 - row.hateful)));
    let smaller = effective_hateful.min(effective_ok);
    let (calibration, method) = if smaller < MIN_TEMPERATURE {
        (
            Err(UncalibratedReason::TooFew { effective: smaller }),
            CalibrationMethod::Temperature,
        )
    } else {
        let line = |parameters| line(rows, [effective_hateful, effective_ok], parameters);
        if smaller < MIN_PLATT {
            (line(Parameters::Slope), CalibrationMethod::Temperature)
        } else {
            (line(Parameters::SlopeAndIntercept), CalibrationMethod::Platt)
        }
    };
    let (calibration, method) = match calibration {
        Ok(calibration) => (calibration, method),
        Err(reason) => (Calibration::Identity, CalibrationMethod::Identity { reason }),
    };
    Ok(FittedCalibration {
        calibration,
        method,
        rows: rows.len(),
        effective_hateful,
        effective_ok,
        log_loss_before: log_loss(rows, Calibration::Identity),
        log_loss_after: log_loss(rows, calibration),
    })
}

fn check(rows: &[CalibrationRow]) -> Result<(), CalibrationRowError> {
    for (row, labelled) in rows.iter().enumerate() {
        let error = |what, value, expected| CalibrationRowError {
            row,
            what,
            value,
            expected,
        };
        if !labelled.margin.is_finite() {
            return Err(error("margin", labelled.margin, "a finite number"));
        }
        if !(0.0..=1.0).contains(&labelled.hateful) {
            return Err(error("label", labelled.hateful, "a number from 0 to 1"));
        }
        if !(labelled.weight > 0.0 && labelled.weight.is_finite()) {
            return Err(error("weight", labelled.weight, "a finite number above 0"));
        }
    }
    Ok(())
}

/// Fits a line and returns it if it rises. `hateful` and `ok` are the effective numbers of rows.
fn line(
    rows: &[CalibrationRow],
    [hateful, ok]: [f64; 2],
    parameters: Parameters,
) -> Result<Calibration, UncalibratedReason> {
    let first = rows.first().map_or(0.0, |row| row.margin);
    if rows.iter().all(|row| row.margin == first) {
        return Err(UncalibratedReason::NoSpread);
    }
    // Platt's targets (section 2.2) instead of 1 and 0: they allow for the size of the sample, and keep the slope
    // finite if the classes are perfectly separated.
    let [high, low] = [(hateful + 1.0) / (hateful + 2.0), 1.0 / (ok + 2.0)];
    let targets = rows.iter().map(|row| {
        let target = row.hateful * high + (1.0 - row.hateful) * low;
        [row.margin, target, row.weight]
    });
    let prior = ((hateful + 1.0) / (ok + 1.0)).ln();
    let [slope, intercept] = Regression::new(targets, prior)
        .minimise(parameters)
        .ok_or(UncalibratedReason::NotConverged)?;
    Calibration::platt(slope, intercept).map_err(|_| UncalibratedReason::NotRising { slope })
}

/// Returns the weighted mean log-loss against the labels, or 0 if there are no rows.
fn log_loss(rows: &[CalibrationRow], calibration: Calibration) -> f64 {
    let (slope, intercept) = match calibration {
        Calibration::Identity => (1.0, 0.0),
        Calibration::Platt { slope, intercept } => (slope, intercept),
    };
    let (sum, weights) = rows.iter().fold((0.0, 0.0), |(sum, weights), row| {
        let z = slope * row.margin + intercept;
        let loss = softplus(z) - row.hateful * z;
        (sum + row.weight * loss, weights + row.weight)
    });
    if weights > 0.0 { sum / weights } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn row(margin: f64, hateful: f64) -> CalibrationRow {
        CalibrationRow {
            margin,
            hateful,
            weight: 1.0,
        }
    }

    /// Returns rows whose labels are drawn with probability `sigmoid(slope * margin + intercept)`.
    fn drawn(count: usize, slope: f64, intercept: f64) -> Vec<CalibrationRow> {
        let mut random = StdRng::seed_from_u64(11);
        let one = |_| {
            let margin = random.random_range(-6.0..6.0);
            let probability = 1.0 / (1.0 + (-(slope * margin + intercept)).exp());
            row(margin, f64::from(u8::from(random.random_bool(probability))))
        };
        (0..count).map(one).collect()
    }

    fn fitted_line(fitted: &FittedCalibration) -> (f64, f64) {
        match fitted.calibration {
            Calibration::Platt { slope, intercept } => (slope, intercept),
            Calibration::Identity => panic!("nothing was fitted: {:?}", fitted.method),
        }
    }

    #[test]
    fn fitting_recovers_the_line_that_generated_the_labels() {
        for (slope, intercept) in [(0.4, -1.0), (1.0, 0.0), (2.5, 1.5)] {
            let fitted = fit(&drawn(20_000, slope, intercept)).unwrap();
            let found = fitted_line(&fitted);
            assert!(
                (found.0 - slope).abs() < 0.1 && (found.1 - intercept).abs() < 0.1,
                "{found:?}, expected {slope} {intercept}"
            );
            assert_eq!(fitted.method, CalibrationMethod::Platt);
            assert!(fitted.log_loss_after <= fitted.log_loss_before + 1e-9);
        }
    }

    #[test]
    fn the_number_of_rows_determines_the_method() {
        let check = |hateful: usize, ok: usize, expected: CalibrationMethod| {
            let rows = (0..hateful).map(|index| row(1.0 - (index % 15) as f64 / 10.0, 1.0));
            let rows = rows.chain((0..ok).map(|index| row((index % 15) as f64 / 10.0 - 1.0, 0.0)));
            let fitted = fit(&rows.collect::<Vec<_>>()).unwrap();
            assert_eq!(fitted.method, expected, "{hateful} and {ok}");
        };
        let too_few = |effective| CalibrationMethod::Identity {
            reason: UncalibratedReason::TooFew { effective },
        };
        check(15, 15, CalibrationMethod::Platt);
        check(14, 200, CalibrationMethod::Temperature);
        check(5, 6, CalibrationMethod::Temperature);
        check(4, 200, too_few(4.0));
        check(0, 200, too_few(0.0));
        check(0, 0, too_few(0.0));
    }

    #[test]
    fn one_heavy_row_does_not_count_as_many_rows() {
        let mut rows = drawn(200, 1.0, 0.0);
        let even = fit(&rows).unwrap();
        assert_eq!(
            even.effective_hateful,
            rows.iter().filter(|row| row.hateful == 1.0).count() as f64
        );
        let heavy = rows.iter_mut().find(|row| row.hateful == 1.0).unwrap();
        heavy.weight = 1e6;
        let uneven = fit(&rows).unwrap();
        assert!((uneven.effective_hateful - 1.0).abs() < 1e-3);
        assert!(matches!(
            uneven.method,
            CalibrationMethod::Identity {
                reason: UncalibratedReason::TooFew { .. }
            }
        ));
    }

    #[test]
    fn without_a_rising_line_the_probability_equals_the_score() {
        let reversed: Vec<_> = drawn(500, 1.0, 0.0)
            .into_iter()
            .map(|row| CalibrationRow {
                margin: -row.margin,
                ..row
            })
            .collect();
        let fitted = fit(&reversed).unwrap();
        assert_eq!(fitted.calibration, Calibration::Identity);
        assert!(
            matches!(fitted.method, CalibrationMethod::Identity { reason: UncalibratedReason::NotRising { slope } } if slope < 0.0)
        );
        let flat: Vec<_> = (0..60).map(|index| row(0.7, f64::from(index % 2))).collect();
        let fitted = fit(&flat).unwrap();
        assert_eq!(
            fitted.method,
            CalibrationMethod::Identity {
                reason: UncalibratedReason::NoSpread
            }
        );
        assert_eq!(fitted.log_loss_before, fitted.log_loss_after);
    }

    #[test]
    fn perfectly_separated_classes_give_a_finite_slope() {
        let rows: Vec<_> = (1..=40)
            .flat_map(|index| [row(f64::from(index), 1.0), row(-f64::from(index), 0.0)])
            .collect();
        let (slope, _) = fitted_line(&fit(&rows).unwrap());
        assert!(slope > 0.0 && slope < 10.0, "{slope}");
    }

    #[test]
    fn invalid_rows_are_errors() {
        let check = |row: CalibrationRow, expected: &str| {
            assert_eq!(fit(&[row]).unwrap_err().to_string(), expected);
        };
        check(row(f64::NAN, 1.0), "row 0: margin is NaN, expected a finite number");
        check(row(0.0, 2.0), "row 0: label is 2, expected a number from 0 to 1");
        let weightless = CalibrationRow {
            weight: 0.0,
            ..row(0.0, 1.0)
        };
        check(weightless, "row 0: weight is 0, expected a finite number above 0");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn any_rows_give_a_rising_line_that_does_not_depend_on_the_unit_of_the_weights(
            rows in prop::collection::vec((-1e3f64..1e3, 0f64..=1.0, 0.01f64..100.0), 0..80),
            unit in 0.01f64..100.0,
        ) {
            let rows: Vec<_> = rows
                .into_iter()
                .map(|(margin, hateful, weight)| CalibrationRow { margin, hateful, weight })
                .collect();
            let scaled: Vec<_> = rows.iter().map(|row| CalibrationRow { weight: row.weight * unit, ..*row }).collect();
            let not_converged = CalibrationMethod::Identity { reason: UncalibratedReason::NotConverged };
            let (unscaled, scaled) = (fit(&rows).unwrap(), fit(&scaled).unwrap());
            prop_assert_ne!(unscaled.method, not_converged);
            let parameters = |fitted: &FittedCalibration| match fitted.calibration {
                Calibration::Platt { slope, intercept } => Some([slope, intercept]),
                Calibration::Identity => None,
            };
            if let Some((unscaled, scaled)) = parameters(&unscaled).zip(parameters(&scaled)) {
                prop_assert!(unscaled[0] > 0.0);
                for (value, expected) in scaled.into_iter().zip(unscaled) {
                    prop_assert!((value - expected).abs() <= 1e-6 * (1.0 + expected.abs()));
                }
            }
        }
    }
}
