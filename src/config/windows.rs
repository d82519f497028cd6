//! How a model wants its texts to be cut into windows, and what their number does to the largest margin.

use serde::{Deserialize, Serialize};

/// The maximum number of comment tokens in a window if neither the settings nor the model's file set it.
const DEFAULT_MAX_TOKENS: usize = 512;

/// The maximum number of windows per comment if neither the settings nor the model's file set it.
const DEFAULT_MAX_WINDOWS: usize = 8;

/// The range of the maximum number of comment tokens in a window.
pub const MAX_TOKENS_RANGE: std::ops::RangeInclusive<usize> = 16..=8192;

/// The range of the maximum number of windows per comment.
pub const MAX_WINDOWS_RANGE: std::ops::RangeInclusive<usize> = 1..=1024;

/// Where windows may begin and end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WindowEdges {
    /// At any token.
    #[default]
    Tokens,
    /// At the end of a sentence if one is near, and otherwise at any token.
    Sentences,
}

/// What a model's `moderatord.json` says about windows. The default is what a model without that file has.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelWindows {
    /// The maximum number of comment tokens in a window, unless the settings set it.
    pub max_tokens: Option<usize>,
    /// The maximum number of windows per comment, unless the settings set it.
    pub max_windows: Option<usize>,
    /// Where windows begin and end.
    pub edges: WindowEdges,
    /// What is subtracted from the largest margin.
    pub correction: WindowCorrection,
}

impl ModelWindows {
    /// Returns the maximum number of comment tokens in a window.
    pub(super) fn max_tokens(&self) -> usize {
        self.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS)
    }

    /// Returns the maximum number of windows per comment.
    pub(super) fn max_windows(&self) -> usize {
        self.max_windows.unwrap_or(DEFAULT_MAX_WINDOWS)
    }
}

/// What is subtracted from the largest of the margins of several windows.
///
/// The more windows a harmless text has, the larger the largest of their margins is by chance. The correction is measured on
/// harmless texts, so that length alone gets no comment flagged. Between the points, it is linear in the logarithm of the number of
/// windows, because the largest of n independent values grows about as fast as that. For one window it is 0, and beyond the
/// last point it stays as it is there.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<CorrectionPoint>", into = "Vec<CorrectionPoint>")]
pub struct WindowCorrection(Vec<CorrectionPoint>);

/// One measured point of a correction.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorrectionPoint {
    /// The number of windows.
    pub windows: usize,
    /// What is subtracted from the largest margin of so many windows.
    pub margin: f32,
}

/// The reason why points are not a correction.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CorrectionError {
    /// The windows are not two or more, in ascending order.
    #[error("`correction` has {found} windows after {before}, expected more, and at least 2")]
    Windows {
        /// The number of windows.
        found: usize,
        /// That of the point before, or 1.
        before: usize,
    },
    /// The margin is negative, or not a number.
    #[error("`correction` has margin {margin} for {windows} windows, expected a number of at least 0")]
    Margin {
        /// The number of windows.
        windows: usize,
        /// The margin.
        margin: f32,
    },
}

impl TryFrom<Vec<CorrectionPoint>> for WindowCorrection {
    type Error = CorrectionError;

    fn try_from(points: Vec<CorrectionPoint>) -> Result<Self, CorrectionError> {
        let mut before = 1;
        for &CorrectionPoint { windows, margin } in &points {
            if windows <= before {
                return Err(CorrectionError::Windows { found: windows, before });
            }
            if !(margin.is_finite() && margin >= 0.0) {
                return Err(CorrectionError::Margin { windows, margin });
            }
            before = windows;
        }
        Ok(Self(points))
    }
}

impl From<WindowCorrection> for Vec<CorrectionPoint> {
    fn from(correction: WindowCorrection) -> Self {
        correction.0
    }
}

impl WindowCorrection {
    /// Returns whether nothing is ever subtracted.
    pub fn is_none(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns what is subtracted from the largest margin of so many windows.
    pub fn margin(&self, windows: usize) -> f32 {
        let mut before = CorrectionPoint {
            windows: 1,
            margin: 0.0,
        };
        for &point in &self.0 {
            if windows <= point.windows {
                let log = |windows: usize| (windows.max(1) as f32).log2();
                let share = (log(windows) - log(before.windows)) / (log(point.windows) - log(before.windows));
                return before.margin + share * (point.margin - before.margin);
            }
            before = point;
        }
        before.margin
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn correction(points: &[(usize, f32)]) -> Result<WindowCorrection, CorrectionError> {
        let point = |&(windows, margin): &(usize, f32)| CorrectionPoint { windows, margin };
        points.iter().map(point).collect::<Vec<_>>().try_into()
    }

    #[test]
    fn the_correction_is_linear_in_the_logarithm_of_the_windows() {
        let correction = correction(&[(4, 1.0), (64, 2.0)]).unwrap();
        for (windows, expected) in [
            (0, 0.0),
            (1, 0.0),
            (2, 0.5),
            (4, 1.0),
            (8, 1.25),
            (16, 1.5),
            (64, 2.0),
            (1000, 2.0),
        ] {
            assert!((correction.margin(windows) - expected).abs() < 1e-6, "{windows}");
        }
        assert_eq!(WindowCorrection::default().margin(1000), 0.0);
    }

    #[test]
    fn points_that_are_no_correction_are_refused_by_value() {
        let text = |points: &[(usize, f32)]| correction(points).unwrap_err().to_string();
        assert_eq!(
            text(&[(1, 0.0)]),
            "`correction` has 1 windows after 1, expected more, and at least 2"
        );
        assert_eq!(
            text(&[(8, 0.1), (4, 0.2)]),
            "`correction` has 4 windows after 8, expected more, and at least 2"
        );
        assert_eq!(
            text(&[(2, -0.5)]),
            "`correction` has margin -0.5 for 2 windows, expected a number of at least 0"
        );
        assert!(text(&[(2, f32::NAN)]).contains("margin NaN for 2 windows"));
    }

    proptest! {
        #[test]
        fn a_correction_stays_between_its_points_and_reads_back(
            margins in prop::collection::vec(0f32..8.0, 0..6),
            windows in 0usize..5000,
        ) {
            let points: Vec<_> = margins.iter().zip(1..).map(|(&margin, power)| (1 << power, margin)).collect();
            let correction = correction(&points).unwrap();
            let largest = margins.iter().copied().fold(0.0, f32::max);
            prop_assert!((0.0..=largest).contains(&correction.margin(windows)));
            let json = serde_json::to_string(&correction).unwrap();
            prop_assert_eq!(serde_json::from_str::<WindowCorrection>(&json).unwrap(), correction);
        }
    }
}
