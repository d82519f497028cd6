//! What difference in PR-AUC the judged rows can show, whatever the verdict is.
//!
//! The power depends only on how much the difference varies between resamples, not on its size, so it says before the
//! comparison what a true difference has to be. The difference is taken as normally distributed around the true one.

use serde::{Deserialize, Serialize};

use super::binormal::normal_cdf;
use super::rank::Requirement;

/// The probability of promotion at the smallest difference that counts as detectable: the usual choice (Cohen,
/// "Statistical Power Analysis for the Behavioral Sciences", 1988).
pub const POWER: f64 = 0.8;

/// The 80 % quantile of the standard normal distribution.
const POWER_Z: f64 = 0.841_621_233_572_914_2;

/// The difference in PR-AUC whose probability of promotion is given: a gain that a few hundred new labels bring.
pub const REFERENCE_DIFFERENCE: f64 = 0.03;

/// The differences in PR-AUC that the judged rows can show.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Power {
    /// Standard error of the smoothed difference, from the paired bootstrap.
    pub standard_error: f64,
    /// The smallest true difference with which a challenger would be promoted with a probability of [`POWER`].
    pub detectable: f64,
    /// The probability that a challenger with a true difference of [`REFERENCE_DIFFERENCE`] would be promoted.
    pub at_reference: f64,
}

impl Power {
    pub(super) fn new(standard_error: f64, requirement: Requirement) -> Self {
        let excess = REFERENCE_DIFFERENCE - requirement.difference;
        Self {
            standard_error,
            detectable: requirement.difference + (requirement.z + POWER_Z) * standard_error,
            // Without variation, any difference above the required one passes.
            at_reference: if standard_error > 0.0 {
                normal_cdf(excess / standard_error - requirement.z)
            } else {
                1.0
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::retrain::judge::gate::{TrainingRows, rank};

    fn requirement(challenger: usize) -> Requirement {
        let rows = TrainingRows {
            champion: 100,
            challenger,
        };
        rank::Requirement::new(rows, 50)
    }

    /// The expected numbers were computed by hand: 0.02 times (1.6449 + 0.8416), and so on.
    #[test]
    fn the_detectable_difference_and_the_power_follow_from_the_standard_error() {
        let same = Power::new(0.02, requirement(100));
        assert!((same.detectable - 0.049_729).abs() < 1e-5, "{same:?}");
        assert!((same.at_reference - 0.442_417).abs() < 1e-3, "{same:?}");
        let grown = Power::new(0.02, requirement(150));
        assert!((grown.detectable - 0.046_032).abs() < 1e-5, "{grown:?}");
        assert!((grown.at_reference - 0.515_95).abs() < 1e-3, "{grown:?}");
        assert_eq!(Power::new(0.0, requirement(100)).at_reference, 1.0);
    }
}
