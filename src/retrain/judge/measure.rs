//! Labelled rows scored as they are served: windows, normaliser, largest margin.

use super::calibration::CalibrationRow;
use super::evaluation::{ScoredRow, SoftLabels};
use super::thresholds::ThresholdRow;
use crate::decide::Calibration;
use crate::prompt::{Prompt, PromptError, Prompter};
use crate::retrain::data::dataset::LabelledRow;
use crate::retrain::train::trainer::TrainingRow;
use crate::scorer::{Row, ScoreError, Scorer, largest_margin};

/// Rows of one call of the scorer.
const ROWS: usize = 256;

/// Prompts of labelled rows.
///
/// # Errors
/// The tokenizer fails on one.
pub fn prompts(prompter: &Prompter, rows: &[LabelledRow]) -> Result<Vec<Prompt>, PromptError> {
    rows.iter().map(|row| prompter.encode(&row.feedback.text)).collect()
}

/// What the trainer takes: a row's windows share its weight.
pub fn training_rows(rows: &[LabelledRow], prompts: &[Prompt]) -> Vec<TrainingRow> {
    let windows = |(row, prompt): (&LabelledRow, &Prompt)| {
        let (hateful, weight) = (row.feedback.hateful, row.weight / prompt.rows.len() as f32);
        let window = move |row: &Row| TrainingRow {
            row: row.clone(),
            hateful,
            weight,
        };
        prompt.rows.iter().map(window).collect::<Vec<_>>()
    };
    rows.iter().zip(prompts).flat_map(windows).collect()
}

/// The largest margin of each prompt's windows.
///
/// # Errors
/// The scorer's.
pub fn margins(scorer: &mut dyn Scorer, prompts: &[Prompt]) -> Result<Vec<f64>, ScoreError> {
    let rows: Vec<Row> = prompts.iter().flat_map(|prompt| prompt.rows.iter().cloned()).collect();
    let mut margins = Vec::with_capacity(rows.len());
    for chunk in rows.chunks(ROWS) {
        margins.extend(scorer.score(chunk)?);
    }
    let mut margins = margins.into_iter();
    let largest = |prompt: &Prompt| {
        let windows = margins.by_ref().take(prompt.rows.len());
        f64::from(largest_margin(windows).unwrap_or(f32::NEG_INFINITY))
    };
    Ok(prompts.iter().map(largest).collect())
}

/// How many rows of the traffic a row stands for.
pub fn traffic_weight(row: &LabelledRow) -> f64 {
    row.feedback
        .inclusion
        .map_or(1.0, |inclusion| 1.0 / f64::from(inclusion))
}

/// As the calibration takes them.
pub fn calibration_rows(rows: &[LabelledRow], margins: &[f64]) -> Vec<CalibrationRow> {
    let row = |(row, &margin): (&LabelledRow, &f64)| CalibrationRow {
        margin,
        hateful: f64::from(row.feedback.hateful),
        weight: traffic_weight(row),
    };
    rows.iter().zip(margins).map(row).collect()
}

/// As the thresholds take them.
pub fn threshold_rows(rows: &[LabelledRow], margins: &[f64], calibration: Calibration) -> Vec<ThresholdRow> {
    let row = |(row, &margin): (&LabelledRow, &f64)| ThresholdRow {
        probability: calibration.probability(margin as f32),
        hateful: is_hateful(row),
        inclusion: row.feedback.inclusion.map(f64::from),
    };
    rows.iter().zip(margins).map(row).collect()
}

/// As the evaluation takes them.
pub fn scored_rows(rows: &[LabelledRow], margins: &[f64], calibration: Calibration) -> Vec<ScoredRow> {
    let row = |(row, &margin): (&LabelledRow, &f64)| ScoredRow {
        margin,
        probability: calibration.probability(margin as f32),
        hateful: is_hateful(row),
        weight: traffic_weight(row),
        community: row.feedback.community_id.clone(),
    };
    rows.iter().zip(margins).map(row).collect()
}

/// The likelier class.
pub fn is_hateful(row: &LabelledRow) -> bool {
    SoftLabels::LIKELIER
        .round(f64::from(row.feedback.hateful))
        .unwrap_or(true)
}
