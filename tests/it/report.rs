//! The report of a retraining is complete, self-contained and escaped.
//!
//! `cargo test --test it report:: -- --ignored` writes sample reports for viewing.

use moderatord::decide::Calibration;
use moderatord::retrain::judge::calibration::{CalibrationRow, FittedCalibration, fit};
use moderatord::retrain::judge::evaluation::{Bootstrap, Curves, Evaluation, EvaluationConfig, ScoredRow, evaluate};
use moderatord::retrain::judge::gate::{GateConfig, GateRow, GoldenSet, Prediction, TrainingRows, Verdict, judge};
use moderatord::retrain::judge::thresholds::{
    ReviewTarget, ThresholdDerivation, ThresholdOutcome, ThresholdRow, ThresholdTargets,
};
use moderatord::retrain::report::{Fact, Judgement, Report, ReportSide, render};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const HOSTILE: &str = "</td><script>alert(1)</script>\"'&";

/// How well an adapter separates the classes, and by what factor its margins differ from log-odds.
#[derive(Clone, Copy)]
struct Skill {
    distance: f64,
    scale: f64,
}

struct Measurements {
    champion: (Evaluation, Curves),
    challenger: (Evaluation, Curves),
    verdict: Verdict,
    fitted: FittedCalibration,
    thresholds: ThresholdDerivation,
}

/// Returns everything that a retraining would measure, for random margins.
fn measure(rows: usize, champion: Skill, challenger: Skill, sampled: bool) -> Measurements {
    let mut random = StdRng::seed_from_u64(4);
    let mut margin = |hateful: bool, skill: Skill| {
        let noise: f64 = (0..12).map(|_| random.random_range(-0.5..0.5)).sum();
        skill.scale * (if hateful { skill.distance } else { -skill.distance } + 1.4 * noise - 0.6)
    };
    let config = EvaluationConfig {
        threshold: 0.5,
        bootstrap: Bootstrap {
            resamples: 300,
            seed: 1,
        },
    };
    let labels: Vec<bool> = (0..rows).map(|row| row % 5 == 0).collect();
    let communities = [
        "gardening",
        "chess",
        "cycling",
        "cooking",
        HOSTILE,
        "a-very-long-community-identifier-0001",
    ];
    let community = |row: usize| (row % 13 != 12).then(|| communities[row * row % 7 % 6].to_owned());
    let margins = |skill, margin: &mut dyn FnMut(bool, Skill) -> f64| -> Vec<f64> {
        labels.iter().map(|&hateful| margin(hateful, skill)).collect()
    };
    let before = margins(champion, &mut margin);
    let after = margins(challenger, &mut margin);
    let validation = margins(challenger, &mut margin);
    let fitted = fit(&validation
        .iter()
        .zip(&labels)
        .map(|(&margin, &hateful)| CalibrationRow {
            margin,
            hateful: f64::from(u8::from(hateful)),
            weight: 1.0,
        })
        .collect::<Vec<_>>())
    .unwrap();
    let side = |margins: &[f64], calibration: Calibration| {
        let rows = margins.iter().zip(&labels).enumerate();
        let rows: Vec<_> = rows
            .map(|(row, (&margin, &hateful))| ScoredRow {
                margin,
                probability: calibration.probability(margin as f32),
                hateful,
                weight: 1.0,
                community: community(row),
            })
            .collect();
        (evaluate(&rows, config).unwrap(), Curves::new(&rows).unwrap())
    };
    let gate_rows: Vec<_> = (0..rows)
        .map(|row| {
            let prediction = |margin: f64, calibration: Calibration| Prediction {
                margin,
                flagged: calibration.probability(margin as f32) >= 0.5,
            };
            GateRow {
                hateful: labels[row],
                weight: 1.0,
                community: community(row),
                fold: 0,
                champion: prediction(before[row], Calibration::Identity),
                challenger: prediction(after[row], fitted.calibration),
            }
        })
        .collect();
    let training_rows = TrainingRows {
        champion: 1200,
        challenger: 1900,
    };
    let golden = GoldenSet {
        cases: 12,
        failed: if challenger.distance < champion.distance {
            vec!["greeting-3".into(), HOSTILE.into()]
        } else {
            Vec::new()
        },
    };
    let gate = GateConfig {
        bootstrap: config.bootstrap,
        min_growth: 1000,
    };
    let threshold_rows: Vec<_> = validation
        .iter()
        .zip(&labels)
        .map(|(&margin, &hateful)| ThresholdRow {
            probability: fitted.calibration.probability(margin as f32),
            hateful,
            inclusion: sampled.then_some(0.05),
        })
        .collect();
    let targets = ThresholdTargets {
        block_precision: 0.9,
        review: ReviewTarget::Recall(0.9),
        provisional: true,
    };
    Measurements {
        champion: side(&before, Calibration::Identity),
        challenger: side(&after, fitted.calibration),
        verdict: judge(&gate_rows, training_rows, golden, gate),
        thresholds: ThresholdDerivation::derive(&threshold_rows, targets).unwrap(),
        fitted,
    }
}

