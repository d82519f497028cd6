//! Decides whether a challenger replaces the champion.
//!
//! The challenger must rank the test part better, must not flag the harmless comments of any community more often, and
//! must classify the golden set correctly. A failed check does not end the comparison, so the verdict lists every
//! reason against the challenger and every number that it is based on. This module does no I/O.

mod communities;
mod verdict;

use serde::{Deserialize, Serialize};

use super::evaluation::{Bootstrap, DEFINED_SHARE, Ranking, quantile, resample};

pub use communities::{CommunityComparison, CommunityGroup, MIN_OK_ROWS};
pub use verdict::{Refusal, Verdict};

/// Minimum number of rows of each class in the test part. With fewer, percentile intervals are too narrow (Hesterberg,
/// "What Teachers Should Know about the Bootstrap", 2015).
pub const MIN_CLASS_ROWS: usize = 20;

/// Largest loss of PR-AUC, at the lower bound, that is accepted from a challenger that was trained on more rows.
///
/// New feedback tends to come from comments that the champion got wrong, so an adapter that was trained on it is
/// preferred if it ranks equally well.
pub const GROWTH_TOLERANCE: f64 = 0.01;

/// The quantile of the resamples that serves as the one-sided 95 % lower bound.
const LOWER_BOUND: f64 = 0.05;

/// The quantiles of the resamples that bound the two-sided 95 % interval.
const INTERVAL: [f64; 2] = [0.025, 0.975];

/// One labelled row of the test part, with the predictions of both adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct GateRow {
    /// Whether the row is labelled hateful.
    pub hateful: bool,
    /// The number of comments in the traffic that the row represents; 0 or more.
    pub weight: f64,
    /// The community that the comment was posted in, if known.
    pub community: Option<String>,
    /// The prediction of the champion.
    pub champion: Prediction,
    /// The prediction of the challenger.
    pub challenger: Prediction,
}

/// An adapter's prediction for a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// The logit of the hateful label minus the logit of the other label.
    pub margin: f64,
    /// Whether the adapter's calibration and thresholds would have the comment reviewed or blocked.
    pub flagged: bool,
}

/// Number of rows that each adapter was trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingRows {
    /// Training rows of the champion; 0 for the bare base model.
    pub champion: usize,
    /// Training rows of the challenger.
    pub challenger: usize,
}

/// The result of the challenger on the golden set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoldenSet {
    /// Number of texts in the golden set.
    pub cases: usize,
    /// Ids of the misclassified texts. The texts themselves are not included.
    pub failed: Vec<String>,
}

/// Settings of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateConfig {
    /// How the interval of the difference in PR-AUC is estimated.
    pub bootstrap: Bootstrap,
    /// Number of training rows that the challenger must have beyond the champion's for [`GROWTH_TOLERANCE`] to apply.
    pub min_growth: usize,
}

/// The PR-AUC of both adapters on the test part.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RankComparison {
    /// PR-AUC of the champion.
    pub champion: f64,
    /// PR-AUC of the challenger.
    pub challenger: f64,
    /// PR-AUC of the challenger minus that of the champion.
    pub difference: f64,
    /// One-sided 95 % lower bound of the difference: the 5th percentile of a paired bootstrap, in which both adapters
    /// are evaluated on the same resamples.
    pub lower_bound: f64,
    /// Two-sided 95 % interval of the difference.
    pub interval: [f64; 2],
    /// What the lower bound must exceed: 0, or minus [`GROWTH_TOLERANCE`].
    pub required: f64,
}

/// Compares a challenger with the champion and returns the verdict.
pub fn judge(rows: &[GateRow], training_rows: TrainingRows, golden: GoldenSet, config: GateConfig) -> Verdict {
    let hateful = rows.iter().filter(|row| row.hateful).count();
    let mut verdict = Verdict {
        promote: false,
        rows: rows.len(),
        hateful,
        training_rows,
        config,
        pr_auc: None,
        communities: Vec::new(),
        golden,
        refusals: Vec::new(),
    };
    if let Some(refusal) = unusable(rows) {
        verdict.refusals.push(refusal);
    } else {
        let few = hateful.min(rows.len() - hateful) < MIN_CLASS_ROWS;
        verdict.pr_auc = if few {
            None
        } else {
            compare(rows, training_rows, config)
        };
        match verdict.pr_auc {
            None => verdict.refusals.push(Refusal::TooFewRows {
                hateful,
                ok: rows.len() - hateful,
            }),
            // This comparison is false for NaN, so a challenger whose bound is NaN is refused.
            Some(comparison) if comparison.lower_bound > comparison.required => {}
            Some(comparison) => verdict.refusals.push(Refusal::NotBetter(comparison)),
        }
        verdict.communities = communities::compare(rows);
        let worse = verdict.communities.iter().filter(|community| community.worse);
        verdict.refusals.extend(worse.cloned().map(Refusal::CommunityWorse));
    }
    if !verdict.golden.failed.is_empty() {
        verdict.refusals.push(Refusal::Golden {
            cases: verdict.golden.cases,
            failed: verdict.golden.failed.clone(),
        });
    }
    verdict.promote = verdict.refusals.is_empty();
    verdict
}

