//! How much of a figure is chance: the percentile bootstrap (Efron and Tibshirani, "An introduction
//! to the bootstrap", 1993, chapter 13).
//!
//! Rows are drawn plainly, not by class: how many of them are hateful is chance too, and the area
//! under the precision-recall curve depends on it. The same seed gives the same intervals.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::figures::{Estimate, Figures, Prepared};

/// How intervals are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// Samples drawn, with replacement, of as many rows as there are; none gives no intervals.
    pub resamples: usize,
    /// Of the draws.
    pub seed: u64,
}

/// Outside of it lie 2.5 % of the resamples on either side.
const INTERVAL: [f64; 2] = [0.025, 0.975];

/// With fewer resamples on which a figure is defined, it has no interval: what is left would be a
/// selection.
const DEFINED_SHARE: f64 = 0.95;

/// Calls `each` with every resample: the weights, each multiplied by how often its row was drawn.
pub fn resample(weights: &[f64], bootstrap: Bootstrap, mut each: impl FnMut(&[f64])) {
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

/// The value below which a share of `sorted` lies, interpolated linearly between two values (NumPy's
/// default); nothing for no values.
pub fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let at = share.clamp(0.0, 1.0) * last as f64;
    let (below, above) = (at.floor() as usize, at.ceil() as usize);
    Some(sorted[below] + (sorted[above] - sorted[below]) * at.fract())
}

pub(super) fn estimate(prepared: &Prepared, weights: &[f64], bootstrap: Bootstrap) -> Figures<Estimate> {
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
    fn quantiles_interpolate() {
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
        resample(&[], bootstrap, |_| panic!("nothing to draw from"));
    }

    /// The interval of a share is close to what the normal distribution says of it.
    #[test]
    fn the_interval_of_a_share_is_about_right_and_repeats() {
        let rows: Vec<_> = (0..400)
            .map(|index| row(if index % 5 == 0 { -1.0 } else { 1.0 }, true, 1.0))
            .collect();
        let prepared = Prepared::new(&rows, 0.5);
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
        let prepared = Prepared::new(&[row(1.0, true, 1.0), row(-1.0, false, 1.0)], 0.5);
        let none = estimate(&prepared, &[1.0; 2], Bootstrap { resamples: 0, seed: 1 });
        assert_eq!((none.f1.value, none.f1.interval), (Some(1.0), None));
    }
}
