//! What a weighted sample is worth, and how sure a share found in it is.

/// Quantile of the normal distribution for a one-sided bound of 95 %.
const Z: f64 = 1.644_853_626_951_472_7;

/// Effective number of rows, `(sum w)^2 / sum w^2` (Kish, "Survey sampling", 1965), of a class to which
/// each row of a weight belongs with a share between 0 and 1.
pub(super) fn effective_rows(rows: impl Iterator<Item = (f64, f64)>) -> f64 {
    let (sum, squares) = rows.fold((0.0, 0.0), |(sum, squares), (weight, share)| {
        (sum + weight * share, squares + weight * weight * share)
    });
    if squares > 0.0 { sum * sum / squares } else { 0.0 }
}

/// One-sided lower bound of 95 % for a share found in so many rows (Wilson, 1927).
pub(super) fn wilson_lower(share: f64, rows: f64) -> f64 {
    let z2 = Z * Z / rows;
    let half = Z * (share * (1.0 - share) / rows + z2 / (4.0 * rows)).sqrt();
    ((share + z2 / 2.0 - half) / (1.0 + z2)).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_weights_are_worth_their_number() {
        let rows = |weights: &[f64]| effective_rows(weights.iter().map(|&weight| (weight, 1.0)));
        assert_eq!(rows(&[]), 0.0);
        assert_eq!(rows(&[3.0; 8]), 8.0);
        assert!((rows(&[1.0, 1.0, 1e9]) - 1.0).abs() < 1e-6);
        let halves = effective_rows([(1.0, 0.5); 8].into_iter());
        assert_eq!(halves, 4.0);
    }

    /// Against the formula in another program.
    #[test]
    fn wilsons_bound() {
        for (share, rows, expected) in [
            (1.0, 50.0, 0.948_666_814_213_729_8),
            (0.9, 100.0, 0.839_644_490_388_907_8),
            (1.0, 20.0, 0.880_842_162_639_035_4),
            (0.0, 10.0, 0.0),
        ] {
            let found = wilson_lower(share, rows);
            assert!((found - expected).abs() < 1e-12, "{share} of {rows}: {found}");
        }
    }
}
