//! Loads a classifier: first every part, collecting all faults, and then the classifier from these parts.

use std::path::Path;
use std::sync::Arc;
use std::thread::ScopedJoinHandle;

use tracing::{info, warn};

use super::Classifier;
use super::defaults::ModelDefaults;
use super::head::Head;
use crate::config::{ModelConfig, PromptConfig, Quantize};
use crate::fault::{Fault, Faults};
use crate::message::ModelIdentity;
use crate::model::device::{self, Placement};
use crate::model::files::bundled;
use crate::model::files::checkpoint::Checkpoint;
use crate::model::files::lora::Adapter;
use crate::model::forward::gemma::Gemma;
use crate::model::forward::linear::LoraMode;
use crate::model::forward::load::LoadOptions;
use crate::ops::memory;
use crate::prompt::Prompter;

/// A base model with its device and frame, which fit together. Classifiers with different adapters can share it.
#[derive(Clone)]
pub struct Base {
    settings: ModelConfig,
    /// The content hash of the checkpoint.
    hash: String,
    placement: Placement,
    prompter: Arc<Prompter>,
    defaults: ModelDefaults,
    gemma: Gemma,
    head: Option<Head>,
    notes: Vec<String>,
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
        let (base, adapter) = Base::load_with(model, prompt, lora)?;
        Ok(base.assemble(adapter.as_ref())?)
    }
}

impl Base {
    /// Loads the base model and the frame that the settings name. An adapter in the settings is ignored.
    ///
    /// # Errors
    /// Returns every fault of the device, the checkpoint and the frame.
    pub fn load(model: &ModelConfig, prompt: &PromptConfig) -> Result<Self, Faults> {
        let settings = ModelConfig {
            adapter: None,
            ..model.clone()
        };
        Ok(Self::load_with(&settings, prompt, LoraMode::Unmerged)?.0)
    }

    /// Returns a classifier over this base model, with an adapter beside it or without one.
    ///
    /// # Errors
    /// Returns every fault of the adapter, and an error if the device fails.
    pub fn classifier(&self, adapter: Option<&Path>) -> Result<Classifier, Faults> {
        let Some(folder) = adapter else {
            return Ok(self.clone().assemble(None)?);
        };
        let adapter = Adapter::load(folder, self.gemma.config(), &self.hash)?;
        // The prompt of this base is made for its labels or its own head.
        if adapter.head().is_some() {
            let text =
                "has a classification head, expected none in a registry: set `model.adapter` to this adapter instead";
            return Err(Fault::file(folder, text).into());
        }
        let gemma = self.gemma.with_adapter(&adapter).map_err(|error| {
            let text = device::message_without_backtrace(&error);
            Fault::file(folder, format!("cannot prepare the adapter: {text}"))
        })?;
        let adapted = Self { gemma, ..self.clone() };
        Ok(adapted.assemble(Some(&adapter))?)
    }

    /// Loads all parts, with the adapter of the settings, or returns the faults of all of them.
    fn load_with(
        settings: &ModelConfig,
        prompt: &PromptConfig,
        lora: LoraMode,
    ) -> Result<(Self, Option<Adapter>), Faults> {
        match &settings.path {
            Some(path) => info!(path = %path.display(), "loading model"),
            None => warn!(
                name = bundled::NAME,
                "model.path is not set: loading the small bundled model, which is not meant for production"
            ),
        }
        let checkpoint = open_checkpoint(settings)?;
        let defaults = ModelDefaults::of_model(settings);
        // Without its defaults, the rest of the model is still checked.
        let prompt = &prompt.with_windows_of(&defaults.clone().unwrap_or_default().windows);
        // Hashing takes longest, so everything else is done in the meantime. What is loaded is used only if it turns out
        // to be what was hashed.
        let (hash, prompter, loaded) = std::thread::scope(|scope| {
            let hash = scope.spawn(|| checkpoint.fingerprint());
            let prompter = scope.spawn(|| load_prompter(settings, prompt, &checkpoint));
            let loaded = Loaded::new(settings, prompt, lora, &checkpoint);
            (joined(hash), joined(prompter), loaded)
        });
        let mut faults = Faults::default();
        let defaults = faults.collect(defaults);
        let placement = faults.collect(loaded.placement);
        let prompter = faults.collect(prompter);
        let adapter = loaded.adapter.and_then(|adapter| {
            if let Some(adapter) = &adapter {
                adapter.require_base(&hash)?;
            }
            Ok(adapter)
        });
        let adapter = faults.collect(adapter).flatten();
        let head = faults.collect(loaded.head).flatten();
        let gemma = faults.collect(loaded.gemma);
        faults.collect(checkpoint.require_unchanged());
        match (placement, prompter, defaults, gemma) {
            (Some(placement), Some(prompter), Some(defaults), Some(gemma)) if faults.is_empty() => {
                let adapter_notes = adapter.as_ref().map_or(&[][..], Adapter::notes);
                let head_notes = head.as_ref().map_or(&[][..], |head| &head.notes);
                let notes = [checkpoint.notes(), adapter_notes, head_notes].concat();
                for note in &notes {
                    info!(note, "note on the model's files");
                }
                let base = Self {
                    gemma: if head.is_some() { gemma.without_softcap() } else { gemma },
                    head,
                    notes,
                    settings: settings.clone(),
                    hash,
                    placement,
                    prompter: Arc::new(prompter.with_scope(defaults.scope.clone())),
                    defaults,
                };
                Ok((base, adapter))
            }
            _ => Err(faults),
        }
    }