/// Returns a refusal if a margin or weight is not usable.
fn unusable(rows: &[GateRow]) -> Option<Refusal> {
    rows.iter().enumerate().find_map(|(index, row)| {
        let numbers = [
            ("champion's margin", row.champion.margin),
            ("challenger's margin", row.challenger.margin),
            ("weight", row.weight),
        ];
        let bad = numbers.into_iter().find(|(_, value)| !value.is_finite());
        let bad = bad.or_else(|| (row.weight < 0.0).then_some(("weight", row.weight)));
        bad.map(|(what, value)| Refusal::NoNumber {
            row: index,
            what: what.to_owned(),
            value: value.to_string(),
        })
    })
}

/// Compares the rankings. Returns `None` if an area is not defined, or is not defined on enough resamples.
fn compare(rows: &[GateRow], training_rows: TrainingRows, config: GateConfig) -> Option<RankComparison> {
    let ranking = |prediction: fn(&GateRow) -> Prediction| {
        let margins: Vec<f64> = rows.iter().map(|row| prediction(row).margin).collect();
        Ranking::new(&margins)
    };
    let (champion, challenger) = (ranking(|row| row.champion), ranking(|row| row.challenger));
    let hateful: Vec<bool> = rows.iter().map(|row| row.hateful).collect();
    let weights: Vec<f64> = rows.iter().map(|row| row.weight).collect();
    let areas = |weights: &[f64]| {
        let area = |ranking: &Ranking| ranking.areas(&hateful, weights).map(|areas| areas.pr_auc);
        Some((area(&champion)?, area(&challenger)?))
    };
    let (champion, challenger) = areas(&weights)?;
    let mut differences = Vec::with_capacity(config.bootstrap.resamples);
    resample(&weights, config.bootstrap, |drawn| {
        differences.extend(areas(drawn).map(|(champion, challenger)| challenger - champion));
    });
    if (differences.len() as f64) < DEFINED_SHARE * config.bootstrap.resamples as f64 {
        return None;
    }
    differences.sort_by(f64::total_cmp);
    let bound = |share| quantile(&differences, share);
    let more = training_rows.challenger.saturating_sub(training_rows.champion);
    let grown = more > 0 && more >= config.min_growth;
    Some(RankComparison {
        champion,
        challenger,
        difference: challenger - champion,
        lower_bound: bound(LOWER_BOUND)?,
        interval: [bound(INTERVAL[0])?, bound(INTERVAL[1])?],
        required: if grown { -GROWTH_TOLERANCE } else { 0.0 },
    })
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const CONFIG: GateConfig = GateConfig {
        bootstrap: Bootstrap {
            resamples: 400,
            seed: 1,
        },
        min_growth: 100,
    };
    const SAME: TrainingRows = TrainingRows {
        champion: 500,
        challenger: 500,
    };

    /// Returns rows whose margins are the label plus independent noise for each adapter. Less noise gives a better
    /// ranking.
    pub(super) fn drawn(count: usize, noise: [f64; 2], seed: u64) -> Vec<GateRow> {
        let mut random = StdRng::seed_from_u64(seed);
        let row = |index: usize| {
            let hateful = index.is_multiple_of(4);
            let mut prediction = |noise: f64| {
                let margin = if hateful { 1.0 } else { -1.0 } + noise * random.random_range(-3.0..3.0);
                Prediction {
                    margin,
                    flagged: margin >= 0.0,
                }
            };
            GateRow {
                hateful,
                weight: 1.0,
                community: Some(if index.is_multiple_of(3) { "garden" } else { "chess" }.into()),
                champion: prediction(noise[0]),
                challenger: prediction(noise[1]),
            }
        };
        (0..count).map(row).collect()
    }

    fn passing() -> GoldenSet {
        GoldenSet {
            cases: 12,
            failed: Vec::new(),
        }
    }

    #[test]
    fn a_better_challenger_is_promoted_and_a_worse_one_is_not() {
        let verdict = judge(&drawn(600, [1.2, 0.5], 1), SAME, passing(), CONFIG);
        assert!(verdict.promote, "{verdict}");
        let comparison = verdict.pr_auc.unwrap();
        let [low, high] = comparison.interval;
        assert!(low < comparison.lower_bound && comparison.lower_bound < comparison.difference);
        assert!(comparison.difference < high);
        let verdict = judge(&drawn(600, [0.5, 1.2], 1), SAME, passing(), CONFIG);
        assert!(
            !verdict.promote && matches!(verdict.refusals[0], Refusal::NotBetter(_)),
            "{verdict}"
        );
    }

    #[test]
    fn an_equal_challenger_is_promoted_if_it_has_enough_more_training_rows() {
        let mut rows = drawn(400, [0.8, 0.8], 2);
        rows.iter_mut().for_each(|row| row.challenger = row.champion);
        let check = |champion, challenger, required, promote| {
            let verdict = judge(&rows, TrainingRows { champion, challenger }, passing(), CONFIG);
            let comparison = verdict.pr_auc.unwrap();
            assert_eq!(
                (comparison.lower_bound, comparison.required, verdict.promote),
                (0.0, required, promote)
            );
        };
        check(500, 500, 0.0, false);
        check(500, 599, 0.0, false);
        check(500, 600, -GROWTH_TOLERANCE, true);
        check(600, 500, 0.0, false);
    }

    /// Between equally good adapters, the challenger is promoted about as often as a 95 % bound allows.
    #[test]
    fn equally_good_adapters_are_rarely_promoted() {
        let config = GateConfig {
            bootstrap: Bootstrap {
                resamples: 200,
                seed: 1,
            },
            ..CONFIG
        };
        let promoted =
            (0..300).filter(|&seed| judge(&drawn(200, [1.0, 1.0], 100 + seed), SAME, passing(), config).promote);
        let promoted = promoted.count();
        assert!(promoted <= 30, "{promoted} of 300");
    }

    #[test]
    fn the_refusal_gives_the_reason() {
        let check = |rows: &[GateRow], golden, expected: &str| {
            let verdict = judge(rows, SAME, golden, CONFIG);
            let refusals: Vec<String> = verdict.refusals.iter().map(ToString::to_string).collect();
            assert_eq!(refusals, [expected]);
            assert!(!verdict.promote);
        };
        check(
            &[],
            passing(),
            "the test part has 0 hateful and 0 other rows, expected at least 20 of each",
        );
        check(
            &drawn(76, [1.2, 0.5], 1),
            passing(),
            "the test part has 19 hateful and 57 other rows, expected at least 20 of each",
        );
        let mut broken = drawn(600, [1.2, 0.5], 1);
        broken[7].challenger.margin = f64::NAN;
        check(
            &broken,
            passing(),
            "row 7: the challenger's margin is NaN, expected a finite number",
        );
        let failing = GoldenSet {
            cases: 12,
            failed: vec!["quoted-insult".into(), "reclaimed-word".into()],
        };
        check(
            &drawn(600, [1.2, 0.5], 1),
            failing,
            "2 of 12 golden texts are misclassified: quoted-insult, reclaimed-word",
        );
    }

    #[test]
    fn a_verdict_is_displayed_as_one_sentence() {
        let sentence = |noise, golden| judge(&drawn(600, noise, 1), SAME, golden, CONFIG).to_string();
        let promoted = sentence([1.2, 0.5], passing());
        assert!(
            promoted.starts_with("promote the challenger: PR-AUC changes from 0."),
            "{promoted}"
        );
        let end = ", above 0; false positives do not increase significantly in any of the 2 groups compared; all 12 golden texts pass";
        assert!(promoted.ends_with(end), "{promoted}");
        let failing = GoldenSet {
            cases: 2,
            failed: vec!["greeting".into()],
        };
        let kept = sentence([0.5, 1.2], failing);
        assert!(kept.starts_with("keep the champion: PR-AUC changes from "), "{kept}");
        assert!(kept.contains("; community `chess`: "), "{kept}");
        assert!(
            kept.ends_with("; 1 of 2 golden texts is misclassified: greeting"),
            "{kept}"
        );
    }

    #[test]
    fn without_resamples_nothing_is_promoted() {
        let config = GateConfig {
            bootstrap: Bootstrap { resamples: 0, seed: 1 },
            ..CONFIG
        };
        assert!(!judge(&drawn(600, [1.2, 0.5], 1), SAME, passing(), config).promote);
    }

    #[test]
    fn a_verdict_survives_a_round_trip_through_json() {
        for noise in [[1.2, 0.5], [0.5, 1.2]] {
            let verdict = judge(&drawn(400, noise, 3), SAME, passing(), CONFIG);
            let json = serde_json::to_string(&verdict).unwrap();
            assert_eq!(serde_json::from_str::<Verdict>(&json).unwrap(), verdict);
        }
    }
}
