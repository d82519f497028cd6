//! Scores labelled rows as they are scored in service (normalised, split into windows, the largest margin counts), and
//! converts them to the inputs of training, calibration, thresholds and evaluation.

use super::calibration::CalibrationRow;
use super::evaluation::ScoredRow;
use super::thresholds::ThresholdRow;
use crate::decide::Calibration;
use crate::prompt::{Prompt, PromptError, Prompter};
use crate::retrain::data::dataset::LabelledRow;
use crate::retrain::train::trainer::TrainingRow;
use crate::scorer::{Row, ScoreError, Scorer, comment_margin};

/// Number of model rows (windows) that are passed to the scorer at once.
const ROWS_PER_CALL: usize = 256;

/// Encodes the text of every labelled row.
///
/// # Errors
/// Returns an error if the tokenizer fails.
pub(crate) fn prompts(prompter: &Prompter, rows: &[LabelledRow]) -> Result<Vec<Prompt>, PromptError> {
    rows.iter().map(|row| prompter.encode(&row.feedback.text)).collect()
}

/// Returns one training row for each window. The windows of a labelled row share its weight equally.
pub(crate) fn training_rows(rows: &[LabelledRow], prompts: &[Prompt]) -> Vec<TrainingRow> {
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

/// Returns the margin of every prompt; see [`comment_margin`].
///
/// # Errors
/// Returns an error if the scorer fails.
pub(crate) fn margins(scorer: &mut dyn Scorer, prompts: &[Prompt]) -> Result<Vec<f64>, ScoreError> {
    let rows: Vec<Row> = prompts.iter().flat_map(|prompt| prompt.rows.iter().cloned()).collect();
    let mut margins = Vec::with_capacity(rows.len());
    for chunk in rows.chunks(ROWS_PER_CALL) {
        margins.extend(scorer.score(chunk)?);
    }
    let mut margins = margins.into_iter();
    let margin = |prompt: &Prompt| {
        let windows = margins.by_ref().take(prompt.rows.len());
        f64::from(comment_margin(windows, prompt.facts()).map_or(f32::NEG_INFINITY, |scored| scored.margin))
    };
    Ok(prompts.iter().map(margin).collect())
}

/// Returns the number of comments in the traffic that a row represents: the inverse of the probability with which it
/// was sampled, or 1 if that is not known.
pub(crate) fn traffic_weight(row: &LabelledRow) -> f64 {
    row.feedback
        .inclusion
        .map_or(1.0, |inclusion| 1.0 / f64::from(inclusion))
}

/// Converts rows and their margins to the input of [`fit`](super::calibration::fit).
pub(crate) fn calibration_rows(rows: &[LabelledRow], margins: &[f64]) -> Vec<CalibrationRow> {
    let row = |(row, &margin): (&LabelledRow, &f64)| CalibrationRow {
        margin,
        hateful: f64::from(row.feedback.hateful),
        weight: traffic_weight(row),
    };
    rows.iter().zip(margins).map(row).collect()
}

/// Converts rows and their margins to the input of
/// [`ThresholdDerivation::derive`](super::thresholds::ThresholdDerivation::derive).
pub(crate) fn threshold_rows(rows: &[LabelledRow], margins: &[f64], calibration: Calibration) -> Vec<ThresholdRow> {
    let row = |(row, &margin): (&LabelledRow, &f64)| ThresholdRow {
        probability: calibration.probability(margin as f32),
        hateful: is_hateful(row),
        inclusion: row.feedback.inclusion.map(f64::from),
    };
    rows.iter().zip(margins).map(row).collect()
}

/// Converts rows and their margins to the input of [`evaluate`](super::evaluation::evaluate).
pub(crate) fn scored_rows(rows: &[LabelledRow], margins: &[f64], calibration: Calibration) -> Vec<ScoredRow> {
    let row = |(row, &margin): (&LabelledRow, &f64)| ScoredRow {
        margin,
        probability: calibration.probability(margin as f32),
        hateful: is_hateful(row),
        weight: traffic_weight(row),
        community: row.feedback.community_id.clone(),
    };
    rows.iter().zip(margins).map(row).collect()
}

/// Returns the label as a class. A label of exactly one half counts as hateful, as it does in the split.
pub(crate) fn is_hateful(row: &LabelledRow) -> bool {
    row.feedback.hateful >= 0.5
}
