//! Trains the challenger on the training part.

use std::time::{Duration, Instant};

use anyhow::bail;

use crate::config::{ModelConfig, Quantize, RetrainConfig};
use crate::fault::Faults;
use crate::model::device::Placement;
use crate::model::files::bundled;
use crate::model::files::checkpoint::Checkpoint;
use crate::model::forward::gemma::Gemma;
use crate::model::forward::linear::LoraMode;
use crate::model::forward::load::LoadOptions;
use crate::prompt::Prompter;
use crate::retrain::data::dataset::{Dataset, LabelledRow};
use crate::retrain::judge::measure;
use crate::retrain::train::peft;
use crate::retrain::train::trainer::{FrameIds, TrainerConfig, TrainingProgress, train};

/// A trained adapter, in the form of its files.
pub(super) struct Challenger {
    pub(super) files: peft::AdapterFiles,
    /// Fingerprint of the base model.
    pub(super) base: String,
    pub(super) config: TrainerConfig,
    /// Number of epochs run. With early stopping, it may be lower than the configured number.
    pub(super) epochs: usize,
    /// Own tokens trained on, over all epochs.
    pub(super) tokens: usize,
    /// How long training took, including the time to load the base model.
    pub(super) elapsed: Duration,
}

impl Challenger {
    pub(super) fn train(
        model: &ModelConfig,
        prompter: &Prompter,
        dataset: &Dataset,
        config: &RetrainConfig,
        progress: &mut dyn FnMut(TrainingProgress),
    ) -> anyhow::Result<Self> {
        let start = Instant::now();
        let config = trainer_config(config);
        let checkpoint = Checkpoint::from_settings(model)?;
        let base = checkpoint.fingerprint();
        let options = LoadOptions {
            lora: LoraMode::Unmerged,
            quantize: Quantize::None,
            placement: Placement::for_checkpoint(model, &checkpoint).map_err(Faults::from)?,
            for_training: true,
        };
        let gemma = Gemma::load(&checkpoint, None, options)?;
        checkpoint.require_unchanged()?;
        let Some(eos) = prompter.eos_id() else {
            bail!("the vocabulary has no `<eos>` token, which training requires");
        };
        let ids = FrameIds {
            prefix: prompter.prefix(),
            labels: prompter.label_ids(),
            eos,
        };
        let rows = |part: &[LabelledRow]| -> anyhow::Result<_> {
            Ok(measure::training_rows(part, &measure::prompts(prompter, part)?))
        };
        let (training, validation) = (rows(&dataset.train)?, rows(&dataset.validation)?);
        let trained = train(gemma, ids, &config, &training, &validation, progress)?;
        // The name under which PEFT looks for the base model. moderatord uses the fingerprint in the manifest instead.
        let name = match &model.path {
            Some(path) => path.display().to_string(),
            None => bundled::NAME.to_owned(),
        };
        let files = peft::write(trained.trainable.variables(), &config, &name)?;
        Ok(Self {
            files,
            base,
            config,
            epochs: trained.epochs,
            tokens: trained.tokens,
            elapsed: start.elapsed(),
        })
    }
}

fn trainer_config(config: &RetrainConfig) -> TrainerConfig {
    TrainerConfig {
        loss: config.loss,
        targets: config.targets.clone(),
        rank: config.rank,
        alpha: config.alpha,
        use_rslora: config.rslora,
        learning_rate: config.learning_rate,
        epochs: config.epochs,
        batch_rows: config.batch,
        patience: config.patience,
        seed: config.seed,
        ..TrainerConfig::default()
    }
}
