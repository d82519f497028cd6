//! Intervals by the percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).
//!
//! Rows are drawn without stratification by class: the number of hateful rows is subject to chance as well, and the
//! area under the precision-recall curve depends on it. The same seed gives the same intervals.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::figures::{Estimate, Figures, PreparedRows};

/// Settings of the bootstrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// Number of resamples. Each draws as many rows as there are, with replacement. With 0, there are no intervals.
    pub resamples: usize,
    /// Seed of the random draws.
    pub seed: u64,
}

/// The quantiles of the resamples that bound the two-sided 95 % interval.
const INTERVAL: [f64; 2] = [0.025, 0.975];

/// Minimum share of resamples on which a figure must be defined to have an interval. Below it, the resamples that are
/// left would be a biased selection.
pub(crate) const DEFINED_SHARE: f64 = 0.95;

/// Calls `each` with the weights of every resample: each row's weight times the number of times that the row was drawn.
pub(crate) fn resample(weights: &[f64], bootstrap: Bootstrap, mut each: impl FnMut(&[f64])) {
    let rows = weights.len() as u32;
    if rows == 0 {
        return;
    }
    let mut random = StdRng::seed_from_u64(bootstrap.seed);
    let mut drawn = vec![0.0; weights.len()];
    for _ in 0..bootstrap.resamples {
        drawn.fill(0.0);
        for _ in 0..rows {
            let row = random.random_range(0..rows) as usize;
            drawn[row] += weights[row];
        }
        each(&drawn);
    }
}

/// Returns the quantile of sorted values at `share`, from 0 to 1, or `None` if there are no values.
///
/// It is interpolated linearly between two values, which is NumPy's default.
pub fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let at = share.clamp(0.0, 1.0) * last as f64;
    let (below, above) = (at.floor() as usize, at.ceil() as usize);
    Some(sorted[below] + (sorted[above] - sorted[below]) * at.fract())
}

/// Computes every figure on all rows, and its interval from resamples.
pub(super) fn estimate(prepared: &PreparedRows, weights: &[f64], bootstrap: Bootstrap) -> Figures<Estimate> {
    let figures = prepared.figures(weights);
    let mut samples: Vec<Vec<f64>> = figures.iter().map(|_| Vec::new()).collect();
    resample(weights, bootstrap, |drawn| {
        for (values, (_, figure)) in samples.iter_mut().zip(prepared.figures(drawn).iter()) {
            values.extend(figure);
        }
    });
    let mut samples = samples.into_iter();
    figures.map(|value| {
        let values = samples.next().unwrap_or_default();
        let enough = values.len() as f64 >= DEFINED_SHARE * bootstrap.resamples as f64;
        let interval = value.and_then(|_| interval(values)).filter(|_| enough);
        Estimate { value, interval }
    })
}

fn interval(mut values: Vec<f64>) -> Option<[f64; 2]> {
    values.sort_by(f64::total_cmp);
    Some([quantile(&values, INTERVAL[0])?, quantile(&values, INTERVAL[1])?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::retrain::judge::evaluation::tests::row;

    #[test]
    fn quantiles_are_interpolated() {
        for (sorted, share, expected) in [
            (&[][..], 0.5, None),
            (&[3.0], 0.975, Some(3.0)),
            (&[1.0, 2.0], 0.25, Some(1.25)),
            (&[1.0, 2.0, 4.0], 1.0, Some(4.0)),
            (&[1.0, 2.0, 4.0], 0.75, Some(3.0)),
        ] {
            assert_eq!(quantile(sorted, share), expected, "{sorted:?} at {share}");
        }
    }

    #[test]
    fn a_resample_draws_as_many_rows_as_there_are() {
        let mut sums = Vec::new();
        let bootstrap = Bootstrap { resamples: 50, seed: 3 };
        resample(&[1.0; 40], bootstrap, |drawn| sums.push(drawn.iter().sum::<f64>()));
        assert_eq!(sums, vec![40.0; 50]);
        resample(&[], bootstrap, |_| panic!("a resample of no rows"));
    }

    #[test]
    fn the_interval_of_a_share_is_reproducible_and_close_to_the_normal_approximation() {
        let rows: Vec<_> = (0..400)
            .map(|index| row(if index % 5 == 0 { -1.0 } else { 1.0 }, true, 1.0))
            .collect();
        let prepared = PreparedRows::new(&rows, 0.5);
        let bootstrap = Bootstrap {
            resamples: 2000,
            seed: 5,
        };
        let found = estimate(&prepared, &[1.0; 400], bootstrap);
        assert_eq!(found, estimate(&prepared, &[1.0; 400], bootstrap));
        let [low, high] = found.recall.interval.unwrap();
        let half = 1.96 * (0.8f64 * 0.2 / 400.0).sqrt();
        assert!(
            (low - (0.8 - half)).abs() < 0.005 && (high - (0.8 + half)).abs() < 0.005,
            "{low} {high}"
        );
        assert_eq!(found.roc_auc.interval, None);
    }

    #[test]
    fn without_resamples_there_are_no_intervals() {
        let prepared = PreparedRows::new(&[row(1.0, true, 1.0), row(-1.0, false, 1.0)], 0.5);
        let none = estimate(&prepared, &[1.0; 2], Bootstrap { resamples: 0, seed: 1 });
        assert_eq!((none.f1.value, none.f1.interval), (Some(1.0), None));
    }
}
