//! Whether a challenger takes the champion's place.
//!
//! Three questions, all asked on rows that neither was trained on, all answered before anything is
//! decided: does it rank better, is no community's harmless speech treated worse, does it get the
//! golden set right. Pure; a verdict carries every number that it rests on.

mod communities;
mod verdict;

use serde::{Deserialize, Serialize};

use super::evaluation::{Bootstrap, Ranking, quantile, resample};

pub use communities::{CommunityComparison, Group, MIN_OK_ROWS};
pub use verdict::{Refusal, Verdict};

/// Rows of each class in the test part. Below, the percentile interval is known to be too short
/// (Hesterberg, "What teachers should know about the bootstrap", 2015).
pub const MIN_CLASS_ROWS: usize = 20;

/// What PR-AUC may lose, at the bound, for having learnt from more rows: feedback grows where the
/// champion was wrong, and an adapter that has seen it is worth having at equal rank.
pub const GROWTH_TOLERANCE: f64 = 0.01;

/// A lower bound of 95 %, and the interval that is told beside it.
const LOWER: f64 = 0.05;
const INTERVAL: [f64; 2] = [0.025, 0.975];

/// One row of the test part, scored by both.
#[derive(Debug, Clone, PartialEq)]
pub struct GateRow {
    /// The label.
    pub hateful: bool,
    /// How many rows of the traffic it stands for.
    pub weight: f64,
    /// The community it was posted in.
    pub community: Option<String>,
    /// What the adapter in service says.
    pub champion: Prediction,
    /// What the new one says.
    pub challenger: Prediction,
}

/// What an adapter says of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Logit of the hateful label minus the other's.
    pub margin: f64,
    /// Whether its own calibration and thresholds would act on it.
    pub called: bool,
}

/// Rows in the training part of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingRows {
    /// Of the adapter in service; 0 for the bare base.
    pub champion: usize,
    /// Of the new one.
    pub challenger: usize,
}

/// Fixed cases that every adapter must get right.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoldenSet {
    /// How many there are.
    pub cases: usize,
    /// Ids of those that failed, never their text.
    pub failed: Vec<String>,
}

/// How the gate judges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateConfig {
    /// Of the difference in PR-AUC.
    pub bootstrap: Bootstrap,
    /// So many more training rows than the champion's earn [`GROWTH_TOLERANCE`].
    pub min_growth: usize,
}

/// PR-AUC of both on the same rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RankComparison {
    /// The champion's.
    pub champion: f64,
    /// The challenger's.
    pub challenger: f64,
    /// Challenger minus champion.
    pub difference: f64,
    /// One-sided 95 % lower bound of the difference: the 5th percentile of a paired bootstrap, each
    /// resample judging both.
    pub lower_bound: f64,
    /// Two-sided 95 % interval of the difference.
    pub interval: [f64; 2],
    /// The lower bound must be above it: 0, or minus [`GROWTH_TOLERANCE`].
    pub required: f64,
}

/// Judges a challenger.
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
            // Written so that a bound that is no number fails as well.
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

/// The first number that nothing can be prediction of.
fn unusable(rows: &[GateRow]) -> Option<Refusal> {
    rows.iter().enumerate().find_map(|(row, one)| {
        let numbers = [
            ("champion's margin", one.champion.margin),
            ("challenger's margin", one.challenger.margin),
            ("weight", one.weight),
        ];
        let bad = numbers.into_iter().find(|(_, value)| !value.is_finite());
        let bad = bad.or_else(|| (one.weight < 0.0).then_some(("weight", one.weight)));
        bad.map(|(what, value)| Refusal::NoNumber {
            row,
            what: what.to_owned(),
            value: value.to_string(),
        })
    })
}

/// Nothing where the areas are not defined, or not on enough resamples.
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
    if (differences.len() as f64) < 0.95 * config.bootstrap.resamples as f64 {
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
        lower_bound: bound(LOWER)?,
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

    /// Rows whose margins are the label with noise of its own for each; less noise ranks better.
    pub(super) fn drawn(count: usize, noise: [f64; 2], seed: u64) -> Vec<GateRow> {
        let mut random = StdRng::seed_from_u64(seed);
        let row = |index: usize| {
            let hateful = index.is_multiple_of(4);
            let mut prediction = |noise: f64| {
                let margin = if hateful { 1.0 } else { -1.0 } + noise * random.random_range(-3.0..3.0);
                Prediction {
                    margin,
                    called: margin >= 0.0,
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
    fn more_training_rows_earn_a_little_patience() {
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

    /// Two adapters of equal worth: the new one is let through about as often as the bound says.
    #[test]
    fn chance_alone_seldom_promotes() {
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
    fn what_cannot_be_judged_is_refused() {
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
            "2 of 12 golden cases fail: quoted-insult, reclaimed-word",
        );
    }

    #[test]
    fn a_verdict_is_a_sentence() {
        let sentence = |noise, golden| judge(&drawn(600, noise, 1), SAME, golden, CONFIG).to_string();
        let promoted = sentence([1.2, 0.5], passing());
        assert!(
            promoted.starts_with("promote the challenger: PR-AUC goes from 0."),
            "{promoted}"
        );
        let end = ", above 0; none of 2 groups has more false positives beyond noise; all 12 golden cases pass";
        assert!(promoted.ends_with(end), "{promoted}");
        let failing = GoldenSet {
            cases: 2,
            failed: vec!["greeting".into()],
        };
        let kept = sentence([0.5, 1.2], failing);
        assert!(kept.starts_with("keep the champion: PR-AUC goes from "), "{kept}");
        assert!(kept.contains("; community `chess` would see "), "{kept}");
        assert!(kept.ends_with("; 1 of 2 golden cases fail: greeting"), "{kept}");
    }

    #[test]
    fn no_resamples_promote_nothing() {
        let config = GateConfig {
            bootstrap: Bootstrap { resamples: 0, seed: 1 },
            ..CONFIG
        };
        assert!(!judge(&drawn(600, [1.2, 0.5], 1), SAME, passing(), config).promote);
    }

    #[test]
    fn a_verdict_reads_back_from_json() {
        for noise in [[1.2, 0.5], [0.5, 1.2]] {
            let verdict = judge(&drawn(400, noise, 3), SAME, passing(), CONFIG);
            let json = serde_json::to_string(&verdict).unwrap();
            assert_eq!(serde_json::from_str::<Verdict>(&json).unwrap(), verdict);
        }
    }
}