fn page(made: &Measurements) -> String {
    let side = |name, (evaluation, curves): &'_ (Evaluation, Curves)| (name, evaluation.clone(), curves.clone());
    let (champion, challenger) = (
        side("3f0c2a9d51e7b604", &made.champion),
        side(HOSTILE, &made.challenger),
    );
    let report = Report {
        created_at: "2026-01-02T03:04:05Z",
        champion: ReportSide {
            name: champion.0,
            evaluation: &champion.1,
            curves: &champion.2,
        },
        challenger: ReportSide {
            name: challenger.0,
            evaluation: &challenger.1,
            curves: &challenger.2,
        },
        judgement: Some(Judgement {
            verdict: &made.verdict,
            calibration: &made.fitted,
            thresholds: &made.thresholds,
        }),
        data: vec![
            Fact::new("Labels", 3120),
            Fact::new("Rows in the training part", 1900),
            Fact::new("Rows in the validation part", 600),
            Fact::new("Rows in the test part", 620),
            Fact::new("Left out: same text as another row", 41),
            Fact::new("Left out: same text, opposite labels", 6),
            Fact::new("Left out of training: near-duplicate of a held-out row", 23),
        ],
        hyperparameters: vec![
            Fact::new("Rank", 8),
            Fact::new("Alpha", 16),
            Fact::new("Learning rate", 5e-4),
            Fact::new("Targets", "q_proj, v_proj"),
            Fact::new("Seed", 1),
        ],
        identities: vec![
            Fact::new("Base", format!("sha256:{}", "0123456789abcdef".repeat(4))),
            Fact::new("Adapter", format!("sha256:{}", "fedcba9876543210".repeat(4))),
            Fact::new("Normaliser", HOSTILE),
        ],
    };
    render(&report).unwrap()
}

const POOR: Skill = Skill {
    distance: 0.8,
    scale: 1.0,
};
const GOOD: Skill = Skill {
    distance: 1.4,
    scale: 2.6,
};

#[test]
fn a_report_is_complete_and_loads_nothing() {
    let made = measure(700, POOR, GOOD, true);
    assert!(made.verdict.promote, "{}", made.verdict);
    let page = page(&made);
    for forbidden in [
        "<script", "src=", "href=", "url(", "@import", "http:", "https:", "//", "<link", "<iframe", "onload",
    ] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
    assert_eq!(
        page.matches("<svg class=\"chart\" role=\"img\" aria-label=\"").count(),
        7
    );
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#39;&amp;"));
    assert!(page.contains("Accepted for promotion") && !page.contains("Not representative"));
    let power = made.verdict.power.unwrap();
    for expected in [
        format!("What these rows can show: {power}."),
        "harmless comments that each adapter flags if both flag ".to_owned(),
        "700 rows in the test part, 140 of them labelled hateful".to_owned(),
    ] {
        assert!(page.contains(&expected), "{expected}");
    }
    for (name, estimate) in made.challenger.0.figures.iter() {
        assert!(page.contains(&format!("{:.3}", estimate.value.unwrap())), "{name}");
    }
    assert!(page.len() < 400_000, "{} bytes", page.len());
    assert_balanced(&page);
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let made = measure(300, POOR, GOOD, false);
    assert!(page(&made) == page(&made));
}

#[test]
fn a_refusal_lists_every_reason() {
    let made = measure(700, GOOD, POOR, false);
    let page = page(&made);
    assert!(made.verdict.refusals.len() >= 2, "{}", made.verdict);
    for expected in [
        "Not promoted: the champion stays in service",
        "95 % lower bound of -0.",
        "2 of 12 golden texts are misclassified: greeting-3, &lt;/td&gt;",
        "Not representative.",
        "provisional: estimated from few rows",
        "unweighted, which is not representative of the traffic",
    ] {
        assert!(page.contains(expected), "{expected}");
    }
    assert_balanced(&page);
}

/// What was sampled at random gives thresholds that reach their targets by their bounds, and others are estimated.
#[test]
fn thresholds_are_shown_with_their_intervals() {
    for sampled in [true, false] {
        let made = measure(1500, POOR, GOOD, sampled);
        let page = page(&made);
        assert_eq!(page.contains("provisional"), !sampled);
        let ThresholdOutcome::Derived { figures, .. } = made.thresholds.review else {
            panic!("{:?}", made.thresholds.review);
        };
        let [low, high] = figures.recall_interval.unwrap();
        assert!(page.contains(&format!("<small>{low:.3} to {high:.3}</small>")));
    }
}

#[test]
fn a_cross_fitted_verdict_says_so() {
    let mut made = measure(700, POOR, GOOD, true);
    made.verdict.folds = 5;
    let page = page(&made);
    assert!(page.contains("700 rows judged in 5 folds, 140 of them labelled hateful"));
    assert!(page.contains("the labelled rows are divided into 5 folds") && !page.contains("which is never trained on"));
    assert_balanced(&page);
}

/// With a handful of rows, nearly every figure is undefined and is shown as a dash.
#[test]
fn a_report_of_a_few_rows_can_be_rendered() {
    for rows in [1, 2, 6] {
        let page = page(&measure(rows, POOR, GOOD, true));
        assert!(page.contains("expected at least 20 of each") && page.contains("–"));
        assert!(!page.contains("NaN") && !page.contains(">inf"));
        assert_balanced(&page);
    }
}

/// Asserts that every element is closed by its own end tag.
fn assert_balanced(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    for tag in page.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').unwrap();
        let name = tag.split([' ', '\n', '/']).next().unwrap();
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "before </{name}>");
        } else if !(tag.ends_with('/') || ["!DOCTYPE", "meta", "br"].contains(&name)) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?} are not closed");
}

#[test]
#[ignore = "writes sample reports for viewing in a browser"]
fn write_sample_reports() {
    for (name, made) in [
        ("promoted", measure(1500, POOR, GOOD, true)),
        ("refused", measure(700, GOOD, POOR, false)),
        ("few", measure(6, POOR, GOOD, false)),
    ] {
        let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("report-{name}.html"));
        std::fs::write(&path, page(&made)).unwrap();
        eprintln!("{}", path.display());
    }
}
