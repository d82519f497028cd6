//! candle-transformers' own Gemma as a second opinion, and as the baseline of our benches.
//!
//! An independent implementation over the same files: `check --oracle` compares the two on the
//! operator's own weights, where no recorded reference exists. It runs one text at a time over the
//! base without an adapter. What it cannot express is refused, not approximated.

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{gemma, gemma2, gemma3};

use super::Classifier;
use crate::config::{DeviceChoice, DtypeChoice, ModelConfig, PromptConfig, Quantize};
use crate::fault::{Fault, Faults};
use crate::model::config::{Family, GemmaConfig};
use crate::model::files::checkpoint::Checkpoint;
use crate::model::files::tensor_file::TensorFile;
use crate::scorer::{Row, ScoreError};

/// Positions of the oracle's tables: it makes one for every layer.
const MAX_POSITIONS: usize = 4096;

/// candle-transformers' model of a checkpoint.
pub enum Oracle {
    /// Gemma 1.
    Gemma(gemma::Model),
    /// Gemma 2.
    Gemma2(gemma2::Model),
    /// Gemma 3.
    Gemma3(gemma3::Model),
}

/// How far the two implementations are apart.
#[derive(Debug, Clone, Copy)]
pub struct OracleReport {
    /// Texts that were compared.
    pub texts: usize,
    /// Largest difference of a label's logit.
    pub max_difference: f32,
}

/// Why no comparison was made.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// The files are at fault, or the oracle cannot express them.
    #[error(transparent)]
    Load(#[from] Faults),
    /// Our own scorer failed.
    #[error(transparent)]
    Score(#[from] ScoreError),
    /// A sample has no prompt.
    #[error(transparent)]
    Prompt(#[from] crate::prompt::PromptError),
    /// The oracle failed.
    #[error("candle-transformers: {0}")]
    Oracle(#[from] candle_core::Error),
}

/// Scores `texts` with both implementations.
///
/// # Errors
/// [`OracleError`]; an architecture that candle-transformers cannot express is one.
pub fn compare(model: &ModelConfig, prompt: &PromptConfig, texts: &[&str]) -> Result<OracleReport, OracleError> {
    // What is compared is how the files are understood: exactly, which is on the CPU in f32.
    let base = ModelConfig {
        adapter: None,
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::F32,
        quantize: Quantize::None,
        ..model.clone()
    };
    let classifier = Classifier::load(&base, prompt)?;
    let checkpoint = Checkpoint::of(model)?;
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
    /// The architecture cannot be expressed, or candle-transformers refuses the files.
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
                // SAFETY: as for our own map of the same files: nobody changes them in place meanwhile.
                unsafe {
                    VarBuilder::from_mmaped_safetensors(&paths, dtype, &Device::Cpu)?
                }
            }
        };
        if let Some(outer) = checkpoint.prefix().trim_end_matches("model.").strip_suffix('.') {
            vb = vb.pp(outer);
        }
        Ok(match config.family {
            Family::Gemma => Self::Gemma(gemma::Model::new(false, &gemma_config(config), vb)?),
            Family::Gemma2 => Self::Gemma2(gemma2::Model::new(false, &gemma2_config(config), vb)?),
            Family::Gemma3 => Self::Gemma3(gemma3::Model::new(false, &gemma3_config(config), vb)?),
        })
    }

    /// Logits of the two labels at the last position of one row.
    ///
    /// # Errors
    /// candle's.
    pub fn label_logits(&mut self, row: &Row, label_ids: [u32; 2]) -> CandleResult<[f32; 2]> {
        let ids = Tensor::new(&row.tokens[..], &Device::Cpu)?.unsqueeze(0)?;
        let logits = self.forward(&ids)?.to_dtype(DType::F32)?.flatten_all()?;
        let logit = |id: u32| logits.get(id as usize)?.to_scalar::<f32>();
        Ok([logit(label_ids[0])?, logit(label_ids[1])?])
    }

    /// Token ids (batch, tokens) to logits (batch, 1, vocabulary) of the last column, from an empty
    /// cache. Rows are not masked: all are as long as the batch is wide.
    ///
    /// # Errors
    /// candle's.
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

/// What candle-transformers 0.11 does not compute as the architecture says.
fn inexpressible(config: &GemmaConfig) -> Option<String> {
    let default_scale = (config.head_dim as f64).powf(-0.5);
    if (config.query_scale - default_scale).abs() > 1e-9 {
        return Some("its queries are scaled by other than head_dim^-0.5".into());
    }
    if config.layers.iter().any(|layer| layer.rope.factor != 1.0) {
        return Some("its rotary positions are scaled".into());
    }
    if !config.tie_word_embeddings {
        return Some("its unembedding is not tied".into());
    }
    if config.family == Family::Gemma3 && pattern(config).is_none() {
        return Some("its windowed layers follow no pattern".into());
    }
    None
}

/// The `p` for which every `p`-th layer, and no other, is a full one.
fn pattern(config: &GemmaConfig) -> Option<usize> {
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
        // It refuses both, and reads "gelu" as another function than Gemma's.
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
        sliding_window_pattern: pattern(config).unwrap_or(1),
        max_position_embeddings: config.max_position_embeddings.min(MAX_POSITIONS),
    }
}
