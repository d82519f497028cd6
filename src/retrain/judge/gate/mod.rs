//! Decides whether a challenger replaces the champion.
//!
//! The challenger must rank the judged rows better, must not flag the harmless comments of any community more often at
//! an equal flag rate, and must classify the golden set correctly. A failed check does not end the comparison, so the
//! verdict lists every reason against the challenger and every number that it is based on. This module does no I/O.
//!
//! The judged rows are the test part. If it is small, judging is cross-fitted: the other rows are divided into folds,
//! and the rows of each are judged by a model that was trained in the same way as the challenger, but on none of them.

mod binormal;
mod communities;
mod flag_rate;
mod power;
mod rank;
mod verdict;

use serde::{Deserialize, Serialize};

use super::evaluation::Bootstrap;

pub use communities::{CommunityComparison, CommunityGroup, MIN_OK_ROWS};
pub use flag_rate::FlagRates;
pub use power::{POWER, Power, REFERENCE_DIFFERENCE};
pub use rank::{GROWTH_TOLERANCE, RankComparison};
pub use verdict::{Refusal, Verdict};

/// Minimum number of judged rows of each class. With fewer, percentile intervals are too narrow (Hesterberg,
/// "What Teachers Should Know about the Bootstrap", 2015).
pub const MIN_CLASS_ROWS: usize = 20;

/// One judged row, with the predictions of both adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct GateRow {
    /// Whether the row is labelled hateful.
    pub hateful: bool,
    /// The number of comments in the traffic that the row represents; 0 or more.
    pub weight: f64,
    /// The community that the comment was posted in, if known.
    pub community: Option<String>,
    /// The fold of the row: 0 if the challenger itself predicted it. In every other fold, a model of its own stands in
    /// for the challenger.
    pub fold: usize,
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

