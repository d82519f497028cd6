//! Reads the challenger back from its files, and calibrates it on the validation part.

use anyhow::{Context, anyhow};

use crate::classifier::Classifier;
use crate::config::RetrainConfig;
use crate::prompt::Prompter;
use crate::registry::ADAPTER_FILES;
use crate::retrain::data::dataset::LabelledRow;
use crate::retrain::judge::calibration::{FittedCalibration, fit};
use crate::retrain::judge::measure;
use crate::retrain::judge::thresholds::{ReviewTarget, ThresholdDerivation, ThresholdTargets};
use crate::retrain::train::peft::AdapterFiles;
use crate::serving::ModelSource;

/// The challenger as it will be served, with its calibration and thresholds.
pub(super) struct CalibratedChallenger {
    pub(super) classifier: Classifier,
    pub(super) calibration: FittedCalibration,
    pub(super) thresholds: ThresholdDerivation,
}

impl CalibratedChallenger {
    /// Reads the adapter back from `files`, fits its calibration and derives its thresholds.
    pub(super) fn new(
        files: &AdapterFiles,
        source: &ModelSource,
        prompter: &Prompter,
        validation: &[LabelledRow],
        config: &RetrainConfig,
    ) -> anyhow::Result<Self> {
        let mut classifier = read_back(files, source)?;
        let prompts = measure::prompts(prompter, validation)?;
        let margins = measure::margins(&mut classifier, &prompts)?;
        let fitted = fit(&measure::calibration_rows(validation, &margins))?;
        let rows = measure::threshold_rows(validation, &margins, fitted.calibration);
        Ok(Self {
            classifier,
            thresholds: ThresholdDerivation::derive(&rows, targets(config))?,
            calibration: fitted,
        })
    }
}

/// Loads the adapter from disk as a daemon does, so that the model that is measured is the one that will be served.
fn read_back(files: &AdapterFiles, source: &ModelSource) -> anyhow::Result<Classifier> {
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
    }
}
