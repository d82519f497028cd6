//! Whether any community's harmless comments are called hateful more often than before.
//!
//! Among the rows that are not hateful, only those on which the two disagree tell them apart. If the
//! challenger were no worse, each of them would be as likely newly called as no longer called: the
//! exact one-sided McNemar test. Rows count one, whatever their weight. With many communities some
//! would look worse by chance, so that the levels are Holm's (1979), 5 % over all together.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::GateRow;

/// Rows that are not hateful from which on a community is tested by itself; those with fewer are
/// tested together. Fewer than five disagreements prove nothing either way: 1/2^4 is above 5 %.
pub const MIN_OK_ROWS: usize = 20;

/// Chance that any community is called worse where none is.
const LEVEL: f64 = 0.05;

/// Whose comments are compared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Group {
    /// One community.
    Community {
        /// Its id.
        id: String,
    },
    /// Rows that name no community.
    Unnamed,
    /// All communities with fewer than [`MIN_OK_ROWS`] rows that are not hateful.
    Small {
        /// How many they are.
        communities: usize,
    },
}

/// One group's rows that are not hateful, under both adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CommunityComparison {
    /// Whose they are.
    pub group: Group,
    /// How many they are.
    pub ok_rows: usize,
    /// Share that the champion calls hateful.
    pub champion_rate: f64,
    /// Share that the challenger calls hateful.
    pub challenger_rate: f64,
    /// Called by the challenger alone.
    pub newly_called: usize,
    /// Called by the champion alone.
    pub no_longer_called: usize,
    /// Chance of so many newly called ones if the challenger were no worse; absent with too few rows.
    pub p_value: Option<f64>,
    /// It is smaller than its level allows.
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

/// Every group, communities by id, then the rest.
pub(super) fn compare(rows: &[GateRow]) -> Vec<CommunityComparison> {
    let mut communities: BTreeMap<Option<&str>, ErrorCounts> = BTreeMap::new();
    for row in rows.iter().filter(|row| !row.hateful) {
        let (champion, challenger) = (row.champion.called, row.challenger.called);
        let counts = communities.entry(row.community.as_deref()).or_default();
        counts.rows += 1;
        counts.champion += usize::from(champion);
        counts.challenger += usize::from(challenger);
        counts.newly += usize::from(challenger && !champion);
        counts.no_longer += usize::from(champion && !challenger);
    }
    let mut groups: BTreeMap<Group, ErrorCounts> = BTreeMap::new();
    let (mut small, mut small_communities) = (ErrorCounts::default(), 0);
    for (community, counts) in communities {
        match community {
            Some(id) if counts.rows >= MIN_OK_ROWS => {
                groups.insert(Group::Community { id: id.to_owned() }, counts);
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
                groups.insert(Group::Unnamed, counts);
            }
        }
    }
    if small_communities > 0 {
        let group = Group::Small {
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

fn comparison(group: Group, counts: ErrorCounts) -> CommunityComparison {
    let rate = |called: usize| called as f64 / counts.rows as f64;
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

/// Holm's procedure: the smallest p-value is held to the level over all tests, the next to the level
/// over one fewer, until one is too large.
fn mark_worse(comparisons: &mut [CommunityComparison]) {
    let mut tested: Vec<(f64, &mut bool)> = comparisons
        .iter_mut()
        .filter_map(|one| Some((one.p_value?, &mut one.worse)))
        .collect();
    tested.sort_by(|one, other| one.0.total_cmp(&other.0));
    let count = tested.len();
    for (rank, (p_value, worse)) in tested.into_iter().enumerate() {
        if p_value > LEVEL / (count - rank) as f64 {
            break;
        }
        *worse = true;
    }
}

/// Probability of at least `heads` in `tosses` of a fair coin.
fn upper_tail(heads: usize, tosses: usize) -> f64 {
    // Terms in logarithms, from the first one up: thousands of tosses underflow otherwise.
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

    /// Rows that are not hateful, of one community.
    fn rows(community: Option<&str>, newly: usize, no_longer: usize, agreed: usize) -> Vec<GateRow> {
        let prediction = |called| Prediction { margin: 0.0, called };
        let row = |champion, challenger| GateRow {
            hateful: false,
            weight: 1.0,
            community: community.map(str::to_owned),
            champion: prediction(champion),
            challenger: prediction(challenger),
        };
        let mut rows = vec![row(false, true); newly];
        rows.extend(vec![row(true, false); no_longer]);
        rows.extend(vec![row(false, false); agreed]);
        rows
    }

    /// scipy.stats.binom.sf(heads - 1, tosses, 0.5).
    #[test]
    fn tails_of_the_binomial() {
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
            assert!((found / expected - 1.0).abs() < 1e-9, "{heads} of {tosses}: {found}");
        }
    }

    #[test]
    fn a_community_is_worse_beyond_noise_or_not() {
        let check = |newly, no_longer, agreed, expected| {
            let found = compare(&rows(Some("garden"), newly, no_longer, agreed));
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
        // Too few rows to say.
        check(6, 0, 13, false);
    }

    #[test]
    fn many_communities_share_the_level() {
        let mut all = Vec::new();
        for community in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"] {
            all.extend(rows(Some(community), 3, 3, 40));
        }
        // Alone it would be called worse at p = 0.03, among eleven it is not.
        all.extend(rows(Some("garden"), 5, 0, 40));
        assert!(compare(&all).iter().all(|one| !one.worse));
        all.extend(rows(Some("chess"), 12, 0, 40));
        let worse: Vec<_> = compare(&all)
            .into_iter()
            .filter(|one| one.worse)
            .map(|one| one.group)
            .collect();
        assert_eq!(worse, [Group::Community { id: "chess".into() }]);
    }

    #[test]
    fn small_communities_are_looked_at_together() {
        let mut all = rows(None, 0, 0, 30);
        for index in 0..8 {
            all.extend(rows(Some(&format!("small-{index}")), 2, 0, 3));
        }
        let found = compare(&all);
        assert_eq!(found[0].group, Group::Unnamed);
        let small = &found[1];
        assert_eq!(
            (&small.group, small.ok_rows, small.worse),
            (&Group::Small { communities: 8 }, 40, true)
        );
        assert_eq!((small.champion_rate, small.challenger_rate), (0.0, 0.4));
    }

    #[test]
    fn hateful_rows_do_not_count() {
        let mut all = rows(Some("garden"), 9, 0, 40);
        all.iter_mut().for_each(|row| row.hateful = true);
        assert!(compare(&all).is_empty());
        let found = compare(&drawn(400, [1.0, 1.0], 1));
        assert_eq!(found.iter().map(|one| one.ok_rows).sum::<usize>(), 300);
    }
}