/// Compares a challenger with the champion and returns the verdict.
pub fn judge(rows: &[GateRow], training_rows: TrainingRows, golden: GoldenSet, config: GateConfig) -> Verdict {
    let hateful = rows.iter().filter(|row| row.hateful).count();
    let mut verdict = Verdict {
        promote: false,
        rows: rows.len(),
        hateful,
        training_rows,
        config,
        folds: rows.iter().map(|row| row.fold + 1).max().unwrap_or(1),
        pr_auc: None,
        power: None,
        flag_rates: None,
        communities: Vec::new(),
        golden,
        refusals: Vec::new(),
    };
    if let Some(refusal) = unusable(rows) {
        verdict.refusals.push(refusal);
    } else {
        let few = hateful.min(rows.len() - hateful) < MIN_CLASS_ROWS;
        let compared = if few {
            None
        } else {
            rank::compare(rows, training_rows, config)
        };
        (verdict.pr_auc, verdict.power) = compared.unzip();
        match verdict.pr_auc {
            None => verdict.refusals.push(Refusal::TooFewRows {
                hateful,
                ok: rows.len() - hateful,
            }),
            Some(comparison) if comparison.passes() => {}
            Some(comparison) => verdict.refusals.push(Refusal::NotBetter(comparison)),
        }
        verdict.flag_rates = FlagRates::new(rows);
        if let Some(rates) = verdict.flag_rates {
            verdict.communities = communities::compare(rows, rates);
        }
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

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    pub(super) const CONFIG: GateConfig = GateConfig {
        bootstrap: Bootstrap {
            resamples: 400,
            seed: 1,
        },
        min_growth: 100,
    };
    pub(super) const SAME: TrainingRows = TrainingRows {
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
                fold: 0,
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
            assert_eq!(verdict.power.unwrap().at_reference, 1.0);
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
            "0 hateful and 0 other rows can judge, expected at least 20 of each",
        );
        check(
            &drawn(76, [1.2, 0.5], 1),
            passing(),
            "19 hateful and 57 other rows can judge, expected at least 20 of each",
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

    /// Returns a margin of a normal distribution with the given mean and a standard deviation of 1.
    fn normal(random: &mut StdRng, mean: f64) -> f64 {
        mean + (0..12).map(|_| random.random_range(-0.5..0.5)).sum::<f64>()
    }

    /// Returns rows of two equal communities. The champion has a recall of 0.61 at a false positive rate of 0.15, and
    /// the challenger one of 0.83 at 0.29, which is a better ranking at a higher flag rate. `bias` is added to the
    /// challenger's margins of the harmless rows of the second community.
    fn more_flagged(bias: f64) -> Vec<GateRow> {
        let mut random = StdRng::seed_from_u64(8);
        let row = |index: usize| {
            let hateful = index.is_multiple_of(3);
            let second = index.is_multiple_of(2);
            // The distances are the sums of the normal quantiles of recall and specificity.
            let champion = normal(&mut random, if hateful { 1.315 } else { 0.0 });
            let shared = if hateful { champion - 1.315 } else { champion };
            let unfair = if second && !hateful { bias } else { 0.0 };
            let margin = 0.8 * shared + 0.6 * normal(&mut random, 0.0) + if hateful { 1.65 } else { unfair };
            GateRow {
                hateful,
                weight: 1.0,
                community: Some(if second { "garden" } else { "chess" }.into()),
                fold: 0,
                champion: Prediction {
                    margin: champion,
                    flagged: champion >= 1.036,
                },
                challenger: Prediction {
                    margin,
                    flagged: margin >= 0.553,
                },
            }
        };
        (0..1200).map(row).collect()
    }

    #[test]
    fn a_challenger_that_flags_more_comments_and_ranks_better_is_promoted() {
        let rows = more_flagged(0.0);
        let rate = |flagged: fn(&GateRow) -> bool, hateful: bool| {
            let class: Vec<_> = rows.iter().filter(|row| row.hateful == hateful).collect();
            class.iter().filter(|row| flagged(row)).count() as f64 / class.len() as f64
        };
        let false_positives = [
            rate(|row| row.champion.flagged, false),
            rate(|row| row.challenger.flagged, false),
        ];
        assert!(
            false_positives[0] < 0.18 && false_positives[1] > 0.25,
            "{false_positives:?}"
        );
        let recalls = [
            rate(|row| row.champion.flagged, true),
            rate(|row| row.challenger.flagged, true),
        ];
        assert!(recalls[0] < 0.65 && recalls[1] > 0.8, "{recalls:?}");
        let verdict = judge(&rows, SAME, passing(), CONFIG);
        assert!(verdict.promote, "{verdict}");
        let rates = verdict.flag_rates.unwrap();
        assert!(
            rates.champion < 0.35 && rates.compared > 0.4 && rates.compared == rates.challenger,
            "{rates:?}"
        );
        for group in &verdict.communities {
            assert!(group.challenger_rate <= group.champion_rate + 0.01, "{group:?}");
        }
    }

    #[test]
    fn a_challenger_whose_false_positives_move_to_one_community_is_refused() {
        let verdict = judge(&more_flagged(0.8), SAME, passing(), CONFIG);
        let worse: Vec<_> = verdict
            .communities
            .iter()
            .filter(|group| group.worse)
            .map(|group| &group.group)
            .collect();
        assert_eq!(worse, [&CommunityGroup::Community { id: "garden".into() }]);
        assert!(
            !verdict.promote
                && verdict
                    .refusals
                    .iter()
                    .any(|refusal| matches!(refusal, Refusal::CommunityWorse(_)))
        );
    }

    /// Verdicts in registries have no folds, power, flag rates and smoothed differences.
    #[test]
    fn a_verdict_of_an_earlier_release_can_be_read() {
        let json = r#"{
            "promote": false, "rows": 60, "hateful": 25, "training_rows": {"champion": 0, "challenger": 190},
            "config": {"bootstrap": {"resamples": 1000, "seed": 1}, "min_growth": 200},
            "pr_auc": {"champion": 0.8, "challenger": 0.825, "difference": 0.025, "lower_bound": -0.011,
                "interval": [-0.02, 0.07], "required": 0.0},
            "communities": [{"group": {"kind": "unnamed"}, "ok_rows": 35, "champion_rate": 0.2, "challenger_rate": 0.2,
                "newly_called": 1, "no_longer_called": 1, "p_value": 0.75, "worse": false}],
            "golden": {"cases": 12, "failed": []},
            "refusals": [{"kind": "not_better", "champion": 0.8, "challenger": 0.825, "difference": 0.025,
                "lower_bound": -0.011, "interval": [-0.02, 0.07], "required": 0.0}]
        }"#;
        let verdict: Verdict = serde_json::from_str(json).unwrap();
        assert_eq!((verdict.folds, verdict.power, verdict.flag_rates), (1, None, None));
        assert_eq!(
            verdict.to_string(),
            "keep the champion: PR-AUC changes from 0.800 to 0.825, a difference of +0.025 with a 95 % lower bound of \
             -0.011, expected above 0"
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
