//! Reads the challenger back from its files, calibrates it and derives its thresholds.
//!
//! Both use the validation part. If judging is cross-fitted, they also use the training part, with the margins of the
//! adapters that were not trained on the rows, moved to the scale of the challenger. The test part is used for neither,
//! apart from that scale, which needs no labels.

use std::collections::BTreeSet;

use anyhow::{Context, anyhow};

use super::champion::MeasuredChampion;
use super::cross_fit::CrossFitted;
use super::split::FeedbackSplit;

use crate::classifier::Classifier;
use crate::config::RetrainConfig;
use crate::registry::ADAPTER_FILES;
use crate::retrain::judge::calibration::{FittedCalibration, fit};
use crate::retrain::judge::measure;
use crate::retrain::judge::scale::Scale;
use crate::retrain::judge::thresholds::{ReviewTarget, ThresholdDerivation, ThresholdTargets};
use crate::retrain::train::peft::AdapterFiles;
use crate::serving::ModelSource;

/// The challenger as it will be served, with its calibration and thresholds.
pub(super) struct CalibratedChallenger {
    pub(super) classifier: Classifier,
    pub(super) calibration: FittedCalibration,
    pub(super) thresholds: ThresholdDerivation,
    /// One margin for each row of the test part.
    pub(super) test_margins: Vec<f64>,
    /// The scale of the challenger's margins.
    pub(super) scale: Scale,
}

impl CalibratedChallenger {
    /// Reads the adapter back from `files`, fits its calibration and derives its thresholds.
    pub(super) fn new(
        files: &AdapterFiles,
        source: &ModelSource,
        champion: &MeasuredChampion,
        split: &FeedbackSplit,
        cross_fitted: Option<&CrossFitted>,
        config: &RetrainConfig,
    ) -> anyhow::Result<Self> {
        let mut classifier = read_back(files, source)?;
        let mut rows = split.dataset.validation.clone();
        let prompts = measure::prompts(&champion.prompter, &rows)?;
        let mut margins = measure::margins(&mut classifier, &prompts)?;
        let test_margins = measure::margins(&mut classifier, &champion.test_prompts)?;
        let scale = Scale::of(margins.iter().chain(&test_margins).copied());
        if let Some(CrossFitted { rows: folds, .. }) = cross_fitted {
            let train = split.dataset.train.iter().map(|row| row.feedback.content_id.as_str());
            let train: BTreeSet<&str> = train.collect();
            for fold in folds {
                if train.contains(fold.row.feedback.content_id.as_str()) {
                    margins.push(scale.margin(fold.standard_margin));
                    rows.push(fold.row.clone());
                }
            }
        }
        let fitted = fit(&measure::calibration_rows(&rows, &margins))?;
        let rows = measure::threshold_rows(&rows, &margins, fitted.calibration);
        Ok(Self {
            classifier,
            thresholds: ThresholdDerivation::derive(&rows, targets(config))?,
            calibration: fitted,
            test_margins,
            scale,
        })
    }
}

/// Loads the adapter from disk as a daemon does, so that the model that is measured is the one that will be served.
pub(super) fn read_back(files: &AdapterFiles, source: &ModelSource) -> anyhow::Result<Classifier> {
    let folder = tempfile::tempdir().context("cannot create a temporary folder for the adapter")?;
    let [config, weights] = ADAPTER_FILES.map(|name| folder.path().join(name));
    std::fs::write(&config, &files.config).context("cannot write the adapter to a temporary folder")?;
    std::fs::write(&weights, &files.weights).context("cannot write the adapter to a temporary folder")?;
    // These faults are not the operator's: the files were written a moment ago.
    let loaded = source.load_with_adapter(Some(folder.path()));
    loaded.map_err(|faults| anyhow!("cannot load the trained adapter: {}", faults.on_one_line()))
}

fn targets(config: &RetrainConfig) -> ThresholdTargets {
    let review = match config.review_share {
        Some(share) => ReviewTarget::Share(share),
        None => ReviewTarget::Recall(config.review_recall),
    };
    ThresholdTargets {
        block_precision: config.block_precision,
        review,
        provisional: config.provisional_thresholds,
    }
}
