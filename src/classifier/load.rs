//! Loads a classifier: first every part, collecting all faults, and then the classifier from these parts.

use std::path::Path;
use std::sync::Arc;

use tracing::{info, warn};

use super::Classifier;
use crate::config::{ModelConfig, PromptConfig, Quantize};
use crate::fault::{Fault, Faults};
use crate::message::ModelIdentity;
use crate::model::device::Placement;
use crate::model::files::bundled;
use crate::model::files::checkpoint::Checkpoint;
use crate::model::files::lora::Adapter;
use crate::model::forward::gemma::Gemma;
use crate::model::forward::linear::LoraMode;
use crate::model::forward::load::LoadOptions;
use crate::prompt::Prompter;

/// The parts of a classifier, which loaded without a fault and fit together.
struct LoadedParts {
    /// The content hash of the checkpoint.
    base: String,
    placement: Placement,
    prompter: Prompter,
    adapter: Option<Adapter>,
    gemma: Gemma,
}

impl Classifier {
    /// Loads the base model, the adapter and the frame that the settings name, and merges the adapter into the weights.
    ///
    /// # Errors
    /// Returns every fault of the device, the checkpoint, the adapter and the frame.
    pub fn load(model: &ModelConfig, prompt: &PromptConfig) -> Result<Self, Faults> {
        Self::load_with(model, prompt, LoraMode::Merged)
    }

    /// Loads the model like [`Classifier::load`], with the adapter merged into the weights or beside them.
    ///
    /// # Errors
    /// Returns every fault of the device, the checkpoint, the adapter and the frame.
    pub fn load_with(model: &ModelConfig, prompt: &PromptConfig, lora: LoraMode) -> Result<Self, Faults> {
        match &model.path {
            Some(path) => info!(path = %path.display(), "loading model"),
            None => warn!(
                name = bundled::NAME,
                "model.path is not set: loading the small bundled model, which is not meant for production"
            ),
        }
        let checkpoint = open_checkpoint(model)?;
        let parts = LoadedParts::load(model, prompt, lora, &checkpoint)?;
        let classifier = parts.assemble(model, &checkpoint)?;
        info!(description = %classifier.description, "loaded model");
        Ok(classifier)
    }
}

/// Opens the checkpoint. If that fails, the device is checked too, because it is the only part that can be checked
/// without a checkpoint.
fn open_checkpoint(model: &ModelConfig) -> Result<Checkpoint, Faults> {
    Checkpoint::from_settings(model).map_err(|checkpoint_faults| {
        let mut faults = Faults::default();
        faults.collect(Placement::from_settings(model));
        faults.extend(checkpoint_faults);
        faults
    })
}

impl LoadedParts {
    /// Loads all parts, and returns the faults of all of them if there are any.
    fn load(
        model: &ModelConfig,
        prompt: &PromptConfig,
        lora: LoraMode,
        checkpoint: &Checkpoint,
    ) -> Result<Self, Faults> {
        let config = checkpoint.config();
        let mut faults = Faults::default();
        let placement = faults.collect(Placement::for_checkpoint(model, checkpoint));
        let (base, prompter) = rayon::join(
            || checkpoint.fingerprint(),
            || {
                Prompter::new(
                    &checkpoint.tokenizer_path(),
                    checkpoint.tokenizer(),
                    prompt,
                    config.vocab_size,
                    config.max_position_embeddings,
                )
            },
        );
        let prompter = faults.collect(prompter);
        let load_adapter = |folder: &Path| Adapter::load(folder, config, &base);
        let adapter = faults.collect(model.adapter.as_deref().map(load_adapter).transpose());
        let adapter = adapter.flatten();
        let options = LoadOptions {
            lora,
            quantize: model.quantize,
            // If the device cannot be used, the weights are still checked, on the CPU.
            placement: placement.clone().unwrap_or_else(Placement::cpu),
        };
        let gemma = faults.collect(Gemma::load(checkpoint, adapter.as_ref(), options));
        match (placement, prompter, gemma) {
            (Some(placement), Some(prompter), Some(gemma)) if faults.is_empty() => Ok(Self {
                base,
                placement,
                prompter,
                adapter,
                gemma,
            }),
            _ => Err(faults),
        }
    }

    /// Caches the prefix and the labels' weights, and describes the result.
    fn assemble(self, model: &ModelConfig, checkpoint: &Checkpoint) -> Result<Classifier, Fault> {
        let fault = |text: String| Fault::file(checkpoint.folder(), text);
        let prefix = self.gemma.cache_prefix(self.prompter.prefix());
        let prefix = prefix.map_err(|error| fault(format!("cannot compute the prefix: {error}")))?;
        let labels = self.gemma.unembedding_rows(&self.prompter.label_ids());
        let labels = labels.map_err(|error| fault(format!("cannot read the labels' rows: {error}")))?;
        Ok(Classifier {
            identity: self.identity(model),
            description: self.description(model, checkpoint),
            prefix,
            labels,
            model: self.gemma,
            prompter: Arc::new(self.prompter),
            placement: self.placement,
        })
    }

    /// Returns the identity without a calibration, which belongs to the version and not to the model.
    fn identity(&self, model: &ModelConfig) -> ModelIdentity {
        let adapter = self.adapter.as_ref();
        ModelIdentity {
            base: self.base.clone(),
            adapter: adapter.map_or("none", Adapter::fingerprint).to_owned(),
            adapter_version: adapter.and_then(Adapter::version).map(str::to_owned),
            prompt: self.prompter.content_hash().to_owned(),
            calibration: "identity".to_owned(),
            normalizer: self.prompter.normalizer().to_owned(),
            device: self.placement.name(),
            dtype: self.placement.dtype_name().to_owned(),
            quantization: quantization(model).to_owned(),
        }
    }

    fn description(&self, model: &ModelConfig, checkpoint: &Checkpoint) -> String {
        let bundled = match model.path {
            Some(_) => String::new(),
            None => format!("{} (bundled), ", bundled::NAME),
        };
        let quantized = match model.quantize {
            Quantize::None => String::new(),
            Quantize::Q8_0 => format!(" over {}", quantization(model)),
        };
        let config = checkpoint.config();
        format!(
            "{bundled}{}, {} layers, {:.1} M parameters, {} {}{quantized}, adapter {}",
            config.family.model_type(),
            config.num_layers(),
            self.gemma.parameters() as f64 / 1e6,
            self.placement.name(),
            self.placement.dtype_name(),
            self.adapter.as_ref().map_or("none", Adapter::description),
        )
    }
}

/// Returns the name by which decisions record how the weights are quantised.
fn quantization(model: &ModelConfig) -> &'static str {
    match model.quantize {
        Quantize::None => "none",
        Quantize::Q8_0 => "q8_0",
    }
}
