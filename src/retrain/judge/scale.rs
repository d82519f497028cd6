//! Puts the margins of adapters that were trained on different rows on one scale, without looking at labels.
//!
//! Adapters of the same kind order comments similarly, but the location and the spread of their margins differ: in a
//! measurement with the bundled model, by half a standard deviation. Each adapter's held-out rows are a random part of
//! the same labelled rows, so their margins are standardised by their mean and standard deviation.

/// The mean and the standard deviation of an adapter's margins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scale {
    mean: f64,
    deviation: f64,
}

impl Scale {
    /// Returns the scale of the margins of held-out rows. The deviation is 1 if it cannot be estimated.
    pub(crate) fn of(margins: impl Iterator<Item = f64> + Clone) -> Self {
        let count = margins.clone().count() as f64;
        let mean = margins.clone().sum::<f64>() / count.max(1.0);
        let squares: f64 = margins.map(|margin| (margin - mean) * (margin - mean)).sum();
        let deviation = (squares / (count - 1.0).max(1.0)).sqrt();
        Self {
            mean,
            deviation: if deviation > 0.0 { deviation } else { 1.0 },
        }
    }

    /// Returns the margin as a number of standard deviations above the mean.
    pub(crate) fn standardise(self, margin: f64) -> f64 {
        (margin - self.mean) / self.deviation
    }

    /// Returns the margin on this scale that is a number of standard deviations above the mean.
    pub(crate) fn margin(self, standard: f64) -> f64 {
        self.mean + self.deviation * standard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins_are_moved_from_one_scale_to_another() {
        let one = Scale::of([1.0, 2.0, 3.0].into_iter());
        let other = Scale::of([10.0, 30.0, 50.0].into_iter());
        for (margin, expected) in [(2.0, 30.0), (3.0, 50.0), (0.0, -10.0)] {
            assert_eq!(other.margin(one.standardise(margin)), expected);
        }
    }

    #[test]
    fn equal_margins_and_no_margins_have_a_scale() {
        for margins in [vec![], vec![2.0], vec![2.0; 5]] {
            let scale = Scale::of(margins.iter().copied());
            assert_eq!(scale.margin(scale.standardise(7.0)), 7.0, "{margins:?}");
        }
    }
}
