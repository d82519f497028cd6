//! The champion: the version in service when the retraining begins, and its results on the test part.

use std::sync::Arc;

use anyhow::Context;
use tracing::warn;

use super::measurement::{MeasuredAdapter, TestSettings};
use super::publish::SIGNATURES_FILE;
use crate::config::ModelConfig;
use crate::model::files::checkpoint::Checkpoint;
use crate::prompt::{Prompt, Prompter};
use crate::registry::{AdapterVersion, Pointer, Registry};
use crate::retrain::data::dataset::LabelledRow;
use crate::retrain::data::near_duplicates::Signature;
use crate::retrain::judge::measure;
use crate::serving::ModelSource;

/// The version that the challenger is compared with, or the bare base model.
pub(super) struct Champion {
    /// The pointer that named it. The challenger is promoted only if no other pointer has been added since.
    pub(super) pointer: Option<Pointer>,
    /// The version; absent for the bare base model.
    pub(super) version: Option<AdapterVersion>,
}

/// The champion's results, with the prompts that the challenger is measured on as well.
pub(super) struct MeasuredChampion {
    pub(super) prompter: Arc<Prompter>,
    /// The prompts of the test part, in the order of its rows.
    pub(super) test_prompts: Vec<Prompt>,
    pub(super) measured: MeasuredAdapter,
    /// One margin for each row of the other folds that judges; empty if judging is not cross-fitted.
    pub(super) fold_margins: Vec<f64>,
}

impl Champion {
    /// Reads the version in service.
    ///
    /// A version that was made for another base model cannot be served, so the challenger is then compared with the
    /// bare base model.
    pub(super) async fn read(registry: &Registry, model: &ModelConfig) -> anyhow::Result<Self> {
        let bare = |pointer| Self { pointer, version: None };
        let Some(pointer) = registry.current().await? else {
            return Ok(bare(None));
        };
        let Some(version) = registry.read_current(&pointer).await? else {
            return Ok(bare(Some(pointer)));
        };
        let base = Checkpoint::from_settings(model)?.fingerprint();
        let (found, facts) = (&version.manifest.version, &version.manifest.facts);
        if facts.base != base {
            warn!(
                version = %found,
                base,
                made_for = facts.base,
                "the version in service was made for another base model; comparing with the bare base model"
            );
            return Ok(bare(Some(pointer)));
        }
        Ok(Self {
            pointer: Some(pointer),
            version: Some(version),
        })
    }

    pub(super) fn name(&self) -> String {
        self.version.as_ref().map_or_else(
            || "the bare base model".to_owned(),
            |version| version.manifest.version.to_string(),
        )
    }

    /// Returns the signatures of the rows that the champion was trained on. The bare base model has none.
    pub(super) fn signatures(&self) -> anyhow::Result<Vec<Signature>> {
        let json = self
            .version
            .as_ref()
            .and_then(|version| version.files.get(SIGNATURES_FILE));
        let Some(json) = json else {
            return Ok(Vec::new());
        };
        let numbers: Vec<Vec<u32>> =
            serde_json::from_slice(json).context("cannot read the signatures of the champion's training rows")?;
        let signatures = numbers.iter().map(|numbers| Signature::from_numbers(numbers));
        signatures
            .collect::<Option<_>>()
            .context("the signatures of the champion's training rows do not have the expected length")
    }

    /// Loads the champion, measures it on the test part, scores the rows of the other folds, and releases it.
    ///
    /// Sets the device of `source` to the one that the champion was loaded on, so that everything that is compared is
    /// computed on the same device.
    pub(super) fn measure(
        &self,
        source: &mut ModelSource,
        registry: &Registry,
        test: &[LabelledRow],
        folds: &[LabelledRow],
        settings: &TestSettings,
    ) -> anyhow::Result<MeasuredChampion> {
        let version = self.version.as_ref();
        let mut loaded = source.load_version(version.map(|_| registry), version)?;
        source.model.device = loaded.classifier.placement().choice();
        let prompter = loaded.classifier.prompter();
        let test_prompts = measure::prompts(&prompter, test)?;
        let margins = measure::margins(&mut loaded.classifier, &test_prompts)?;
        let fold_margins = measure::margins(&mut loaded.classifier, &measure::prompts(&prompter, folds)?)?;
        // Training loads the base model in another form.
        drop(loaded.classifier);
        source.release_base();
        let measured = settings.measure(test, margins, loaded.calibration, loaded.thresholds)?;
        Ok(MeasuredChampion {
            prompter,
            test_prompts,
            measured,
            fold_margins,
        })
    }
}
