//! Tests whether the challenger flags harmless comments of any community more often than the champion does, if both
//! flag the same share of the judged rows (`flag_rate` explains why).
//!
//! Among the rows that are not hateful, only those that exactly one adapter flags are informative. If the challenger
//! were no worse, each of them would be as likely to be newly flagged as to be no longer flagged; this is the exact
//! one-sided McNemar test. Every row counts once, whatever its weight. With many communities, some would look worse
//! by chance, so the significance levels are corrected by Holm's procedure ("A Simple Sequentially Rejective
//! Multiple Test Procedure", 1979), for a level of 5 % over all groups together.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::flag_rate::flag;
use super::{FlagRates, GateRow};

/// Minimum number of rows that are not hateful for testing a community by itself. Smaller communities are tested
/// together.
///
/// With fewer than five disagreements, the test cannot reject at the 5 % level, because 1/2^4 is larger.
pub const MIN_OK_ROWS: usize = 20;

/// Probability of finding at least one group worse if none is.
const LEVEL: f64 = 0.05;

/// The comments that are compared as one group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum CommunityGroup {
    /// The comments of one community.
    Community {
        /// The id of the community.
        id: String,
    },
    /// The comments without a community.
    Unnamed,
    /// The comments of all communities with fewer than [`MIN_OK_ROWS`] rows that are not hateful.
    Small {
        /// Number of these communities.
        communities: usize,
    },
}

/// How often each adapter flags the rows of one group that are not hateful, if both flag the same share of all judged
/// rows. In verdicts without [`FlagRates`], each adapter flags rows by its own calibration and thresholds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CommunityComparison {
    /// The group of comments.
    pub group: CommunityGroup,
    /// Number of rows that are not hateful.
    pub ok_rows: usize,
    /// Share of these rows that the champion flags, from 0 to 1.
    pub champion_rate: f64,
    /// Share of these rows that the challenger flags, from 0 to 1.
    pub challenger_rate: f64,
    /// Number of rows that only the challenger flags.
    pub newly_called: usize,
    /// Number of rows that only the champion flags.
    pub no_longer_called: usize,
    /// Probability of at least this many newly flagged rows if the challenger were no worse. Absent if there are fewer
    /// than [`MIN_OK_ROWS`] rows.
    pub p_value: Option<f64>,
    /// Whether the challenger is significantly worse for this group.
    pub worse: bool,
}

#[derive(Default, Clone, Copy)]
struct ErrorCounts {
    rows: usize,
    champion: usize,
    challenger: usize,
    newly: usize,
    no_longer: usize,
}

/// Compares every group: the communities by id, then the comments without a community, then the small communities.
pub(super) fn compare(rows: &[GateRow], rates: FlagRates) -> Vec<CommunityComparison> {
    let champion = flag(rows, |row| row.champion, rates.compared);
    let challenger = flag(rows, |row| row.challenger, rates.compared);
    compare_flagged(rows, &champion, &challenger)
}

/// Compares every group, given which rows each adapter flags.
fn compare_flagged(rows: &[GateRow], champion: &[bool], challenger: &[bool]) -> Vec<CommunityComparison> {
    let mut communities: BTreeMap<Option<&str>, ErrorCounts> = BTreeMap::new();
    for ((row, &champion), &challenger) in rows.iter().zip(champion).zip(challenger) {
        if row.hateful {
            continue;
        }
        let counts = communities.entry(row.community.as_deref()).or_default();
        counts.rows += 1;
        counts.champion += usize::from(champion);
        counts.challenger += usize::from(challenger);
        counts.newly += usize::from(challenger && !champion);
        counts.no_longer += usize::from(champion && !challenger);
    }
    let mut groups: BTreeMap<CommunityGroup, ErrorCounts> = BTreeMap::new();
    let (mut small, mut small_communities) = (ErrorCounts::default(), 0);
    for (community, counts) in communities {
        match community {
            Some(id) if counts.rows >= MIN_OK_ROWS => {
                groups.insert(CommunityGroup::Community { id: id.to_owned() }, counts);
            }
            Some(_) => {
                small_communities += 1;
                small.rows += counts.rows;
                small.champion += counts.champion;
                small.challenger += counts.challenger;
                small.newly += counts.newly;
                small.no_longer += counts.no_longer;
            }
            None => {
                groups.insert(CommunityGroup::Unnamed, counts);
            }
        }
    }
    if small_communities > 0 {
        let group = CommunityGroup::Small {
            communities: small_communities,
        };
        groups.insert(group, small);
    }
    let mut comparisons: Vec<_> = groups
        .into_iter()
        .map(|(group, counts)| comparison(group, counts))
        .collect();
    mark_worse(&mut comparisons);
    comparisons
}

fn comparison(group: CommunityGroup, counts: ErrorCounts) -> CommunityComparison {
    let rate = |flagged: usize| flagged as f64 / counts.rows as f64;
    let p_value = upper_tail(counts.newly, counts.newly + counts.no_longer);
    CommunityComparison {
        group,
        ok_rows: counts.rows,
        champion_rate: rate(counts.champion),
        challenger_rate: rate(counts.challenger),
        newly_called: counts.newly,
        no_longer_called: counts.no_longer,
        p_value: (counts.rows >= MIN_OK_ROWS).then_some(p_value),
        worse: false,
    }
}

