//! The Gemma models of candle-transformers, as a second implementation to compare with and as a baseline for
//! benchmarks.
//!
//! `check --oracle` compares the two implementations on the operator's own weights, for which there are no recorded
//! references. The oracle scores one text at a time with the base model, without an adapter. A model that
//! candle-transformers cannot express exactly is rejected.

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{gemma, gemma2, gemma3};

use super::Classifier;
use crate::config::{DeviceChoice, DtypeChoice, ModelConfig, PromptConfig, Quantize};
use crate::fault::{Fault, Faults};
use crate::model::config::{Family, GemmaConfig};
use crate::model::files::checkpoint::Checkpoint;
use crate::model::files::tensor_file::TensorFile;
use crate::prompt::PromptError;
use crate::scorer::{Row, ScoreError};

/// The largest number of positions of the oracle, which allocates its rotary tables once per layer.
const MAX_POSITIONS: usize = 4096;

/// A checkpoint loaded by candle-transformers.
pub enum Oracle {
    /// A Gemma 1 model.
    Gemma(gemma::Model),
    /// A Gemma 2 model.
    Gemma2(gemma2::Model),
    /// A Gemma 3 model.
    Gemma3(gemma3::Model),
}

/// How much the two implementations differ.
#[derive(Debug, Clone, Copy)]
pub struct OracleReport {
    /// The number of texts that were compared.
    pub texts: usize,
    /// The largest difference between two logits of a label.
    pub max_difference: f32,
}

/// The reason why the implementations could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// The files have faults, or candle-transformers cannot express the model.
    #[error(transparent)]
    Load(#[from] Faults),
    /// The classifier failed.
    #[error(transparent)]
    Score(#[from] ScoreError),
    /// A text cannot be tokenised.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// candle-transformers failed.
    #[error("candle-transformers: {0}")]
    Oracle(#[from] candle_core::Error),
}

/// Scores `texts` with both implementations, on the CPU in f32 and without an adapter.
///
/// # Errors
/// Returns an error if the model cannot be loaded, if candle-transformers cannot express it, or if either
/// implementation fails on a text.
pub fn compare(model: &ModelConfig, prompt: &PromptConfig, texts: &[&str]) -> Result<OracleReport, OracleError> {
    // The comparison is about how the files are read, so rounding must not hide a difference.
    let base = ModelConfig {
        adapter: None,
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::F32,
        quantize: Quantize::None,
        ..model.clone()
    };
    let classifier = Classifier::load(&base, prompt)?;
    let checkpoint = Checkpoint::from_settings(model)?;
    let mut oracle = Oracle::load(&checkpoint, DType::F32)?;
    let prompter = classifier.prompter();
    let mut report = OracleReport {
        texts: 0,
        max_difference: 0.0,
    };
    for text in texts {
        for row in prompter.encode(text)?.rows {
            let ours = classifier.label_logits(std::slice::from_ref(&row))?;
            let theirs = oracle.label_logits(&row, prompter.label_ids())?;
            for (ours, theirs) in ours.iter().flatten().zip(theirs) {
                report.max_difference = report.max_difference.max((ours - theirs).abs());
            }
        }
        report.texts += 1;
    }
    Ok(report)
}

impl Oracle {
    /// Loads the checkpoint a second time, on the CPU.
    ///
    /// # Errors
    /// Returns an error if candle-transformers cannot express the architecture or rejects the files.
    pub fn load(checkpoint: &Checkpoint, dtype: DType) -> Result<Self, OracleError> {
        let config = checkpoint.config();
        if let Some(reason) = inexpressible(config) {
            let text = format!("candle-transformers cannot express this model: {reason}");
            return Err(Faults::from(Fault::file(checkpoint.folder(), text)).into());
        }
        let mut vb = match checkpoint.files() {
            [file] => VarBuilder::from_slice_safetensors(file.bytes(), dtype, &Device::Cpu)?,
            files => {
                let paths: Vec<_> = files.iter().map(TensorFile::path).collect();
                #[expect(
                    unsafe_code,
                    reason = "candle-transformers reads its weights through candle's memory map"
                )]
                // SAFETY: `TensorFile` maps the same files under the same condition: nothing changes them in place
                // while they are mapped.
                unsafe {
                    VarBuilder::from_mmaped_safetensors(&paths, dtype, &Device::Cpu)?
                }
            }
        };
        // candle-transformers knows the names of text-only checkpoints.
        let prefix = checkpoint.prefix().to_owned();
        vb = vb.rename_f(move |name| match name.strip_prefix("model.") {
            Some(rest) => format!("{prefix}{rest}"),
            None => name.to_owned(),
        });
        Ok(match config.family {
            Family::Gemma => Self::Gemma(gemma::Model::new(false, &gemma_config(config), vb)?),
            Family::Gemma2 => Self::Gemma2(gemma2::Model::new(false, &gemma2_config(config), vb)?),
            Family::Gemma3 => Self::Gemma3(gemma3::Model::new(false, &gemma3_config(config), vb)?),
        })
    }

    /// Returns the logits of the two labels at the last position of one row.
    ///
    /// # Errors
    /// Returns the error of candle-transformers.
    pub fn label_logits(&mut self, row: &Row, label_ids: [u32; 2]) -> CandleResult<[f32; 2]> {
        let ids = Tensor::new(&row.tokens[..], &Device::Cpu)?.unsqueeze(0)?;
        let logits = self.forward(&ids)?.to_dtype(DType::F32)?.flatten_all()?;
        let logit = |id: u32| logits.get(id as usize)?.to_scalar::<f32>();
        Ok([logit(label_ids[0])?, logit(label_ids[1])?])
    }

    /// Computes the logits (batch, 1, vocabulary) at the last position of token ids (batch, tokens), with an empty
    /// cache. There is no padding mask, so all rows must have the same length.
    ///
    /// # Errors
    /// Returns the error of candle-transformers.
    pub fn forward(&mut self, ids: &Tensor) -> CandleResult<Tensor> {
        match self {
            Self::Gemma(model) => {
                model.clear_kv_cache();
                model.forward(ids, 0)
            }
            Self::Gemma2(model) => {
                model.clear_kv_cache();
                model.forward(ids, 0)
            }
            Self::Gemma3(model) => {
                model.clear_kv_cache();
                model.forward(ids, 0)
            }
        }
    }
}

