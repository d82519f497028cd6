//! Cross-fitted judging: every labelled row judges, through an adapter that was not trained on it.
//!
//! The test part is the first fold, which the challenger predicts itself. The other rows are divided into further
//! folds. For each of them, the split is rotated so that the fold is its test part, and an adapter is trained on the
//! rotated training part, exactly as the challenger was on its own. What is judged is thus the way in which challengers
//! are trained on this feedback, of which the challenger is one result. The adapters of the folds are then discarded.
//!
//! A row judges only if neither side has seen it. The challenger's side is kept clear of it, and of its near-duplicates,
//! by the rotated split. Near-duplicates of the rows that the champion was trained on do not judge, because the champion
//! knows their labels; the validation part, with which the champion may have been calibrated, does judge, to the
//! champion's advantage. Of several near-duplicates, one judges, because the bootstrap takes rows as independent.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::calibrate::read_back;
use super::split::{FeedbackSplit, single_class};
use super::train::Challenger;
use super::{ProgressOf, SessionProgress};
use crate::config::{CrossFit, RetrainConfig};
use crate::prompt::Prompter;
use crate::retrain::data::dataset::{Dataset, LabelledRow};
use crate::retrain::data::near_duplicates::{NearDuplicateIndex, Signature};
use crate::retrain::judge::measure;
use crate::retrain::judge::scale::Scale;
use crate::serving::ModelSource;

/// Number of rows of the smaller class in the test part from which `cross_fit = "auto"` does not cross-fit.
///
/// In `examples/gate_power.rs`, 500 rows, half of them hateful, show a difference of 0.03 in PR-AUC with a probability
/// of about 80 %.
const MIN_TEST_CLASS_ROWS: usize = 250;

/// The folds other than the test part.
pub(super) struct CrossFitPlan {
    folds: Vec<Fold>,
    /// Rows that do not judge because they are near-duplicates of the champion's training rows.
    pub(super) near_champion: usize,
    /// Rows that do not judge because they are near-duplicates of another row that does.
    pub(super) near_judged: usize,
}

struct Fold {
    /// The rotated split, whose test part is the fold.
    dataset: Dataset,
    /// Whether each row of the fold judges.
    judges: Vec<bool>,
}

/// A row of a fold, with the margin of the fold's adapter.
pub(super) struct FoldRow {
    pub(super) row: LabelledRow,
    /// Number of the fold, from 1.
    pub(super) fold: usize,
    /// The margin, standardised by the scale of the fold's adapter.
    pub(super) standard_margin: f64,
    pub(super) judges: bool,
}

/// The results of the folds.
pub(super) struct CrossFitted {
    pub(super) rows: Vec<FoldRow>,
    /// Time taken to train and measure the adapters of the folds.
    pub(super) elapsed: Duration,
}

impl CrossFitPlan {
    /// Divides the rows into folds, or returns `None` if judging is not to be cross-fitted.
    pub(super) fn new(split: &FeedbackSplit, config: &RetrainConfig) -> Option<Self> {
        let test = &split.dataset.test;
        let hateful = test.iter().filter(|row| measure::is_hateful(row)).count();
        let few = hateful.min(test.len() - hateful) < MIN_TEST_CLASS_ROWS;
        let wanted = match config.cross_fit {
            CrossFit::Auto => few,
            CrossFit::Always => true,
            CrossFit::Never => false,
        };
        if !wanted {
            return None;
        }
        let mut plan = Self {
            folds: Vec::new(),
            near_champion: 0,
            near_judged: 0,
        };
        let mut judged = NearDuplicateIndex::default();
        test.iter()
            .for_each(|row| judged.insert(Signature::new(&row.feedback.text)));
        for [start, share] in arcs(config.test, config.folds) {
            let dataset = split.rotated(start, share);
            let parts = [("training", &dataset.train), ("validation", &dataset.validation)];
            if let Some(reason) = parts.into_iter().find_map(|(part, rows)| single_class(part, rows)) {
                warn!(
                    reason,
                    "the rows of a fold do not judge, because no adapter can be trained without them"
                );
                continue;
            }
            let judges = dataset.test.iter().map(|row| {
                let signature = Signature::new(&row.feedback.text);
                if split.trained_on.contains_near_duplicate(&signature) {
                    plan.near_champion += 1;
                    return false;
                }
                if judged.contains_near_duplicate(&signature) {
                    plan.near_judged += 1;
                    return false;
                }
                judged.insert(signature);
                true
            });
            let judges = judges.collect();
            if !dataset.test.is_empty() {
                plan.folds.push(Fold { dataset, judges });
            }
        }
        Some(plan)
    }

