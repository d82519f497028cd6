//! Evaluation and calibration equal recorded results of scikit-learn, NumPy and a general optimiser
//! (`tests/fixtures/evaluation/record.py`).

use crate::common::fixture;
use moderatord::decide::Calibration;
use moderatord::retrain::judge::calibration::{CalibrationRow, fit};
use moderatord::retrain::judge::evaluation::{
    Bootstrap, Curves, EvaluationConfig, Point, ScoredRow, evaluate, quantile,
};
use serde_json::Value;

/// Allows for sums over 300 rows in a different order than NumPy's.
const TOLERANCE: f64 = 1e-12;

fn recorded() -> Value {
    let bytes = std::fs::read(fixture("evaluation/figures.json")).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn numbers(values: &Value) -> Vec<f64> {
    let values = values.as_array().unwrap().iter();
    values.map(|value| value.as_f64().unwrap()).collect()
}

fn rows(recorded: &Value, case: &Value) -> Vec<ScoredRow> {
    let communities = recorded["community"].as_array().unwrap().iter();
    let communities = communities.map(|name| name.as_str().filter(|name| !name.is_empty()).map(str::to_owned));
    let rows = numbers(&recorded["margin"])
        .into_iter()
        .zip(numbers(&recorded["hateful"]))
        .zip(numbers(&case["weight"]))
        .zip(communities);
    rows.map(|(((margin, hateful), weight), community)| ScoredRow {
        margin,
        probability: 1.0 / (1.0 + (-margin).exp()),
        hateful: hateful == 1.0,
        weight,
        community,
    })
    .collect()
}

fn assert_close(what: &str, found: f64, expected: &Value) {
    let expected = expected.as_f64().unwrap();
    assert!(
        (found - expected).abs() < TOLERANCE,
        "{what}: {found}, expected {expected}"
    );
}

#[test]
fn figures_equal_those_of_scikit_learn() {
    let recorded = recorded();
    for case in recorded["cases"].as_array().unwrap() {
        let config = EvaluationConfig {
            threshold: case["threshold"].as_f64().unwrap(),
            bootstrap: Bootstrap {
                resamples: 100,
                seed: 1,
            },
        };
        let evaluation = evaluate(&rows(&recorded, case), config).unwrap();
        for (name, estimate) in evaluation.figures.iter() {
            let value = estimate.value.unwrap();
            assert_close(name, value, &case["figures"][name]);
            let [low, high] = estimate.interval.unwrap();
            assert!(high > low && high - low < 0.4, "{name}: {value} from {low} to {high}");
        }
        let confusion = evaluation.weighted_confusion;
        assert_close(
            "true positives",
            confusion.true_positives,
            &case["confusion"]["true_positives"],
        );
        assert_close(
            "false positives",
            confusion.false_positives,
            &case["confusion"]["false_positives"],
        );
        assert_close(
            "false negatives",
            confusion.false_negatives,
            &case["confusion"]["false_negatives"],
        );
        assert_close(
            "true negatives",
            confusion.true_negatives,
            &case["confusion"]["true_negatives"],
        );
        assert_eq!(evaluation.communities.len(), 3);
        for community in &evaluation.communities {
            let name = community.community.as_deref().unwrap_or("");
            let expected = &case["communities"][name];
            assert_eq!(
                (Some(community.rows as u64), Some(community.hateful as u64)),
                (expected["rows"].as_u64(), expected["hateful"].as_u64())
            );
            assert_close(
                name,
                community.false_positive_rate.unwrap(),
                &expected["false_positive_rate"],
            );
            assert_close(name, community.f1.unwrap(), &expected["f1"]);
        }
    }
}

#[test]
fn curves_equal_those_of_scikit_learn() {
    let recorded = recorded();
    for case in recorded["cases"].as_array().unwrap() {
        let curves = Curves::new(&rows(&recorded, case)).unwrap();
        let check = |name: &str, found: &[Point], [x, y]: [&Value; 2]| {
            let expected: Vec<_> = numbers(x).into_iter().zip(numbers(y)).collect();
            assert_eq!(found.len(), expected.len(), "{name}");
            for (index, (point, (x, y))) in found.iter().zip(expected).enumerate() {
                let near = (point.x - x).abs() < TOLERANCE && (point.y - y).abs() < TOLERANCE;
                assert!(near, "{name} {index}: {point:?}, expected {x}, {y}");
            }
        };
        check("roc", &curves.roc, [&case["roc"][0], &case["roc"][1]]);
        let expected = &case["precision_recall"];
        check(
            "precision-recall",
            &curves.precision_recall,
            [&expected[0], &expected[1]],
        );
    }
}

#[test]
fn quantiles_equal_those_of_numpy() {
    let recorded = recorded();
    let quantiles = &recorded["quantiles"];
    let values = numbers(&quantiles["values"]);
    for (share, expected) in numbers(&quantiles["shares"])
        .into_iter()
        .zip(quantiles["expected"].as_array().unwrap())
    {
        assert_close("quantile", quantile(&values, share).unwrap(), expected);
    }
}

/// The expected values come from a general optimiser on the same objective, stopped at a gradient of about 1e-9.
#[test]
fn the_calibration_minimises_the_loss() {
    let recorded = recorded();
    for case in recorded["cases"].as_array().unwrap() {
        let rows: Vec<_> = rows(&recorded, case)
            .into_iter()
            .map(|row| CalibrationRow {
                margin: row.margin,
                hateful: f64::from(u8::from(row.hateful)),
                weight: row.weight,
            })
            .collect();
        let fitted = fit(&rows).unwrap();
        let Calibration::Platt { slope, intercept } = fitted.calibration else {
            panic!("{:?}", fitted.method);
        };
        let expected = |name: &str| case["platt"][name].as_f64().unwrap();
        assert!((slope - expected("slope")).abs() < 1e-6, "{slope}");
        assert!((intercept - expected("intercept")).abs() < 1e-6, "{intercept}");
        assert!(fitted.log_loss_after < fitted.log_loss_before);
    }
}