/// Applies Holm's procedure: the smallest p-value is compared with the level divided by the number of tests, the next
/// one with the level divided by one fewer, and so on until one is too large.
fn mark_worse(comparisons: &mut [CommunityComparison]) {
    let mut tested: Vec<(f64, &mut bool)> = comparisons
        .iter_mut()
        .filter_map(|comparison| Some((comparison.p_value?, &mut comparison.worse)))
        .collect();
    tested.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let count = tested.len();
    for (rank, (p_value, worse)) in tested.into_iter().enumerate() {
        if p_value > LEVEL / (count - rank) as f64 {
            break;
        }
        *worse = true;
    }
}

/// Returns the probability of at least `heads` heads in `tosses` tosses of a fair coin.
fn upper_tail(heads: usize, tosses: usize) -> f64 {
    // The terms are kept as logarithms, because they underflow for thousands of tosses.
    let mut term = -(tosses as f64) * std::f64::consts::LN_2;
    for head in 0..heads {
        term += ((tosses - head) as f64 / (head + 1) as f64).ln();
    }
    let mut sum = 0.0;
    for head in heads..=tosses {
        sum += term.exp();
        term += ((tosses - head) as f64 / (head + 1) as f64).ln();
    }
    sum.min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::retrain::judge::gate::Prediction;
    use crate::retrain::judge::gate::tests::drawn;

    /// Compares the rows that each adapter flags at its own thresholds.
    fn by_own_flags(rows: &[GateRow]) -> Vec<CommunityComparison> {
        let [champion, challenger] = [
            |row: &GateRow| row.champion.flagged,
            |row: &GateRow| row.challenger.flagged,
        ]
        .map(|flagged| rows.iter().map(flagged).collect::<Vec<_>>());
        compare_flagged(rows, &champion, &challenger)
    }

    /// Returns rows of one community that are not hateful, by how the two adapters flag them.
    fn rows(community: Option<&str>, newly: usize, no_longer: usize, agreed: usize) -> Vec<GateRow> {
        let prediction = |flagged| Prediction { margin: 0.0, flagged };
        let row = |champion, challenger| GateRow {
            hateful: false,
            weight: 1.0,
            community: community.map(str::to_owned),
            fold: 0,
            champion: prediction(champion),
            challenger: prediction(challenger),
        };
        let mut rows = vec![row(false, true); newly];
        rows.extend(vec![row(true, false); no_longer]);
        rows.extend(vec![row(false, false); agreed]);
        rows
    }

    /// The expected values are `scipy.stats.binom.sf(heads - 1, tosses, 0.5)`.
    #[test]
    fn binomial_tails_equal_those_of_scipy() {
        for (heads, tosses, expected) in [
            (0, 0, 1.0),
            (5, 5, 0.031_25),
            (4, 4, 0.062_5),
            (8, 10, 0.054_687_5),
            (60, 100, 0.028_443_966_820_490_444),
            (1200, 2200, 1.090_851_320_395_709_7e-5),
            (3, 12, 0.980_712_890_625),
        ] {
            let found = upper_tail(heads, tosses);
            assert!(
                (found / expected - 1.0).abs() < 1e-9,
                "{heads} heads in {tosses} tosses: {found}"
            );
        }
    }

    #[test]
    fn a_community_is_worse_only_if_the_difference_is_significant() {
        let check = |newly, no_longer, agreed, expected| {
            let found = by_own_flags(&rows(Some("garden"), newly, no_longer, agreed));
            assert_eq!(
                (found.len(), found[0].p_value.is_some(), found[0].worse),
                (1, newly + no_longer + agreed >= MIN_OK_ROWS, expected),
                "{newly} {no_longer} {agreed}"
            );
        };
        check(5, 0, 15, true);
        check(4, 0, 16, false);
        check(0, 9, 100, false);
        check(9, 7, 100, false);
        check(20, 7, 100, true);
        // Too few rows to be tested.
        check(6, 0, 13, false);
    }

    #[test]
    fn the_significance_level_is_shared_by_all_communities() {
        let mut all = Vec::new();
        for community in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"] {
            all.extend(rows(Some(community), 3, 3, 40));
        }
        // p = 0.03 would be significant for a single community, but not among eleven.
        all.extend(rows(Some("garden"), 5, 0, 40));
        assert!(by_own_flags(&all).iter().all(|comparison| !comparison.worse));
        all.extend(rows(Some("chess"), 12, 0, 40));
        let worse: Vec<_> = by_own_flags(&all)
            .into_iter()
            .filter(|comparison| comparison.worse)
            .map(|comparison| comparison.group)
            .collect();
        assert_eq!(worse, [CommunityGroup::Community { id: "chess".into() }]);
    }

    #[test]
    fn small_communities_are_tested_together() {
        let mut all = rows(None, 0, 0, 30);
        for index in 0..8 {
            all.extend(rows(Some(&format!("small-{index}")), 2, 0, 3));
        }
        let found = by_own_flags(&all);
        assert_eq!(found[0].group, CommunityGroup::Unnamed);
        let small = &found[1];
        assert_eq!(
            (&small.group, small.ok_rows, small.worse),
            (&CommunityGroup::Small { communities: 8 }, 40, true)
        );
        assert_eq!((small.champion_rate, small.challenger_rate), (0.0, 0.4));
    }

    #[test]
    fn hateful_rows_are_ignored() {
        let mut all = rows(Some("garden"), 9, 0, 40);
        all.iter_mut().for_each(|row| row.hateful = true);
        assert!(by_own_flags(&all).is_empty());
        let found = by_own_flags(&drawn(400, [1.0, 1.0], 1));
        assert_eq!(found.iter().map(|comparison| comparison.ok_rows).sum::<usize>(), 300);
    }
}
