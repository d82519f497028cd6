//! Has both adapters flag the same share of the judged rows, so that their false positives can be compared.
//!
//! At their own thresholds, an adapter that flags more comments also flags more harmless ones, of every community, even
//! if it tells the classes apart better. How many comments are flagged is the operator's choice and not a property of
//! an adapter, so decision rules are compared at the same rate (as in Corbett-Davies et al., "Algorithmic Decision
//! Making and the Cost of Fairness", 2017). What remains is which comments are flagged: if the challenger takes more of
//! its false positives from one community, it flags harmless comments of that community more often than the champion.

use serde::{Deserialize, Serialize};

use super::{GateRow, Prediction};

/// The shares of the judged rows that the adapters flag, weighted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct FlagRates {
    /// The share that the champion flags at its own thresholds.
    pub champion: f64,
    /// The share that the challenger flags at its own thresholds, on the rows that it judged itself.
    pub challenger: f64,
    /// The share that both flag in the comparison of false positives: the challenger's own, which is the one in service
    /// after a promotion. If the challenger flags none of the rows or all of them, it is the share of hateful rows.
    pub compared: f64,
}

impl FlagRates {
    /// Returns `None` if no row has weight.
    pub(super) fn new(rows: &[GateRow]) -> Option<Self> {
        let share = |rows: &mut dyn Iterator<Item = &GateRow>, counts: fn(&GateRow) -> bool| {
            let sums = rows.fold([0.0, 0.0], |[some, all], row| {
                let weight = if counts(row) { row.weight } else { 0.0 };
                [some + weight, all + row.weight]
            });
            (sums[1] > 0.0).then(|| sums[0] / sums[1])
        };
        let own = share(&mut rows.iter().filter(|row| row.fold == 0), |row| {
            row.challenger.flagged
        });
        let hateful = share(&mut rows.iter(), |row| row.hateful)?;
        let own = own.unwrap_or(hateful);
        Some(Self {
            champion: share(&mut rows.iter(), |row| row.champion.flagged)?,
            challenger: own,
            compared: if own > 0.0 && own < 1.0 { own } else { hateful },
        })
    }
}

/// Returns which rows an adapter flags if it flags those with the largest margins, a share of `rate` of the weight of
/// each fold. Rows with equal margins are flagged together or not at all, whichever comes closer to the rate.
pub(super) fn flag(rows: &[GateRow], prediction: fn(&GateRow) -> Prediction, rate: f64) -> Vec<bool> {
    let margin = |row: usize| prediction(&rows[row]).margin;
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by(|&a, &b| rows[a].fold.cmp(&rows[b].fold).then(margin(b).total_cmp(&margin(a))));
    let mut flagged = vec![false; rows.len()];
    for fold in order.chunk_by(|&a, &b| rows[a].fold == rows[b].fold) {
        let target = rate * weight(rows, fold);
        let mut above = 0.0;
        for equal in fold.chunk_by(|&a, &b| margin(a) == margin(b)) {
            let weight = weight(rows, equal);
            if above + 0.5 * weight > target {
                break;
            }
            above += weight;
            equal.iter().for_each(|&row| flagged[row] = true);
        }
    }
    flagged
}

fn weight(rows: &[GateRow], indices: &[usize]) -> f64 {
    indices.iter().map(|&row| rows[row].weight).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(margins: &[(usize, f64, f64)]) -> Vec<GateRow> {
        let row = |&(fold, margin, weight): &(usize, f64, f64)| GateRow {
            hateful: margin > 2.0,
            weight,
            community: None,
            fold,
            champion: Prediction { margin, flagged: false },
            challenger: Prediction {
                margin,
                flagged: margin > 1.0,
            },
        };
        margins.iter().map(row).collect()
    }

    #[test]
    fn the_largest_margins_of_each_fold_are_flagged() {
        let rows = rows(&[
            (0, 1.0, 1.0),
            (0, 3.0, 1.0),
            (0, 2.0, 1.0),
            (0, 0.0, 1.0),
            (1, 90.0, 1.0),
            (1, 80.0, 1.0),
        ]);
        let check = |rate, expected: [bool; 6]| assert_eq!(flag(&rows, |row| row.champion, rate), expected, "{rate}");
        check(0.0, [false; 6]);
        check(0.5, [false, true, true, false, true, false]);
        check(0.3, [false, true, false, false, true, false]);
        check(1.0, [true; 6]);
    }

    #[test]
    fn equal_margins_are_flagged_together_and_weights_count() {
        let tied = rows(&[(0, 1.0, 1.0), (0, 1.0, 1.0), (0, 1.0, 1.0), (0, 0.0, 1.0)]);
        assert_eq!(flag(&tied, |row| row.champion, 0.25), [false; 4]);
        assert_eq!(flag(&tied, |row| row.champion, 0.5), [true, true, true, false]);
        let heavy = rows(&[(0, 2.0, 1.0), (0, 1.0, 9.0), (0, 0.0, 10.0)]);
        assert_eq!(flag(&heavy, |row| row.champion, 0.5), [true, true, false]);
        assert_eq!(flag(&heavy, |row| row.champion, 0.1), [true, false, false]);
    }

    #[test]
    fn the_rate_is_the_challengers_own_unless_it_separates_nothing() {
        let some = rows(&[(0, 3.0, 1.0), (0, 2.0, 1.0), (0, 0.0, 2.0), (1, 5.0, 4.0)]);
        let rates = FlagRates::new(&some).unwrap();
        assert_eq!((rates.champion, rates.challenger, rates.compared), (0.0, 0.5, 0.5));
        let none = rows(&[(0, 0.0, 3.0), (1, 5.0, 1.0)]);
        let rates = FlagRates::new(&none).unwrap();
        assert_eq!((rates.challenger, rates.compared), (0.0, 0.25));
        assert_eq!(FlagRates::new(&rows(&[(0, 1.0, 0.0)])), None);
    }
}
