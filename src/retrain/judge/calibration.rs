//! Fits the line that turns margins into probabilities.
//!
//! Platt, "Probabilistic outputs for support vector machines", 1999, with the targets of its section
//! 2.2 and Newton's method as in Lin, Lin and Weng, "A note on Platt's probabilistic outputs", 2007.
//! Rows count by their weight, one over the probability of having been chosen.
//!
//! The rule: with at least [`MIN_PLATT`] effective rows of each class slope and intercept are fitted
//! (Platt); with at least [`MIN_TEMPERATURE`] of each the slope alone (temperature); with fewer, or
//! where the fit gives no rising line, the model's own probability stays and the reason is told.

use serde::{Deserialize, Serialize};

use super::logistic::{MAX_STEPS, Parameters, Regression, softplus};
use super::sampling::effective_rows;
use crate::decide::Calibration;

/// The intercept's standard error is at least `sqrt(1/n + 1/m)` for classes of n and m rows: 0.37
/// at 15 each, already a factor of 1.4 in the odds. Fewer rows than that do not earn a second
/// parameter.
pub const MIN_PLATT: f64 = 15.0;

/// One parameter, held back by the targets; with fewer rows they decide more than the data does.
pub const MIN_TEMPERATURE: f64 = 5.0;

/// One row to calibrate on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CalibrationRow {
    /// As scored, with the windows and normaliser of serving.
    pub margin: f64,
    /// Probability that it is hateful, 0 to 1.
    pub hateful: f64,
    /// How many rows of the traffic it stands for.
    pub weight: f64,
}

/// A fitted calibration and what it rests on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fitted {
    /// To be served.
    pub calibration: Calibration,
    /// Which kind it is, or why there is none.
    pub method: Method,
    /// Rows it was fitted on.
    pub rows: usize,
    /// Effective number of hateful rows.
    pub effective_hateful: f64,
    /// Effective number of the others.
    pub effective_ok: f64,
    /// Mean log-loss of the model's own probability on these rows.
    pub log_loss_before: f64,
    /// Mean log-loss of the calibrated one on the same rows.
    pub log_loss_after: f64,
}

/// How a calibration came about.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Method {
    /// Slope and intercept.
    Platt,
    /// Slope alone.
    Temperature,
    /// None: the model's own probability stays.
    Identity {
        /// Why.
        reason: Reason,
    },
}

/// Why nothing was fitted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Reason {
    /// Too few rows of a class.
    #[error("the smaller class has {effective:.1} effective rows, expected at least {MIN_TEMPERATURE}")]
    TooFew {
        /// Effective rows of the smaller class.
        effective: f64,
    },
    /// A larger margin would mean a smaller probability, or none other.
    #[error("the fitted slope is {slope:.3}, expected one above 0")]
    NotRising {
        /// The slope found.
        slope: f64,
    },
    /// All margins are equal.
    #[error("all margins are equal, expected some spread")]
    NoSpread,
    /// The method did not come to an end.
    #[error("the fit did not converge in {MAX_STEPS} steps")]
    NotConverged,
}

/// A row that nothing can be fitted on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("row {row}: {what} is {value}, expected {expected}")]
pub struct CalibrationRowError {
    row: usize,
    what: &'static str,
    value: f64,
    expected: &'static str,
}

