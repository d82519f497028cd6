//! Where the bands should begin, from the validation part.
//!
//! `block` is the lowest threshold whose precision reaches a target even at its lower bound: Wilson's
//! score interval, one-sided 95 %, over the effective number of rows. Each threshold is bounded by itself,
//! so the lowest that passes is a little optimistic; the test part shows what it does on other rows.
//! `review` is where a target recall is reached, or a target share of traffic is kept to; both count what
//! is at or above the threshold, blocked or reviewed.
//!
//! Only feedback that was chosen at random with a known probability says what traffic is like; each
//! such row stands for one over that probability. With enough of it, it alone is looked at. Without,
//! `block` comes from all labelled rows, each counting one, and is marked not representative, and no
//! recall or share is derived: what nobody was shown is not in the labels.

mod cuts;

use serde::{Deserialize, Serialize};

use cuts::Cuts;

use super::sampling::effective_rows;
use crate::message::Thresholds;

/// Effective sampled rows from which on they speak for the traffic: a share of one in ten is then
/// known to 0.03 (one standard error).
pub const MIN_SAMPLED: f64 = 100.0;

/// Effective hateful rows among the sampled for a recall: one of 0.9 is then known to 0.07.
pub const MIN_HATEFUL: f64 = 20.0;

/// One row of the validation part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ThresholdRow {
    /// Calibrated.
    pub probability: f64,
    /// The label.
    pub hateful: bool,
    /// Probability with which it was chosen to be labelled, where it was sampled.
    pub inclusion: Option<f64>,
}

/// What the bands are to reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Targets {
    /// Least precision of what is blocked.
    pub block_precision: f64,
    /// What a moderator should get to see.
    pub review: ReviewTarget,
}

/// What a moderator should get to see.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReviewTarget {
    /// At least this share of all hateful comments, reviewed or blocked.
    Recall(f64),
    /// At most this share of all comments, reviewed or blocked.
    Share(f64),
}

/// The bands, and what they rest on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bands {
    /// Which rows were looked at.
    pub basis: Basis,
    /// How many they are.
    pub rows: usize,
    /// Hateful ones among them.
    pub hateful: usize,
    /// What was asked for.
    pub targets: Targets,
    /// Where blocking begins.
    pub block: Band,
    /// Where review begins; never above `block`.
    pub review: Band,
}

/// Which rows speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// Sampled rows, weighted: what is said holds for the traffic.
    Sampled,
    /// All labelled rows, unweighted: not representative of the traffic.
    AsLabelled,
}

/// One band.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Band {
    /// A threshold was found.
    Derived {
        /// The probability at which the band begins.
        value: f64,
        /// What is at or above it.
        figures: BandFigures,
        /// The target alone would have been met higher up, where everything is blocked already.
        limited_by_block: bool,
    },
    /// None was, and the settings' stays.
    None {
        /// Why.
        reason: NoBand,
    },
}

/// What is at or above a threshold, on the rows of the basis.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BandFigures {
    /// Rows, unweighted.
    pub rows: usize,
    /// Share of hateful ones.
    pub precision: f64,
    /// Its lower bound.
    pub precision_bound: f64,
    /// Share of all hateful rows; absent without such.
    pub recall: Option<f64>,
    /// Share of all rows.
    pub share: f64,
}

/// Why there is no threshold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum NoBand {
    /// No row has a known probability of having been chosen.
    #[error("no feedback was sampled with a known rate, so recall and share of traffic are not known")]
    NoSample,
    /// Too few rows were sampled.
    #[error("the sampled feedback is worth {effective:.0} rows, expected at least {MIN_SAMPLED}")]
    SmallSample {
        /// Effective rows.
        effective: f64,
    },
    /// Too few hateful rows were sampled.
    #[error("the sampled feedback has {effective:.0} effective hateful rows, expected at least {MIN_HATEFUL}")]
    FewHateful {
        /// Effective hateful rows.
        effective: f64,
    },
    /// No threshold is surely precise enough.
    #[error("no threshold has a precision of {target} with 95 % confidence; the best lower bound is {best:.3}")]
    Imprecise {
        /// What was asked for.
        target: f64,
        /// Largest lower bound of any threshold.
        best: f64,
    },
    /// Even the highest threshold lets more through.
    #[error("no threshold keeps to a share of {target}; the highest one has {least:.4}")]
    TooMany {
        /// What was asked for.
        target: f64,
        /// Share at the highest threshold.
        least: f64,
    },
}

