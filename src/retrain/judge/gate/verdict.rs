//! The gate's verdict, as a record in the manifest and as a sentence for readers.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    CommunityComparison, CommunityGroup, FlagRates, GateConfig, GoldenSet, MIN_CLASS_ROWS, POWER, Power,
    REFERENCE_DIFFERENCE, RankComparison, TrainingRows,
};

/// The gate's decision, with everything that it is based on. It is displayed as one sentence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Whether the challenger may replace the champion.
    pub promote: bool,
    /// Number of judged rows.
    pub rows: usize,
    /// Number of these rows that are labelled hateful.
    pub hateful: usize,
    /// Number of rows that each adapter was trained on.
    pub training_rows: TrainingRows,
    /// The settings of the gate.
    pub config: GateConfig,
    /// Number of models that predicted the judged rows for the challenger: 1 if it predicted all of them itself, more if
    /// judging was cross-fitted.
    #[serde(default = "one")]
    pub folds: usize,
    /// The comparison of the rankings; absent if there were too few rows.
    pub pr_auc: Option<RankComparison>,
    /// What difference in PR-AUC the judged rows can show; absent if there were too few rows, and in old verdicts.
    #[serde(default)]
    pub power: Option<Power>,
    /// The share of the rows that the adapters flag; absent if no row has weight, and in old verdicts.
    #[serde(default)]
    pub flag_rates: Option<FlagRates>,
    /// The comparison of false positives, one entry per group of comments.
    pub communities: Vec<CommunityComparison>,
    /// The result of the challenger on the golden set.
    pub golden: GoldenSet,
    /// Every reason against the challenger; empty if it may be promoted.
    pub refusals: Vec<Refusal>,
}

/// The number of folds of verdicts from before cross-fitted judging.
fn one() -> usize {
    1
}

/// A reason to keep the champion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Refusal {
    /// A margin or weight is not a finite number, or a weight is negative.
    #[error("row {row}: the {what} is {value}, expected a finite number")]
    NoNumber {
        /// Index of the row, from 0.
        row: usize,
        /// Which number it is, such as "champion's margin".
        what: String,
        /// The value, as text because JSON has no such numbers.
        value: String,
    },
    /// There are too few judged rows of a class for a comparison.
    #[error("{hateful} hateful and {ok} other rows can judge, expected at least {MIN_CLASS_ROWS} of each")]
    TooFewRows {
        /// Number of rows that are labelled hateful.
        hateful: usize,
        /// Number of rows that are not.
        ok: usize,
    },
    /// The challenger does not rank better, or the difference may be due to chance.
    #[error("{}, expected above {}", ranks(.0), .0.required)]
    NotBetter(RankComparison),
    /// The challenger flags significantly more harmless comments of a group.
    #[error(
        "{}: {:.1} % of harmless comments would be flagged instead of {:.1} % at an equal flag rate \
         ({} newly, {} no longer, p = {:.4})",
        .0.group, 100.0 * .0.challenger_rate, 100.0 * .0.champion_rate, .0.newly_called, .0.no_longer_called,
        .0.p_value.unwrap_or(1.0)
    )]
    CommunityWorse(CommunityComparison),
    /// The challenger misclassifies texts of the golden set.
    #[error(
        "{} of {cases} golden texts {} misclassified: {}",
        failed.len(), if failed.len() == 1 { "is" } else { "are" }, failed.join(", ")
    )]
    Golden {
        /// Number of texts in the golden set.
        cases: usize,
        /// Ids of the misclassified texts.
        failed: Vec<String>,
    },
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.promote {
            f.write_str("keep the champion: ")?;
            for (index, refusal) in self.refusals.iter().enumerate() {
                let separator = if index > 0 { "; " } else { "" };
                write!(f, "{separator}{refusal}")?;
            }
            return Ok(());
        }
        f.write_str("promote the challenger: ")?;
        if let Some(comparison) = &self.pr_auc {
            write!(f, "{}, above {}", ranks(comparison), comparison.required)?;
        }
        let tested = self.communities.iter().filter(|group| group.p_value.is_some()).count();
        match tested {
            0 => f.write_str("; no community has enough rows for a comparison of false positives")?,
            1 => f.write_str("; false positives do not increase significantly in the one group compared")?,
            _ => write!(
                f,
                "; false positives do not increase significantly in any of the {tested} groups compared"
            )?,
        }
        match self.golden.cases {
            0 => f.write_str("; there is no golden set"),
            1 => f.write_str("; the golden text passes"),
            cases => write!(f, "; all {cases} golden texts pass"),
        }
    }
}

/// Describes a comparison of rankings, without what is required.
fn ranks(comparison: &RankComparison) -> String {
    let RankComparison {
        champion,
        challenger,
        difference,
        smoothed_difference,
        lower_bound,
        ..
    } = comparison;
    let smoothed = smoothed_difference.map_or_else(String::new, |smoothed| format!(", smoothed {smoothed:+.3},"));
    format!(
        "PR-AUC changes from {champion:.3} to {challenger:.3}, a difference of {difference:+.3}{smoothed} with a {} % \
         lower bound of {lower_bound:+.3}",
        comparison.confidence()
    )
}

impl fmt::Display for Power {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "a challenger whose PR-AUC is truly higher by {:.3} would be promoted with a probability of {:.0} %, one \
             that is higher by {REFERENCE_DIFFERENCE} with {:.0} %",
            self.detectable.max(0.0),
            100.0 * POWER,
            100.0 * self.at_reference
        )
    }
}

impl fmt::Display for CommunityGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Community { id } => write!(f, "community `{id}`"),
            Self::Unnamed => f.write_str("comments without a community"),
            Self::Small { communities: 1 } => f.write_str("1 small community"),
            Self::Small { communities } => write!(f, "{communities} small communities together"),
        }
    }
}
