//! Turns margins into calibrated probabilities.
//!
//! For every margin, the probability is in `0..=1`. It never falls as the margin rises, and is 0.5 for NaN.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::hash::content_hash;

/// The function from a margin to the probability that the thresholds are compared with.
///
/// In JSON it is `"identity"` or `{"platt":{"slope":1.5,"intercept":-0.25}}`. Reading it back checks the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", try_from = "Unchecked")]
pub enum Calibration {
    /// No calibration: the probability is the score.
    Identity,
    /// The sigmoid of a linear function of the margin (Platt, 1999). Temperature scaling is the case of intercept 0.
    /// Use [`Calibration::platt`] to create it.
    Platt {
        /// The slope, which is finite and above 0, so that the order of comments does not change.
        slope: f64,
        /// The intercept, which is finite.
        intercept: f64,
    },
}

/// The reason why a slope and an intercept are not a valid calibration.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum CalibrationError {
    /// The slope is not finite, or not above 0, which would reverse or lose the order of comments.
    #[error("the calibration's slope is {0}, expected a finite number above 0")]
    Slope(f64),
    /// The intercept is not finite.
    #[error("the calibration's intercept is {0}, expected a finite number")]
    Intercept(f64),
}

impl Calibration {
    /// Creates the calibration `sigmoid(slope * margin + intercept)`.
    ///
    /// # Errors
    /// Returns an error if either number is not finite, or if the slope is not above 0.
    pub fn platt(slope: f64, intercept: f64) -> Result<Self, CalibrationError> {
        if !(slope.is_finite() && slope > 0.0) {
            return Err(CalibrationError::Slope(slope));
        }
        if !intercept.is_finite() {
            return Err(CalibrationError::Intercept(intercept));
        }
        // Minus zero becomes zero, so that equal calibrations have equal hashes.
        let intercept = if intercept == 0.0 { 0.0 } else { intercept };
        Ok(Self::Platt { slope, intercept })
    }

    /// Returns the calibrated probability of a margin. A larger margin never has a smaller probability.
    pub fn probability(self, margin: f32) -> f64 {
        match self {
            Self::Identity => sigmoid(f64::from(margin)),
            Self::Platt { slope, intercept } => sigmoid(slope * f64::from(margin) + intercept),
        }
    }

    /// Returns the name for [`ModelIdentity::calibration`](crate::message::ModelIdentity::calibration): `identity`, or
    /// the content hash of [`Calibration::canonical`].
    pub fn name(self) -> Cow<'static, str> {
        match self {
            Self::Identity => Cow::Borrowed("identity"),
            Self::Platt { .. } => Cow::Owned(content_hash(self.canonical().as_bytes())),
        }
    }

    /// Returns the canonical JSON form of this calibration: without white space, the slope first, and each number with
    /// the fewest digits that read back as the same number.
    pub fn canonical(self) -> String {
        serde_json::to_string(&self).expect("names and numbers always have a JSON form")
    }
}

/// A calibration as read from JSON, before its numbers are checked.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Unchecked {
    Identity,
    Platt { slope: f64, intercept: f64 },
}

impl TryFrom<Unchecked> for Calibration {
    type Error = CalibrationError;

    fn try_from(unchecked: Unchecked) -> Result<Self, CalibrationError> {
        match unchecked {
            Unchecked::Identity => Ok(Self::Identity),
            Unchecked::Platt { slope, intercept } => Self::platt(slope, intercept),
        }
    }
}

