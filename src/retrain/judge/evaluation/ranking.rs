//! Rows in order of their margin, and the areas under the two curves that the order gives.
//!
//! The order is found once; each set of weights then costs one pass. Rows of equal margin stand
//! together: no order among them is better than another.

/// Rows in falling order of margin.
#[derive(Debug, Clone)]
pub struct Ranking {
    /// Row numbers.
    order: Vec<u32>,
    /// Where each group of equal margins ends in `order`.
    ends: Vec<u32>,
}

/// Areas under the two curves; nothing where only one class has weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Areas {
    /// Probability that a hateful row ranks above one that is not, ties counting one half.
    pub roc_auc: f64,
    /// Average precision: the sum over margins of precision times the gain in recall, without
    /// interpolation, as scikit-learn's `average_precision_score`.
    pub pr_auc: f64,
}

/// Weight at or above a margin.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Above {
    pub margin: f64,
    pub hateful: f64,
    pub ok: f64,
}

impl Ranking {
    /// Ranks finite margins.
    pub fn new(margins: &[f64]) -> Self {
        let mut order: Vec<u32> = (0..margins.len() as u32).collect();
        order.sort_by(|&one, &other| margins[other as usize].total_cmp(&margins[one as usize]));
        let mut ends = Vec::new();
        for (at, pair) in order.windows(2).enumerate() {
            // Compared as numbers: zero and minus zero are one margin.
            if margins[pair[0] as usize] != margins[pair[1] as usize] {
                ends.push(at as u32 + 1);
            }
        }
        if !order.is_empty() {
            ends.push(order.len() as u32);
        }
        Self { order, ends }
    }

    /// The areas under labels and weights given by row number.
    pub fn areas(&self, hateful: &[bool], weights: &[f64]) -> Option<Areas> {
        let (mut above, mut ok_above) = (0.0, 0.0);
        // Sums over groups: ok weight times hateful weight ranked above, hateful weight times precision.
        let (mut pairs, mut precisions) = (0.0, 0.0);
        for (own, ok) in self.groups(hateful, weights) {
            pairs += ok * (above + 0.5 * own);
            above += own;
            ok_above += ok;
            if own > 0.0 {
                precisions += own * (above / (above + ok_above));
            }
        }
        (above > 0.0 && ok_above > 0.0).then(|| Areas {
            roc_auc: pairs / (above * ok_above),
            pr_auc: precisions / above,
        })
    }

    /// Weights at or above each distinct margin, largest margin first.
    pub(super) fn above(&self, margins: &[f64], hateful: &[bool], weights: &[f64]) -> Vec<Above> {
        let mut sums = (0.0, 0.0);
        let groups = self.groups(hateful, weights).zip(&self.ends);
        groups
            .map(|((own, ok), &end)| {
                sums = (sums.0 + own, sums.1 + ok);
                Above {
                    margin: margins[self.order[end as usize - 1] as usize],
                    hateful: sums.0,
                    ok: sums.1,
                }
            })
            .collect()
    }

    /// Hateful and other weight of each group of equal margins.
    fn groups(&self, hateful: &[bool], weights: &[f64]) -> impl Iterator<Item = (f64, f64)> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let group = &self.order[start..end as usize];
            start = end as usize;
            group.iter().fold((0.0, 0.0), |(own, ok), &row| {
                let weight = weights[row as usize];
                if hateful[row as usize] {
                    (own + weight, ok)
                } else {
                    (own, ok + weight)
                }
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_of_small_cases() {
        let check = |margins: &[f64], hateful: &[bool], expected: Option<(f64, f64)>| {
            let areas = Ranking::new(margins).areas(hateful, &vec![1.0; margins.len()]);
            let found = areas.map(|areas| (areas.roc_auc, areas.pr_auc));
            assert_eq!(found, expected, "{margins:?} {hateful:?}");
        };
        check(&[2.0, 1.0], &[true, false], Some((1.0, 1.0)));
        check(&[1.0, 2.0], &[true, false], Some((0.0, 0.5)));
        check(&[1.0, 1.0], &[true, false], Some((0.5, 0.5)));
        check(&[0.0, -0.0], &[true, false], Some((0.5, 0.5)));
        check(
            &[3.0, 2.0, 1.0, 0.0],
            &[true, false, true, false],
            Some((0.75, (1.0 + 2.0 / 3.0) / 2.0)),
        );
        check(&[1.0, 2.0], &[true, true], None);
        check(&[1.0, 2.0], &[false, false], None);
        check(&[], &[], None);
    }

    #[test]
    fn the_order_serves_any_weights() {
        let ranking = Ranking::new(&[3.0, 2.0, 2.0]);
        let hateful = [true, false, true];
        let areas = |weights: &[f64]| ranking.areas(&hateful, weights).map(|areas| areas.roc_auc);
        assert_eq!(areas(&[1.0, 1.0, 1.0]), Some(0.75));
        assert_eq!(areas(&[0.0, 1.0, 5.0]), Some(0.5));
        assert_eq!(areas(&[1.0, 0.0, 1.0]), None);
    }
}
