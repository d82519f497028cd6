//! Precision-recall areas in the binormal model, in which the margins of the hateful and of the other rows are normal
//! with equal variance (Brodersen et al., "The Binormal Assumption on Precision-Recall Curves", 2010).
//!
//! The model is used only to express a difference of smoothed areas in units of PR-AUC. It determines neither the sign
//! of a difference nor whether it is significant.

use statrs::function::erf::erfc;

use crate::retrain::judge::evaluation::SMOOTHING;

/// The largest distance between the classes that is considered, in standard deviations. PR-AUC is then above 0.999.
const MAX_DISTANCE: f64 = 6.0;

/// Number of steps of the integral over the margins of the hateful class, and its bounds in standard deviations. With
/// these, the areas are exact to 1e-6.
const STEPS: u32 = 600;
const BOUND: f64 = 6.0;

/// Returns by what factor a small difference in PR-AUC exceeds the difference in the smoothed area, for an adapter with
/// the PR-AUC `pr_auc` on rows of which a share of `base_rate` is hateful.
pub(super) fn smoothing_factor(pr_auc: f64, base_rate: f64) -> f64 {
    let (mut low, mut high) = (0.0, MAX_DISTANCE);
    // PR-AUC rises with the distance. Forty halvings find it to rounding precision.
    for _ in 0..40 {
        let middle = 0.5 * (low + high);
        if areas(middle, base_rate)[0] < pr_auc {
            low = middle;
        } else {
            high = middle;
        }
    }
    let [before, after] = [low, low + 0.1].map(|distance| areas(distance, base_rate));
    (after[0] - before[0]) / (after[1] - before[1])
}

/// Returns PR-AUC and the smoothed area for classes whose means are `distance` standard deviations apart.
fn areas(distance: f64, base_rate: f64) -> [f64; 2] {
    let width = 2.0 * BOUND / f64::from(STEPS);
    let (mut pr_auc, mut smoothed, mut total) = (0.0, 0.0, 0.0);
    for step in 0..STEPS {
        let z = -BOUND + (f64::from(step) + 0.5) * width;
        let density = (-0.5 * z * z).exp();
        let hateful = base_rate * normal_cdf(-z);
        let above = hateful + (1.0 - base_rate) * normal_cdf(-z - distance);
        pr_auc += density * hateful / above;
        smoothed += density * (hateful + SMOOTHING * base_rate) / (above + SMOOTHING);
        total += density;
    }
    [pr_auc / total, smoothed / total]
}

/// Returns the standard normal distribution function.
pub(super) fn normal_cdf(x: f64) -> f64 {
    0.5 * erfc(-x * std::f64::consts::FRAC_1_SQRT_2)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected areas come from a trapezoidal integral over 20,000 thresholds in NumPy.
    #[test]
    fn areas_equal_those_of_another_integral() {
        for (distance, base_rate, expected) in [(0.0, 0.3, 0.3), (1.2, 0.5, 0.797_227), (1.5, 0.2, 0.638_739)] {
            let [pr_auc, _] = areas(distance, base_rate);
            assert!((pr_auc - expected).abs() < 1e-5, "{distance} {base_rate}: {pr_auc}");
        }
    }

    #[test]
    fn the_factor_converts_a_difference_of_smoothed_areas() {
        for (distance, base_rate) in [(0.5, 0.5), (1.2, 0.43), (1.6, 0.1), (2.5, 0.3)] {
            let [before, after] = [distance, distance + 0.1].map(|distance| areas(distance, base_rate));
            let factor = smoothing_factor(before[0], base_rate);
            let (found, expected) = (factor * (after[1] - before[1]), after[0] - before[0]);
            assert!(
                (found / expected - 1.0).abs() < 1e-6,
                "{distance} {base_rate}: {found}, expected {expected}"
            );
            assert!(factor > 1.0 && factor < 4.0, "{factor}");
        }
    }

    #[test]
    fn areas_that_no_distance_gives_have_a_finite_factor() {
        for pr_auc in [0.0, 0.1, 1.0] {
            let factor = smoothing_factor(pr_auc, 0.3);
            assert!(factor.is_finite() && factor > 0.0, "{pr_auc}: {factor}");
        }
    }
}
