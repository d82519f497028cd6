//! The daemon's [`Scorer`]: a base, an adapter and a frame, loaded and proven to fit each other.

pub mod canary;
pub mod golden;
pub mod oracle;
pub mod warm_up;

use std::path::Path;
use std::sync::Arc;

use candle_core::{Result as CandleResult, Tensor};
use tracing::{info, warn};

use super::fault::{Fault, Faults};
use super::model::device;
use super::model::device::Placement;
use super::model::device::footprint::pass_bytes;
use super::model::files::bundled;
use super::model::files::checkpoint::Checkpoint;
use super::model::files::lora::Adapter;
use super::model::forward::gemma::{Gemma, PackedRow, PrefixCache};
use super::model::forward::linear::LoraMode;
use super::model::forward::load::LoadOptions;
use super::model::transfer::PendingLogits;
use crate::config::{ModelConfig, PromptConfig, Quantize};
use crate::message::ModelIdentity;
use crate::prompt::Prompter;
use crate::scorer::{Begun, Row, Running, ScoreError, Scorer};

/// Own tokens of one forward pass on the CPU. Passes of 150 to 500 tokens run as fast as larger
/// ones and keep the activations in the cache; a single longer row still runs whole.
const PASS_TOKENS: usize = 512;

/// The same on a GPU, which wants large matrices: bounds the activations, not the batch.
const GPU_PASS_TOKENS: usize = 1 << 15;

/// What a pass may take of a GPU's free memory: the rest is for what cannot be used of it, and for neighbours.
const SHARE_OF_MEMORY: f64 = 0.8;

/// A loaded model that answers with margins.
pub struct Classifier {
    model: Gemma,
    prefix: PrefixCache,
    /// The two labels' rows of the unembedding, hateful first.
    labels: Tensor,
    prompter: Arc<Prompter>,
    placement: Placement,
    identity: ModelIdentity,
    description: String,
}

impl Classifier {
    /// Loads what the settings name, the adapter merged.
    ///
    /// # Errors
    /// Everything wrong with the device, the checkpoint, the adapter and the frame, together.
    pub fn load(model: &ModelConfig, prompt: &PromptConfig) -> Result<Self, Faults> {
        Self::load_with(model, prompt, LoraMode::Merged)
    }

    /// As [`Classifier::load`], with the adapter merged or beside the weights.
    ///
    /// # Errors
    /// As [`Classifier::load`].
    pub fn load_with(model: &ModelConfig, prompt: &PromptConfig, lora: LoraMode) -> Result<Self, Faults> {
        match &model.path {
            Some(path) => info!(path = %path.display(), "loading model"),
            None => warn!(
                name = bundled::NAME,
                "model.path is not set: loading the small bundled model, which is for trying things out"
            ),
        }
        let mut faults = Vec::new();
        let checkpoint = match Checkpoint::of(model) {
            Ok(checkpoint) => checkpoint,
            Err(error) => {
                // What is wrong with the device is told along.
                faults.extend(Placement::of(model).err());
                faults.extend(error);
                return Err(faults.into());
            }
        };
        let mut keep = |error: Faults| faults.extend(error);
        let placement = Placement::for_checkpoint(model, &checkpoint)
            .map_err(|fault| keep(fault.into()))
            .ok();
        let config = checkpoint.config();
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
        let prompter = prompter.map_err(&mut keep).ok();
        let load_adapter = |folder: &Path| Adapter::load(folder, config, &base);
        let adapter = match model.adapter.as_deref().map(load_adapter).transpose() {
            Ok(adapter) => adapter,
            Err(error) => {
                keep(error);
                None
            }
        };
        let options = LoadOptions {
            lora,
            quantize: model.quantize,
            // A device that is not there is told with all else that is wrong.
            placement: placement.clone().unwrap_or_else(Placement::cpu),
        };
        let gemma = Gemma::load(&checkpoint, adapter.as_ref(), options)
            .map_err(&mut keep)
            .ok();
        let (Some(placement), Some(prompter), Some(gemma), true) = (placement, prompter, gemma, faults.is_empty())
        else {
            return Err(faults.into());
        };
        let prefix = gemma
            .cache_prefix(prompter.prefix())
            .map_err(|error| Fault::file(checkpoint.folder(), format!("cannot compute the prefix: {error}")))?;
        let labels = gemma
            .unembedding_of(&prompter.label_ids())
            .map_err(|error| Fault::file(checkpoint.folder(), format!("cannot read the labels' rows: {error}")))?;
        let quantization = match model.quantize {
            Quantize::None => "none",
            Quantize::Q8_0 => "q8_0",
        };
        let description = format!(
            "{}{}, {} layers, {:.1} M parameters, {} {}{}, adapter {}",
            match model.path {
                Some(_) => String::new(),
                None => format!("{} (bundled), ", bundled::NAME),
            },
            config.family.model_type(),
            config.num_layers(),
            gemma.parameters() as f64 / 1e6,
            placement.name(),
            placement.dtype_name(),
            if model.quantize == Quantize::None {
                String::new()
            } else {
                format!(" over {quantization}")
            },
            adapter.as_ref().map_or("none", Adapter::description),
        );
        let identity = ModelIdentity {
            base,
            adapter: adapter.as_ref().map_or("none", Adapter::fingerprint).to_owned(),
            adapter_version: adapter.as_ref().and_then(Adapter::version).map(str::to_owned),
            prompt: prompter.content_hash().to_owned(),
            calibration: "identity".to_owned(),
            normalizer: prompter.normalizer().to_owned(),
            device: placement.name(),
            dtype: placement.dtype_name().to_owned(),
            quantization: quantization.to_owned(),
        };
        info!(%description, "loaded model");
        Ok(Self {
            model: gemma,
            prefix,
            labels,
            prompter: Arc::new(prompter),
            placement,
            identity,
            description,
        })
    }

