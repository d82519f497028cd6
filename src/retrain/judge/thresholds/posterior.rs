//! Estimates a share, such as a precision, from few rows.
//!
//! The calibration already says what the share should be: the precision above a threshold is the mean probability of
//! the rows there, and the recall is the part of all probability that is there. This expectation is the mean of a beta
//! prior with the weight of [`PRIOR_ROWS`] rows, which the labels update. With few rows, the estimate stays close to
//! the expectation, however the rows happened to fall; with many, it is the observed share. It is the shrinkage
//! estimator of the beta-binomial model (Gelman et al., "Bayesian Data Analysis", 2013, sections 2.4 and 5.3).

use statrs::function::beta::beta_reg;

/// Number of rows that the calibration's expectation counts as: as many as are needed to observe one error at a
/// precision of 0.95.
pub const PRIOR_ROWS: f64 = 20.0;

/// The quantiles that bound an interval. It contains the share with a probability of 90 %, so each end is a one-sided
/// 95 % bound.
const INTERVAL: [f64; 2] = [0.05, 0.95];

/// A beta distribution of a share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Posterior {
    inside: f64,
    outside: f64,
}

impl Posterior {
    /// Updates the expected share with a share that was observed in an effective number of rows.
    pub(super) fn new(observed: f64, rows: f64, expected: f64) -> Self {
        let inside = rows * observed + PRIOR_ROWS * expected;
        Self {
            inside,
            outside: rows + PRIOR_ROWS - inside,
        }
    }

    pub(super) fn mean(self) -> f64 {
        self.inside / (self.inside + self.outside)
    }

    /// Returns the interval that contains the share with a probability of 90 %.
    pub(super) fn interval(self) -> [f64; 2] {
        INTERVAL.map(|share| self.quantile(share))
    }

    /// Halves the interval from 0 to 1 until it is smaller than rounding errors.
    fn quantile(self, share: f64) -> f64 {
        // The distribution of a share that is certain is a point, for which the function is not defined.
        if self.inside <= 0.0 || self.outside <= 0.0 {
            return if self.inside <= 0.0 { 0.0 } else { 1.0 };
        }
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..52 {
            let middle = 0.5 * (low + high);
            if beta_reg(self.inside, self.outside, middle) < share {
                low = middle;
            } else {
                high = middle;
            }
        }
        0.5 * (low + high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_leave_the_expectation_and_many_replace_it() {
        let mean = |observed, rows| Posterior::new(observed, rows, 0.9).mean();
        assert!((mean(1.0, 0.0) - 0.9).abs() < 1e-12);
        assert!((mean(0.5, 20.0) - 0.7).abs() < 1e-12);
        assert!((mean(0.5, 1e6) - 0.5).abs() < 1e-4);
    }

    /// Of a beta distribution with parameters 1 and 1 the quantiles are the shares themselves; with 20 and 1 they are
    /// the twentieth roots.
    #[test]
    fn quantiles_of_known_distributions_are_exact() {
        let uniform = Posterior {
            inside: 1.0,
            outside: 1.0,
        };
        let [low, high] = uniform.interval();
        assert!((low - 0.05).abs() < 1e-9 && (high - 0.95).abs() < 1e-9, "{low} {high}");
        let steep = Posterior {
            inside: 20.0,
            outside: 1.0,
        };
        let [low, high] = steep.interval();
        assert!(
            (low - 0.05f64.powf(0.05)).abs() < 1e-9 && (high - 0.95f64.powf(0.05)).abs() < 1e-9,
            "{low} {high}"
        );
    }

    #[test]
    fn a_share_that_is_certain_has_an_interval() {
        assert_eq!(Posterior::new(1.0, 30.0, 1.0).interval(), [1.0, 1.0]);
        assert_eq!(Posterior::new(0.0, 30.0, 0.0).interval(), [0.0, 0.0]);
    }
}
