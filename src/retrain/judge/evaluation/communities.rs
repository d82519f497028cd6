//! Figures of each community at the evaluation threshold.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Confusion, ScoredRow};

/// The figures of one community.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CommunityFigures {
    /// The id of the community; absent for the rows without one.
    pub community: Option<String>,
    /// Number of rows.
    pub rows: usize,
    /// Number of rows that are labelled hateful.
    pub hateful: usize,
    /// Share of the rows not labelled hateful that are predicted hateful, weighted; absent if there are no such rows.
    pub false_positive_rate: Option<f64>,
    /// F1 score of the hateful class, weighted; absent if it is not defined.
    pub f1: Option<f64>,
}

/// Returns the figures of every community, those with the most rows first, and by id among equals.
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
    fn figures_are_computed_for_each_community_separately() {
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
            .map(|figures| {
                let CommunityFigures {
                    community,
                    rows,
                    hateful,
                    false_positive_rate,
                    f1,
                } = figures;
                (community, rows, hateful, false_positive_rate, f1)
            })
            .collect();
        let expected = [
            (Some("garden".to_owned()), 3, 1, Some(0.5), Some(2.0 / 3.0)),
            (None, 2, 0, Some(0.5), Some(0.0)),
            (Some("chess".to_owned()), 1, 1, None, Some(0.0)),
        ];
        assert_eq!(found, expected);
    }
}