/// Returns the softmax probability of the hateful label over the two labels. It is in `0..=1` for every margin, and 0.5
/// for NaN.
pub(super) fn sigmoid(margin: f64) -> f64 {
    if margin.is_nan() {
        return 0.5;
    }
    // Every step is monotonic even after rounding, so the result is as well; with a product of two rounded factors, it
    // might not be. If `exp` overflows to infinity, the result is the correct limit.
    1.0 / (1.0 + (-margin).exp())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_canonical_form_and_its_hash_do_not_change() {
        let platt = Calibration::platt(1.5, -0.25).unwrap();
        assert_eq!(platt.canonical(), r#"{"platt":{"slope":1.5,"intercept":-0.25}}"#);
        assert_eq!(
            platt.name(),
            "sha256:88bcdfdd714029b9481217d80389cd805001e4afc9b53a37b096d4034788db57"
        );
        assert_eq!(Calibration::Identity.canonical(), r#""identity""#);
        assert_eq!(Calibration::Identity.name(), "identity");
        let hash = |intercept| Calibration::platt(1.0, intercept).unwrap().name();
        assert_eq!(hash(-0.0), hash(0.0));
        assert_ne!(hash(0.1), hash(0.0));
    }

    #[test]
    fn invalid_calibrations_are_rejected() {
        let check = |json: &str, expected: &str| {
            let error = serde_json::from_str::<Calibration>(json).unwrap_err().to_string();
            assert!(error.contains(expected), "{json}: {error}");
        };
        check(
            r#"{"platt":{"slope":0,"intercept":0}}"#,
            "the calibration's slope is 0, expected a finite number above 0",
        );
        check(r#"{"platt":{"slope":-1.5,"intercept":0}}"#, "slope is -1.5");
        check(r#"{"platt":{"slope":1e999,"intercept":0}}"#, "out of range");
        check(r#"{"platt":{"slope":1}}"#, "missing field `intercept`");
        check(
            r#"{"platt":{"slope":1,"intercept":0,"bias":1}}"#,
            "unknown field `bias`",
        );
        check(r#""isotonic""#, "unknown variant `isotonic`");
        assert!(Calibration::platt(f64::INFINITY, 0.0).is_err());
        assert!(Calibration::platt(f64::NAN, 0.0).is_err());
        let error = Calibration::platt(1.0, f64::NAN).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the calibration's intercept is NaN, expected a finite number"
        );
    }

    #[test]
    fn slope_and_intercept_are_applied_before_the_sigmoid() {
        let platt = Calibration::platt(2.0, -1.0).unwrap();
        for (margin, expected) in [
            (0.5, 0.5),
            (f32::INFINITY, 1.0),
            (f32::NEG_INFINITY, 0.0),
            (f32::NAN, 0.5),
        ] {
            assert_eq!(platt.probability(margin), expected, "{margin}");
        }
        // Two margins close to zero whose probabilities were in the wrong order with another formula.
        let [below, above] = [-2.296_564e-16, -6.561_516e-17].map(|margin| Calibration::Identity.probability(margin));
        assert!(below <= above);
        let same = Calibration::platt(1.0, 0.0).unwrap();
        assert_eq!(same.probability(0.7), Calibration::Identity.probability(0.7));
    }

    fn calibrations() -> impl Strategy<Value = Calibration> {
        let platt = (-300f64..300.0, any::<f64>()).prop_filter_map("finite", |(exponent, intercept)| {
            Calibration::platt(10f64.powf(exponent), intercept).ok()
        });
        prop_oneof![Just(Calibration::Identity), platt]
    }

    proptest! {
        #[test]
        fn a_larger_margin_never_has_a_smaller_probability(
            calibration in calibrations(), one in any::<f32>(), other in any::<f32>()
        ) {
            let (low, high) = (calibration.probability(one.min(other)), calibration.probability(one.max(other)));
            prop_assert!((0.0..=1.0).contains(&low) && (0.0..=1.0).contains(&high));
            prop_assert!(low <= high);
        }

        #[test]
        fn a_calibration_reads_back_as_written(calibration in calibrations()) {
            let back: Calibration = serde_json::from_str(&calibration.canonical()).unwrap();
            prop_assert_eq!(back, calibration);
            prop_assert_eq!(back.name(), calibration.name());
        }

        #[test]
        fn opposite_margins_sum_to_one(margin in -200f64..200.0) {
            prop_assert!((sigmoid(margin) + sigmoid(-margin) - 1.0).abs() < 1e-15);
        }
    }
}