    /// The frame, shared with the threads that tokenise.
    pub fn prompter(&self) -> Arc<Prompter> {
        Arc::clone(&self.prompter)
    }

    /// Everything that a score depends on, by content hash.
    pub fn identity(&self) -> &ModelIdentity {
        &self.identity
    }

    /// Gives memory back that warming up took and that serving batches of so many own tokens does not need.
    ///
    /// # Errors
    /// What failed on the device.
    pub fn keep_memory_for(&self, max_tokens: usize) -> CandleResult<()> {
        let tokens = max_tokens.min(GPU_PASS_TOKENS) as u64;
        device::keep_memory(
            self.model.device(),
            tokens * pass_bytes(self.model.config(), self.placement.dtype),
        )
    }

    /// Where it computes.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// For people: architecture, size, device, adapter.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// The decoder.
    pub fn model(&self) -> &Gemma {
        &self.model
    }

    /// Logits of the two labels, hateful first, for each row.
    ///
    /// # Errors
    /// [`ScoreError::Failed`], whatever the row.
    pub fn label_logits(&self, rows: &[Row]) -> Result<Vec<[f32; 2]>, ScoreError> {
        self.passes(rows)?.logits()
    }

    /// Begins all of it; on a GPU nothing is waited for.
    fn passes(&self, rows: &[Row]) -> Result<Passes, ScoreError> {
        let pass_tokens = if self.model.device().is_cpu() {
            PASS_TOKENS
        } else {
            GPU_PASS_TOKENS
        };
        let begun: CandleResult<Vec<PendingLogits>> = passes(rows, pass_tokens).map(|pass| self.pass(pass)).collect();
        let count = rows.len();
        begun
            .map(|answers| Passes { answers, rows: count })
            .map_err(|error| self.failed(count, &error))
    }

    /// What the device kept of the failed call goes back, so that a smaller one finds room.
    fn failed(&self, rows: usize, error: &candle_core::Error) -> ScoreError {
        if let Err(error) = device::release(self.model.device()) {
            warn!(
                error = device::first_line(&error),
                "the device does not give its memory back"
            );
        }
        failed(rows, error)
    }

