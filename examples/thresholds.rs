//! Measures the thresholds that `retrain` derives from few labels, on the margins of a real adapter.
//!
//!     cargo run --release --example thresholds SCORED.jsonl [ROWS ...]
//!
//! Each line of SCORED.jsonl has the `margin` that an adapter gave to a comment it was not trained on, and its `label`
//! ("hateful" or "ok"). Some of the rows are drawn 300 times; the calibration and the thresholds are derived from them,
//! with targets of 0.95 for the precision of `block` and 0.9 for the recall of `review`, and measured on the others.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "an example prints its results and panics on errors"
)]

use moderatord::decide::Calibration;
use moderatord::retrain::judge::calibration::{CalibrationRow, fit};
use moderatord::retrain::judge::thresholds::{
    ReviewTarget, ThresholdDerivation, ThresholdOutcome, ThresholdRow, ThresholdTargets,
};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde_json::Value;

const DRAWS: u64 = 300;

/// A margin, and whether the comment is labelled hateful.
type Scored = (f64, bool);

/// What a threshold does on the rows that it was not derived from.
struct Measured {
    precision: f64,
    recall: f64,
    share: f64,
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let text = std::fs::read_to_string(arguments.next().unwrap()).unwrap();
    let row = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        (row["margin"].as_f64().unwrap(), row["label"] == "hateful")
    };
    let rows: Vec<Scored> = text.lines().map(row).collect();
    let mut counts: Vec<usize> = arguments.map(|count| count.parse().unwrap()).collect();
    if counts.is_empty() {
        // What retraining on 200, 800 and 5,000 labels leaves for the thresholds.
        counts = vec![160, 640, 750];
    }
    println!(
        "| rows | threshold | derived | mean precision | 5th to 95th percentile | mean recall | 5th to 95th percentile | mean share |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for count in counts {
        let [mut block, mut review] = [Vec::new(), Vec::new()];
        for seed in 0..DRAWS {
            let mut rows = rows.clone();
            rows.shuffle(&mut StdRng::seed_from_u64(seed));
            let (labelled, others) = rows.split_at(count);
            let calibration = calibration(labelled);
            let targets = ThresholdTargets {
                block_precision: 0.95,
                review: ReviewTarget::Recall(0.9),
                provisional: true,
            };
            let derivation = ThresholdDerivation::derive(&threshold_rows(labelled, calibration), targets).unwrap();
            let others = threshold_rows(others, calibration);
            block.extend(measure(&derivation.block, &others));
            review.extend(measure(&derivation.review, &others));
        }
        print_row(count, "block", &block);
        print_row(count, "review", &review);
    }
}

fn calibration(rows: &[Scored]) -> Calibration {
    let rows: Vec<CalibrationRow> = rows
        .iter()
        .map(|&(margin, hateful)| CalibrationRow {
            margin,
            hateful: f64::from(u8::from(hateful)),
            weight: 1.0,
        })
        .collect();
    fit(&rows).unwrap().calibration
}

fn threshold_rows(rows: &[Scored], calibration: Calibration) -> Vec<ThresholdRow> {
    let row = |&(margin, hateful): &Scored| ThresholdRow {
        probability: calibration.probability(margin as f32),
        hateful,
        inclusion: None,
    };
    rows.iter().map(row).collect()
}

/// Returns `None` if no threshold was derived, or if it flags nothing.
fn measure(outcome: &ThresholdOutcome, rows: &[ThresholdRow]) -> Option<Measured> {
    let threshold = outcome.value()?;
    let flagged = rows.iter().filter(|row| row.probability >= threshold);
    let (count, found) = (
        flagged.clone().count() as f64,
        flagged.filter(|row| row.hateful).count() as f64,
    );
    let hateful = rows.iter().filter(|row| row.hateful).count() as f64;
    (count > 0.0).then(|| Measured {
        precision: found / count,
        recall: found / hateful,
        share: count / rows.len() as f64,
    })
}

fn print_row(count: usize, name: &str, measured: &[Measured]) {
    let column = |value: fn(&Measured) -> f64| {
        let mut values: Vec<f64> = measured.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        let at = |share: f64| values.get((share * (values.len() as f64 - 1.0)) as usize).copied();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        (mean, at(0.05).unwrap_or(f64::NAN), at(0.95).unwrap_or(f64::NAN))
    };
    let (precision, recall) = (column(|one| one.precision), column(|one| one.recall));
    println!(
        "| {count} | {name} | {:.0} % | {:.3} | {:.3} to {:.3} | {:.3} | {:.3} to {:.3} | {:.3} |",
        100.0 * measured.len() as f64 / DRAWS as f64,
        precision.0,
        precision.1,
        precision.2,
        recall.0,
        recall.1,
        recall.2,
        column(|one| one.share).0
    );
}