    /// Caches the prefix and the labels' weights of the model, which has this adapter, and describes the result.
    fn assemble(self, adapter: Option<&Adapter>) -> Result<Classifier, Fault> {
        let name = match &self.settings.path {
            Some(path) => path.display().to_string(),
            None => bundled::NAME.to_owned(),
        };
        let fault = |what: &str, error: &candle_core::Error| {
            Fault::other(format!(
                "{name}: cannot {what}: {}",
                device::message_without_backtrace(error)
            ))
        };
        let prefix = self.gemma.cache_prefix(self.prompter.prefix());
        let prefix = prefix.map_err(|error| fault("compute the prefix", &error))?;
        let labels = match &self.head {
            Some(head) => head.rows.to_device(self.gemma.device()),
            None => self.gemma.unembedding_rows(&self.prompter.label_ids()),
        };
        let labels = labels.map_err(|error| fault("read the labels' rows", &error))?;
        let classifier = Classifier {
            identity: self.identity(adapter),
            description: self.description(adapter),
            prefix,
            labels,
            head: self.head.map(|head| head.description),
            notes: self.notes,
            model: self.gemma,
            prompter: self.prompter,
            defaults: self.defaults,
            placement: self.placement,
        };
        // Weights were converted and packed, which needed as much memory again.
        memory::release_freed_memory();
        info!(description = %classifier.description, "loaded model");
        Ok(classifier)
    }

    /// Returns the identity without a calibration, which belongs to the version and not to the model.
    fn identity(&self, adapter: Option<&Adapter>) -> ModelIdentity {
        ModelIdentity {
            base: self.hash.clone(),
            adapter: adapter.map_or("none", Adapter::fingerprint).to_owned(),
            adapter_version: adapter.and_then(Adapter::version).map(str::to_owned),
            prompt: self.prompter.content_hash().to_owned(),
            calibration: "identity".to_owned(),
            normalizer: self.prompter.normalizer().to_owned(),
            device: self.placement.name(),
            dtype: self.placement.dtype_name().to_owned(),
            quantization: quantization(&self.settings).to_owned(),
        }
    }

    fn description(&self, adapter: Option<&Adapter>) -> String {
        let bundled = match self.settings.path {
            Some(_) => String::new(),
            None => format!("{} (bundled), ", bundled::NAME),
        };
        let quantized = match self.settings.quantize {
            Quantize::None => String::new(),
            Quantize::Int8 | Quantize::Fp8 => format!(" over {}", quantization(&self.settings)),
        };
        let config = self.gemma.config();
        format!(
            "{bundled}{}, {} layers, {:.1} M parameters, {} {}{quantized}, adapter {}",
            config.family.model_type(),
            config.num_layers(),
            self.gemma.parameters() as f64 / 1e6,
            self.placement.name(),
            self.placement.dtype_name(),
            adapter.map_or("none", Adapter::description),
        ) + if self.head.is_some() {
            ", classification head"
        } else {
            ""
        }
    }
}

/// The parts that are loaded while the weights are hashed, each with its own faults.
struct Loaded {
    placement: Result<Placement, Fault>,
    adapter: Result<Option<Adapter>, Faults>,
    head: Result<Option<Head>, Faults>,
    gemma: Result<Gemma, Faults>,
}

impl Loaded {
    fn new(settings: &ModelConfig, prompt: &PromptConfig, lora: LoraMode, checkpoint: &Checkpoint) -> Self {
        let placement = Placement::for_checkpoint(settings, checkpoint);
        let read_adapter = |folder: &Path| Adapter::read(folder, checkpoint.config());
        let adapter = settings.adapter.as_deref().map(read_adapter).transpose();
        let known = adapter.as_ref().ok().and_then(Option::as_ref);
        let head = Head::find(checkpoint, known, prompt);
        let options = LoadOptions {
            lora,
            quantize: settings.quantize,
            // If the device cannot be used, the weights are still checked, on the CPU.
            placement: placement.as_ref().map_or_else(|_| Placement::cpu(), Placement::clone),
            for_training: false,
        };
        let gemma = Gemma::load(checkpoint, known, options);
        Self {
            placement,
            adapter,
            head,
            gemma,
        }
    }
}

fn load_prompter(settings: &ModelConfig, prompt: &PromptConfig, checkpoint: &Checkpoint) -> Result<Prompter, Faults> {
    let config = checkpoint.config();
    // A classifier sees the text alone, as transformers' pipelines give it.
    let has_head =
        config.outputs.classifier.is_some() || settings.adapter.as_deref().is_some_and(Adapter::declares_head);
    let new = if has_head {
        Prompter::without_frame
    } else {
        Prompter::new
    };
    new(
        &checkpoint.tokenizer_path(),
        checkpoint.tokenizer(),
        prompt,
        config.vocab_size,
        config.max_position_embeddings,
    )
}

/// Returns the result of a thread, or continues its panic.
fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
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

/// Returns the name by which decisions record how the weights are quantised.
fn quantization(model: &ModelConfig) -> &'static str {
    match model.quantize {
        Quantize::None => "none",
        Quantize::Int8 => "int8",
        Quantize::Fp8 => "fp8",
    }
}