    /// Returns the number of adapters that are trained for the folds.
    pub(super) fn adapters(&self) -> usize {
        self.folds.len()
    }

    /// Returns the rows of the folds that judge, in order.
    pub(super) fn judging_rows(&self) -> Vec<LabelledRow> {
        let judging = self.folds.iter().flat_map(|fold| {
            let rows = fold.dataset.test.iter().zip(&fold.judges);
            rows.filter(|(_, judges)| **judges).map(|(row, _)| row.clone())
        });
        judging.collect()
    }

    /// Trains an adapter for each fold and scores the rows of the fold with it.
    pub(super) fn run(
        &self,
        source: &mut ModelSource,
        prompter: &Prompter,
        config: &RetrainConfig,
        progress: &mut dyn FnMut(SessionProgress),
    ) -> anyhow::Result<CrossFitted> {
        let start = Instant::now();
        let adapters = self.adapters() + 1;
        let mut rows = Vec::new();
        for (number, fold) in (1..).zip(&self.folds) {
            info!(
                adapter = number + 1,
                adapters, "training an adapter for cross-fitted judging"
            );
            let mut report = ProgressOf {
                adapter: number + 1,
                adapters,
            }
            .reporter(progress);
            let adapter = Challenger::train(&source.model, prompter, &fold.dataset, config, &mut report)?;
            let mut classifier = read_back(&adapter.files, source)?;
            let mut margins_of = |part: &[LabelledRow]| -> anyhow::Result<Vec<f64>> {
                Ok(measure::margins(&mut classifier, &measure::prompts(prompter, part)?)?)
            };
            let (validation, test) = (margins_of(&fold.dataset.validation)?, margins_of(&fold.dataset.test)?);
            drop(classifier);
            // Training loads the base model in another form.
            source.release_base();
            let scale = Scale::of(validation.iter().chain(&test).copied());
            let judged = fold.dataset.test.iter().zip(test).zip(&fold.judges);
            rows.extend(judged.map(|((row, margin), &judges)| FoldRow {
                row: row.clone(),
                fold: number,
                standard_margin: scale.standardise(margin),
                judges,
            }));
        }
        Ok(CrossFitted {
            rows,
            elapsed: start.elapsed(),
        })
    }
}

/// Returns where each fold other than the test part begins, and its share of the texts. There are at most `folds` folds
/// with the test part, and each is at least as large as it, so that no adapter of a fold is trained on more rows than
/// the challenger.
fn arcs(test: f64, folds: usize) -> Vec<[f64; 2]> {
    // Rounded, so that a share of 0.2 gives five folds.
    let most = (1.0 / test + 1e-9) as usize;
    let others = folds.min(most).max(2) - 1;
    let share = (1.0 - test) / others as f64;
    (0..others).map(|fold| [test + fold as f64 * share, share]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folds_cover_all_texts_and_are_never_smaller_than_the_test_part() {
        let check = |test: f64, folds, expected: usize| {
            let arcs = arcs(test, folds);
            assert_eq!(arcs.len() + 1, expected, "{test} {folds}");
            let mut end = test;
            for [start, share] in arcs {
                assert!(
                    (start - end).abs() < 1e-12 && share >= test - 1e-12,
                    "{test} {folds}: {start} {share}"
                );
                end = start + share;
            }
            assert!((end - 1.0).abs() < 1e-12);
        };
        check(0.2, 5, 5);
        check(0.2, 20, 5);
        check(0.15, 20, 6);
        check(0.05, 5, 5);
        check(0.05, 2, 2);
        check(0.5, 5, 2);
    }
}
