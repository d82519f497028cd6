//! Simulates how often the gate promotes challengers whose true difference in PR-AUC is known, and prints a table.
//!
//!     cargo run --release --example gate_power [RUNS]
//!
//! The margins of the two adapters are drawn from normal distributions with equal variance in both classes. Their
//! correlation within a class is one that was measured between real adapters of the bundled model (benches/results
//! gives the figures). When judging is cross-fitted, the rows are in five folds, and the challenger's margins of each
//! fold have a location and a spread of their own. The communities and thresholds are those of no particular service:
//! half of the rows are in one of two communities, and each adapter flags a third of the rows.

#![allow(clippy::print_stdout, reason = "an example prints its results")]

use moderatord::retrain::judge::evaluation::Bootstrap;
use moderatord::retrain::judge::gate::{GateConfig, GateRow, GoldenSet, Prediction, TrainingRows, Verdict, judge};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;
use statrs::function::erf::erfc;

/// A retraining draws 1,000 resamples. Fewer make a percentile less exact, but the simulation faster.
const RESAMPLES: usize = 400;
/// The folds of a retraining with the default settings.
const FOLDS: usize = 5;

/// How much the location of a fold's margins varies, in standard deviations, and the logarithm of their spread.
const FOLD_LOCATION: f64 = 0.5;
const FOLD_SPREAD: f64 = 0.2;

/// True differences in PR-AUC.
const DIFFERENCES: [f64; 4] = [-0.02, -0.01, 0.0, 0.03];

/// Share of hateful rows, PR-AUC of the champion and correlation of the adapters. Correlations of 0.80 to 0.86 were
/// measured between the bare bundled model and its adapters, and of 0.81 to 0.97 between such adapters.
const SETTINGS: [(f64, f64, f64); 5] = [
    (0.5, 0.8, 0.85),
    (0.5, 0.8, 0.92),
    (0.33, 0.75, 0.85),
    (0.33, 0.75, 0.92),
    (0.1, 0.5, 0.92),
];

/// A kind of feedback, and how similar the adapters are.
#[derive(Clone, Copy)]
struct Setting {
    /// Share of hateful rows.
    base_rate: f64,
    /// True PR-AUC of the champion.
    champion: f64,
    /// Correlation of the two adapters' margins within a class.
    correlation: f64,
}

/// The rows that judge.
#[derive(Clone, Copy)]
struct Judging {
    rows: usize,
    folds: usize,
}

fn main() {
    let runs: u64 = std::env::args()
        .nth(1)
        .and_then(|runs| runs.parse().ok())
        .unwrap_or(200);
    println!("{runs} runs per cell; share of runs in which the challenger is promoted, in per cent\n");
    println!(
        "| hateful | PR-AUC | correlation | judging rows | growth | -0.02 | -0.01 | 0 | +0.03 | predicted for +0.03 |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for (base_rate, champion, correlation) in SETTINGS {
        let setting = Setting {
            base_rate,
            champion,
            correlation,
        };
        for (rows, folds) in [(60, 1), (300, FOLDS), (500, 1), (1000, FOLDS)] {
            for growth in [false, true] {
                print_row(setting, Judging { rows, folds }, growth, runs);
            }
        }
    }
}

fn print_row(setting: Setting, judging: Judging, growth: bool, runs: u64) {
    let mut cells = Vec::new();
    let mut predicted = 0.0;
    for difference in DIFFERENCES {
        let verdicts: Vec<Verdict> = (0..runs)
            .into_par_iter()
            .map(|seed| verdict(setting, judging, difference, growth, seed))
            .collect();
        let promoted = verdicts.iter().filter(|verdict| verdict.promote).count();
        cells.push(format!("{:.1}", 100.0 * promoted as f64 / runs as f64));
        let powers = verdicts.iter().filter_map(|verdict| Some(verdict.power?.at_reference));
        predicted = powers.fold(0.0, |sum, power| sum + power) / runs as f64;
    }
    println!(
        "| {} | {} | {} | {}{} | {} | {} | {:.1} |",
        setting.base_rate,
        setting.champion,
        setting.correlation,
        judging.rows,
        if judging.folds > 1 { ", cross-fitted" } else { "" },
        if growth { "yes" } else { "no" },
        cells.join(" | "),
        100.0 * predicted
    );
}

fn verdict(setting: Setting, judging: Judging, difference: f64, growth: bool, seed: u64) -> Verdict {
    let mut random = StdRng::seed_from_u64(seed);
    let distance = |area: f64| distance(area, setting.base_rate);
    let distances = [distance(setting.champion), distance(setting.champion + difference)];
    let folds: Vec<[f64; 2]> = (0..judging.folds)
        .map(|_| {
            [
                FOLD_LOCATION * normal(&mut random),
                (FOLD_SPREAD * normal(&mut random)).exp(),
            ]
        })
        .collect();
    let rows: Vec<GateRow> = (0..judging.rows)
        .map(|row| {
            let hateful = random.random_bool(setting.base_rate);
            let shared = normal(&mut random);
            let own = normal(&mut random);
            let rho = setting.correlation;
            let of_class = |distance: f64| if hateful { distance } else { 0.0 };
            let champion = shared + of_class(distances[0]);
            let challenger = rho * shared + (1.0 - rho * rho).sqrt() * own + of_class(distances[1]);
            let fold = row % judging.folds;
            GateRow {
                hateful,
                weight: 1.0,
                community: (row % 2 == 0).then(|| if row % 4 == 0 { "chess" } else { "garden" }.to_owned()),
                fold,
                champion: Prediction {
                    margin: champion,
                    flagged: champion > 1.0,
                },
                challenger: Prediction {
                    margin: folds[fold][0] + folds[fold][1] * challenger,
                    flagged: challenger > 1.0,
                },
            }
        })
        .collect();
    let training_rows = TrainingRows {
        champion: 500,
        challenger: if growth { 800 } else { 500 },
    };
    let config = GateConfig {
        bootstrap: Bootstrap {
            resamples: RESAMPLES,
            seed: 1,
        },
        min_growth: 200,
    };
    judge(&rows, training_rows, GoldenSet::default(), config)
}

/// Draws from the standard normal distribution (Box and Muller, 1958).
fn normal(random: &mut StdRng) -> f64 {
    let radius = (-2.0 * (1.0 - random.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * random.random::<f64>()).cos()
}

/// Returns how many standard deviations apart the classes are for a PR-AUC.
fn distance(pr_auc: f64, base_rate: f64) -> f64 {
    let (mut low, mut high) = (0.0, 8.0);
    for _ in 0..40 {
        let middle = 0.5 * (low + high);
        if area(middle, base_rate) < pr_auc {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

/// Returns the PR-AUC of classes that are `distance` standard deviations apart.
fn area(distance: f64, base_rate: f64) -> f64 {
    let above = |z: f64| 0.5 * erfc(z * std::f64::consts::FRAC_1_SQRT_2);
    let (mut sum, mut total) = (0.0, 0.0);
    for step in 0..800 {
        let z = -8.0 + (f64::from(step) + 0.5) * 0.02;
        let density = (-0.5 * z * z).exp();
        let hateful = base_rate * above(z);
        sum += density * hateful / (hateful + (1.0 - base_rate) * above(z + distance));
        total += density;
    }
    sum / total
}