/// A number that thresholds cannot be derived from.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ThresholdError {
    /// Of a row.
    #[error("row {row}: {what} is {value}, expected {expected}")]
    Row {
        /// From zero.
        row: usize,
        /// Probability or inclusion.
        what: &'static str,
        /// What it is.
        value: f64,
        /// What would do.
        expected: &'static str,
    },
    /// Of a target.
    #[error("the target {what} is {value}, expected a number above 0, at most 1")]
    Target {
        /// Precision, recall or share.
        what: &'static str,
        /// What it is.
        value: f64,
    },
}

impl Bands {
    /// Derives both bands.
    ///
    /// # Errors
    /// [`ThresholdError`]: a number outside of its range.
    pub fn derive(rows: &[ThresholdRow], targets: Targets) -> Result<Self, ThresholdError> {
        check(rows, targets)?;
        let sampled: Vec<(f64, bool, f64)> = rows
            .iter()
            .filter_map(|row| Some((row.probability, row.hateful, 1.0 / row.inclusion?)))
            .collect();
        let worth = effective_rows(sampled.iter().map(|&(_, _, weight)| (weight, 1.0)));
        let (basis, rows) = if worth >= MIN_SAMPLED {
            (Basis::Sampled, sampled)
        } else {
            let all = rows.iter().map(|row| (row.probability, row.hateful, 1.0));
            (Basis::AsLabelled, all.collect())
        };
        let hateful = rows.iter().filter(|(_, hateful, _)| *hateful);
        let effective_hateful = effective_rows(hateful.clone().map(|&(_, _, weight)| (weight, 1.0)));
        let cuts = Cuts::new(&rows);
        let block = cuts.block(targets.block_precision);
        let review = match basis {
            Basis::AsLabelled if worth == 0.0 => Err(NoBand::NoSample),
            Basis::AsLabelled => Err(NoBand::SmallSample { effective: worth }),
            Basis::Sampled => match targets.review {
                ReviewTarget::Recall(_) if effective_hateful < MIN_HATEFUL => Err(NoBand::FewHateful {
                    effective: effective_hateful,
                }),
                ReviewTarget::Recall(target) => Ok(cuts.recall(target)),
                ReviewTarget::Share(target) => cuts.share(target),
            },
        };
        // Cuts count downwards: the later one is the lower threshold.
        let limit = block.unwrap_or(0);
        Ok(Self {
            basis,
            rows: rows.len(),
            hateful: hateful.count(),
            targets,
            block: cuts.band(block, 0),
            review: cuts.band(review, limit),
        })
    }

    /// Whether the figures hold for the traffic.
    pub fn representative(&self) -> bool {
        self.basis == Basis::Sampled
    }

    /// The thresholds to serve: what was derived, else the settings', review never above block.
    pub fn or(&self, settings: Thresholds) -> Thresholds {
        let block = self.block.value().unwrap_or(settings.block);
        let review = self.review.value().unwrap_or(settings.review);
        Thresholds {
            review: review.min(block),
            block,
        }
    }
}

impl Band {
    /// The threshold, if there is one.
    pub fn value(&self) -> Option<f64> {
        match self {
            Self::Derived { value, .. } => Some(*value),
            Self::None { .. } => None,
        }
    }
}