/// Returns the feature of the model that candle-transformers 0.11 does not compute as the architecture requires.
fn inexpressible(config: &GemmaConfig) -> Option<String> {
    if config.outputs.classifier.is_some() {
        return Some("it has a classification head".into());
    }
    let default_scale = (config.head_dim as f64).powf(-0.5);
    if (config.query_scale - default_scale).abs() > 1e-9 {
        return Some("its queries are not scaled by head_dim^-0.5".into());
    }
    if config.layers.iter().any(|layer| layer.rope.factor != 1.0) {
        return Some("its rotary positions are scaled".into());
    }
    if !config.tie_word_embeddings {
        return Some("its unembedding is not tied".into());
    }
    if config.family == Family::Gemma3 && window_pattern(config).is_none() {
        return Some("its windowed layers do not follow a regular pattern".into());
    }
    None
}

/// Returns the `p` for which exactly every `p`-th layer has no window.
fn window_pattern(config: &GemmaConfig) -> Option<usize> {
    let fits = |pattern: &usize| {
        config
            .layers
            .iter()
            .enumerate()
            .all(|(index, layer)| layer.window.is_none() == ((index + 1) % pattern == 0))
    };
    (1..=config.num_layers() + 1).find(fits)
}

fn gemma_config(config: &GemmaConfig) -> gemma::Config {
    gemma::Config {
        attention_bias: false,
        head_dim: config.head_dim,
        // candle-transformers accepts only one of the two, and takes "gelu" for a different function than Gemma's.
        hidden_act: None,
        hidden_activation: Some(Activation::GeluPytorchTanh),
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_attention_heads: config.num_attention_heads,
        num_hidden_layers: config.num_layers(),
        num_key_value_heads: config.num_key_value_heads,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.layers[0].rope.theta,
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings.min(MAX_POSITIONS),
    }
}

fn gemma2_config(config: &GemmaConfig) -> gemma2::Config {
    gemma2::Config {
        attention_bias: false,
        head_dim: config.head_dim,
        hidden_activation: Activation::GeluPytorchTanh,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_attention_heads: config.num_attention_heads,
        num_hidden_layers: config.num_layers(),
        num_key_value_heads: config.num_key_value_heads,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.layers[0].rope.theta,
        vocab_size: config.vocab_size,
        final_logit_softcapping: config.final_logit_softcapping,
        attn_logit_softcapping: config.attn_logit_softcapping,
        query_pre_attn_scalar: config.head_dim,
        sliding_window: config.layers.iter().find_map(|layer| layer.window),
        max_position_embeddings: config.max_position_embeddings.min(MAX_POSITIONS),
    }
}

fn gemma3_config(config: &GemmaConfig) -> gemma3::Config {
    let theta = |windowed: bool| {
        let layer = config.layers.iter().find(|layer| layer.window.is_some() == windowed);
        layer.unwrap_or(&config.layers[0]).rope.theta
    };
    gemma3::Config {
        attention_bias: false,
        head_dim: config.head_dim,
        hidden_activation: Activation::GeluPytorchTanh,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_attention_heads: config.num_attention_heads,
        num_hidden_layers: config.num_layers(),
        num_key_value_heads: config.num_key_value_heads,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: theta(false),
        rope_local_base_freq: theta(true),
        vocab_size: config.vocab_size,
        final_logit_softcapping: config.final_logit_softcapping,
        attn_logit_softcapping: config.attn_logit_softcapping,
        query_pre_attn_scalar: config.head_dim,
        sliding_window: config
            .layers
            .iter()
            .find_map(|layer| layer.window)
            .unwrap_or(MAX_POSITIONS),
        sliding_window_pattern: window_pattern(config).unwrap_or(1),
        max_position_embeddings: config.max_position_embeddings.min(MAX_POSITIONS),
    }
}
