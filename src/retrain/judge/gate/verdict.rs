//! What the gate says, and why, for machines and for people.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{CommunityComparison, GateConfig, GoldenSet, Group, MIN_CLASS_ROWS, RankComparison, TrainingRows};

/// The gate's answer, with all that it rests on. As text it is one sentence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Whether the challenger takes the champion's place.
    pub promote: bool,
    /// Rows of the test part.
    pub rows: usize,
    /// Hateful ones among them.
    pub hateful: usize,
    /// What each was trained on.
    pub training_rows: TrainingRows,
    /// How it was judged.
    pub config: GateConfig,
    /// Ranking; absent where it could not be compared.
    pub pr_auc: Option<RankComparison>,
    /// False positives, by community.
    pub communities: Vec<CommunityComparison>,
    /// The golden set.
    pub golden: GoldenSet,
    /// Everything that speaks against the challenger; empty where it is promoted.
    pub refusals: Vec<Refusal>,
}

/// One reason to keep the champion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Refusal {
    /// A margin or weight that is no number.
    #[error("row {row}: the {what} is {value}, expected a finite number")]
    NoNumber {
        /// From zero.
        row: usize,
        /// Whose, and what.
        what: String,
        /// As text: JSON has no such number.
        value: String,
    },
    /// The difference would be chance.
    #[error("the test part has {hateful} hateful and {ok} other rows, expected at least {MIN_CLASS_ROWS} of each")]
    TooFewRows {
        /// Hateful rows.
        hateful: usize,
        /// The others.
        ok: usize,
    },
    /// It does not rank better, or not surely.
    #[error(
        "PR-AUC goes from {:.3} to {:.3}, a difference of {:+.3} with a 95 % lower bound of {:+.3}, expected above {}",
        .0.champion, .0.challenger, .0.difference, .0.lower_bound, .0.required
    )]
    NotBetter(RankComparison),
    /// More harmless comments of a community are called hateful.
    #[error(
        "{} would see {:.1} % of harmless comments called hateful instead of {:.1} % ({} newly, {} no longer, p = {:.4})",
        .0.group, 100.0 * .0.challenger_rate, 100.0 * .0.champion_rate, .0.newly_called, .0.no_longer_called,
        .0.p_value.unwrap_or(1.0)
    )]
    CommunityWorse(CommunityComparison),
    /// It gets fixed cases wrong.
    #[error("{} of {cases} golden cases fail: {}", failed.len(), failed.join(", "))]
    Golden {
        /// How many there are.
        cases: usize,
        /// Ids of those that fail.
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
        if let Some(RankComparison {
            champion,
            challenger,
            difference,
            lower_bound,
            required,
            ..
        }) = self.pr_auc
        {
            write!(
                f,
                "PR-AUC goes from {champion:.3} to {challenger:.3}, a difference of {difference:+.3} with a 95 % \
                 lower bound of {lower_bound:+.3}, above {required}"
            )?;
        }
        let tested = self.communities.iter().filter(|one| one.p_value.is_some()).count();
        match tested {
            0 => f.write_str("; no community has enough rows to compare false positives")?,
            1 => f.write_str("; the one group compared has no more false positives beyond noise")?,
            _ => write!(f, "; none of {tested} groups has more false positives beyond noise")?,
        }
        match self.golden.cases {
            0 => f.write_str("; there is no golden set"),
            1 => f.write_str("; the golden case passes"),
            cases => write!(f, "; all {cases} golden cases pass"),
        }
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Community { id } => write!(f, "community `{id}`"),
            Self::Unnamed => f.write_str("comments without a community"),
            Self::Small { communities: 1 } => f.write_str("1 small community"),
            Self::Small { communities } => write!(f, "{communities} small communities together"),
        }
    }
}