fn check(rows: &[ThresholdRow], targets: Targets) -> Result<(), ThresholdError> {
    let (name, review) = match targets.review {
        ReviewTarget::Recall(target) => ("recall", target),
        ReviewTarget::Share(target) => ("share", target),
    };
    for (what, value) in [("precision", targets.block_precision), (name, review)] {
        if !(value > 0.0 && value <= 1.0) {
            return Err(ThresholdError::Target { what, value });
        }
    }
    for (row, one) in rows.iter().enumerate() {
        let fault = |what, value, expected| ThresholdError::Row {
            row,
            what,
            value,
            expected,
        };
        if !(0.0..=1.0).contains(&one.probability) {
            return Err(fault("probability", one.probability, "a number from 0 to 1"));
        }
        if let Some(inclusion) = one.inclusion
            && !(inclusion > 0.0 && inclusion <= 1.0)
        {
            return Err(fault("inclusion", inclusion, "a number above 0, at most 1"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::retrain::judge::sampling::wilson_lower;

    const TARGETS: Targets = Targets {
        block_precision: 0.9,
        review: ReviewTarget::Recall(0.8),
    };

    fn row(probability: f64, hateful: bool, inclusion: Option<f64>) -> ThresholdRow {
        ThresholdRow {
            probability,
            hateful,
            inclusion,
        }
    }

    /// Probabilities 0.001 to 0.999; hateful from `from` on.
    fn separated(from: f64, inclusion: Option<f64>) -> Vec<ThresholdRow> {
        let probabilities = (1..1000).map(|index| f64::from(index) / 1000.0);
        probabilities
            .map(|probability| row(probability, probability >= from, inclusion))
            .collect()
    }

    #[test]
    fn sampled_rows_give_both_bands() {
        let bands = Bands::derive(&separated(0.8, Some(0.1)), TARGETS).unwrap();
        assert!(bands.representative());
        assert_eq!((bands.rows, bands.hateful), (999, 200));
        let Band::Derived { value, figures, .. } = bands.block else {
            panic!("{:?}", bands.block);
        };
        // Below 0.8 precision falls, and its bound with it.
        assert!(
            figures.precision_bound >= 0.9 && (0.785..0.8).contains(&value),
            "{value}"
        );
        assert_eq!(figures.recall, Some(1.0));
        // Recall alone asks for 0.84, where everything is blocked.
        assert!(matches!(bands.review, Band::Derived { value: review, limited_by_block: true, .. } if review == value));
    }

    #[test]
    fn a_share_of_traffic_is_kept_to() {
        let rows = separated(0.8, Some(0.1));
        let check = |share, expected: f64| {
            let targets = Targets {
                review: ReviewTarget::Share(share),
                ..TARGETS
            };
            let value = Bands::derive(&rows, targets).unwrap().review.value();
            assert!((value.unwrap() - expected).abs() < 0.0011, "{share}: {value:?}");
        };
        check(0.5, 0.5);
        check(0.3, 0.7);
        let one_value: Vec<_> = (0..200).map(|index| row(0.5, index % 2 == 0, Some(1.0))).collect();
        let targets = Targets {
            review: ReviewTarget::Share(0.5),
            ..TARGETS
        };
        let reason = NoBand::TooMany {
            target: 0.5,
            least: 1.0,
        };
        assert_eq!(
            Bands::derive(&one_value, targets).unwrap().review,
            Band::None { reason }
        );
    }

    #[test]
    fn a_rarely_chosen_row_stands_for_many() {
        // Half of what is above one half is hateful as labelled, one in eleven in the traffic.
        let mut rows = vec![row(0.9, true, Some(1.0)); 200];
        rows.extend(vec![row(0.9, false, Some(0.1)); 200]);
        rows.extend(vec![row(0.1, false, Some(0.1)); 200]);
        let targets = Targets {
            block_precision: 0.05,
            ..TARGETS
        };
        let bands = Bands::derive(&rows, targets).unwrap();
        let Band::Derived { value, figures, .. } = bands.block else {
            panic!("{:?}", bands.block);
        };
        assert_eq!(value, 0.9);
        assert!((figures.precision - 200.0 / 2200.0).abs() < 1e-12);
        assert!((figures.share - 2200.0 / 4200.0).abs() < 1e-12);
    }

    #[test]
    fn without_a_sample_no_recall_or_share_is_claimed() {
        let check = |rows: &[ThresholdRow], expected: NoBand| {
            for review in [ReviewTarget::Recall(0.8), ReviewTarget::Share(0.1)] {
                let bands = Bands::derive(rows, Targets { review, ..TARGETS }).unwrap();
                assert_eq!(bands.review, Band::None { reason: expected });
                assert!(!bands.representative());
            }
        };
        check(&separated(0.8, None), NoBand::NoSample);
        let mut some = separated(0.8, None);
        some.iter_mut().take(99).for_each(|row| row.inclusion = Some(0.5));
        check(&some, NoBand::SmallSample { effective: 99.0 });
        assert!(Bands::derive(&some, TARGETS).unwrap().block.value().is_some());
        let few = separated(0.99, Some(0.5));
        let bands = Bands::derive(&few, TARGETS).unwrap();
        let reason = NoBand::FewHateful { effective: 10.0 };
        assert_eq!(bands.review, Band::None { reason });
    }

    #[test]
    fn what_cannot_be_reached_says_how_far_it_got() {
        let rows = vec![row(0.9, true, None); 20];
        let bands = Bands::derive(&rows, TARGETS).unwrap();
        let Band::None { reason } = bands.block else {
            panic!("{:?}", bands.block);
        };
        assert_eq!(
            reason.to_string(),
            "no threshold has a precision of 0.9 with 95 % confidence; the best lower bound is 0.881"
        );
        let nothing = Bands::derive(&[], TARGETS).unwrap();
        assert_eq!((nothing.block.value(), nothing.review.value()), (None, None));
    }

    #[test]
    fn numbers_outside_their_range_are_named() {
        let check = |rows: &[ThresholdRow], targets, expected: &str| {
            assert_eq!(Bands::derive(rows, targets).unwrap_err().to_string(), expected);
        };
        check(
            &[row(f64::NAN, true, None)],
            TARGETS,
            "row 0: probability is NaN, expected a number from 0 to 1",
        );
        check(
            &[row(0.5, true, Some(0.0))],
            TARGETS,
            "row 0: inclusion is 0, expected a number above 0, at most 1",
        );
        let targets = Targets {
            review: ReviewTarget::Share(1.5),
            ..TARGETS
        };
        check(
            &[],
            targets,
            "the target share is 1.5, expected a number above 0, at most 1",
        );
    }

    #[test]
    fn the_settings_fill_in_and_review_stays_below_block() {
        let settings = Thresholds {
            review: 0.9,
            block: 0.95,
        };
        let labelled = Bands::derive(&separated(0.8, None), TARGETS).unwrap();
        let served = labelled.or(settings);
        assert_eq!(
            (Some(served.block), served.review),
            (labelled.block.value(), served.block)
        );
        let nothing = Bands::derive(&[], TARGETS).unwrap();
        assert_eq!(nothing.or(settings), settings);
    }

    fn rows() -> impl Strategy<Value = Vec<ThresholdRow>> {
        let inclusion = prop_oneof![Just(None), (1u8..=10).prop_map(|tenths| Some(f64::from(tenths) / 10.0))];
        let one = (0u8..=50, any::<bool>(), inclusion)
            .prop_map(|(step, hateful, inclusion)| row(f64::from(step) / 50.0, hateful || step > 40, inclusion));
        prop::collection::vec(one, 0..600)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn the_bands_hold_what_they_promise(rows in rows(), precision in 0.05f64..=1.0, target in 0.05f64..=1.0, recall: bool) {
            let review = if recall { ReviewTarget::Recall(target) } else { ReviewTarget::Share(target) };
            let bands = Bands::derive(&rows, Targets { block_precision: precision, review }).unwrap();
            if let (Some(review), Some(block)) = (bands.review.value(), bands.block.value()) {
                prop_assert!(review <= block);
            }
            // Again from the definition, over the rows that were looked at.
            let sampled = bands.representative();
            let looked_at: Vec<_> = rows.iter().filter(|row| !sampled || row.inclusion.is_some()).collect();
            let weight = |row: &ThresholdRow| if sampled { 1.0 / row.inclusion.unwrap_or(1.0) } else { 1.0 };
            let bound = |threshold: f64| {
                let above = looked_at.iter().filter(|row| row.probability >= threshold);
                let worth = effective_rows(above.clone().map(|row| (weight(row), 1.0)));
                let sum: f64 = above.clone().map(|row| weight(row)).sum();
                let hateful: f64 = above.filter(|row| row.hateful).map(|row| weight(row)).sum();
                wilson_lower(hateful / sum, worth)
            };
            let lowest = looked_at.iter().map(|row| row.probability).filter(|&value| bound(value) >= precision).reduce(f64::min);
            prop_assert_eq!(bands.block.value(), lowest);
            if let Band::Derived { figures, limited_by_block, .. } = bands.review {
                match review {
                    ReviewTarget::Recall(target) => prop_assert!(figures.recall.unwrap() >= target - 1e-12),
                    ReviewTarget::Share(target) => prop_assert!(limited_by_block || figures.share <= target + 1e-12),
                }
            }
            let settings = Thresholds { review: 0.4, block: 0.6 };
            let served = bands.or(settings);
            prop_assert!(served.review <= served.block);
            let json = serde_json::to_string(&bands).unwrap();
            prop_assert_eq!(serde_json::from_str::<Bands>(&json).unwrap(), bands);
        }
    }
}
