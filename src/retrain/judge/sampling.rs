//! Statistics of weighted samples: the effective number of rows, and a lower bound for a share.

/// The 95 % quantile of the standard normal distribution, for a one-sided bound.
const Z: f64 = 1.644_853_626_951_472_7;

/// Returns the effective number of rows of a class, `(sum w)^2 / sum w^2` (Kish, "Survey Sampling", 1965).
///
/// `rows` are pairs of a row's weight and the probability, from 0 to 1, that the row belongs to the class.
pub(super) fn effective_rows(rows: impl Iterator<Item = (f64, f64)>) -> f64 {
    let (sum, squares) = rows.fold((0.0, 0.0), |(sum, squares), (weight, share)| {
        (sum + weight * share, squares + weight * weight * share)
    });
    if squares > 0.0 { sum * sum / squares } else { 0.0 }
}

/// Returns the one-sided 95 % lower confidence bound of a share that was observed in `rows` rows (Wilson, "Probable
/// Inference, the Law of Succession, and Statistical Inference", 1927).
pub(super) fn wilson_lower(share: f64, rows: f64) -> f64 {
    let z2 = Z * Z / rows;
    let half = Z * (share * (1.0 - share) / rows + z2 / (4.0 * rows)).sqrt();
    ((share + z2 / 2.0 - half) / (1.0 + z2)).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_weights_count_as_the_number_of_rows() {
        let rows = |weights: &[f64]| effective_rows(weights.iter().map(|&weight| (weight, 1.0)));
        assert_eq!(rows(&[]), 0.0);
        assert_eq!(rows(&[3.0; 8]), 8.0);
        assert!((rows(&[1.0, 1.0, 1e9]) - 1.0).abs() < 1e-6);
        let halves = effective_rows([(1.0, 0.5); 8].into_iter());
        assert_eq!(halves, 4.0);
    }

    /// The expected values come from an independent implementation of the formula.
    #[test]
    fn the_wilson_bound_equals_reference_values() {
        for (share, rows, expected) in [
            (1.0, 50.0, 0.948_666_814_213_729_8),
            (0.9, 100.0, 0.839_644_490_388_907_8),
            (1.0, 20.0, 0.880_842_162_639_035_4),
            (0.0, 10.0, 0.0),
        ] {
            let found = wilson_lower(share, rows);
            assert!((found - expected).abs() < 1e-12, "{share} in {rows} rows: {found}");
        }
    }
}
