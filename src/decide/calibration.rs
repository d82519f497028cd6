//! From a margin to the probability that thresholds look at.
//!
//! Pure. Whatever the margin, the probability is in `0..=1`, never falls as the margin rises, and is
//! one half for no number.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::hash::content_hash;

/// From a margin to the probability that the policy looks at.
///
/// In JSON `"identity"` or `{"platt":{"slope":1.5,"intercept":-0.25}}`; what is read back is checked.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", try_from = "Unchecked")]
pub enum Calibration {
    /// The model's own probability.
    Identity,
    /// The sigmoid of a line over the margin (Platt, 1999). Temperature scaling is the line through
    /// zero. Made by [`Calibration::platt`].
    Platt {
        /// Finite and above zero, so that the order of comments stays.
        slope: f64,
        /// Finite.
        intercept: f64,
    },
}

/// Why numbers are no calibration.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum CalibrationError {
    /// A falling or flat line would turn the order of comments around or lose it.
    #[error("the calibration's slope is {0}, expected a finite number above 0")]
    Slope(f64),
    /// Not a number to add.
    #[error("the calibration's intercept is {0}, expected a finite number")]
    Intercept(f64),
}

impl Calibration {
    /// The sigmoid of `slope * margin + intercept`.
    ///
    /// # Errors
    /// [`CalibrationError`].
    pub fn platt(slope: f64, intercept: f64) -> Result<Self, CalibrationError> {
        if !(slope.is_finite() && slope > 0.0) {
            return Err(CalibrationError::Slope(slope));
        }
        if !intercept.is_finite() {
            return Err(CalibrationError::Intercept(intercept));
        }
        // Minus zero is zero: one calibration has one hash.
        let intercept = if intercept == 0.0 { 0.0 } else { intercept };
        Ok(Self::Platt { slope, intercept })
    }

    /// The calibrated probability of a margin; never decreasing.
    pub fn probability(self, margin: f32) -> f64 {
        match self {
            Self::Identity => sigmoid(f64::from(margin)),
            Self::Platt { slope, intercept } => sigmoid(slope * f64::from(margin) + intercept),
        }
    }

    /// What [`ModelIdentity::calibration`](crate::message::ModelIdentity::calibration) says of it:
    /// `identity`, or the content hash of [`Calibration::canonical`].
    pub fn name(self) -> Cow<'static, str> {
        match self {
            Self::Identity => Cow::Borrowed("identity"),
            Self::Platt { .. } => Cow::Owned(content_hash(self.canonical().as_bytes())),
        }
    }

    /// The one JSON text of this calibration: no white space, slope first, the shortest digits that
    /// read back as the same numbers.
    pub fn canonical(self) -> String {
        serde_json::to_string(&self).expect("names and numbers always have a JSON form")
    }
}

/// As it stands in a file, before anybody has looked at the numbers.
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

/// Softmax of the hateful label over the two: in `0..=1` whatever the margin, one half for no number.
pub(super) fn sigmoid(margin: f64) -> f64 {
    if margin.is_nan() {
        return 0.5;
    }
    // Each step keeps the order, rounding included, so the whole never falls; a product of two rounded
    // factors could. Overflow to infinity gives the right limit.
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
    fn what_is_no_calibration_is_refused() {
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
    fn the_line_is_applied_before_the_sigmoid() {
        let platt = Calibration::platt(2.0, -1.0).unwrap();
        for (margin, expected) in [
            (0.5, 0.5),
            (f32::INFINITY, 1.0),
            (f32::NEG_INFINITY, 0.0),
            (f32::NAN, 0.5),
        ] {
            assert_eq!(platt.probability(margin), expected, "{margin}");
        }
        // Two neighbours of zero that another formula had the wrong way round.
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
        fn any_margin_has_a_probability_that_never_falls(
            calibration in calibrations(), one in any::<f32>(), other in any::<f32>()
        ) {
            let (low, high) = (calibration.probability(one.min(other)), calibration.probability(one.max(other)));
            prop_assert!((0.0..=1.0).contains(&low) && (0.0..=1.0).contains(&high));
            prop_assert!(low <= high);
        }

        #[test]
        fn a_calibration_reads_back_as_it_was_written(calibration in calibrations()) {
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