/// Fits a calibration by the rule above.
///
/// # Errors
/// [`CalibrationRowError`]: a margin, label or weight outside of its range.
pub fn fit(rows: &[CalibrationRow]) -> Result<Fitted, CalibrationRowError> {
    check(rows)?;
    let effective_hateful = effective_rows(rows.iter().map(|row| (row.weight, row.hateful)));
    let effective_ok = effective_rows(rows.iter().map(|row| (row.weight, 1.0 - row.hateful)));
    let smaller = effective_hateful.min(effective_ok);
    let (calibration, method) = if smaller < MIN_TEMPERATURE {
        (Err(Reason::TooFew { effective: smaller }), Method::Temperature)
    } else {
        let line = |parameters| line(rows, [effective_hateful, effective_ok], parameters);
        if smaller < MIN_PLATT {
            (line(Parameters::Slope), Method::Temperature)
        } else {
            (line(Parameters::SlopeAndIntercept), Method::Platt)
        }
    };
    let (calibration, method) = match calibration {
        Ok(calibration) => (calibration, method),
        Err(reason) => (Calibration::Identity, Method::Identity { reason }),
    };
    Ok(Fitted {
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
    for (row, one) in rows.iter().enumerate() {
        let fault = |what, value, expected| CalibrationRowError {
            row,
            what,
            value,
            expected,
        };
        if !one.margin.is_finite() {
            return Err(fault("margin", one.margin, "a finite number"));
        }
        if !(0.0..=1.0).contains(&one.hateful) {
            return Err(fault("label", one.hateful, "a number from 0 to 1"));
        }
        if !(one.weight > 0.0 && one.weight.is_finite()) {
            return Err(fault("weight", one.weight, "a finite number above 0"));
        }
    }
    Ok(())
}

/// The fitted line, if it rises; `hateful` and `ok` are effective numbers of rows.
fn line(rows: &[CalibrationRow], [hateful, ok]: [f64; 2], parameters: Parameters) -> Result<Calibration, Reason> {
    let first = rows.first().map_or(0.0, |row| row.margin);
    if rows.iter().all(|row| row.margin == first) {
        return Err(Reason::NoSpread);
    }
    // Not 1 and 0: the most that so many rows can tell (Platt, section 2.2). They also keep the slope
    // finite when the classes are perfectly separated.
    let [high, low] = [(hateful + 1.0) / (hateful + 2.0), 1.0 / (ok + 2.0)];
    let targets = rows.iter().map(|row| {
        let target = row.hateful * high + (1.0 - row.hateful) * low;
        [row.margin, target, row.weight]
    });
    let prior = ((hateful + 1.0) / (ok + 1.0)).ln();
    let [slope, intercept] = Regression::new(targets, prior)
        .minimise(parameters)
        .ok_or(Reason::NotConverged)?;
    Calibration::platt(slope, intercept).map_err(|_| Reason::NotRising { slope })
}

/// Weighted mean log-loss against the labels as they are; 0 for no rows.
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

    /// Labels drawn with probability `sigmoid(slope * margin + intercept)`.
    fn drawn(count: usize, slope: f64, intercept: f64) -> Vec<CalibrationRow> {
        let mut random = StdRng::seed_from_u64(11);
        let one = |_| {
            let margin = random.random_range(-6.0..6.0);
            let probability = 1.0 / (1.0 + (-(slope * margin + intercept)).exp());
            row(margin, f64::from(u8::from(random.random_bool(probability))))
        };
        (0..count).map(one).collect()
    }

    fn fitted_line(fitted: &Fitted) -> (f64, f64) {
        match fitted.calibration {
            Calibration::Platt { slope, intercept } => (slope, intercept),
            Calibration::Identity => panic!("nothing was fitted: {:?}", fitted.method),
        }
    }

    #[test]
    fn the_line_that_made_the_labels_is_found() {
        for (slope, intercept) in [(0.4, -1.0), (1.0, 0.0), (2.5, 1.5)] {
            let fitted = fit(&drawn(20_000, slope, intercept)).unwrap();
            let found = fitted_line(&fitted);
            assert!(
                (found.0 - slope).abs() < 0.1 && (found.1 - intercept).abs() < 0.1,
                "{found:?}, expected {slope} {intercept}"
            );
            assert_eq!(fitted.method, Method::Platt);
            assert!(fitted.log_loss_after <= fitted.log_loss_before + 1e-9);
        }
    }

    #[test]
    fn the_number_of_rows_chooses_the_method() {
        let check = |hateful: usize, ok: usize, expected: Method| {
            let rows = (0..hateful).map(|index| row(1.0 - (index % 15) as f64 / 10.0, 1.0));
            let rows = rows.chain((0..ok).map(|index| row((index % 15) as f64 / 10.0 - 1.0, 0.0)));
            let fitted = fit(&rows.collect::<Vec<_>>()).unwrap();
            assert_eq!(fitted.method, expected, "{hateful} and {ok}");
        };
        let too_few = |effective| Method::Identity {
            reason: Reason::TooFew { effective },
        };
        check(15, 15, Method::Platt);
        check(14, 200, Method::Temperature);
        check(5, 6, Method::Temperature);
        check(4, 200, too_few(4.0));
        check(0, 200, too_few(0.0));
        check(0, 0, too_few(0.0));
    }

    #[test]
    fn weights_count_by_what_they_are_worth() {
        let mut rows = drawn(200, 1.0, 0.0);
        let even = fit(&rows).unwrap();
        assert_eq!(
            even.effective_hateful,
            rows.iter().filter(|row| row.hateful == 1.0).count() as f64
        );
        // One heavy row is worth little more than itself.
        let heavy = rows.iter_mut().find(|row| row.hateful == 1.0).unwrap();
        heavy.weight = 1e6;
        let lopsided = fit(&rows).unwrap();
        assert!((lopsided.effective_hateful - 1.0).abs() < 1e-3);
        assert!(matches!(
            lopsided.method,
            Method::Identity {
                reason: Reason::TooFew { .. }
            }
        ));
    }

    #[test]
    fn no_rising_line_leaves_the_models_own_probability() {
        let turned: Vec<_> = drawn(500, 1.0, 0.0)
            .into_iter()
            .map(|row| CalibrationRow {
                margin: -row.margin,
                ..row
            })
            .collect();
        let fitted = fit(&turned).unwrap();
        assert_eq!(fitted.calibration, Calibration::Identity);
        assert!(matches!(fitted.method, Method::Identity { reason: Reason::NotRising { slope } } if slope < 0.0));
        let flat: Vec<_> = (0..60).map(|index| row(0.7, f64::from(index % 2))).collect();
        let fitted = fit(&flat).unwrap();
        assert_eq!(
            fitted.method,
            Method::Identity {
                reason: Reason::NoSpread
            }
        );
        assert_eq!(fitted.log_loss_before, fitted.log_loss_after);
    }

    #[test]
    fn separated_classes_keep_a_finite_slope() {
        let rows: Vec<_> = (1..=40)
            .flat_map(|index| [row(f64::from(index), 1.0), row(-f64::from(index), 0.0)])
            .collect();
        let (slope, _) = fitted_line(&fit(&rows).unwrap());
        assert!(slope > 0.0 && slope < 10.0, "{slope}");
    }

    #[test]
    fn what_nothing_can_be_fitted_on_is_named() {
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

        /// Whatever the rows, the fit ends, the slope rises, and the unit of the weights is nothing.
        #[test]
        fn any_rows_give_a_calibration(
            rows in prop::collection::vec((-1e3f64..1e3, 0f64..=1.0, 0.01f64..100.0), 0..80),
            unit in 0.01f64..100.0,
        ) {
            let rows: Vec<_> = rows
                .into_iter()
                .map(|(margin, hateful, weight)| CalibrationRow { margin, hateful, weight })
                .collect();
            let scaled: Vec<_> = rows.iter().map(|row| CalibrationRow { weight: row.weight * unit, ..*row }).collect();
            let not_converged = Method::Identity { reason: Reason::NotConverged };
            let (one, other) = (fit(&rows).unwrap(), fit(&scaled).unwrap());
            prop_assert_ne!(one.method, not_converged);
            if let (Calibration::Platt { slope, intercept }, Calibration::Platt { slope: s, intercept: i }) = (one.calibration, other.calibration) {
                prop_assert!(slope > 0.0);
                prop_assert!((slope - s).abs() <= 1e-6 * (1.0 + slope.abs()) && (intercept - i).abs() <= 1e-6 * (1.0 + intercept.abs()));
            }
        }
    }
}
