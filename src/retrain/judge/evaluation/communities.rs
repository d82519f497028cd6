//! The same threshold looked at in each community.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Confusion, ScoredRow};

/// One community's rows at the threshold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CommunityFigures {
    /// Its id; absent for the rows that name none.
    pub community: Option<String>,
    /// Rows that judged.
    pub rows: usize,
    /// Hateful ones among them.
    pub hateful: usize,
    /// Share called hateful among what is not; absent where there is nothing such.
    pub false_positive_rate: Option<f64>,
    /// F1 of the hateful class.
    pub f1: Option<f64>,
}

/// Largest first, then by id.
pub(super) fn by_community(rows: &[ScoredRow], threshold: f64) -> Vec<CommunityFigures> {
    let mut communities: BTreeMap<Option<&str>, (usize, usize, Confusion)> = BTreeMap::new();
    for row in rows {
        let (count, hateful, confusion) = communities.entry(row.community.as_deref()).or_default();
        *count += 1;
        *hateful += usize::from(row.hateful);
        confusion.add(row.hateful, row.probability >= threshold, row.weight);
    }
    let figures =
        |(community, (rows, hateful, confusion)): (Option<&str>, (usize, usize, Confusion))| CommunityFigures {
            community: community.map(str::to_owned),
            rows,
            hateful,
            false_positive_rate: confusion.false_positive_rate(),
            f1: confusion.f1(),
        };
    let mut figures: Vec<_> = communities.into_iter().map(figures).collect();
    figures.sort_by_key(|community| std::cmp::Reverse(community.rows));
    figures
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::retrain::judge::evaluation::tests::row;

    #[test]
    fn each_community_is_counted_alone() {
        let rows: Vec<_> = [
            (Some("garden"), 1.0, true),
            (Some("garden"), 1.0, false),
            (Some("garden"), -1.0, false),
            (Some("chess"), -1.0, true),
            (None, 2.0, false),
            (None, -2.0, false),
        ]
        .into_iter()
        .map(|(community, margin, hateful)| ScoredRow {
            community: community.map(str::to_owned),
            ..row(margin, hateful, 1.0)
        })
        .collect();
        let found: Vec<_> = by_community(&rows, 0.5)
            .into_iter()
            .map(|one| (one.community, one.rows, one.hateful, one.false_positive_rate, one.f1))
            .collect();
        let expected = [
            (Some("garden".to_owned()), 3, 1, Some(0.5), Some(2.0 / 3.0)),
            (None, 2, 0, Some(0.5), Some(0.0)),
            (Some("chess".to_owned()), 1, 1, None, Some(0.0)),
        ];
        assert_eq!(found, expected);
    }
}