    fn pass(&self, rows: &[Row]) -> CandleResult<PendingLogits> {
        let mut packed = Vec::with_capacity(rows.len());
        for (index, row) in rows.iter().enumerate() {
            let (shared, own) = row.tokens.split_at_checked(row.shared).unwrap_or_default();
            if !self.prefix.tokens().starts_with(shared) {
                candle_core::bail!("row {index} shares {} ids that are not the prefix's", row.shared);
            }
            packed.push(PackedRow {
                own,
                shared: row.shared,
            });
        }
        self.model.begin(&packed, Some(&self.prefix), &self.labels)
    }
}

impl Drop for Classifier {
    fn drop(&mut self) {
        device::keep_open_if_failed(self.model.device());
    }
}

/// An error of candle's, its backtrace left out.
fn failed(rows: usize, error: &candle_core::Error) -> ScoreError {
    ScoreError::Failed {
        rows,
        reason: device::first_line(error),
    }
}

/// Rows that were begun, pass after pass.
struct Passes {
    answers: Vec<PendingLogits>,
    rows: usize,
}

impl Passes {
    /// Logits of the two labels, hateful first, for each row.
    fn logits(self) -> Result<Vec<[f32; 2]>, ScoreError> {
        let mut logits = Vec::with_capacity(self.rows);
        for answer in self.answers {
            let pairs = answer.wait().map_err(|error| failed(self.rows, &error))?;
            logits.extend_from_slice(pairs.as_chunks::<2>().0);
        }
        Ok(logits)
    }
}

impl Running for Passes {
    fn is_done(&self) -> bool {
        self.answers.last().is_none_or(PendingLogits::is_here)
    }

    fn margins(self: Box<Self>) -> Result<Vec<f32>, ScoreError> {
        let margins: Vec<f32> = self.logits()?.iter().map(|[hateful, other]| hateful - other).collect();
        match margins.iter().position(|margin| !margin.is_finite()) {
            None => Ok(margins),
            Some(row) => Err(ScoreError::NotFinite {
                row,
                margin: margins[row],
            }),
        }
    }
}

impl Scorer for Classifier {
    fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
        Box::new(self.passes(rows)?).margins()
    }

    fn room(&self) -> Option<usize> {
        let free = match self.placement.free_bytes() {
            Ok(free) => free?,
            Err(error) => {
                warn!(
                    error = device::first_line(&error),
                    "the device does not tell its free memory"
                );
                return None;
            }
        };
        let tokens =
            (free as f64 * SHARE_OF_MEMORY) as usize / pass_bytes(self.model.config(), self.placement.dtype) as usize;
        // A larger batch is cut into passes.
        (tokens < GPU_PASS_TOKENS).then_some(tokens)
    }

    fn begin(&mut self, rows: &[Row]) -> Result<Begun, ScoreError> {
        let passes = Box::new(self.passes(rows)?);
        if self.model.device().is_cpu() {
            passes.margins().map(Begun::Done)
        } else {
            Ok(Begun::Running(passes))
        }
    }
}

/// Cuts rows into passes of at most so many own tokens, in order; a longer row stands alone.
fn passes(rows: &[Row], pass_tokens: usize) -> impl Iterator<Item = &[Row]> {
    let mut rest = rows;
    std::iter::from_fn(move || {
        let mut tokens = 0;
        let fits = |row: &&Row| {
            tokens += row.cost();
            tokens <= pass_tokens
        };
        let count = rest.iter().take_while(fits).count().max(1);
        let (pass, after) = rest.split_at_checked(count)?;
        rest = after;
        Some(pass)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_keep_order_and_bound_tokens() {
        let row = |tokens: usize| Row {
            tokens: vec![0; tokens].into(),
            shared: 0,
        };
        let check = |costs: &[usize], expected: &[usize]| {
            let rows: Vec<Row> = costs.iter().map(|&cost| row(cost)).collect();
            assert_eq!(
                passes(&rows, 512).map(<[Row]>::len).collect::<Vec<_>>(),
                expected,
                "{costs:?}"
            );
        };
        check(&[], &[]);
        check(&[512, 1], &[1, 1]);
        check(&[2000, 1, 1], &[1, 2]);
        check(&[256, 256, 256], &[2, 1]);
    }
}
