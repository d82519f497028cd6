//! LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; the file format and the
//! matching of patterns are PEFT's (`peft/tuners/lora`, `peft/utils/other.py`). What would change
//! the arithmetic and is not computed here (DoRA, biases, replicated layers …) is refused by name.

mod pattern;
mod read;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Result, Tensor};

use self::read::AdapterReader;
use super::checkpoint::{MAX_ADAPTER_CONFIG_BYTES, read_bytes};
use super::tensor_file::TensorFile;
use crate::config::Projection;
use crate::fault::Faults;
use crate::hash::adapter_hash;
use crate::model::config::GemmaConfig;

impl Projection {
    /// Shape of its weight: (outputs, inputs).
    pub fn shape(self, config: &GemmaConfig) -> [usize; 2] {
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        match self {
            Self::Q => [queries, config.hidden_size],
            Self::K | Self::V => [keys, config.hidden_size],
            Self::O => [config.hidden_size, queries],
            Self::Gate | Self::Up => [config.intermediate_size, config.hidden_size],
            Self::Down => [config.hidden_size, config.intermediate_size],
        }
    }
}

/// The low-rank delta of one linear layer: `scale * B A`, all f32.
#[derive(Debug, Clone)]
pub struct LoraWeights {
    /// (rank, inputs).
    pub a: Tensor,
    /// (outputs, rank).
    pub b: Tensor,
    /// `alpha / rank`, or `alpha / sqrt(rank)` for rslora.
    pub scale: f64,
}

impl LoraWeights {
    /// `scale (x A') B'`: (tokens, inputs) to (tokens, outputs), f32.
    pub(in crate::model) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        (x.matmul(&self.a.t()?)? * self.scale)?.matmul(&self.b.t()?)
    }

    pub(in crate::model) fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            a: self.a.to_device(device)?,
            b: self.b.to_device(device)?,
            scale: self.scale,
        })
    }
}

/// An adapter, read and matched against a base.
#[derive(Debug)]
pub struct Adapter {
    weights: BTreeMap<(usize, Projection), LoraWeights>,
    fingerprint: String,
    version: Option<String>,
    description: String,
}

impl Adapter {
    /// Reads the folder and checks every tensor against the base's shapes.
    ///
    /// `base_fingerprint` is compared with the manifest's, where the folder has one.
    ///
    /// # Errors
    /// Every fault found: unreadable files, options that we do not compute, missing, misshapen or
    /// superfluous tensors, values that are not finite, another base.
    pub fn load(folder: &Path, config: &GemmaConfig, base_fingerprint: &str) -> std::result::Result<Self, Faults> {
        let config_path = folder.join("adapter_config.json");
        let weights_path = folder.join("adapter_model.safetensors");
        let config_bytes = read_bytes(&config_path, MAX_ADAPTER_CONFIG_BYTES)?;
        let file = TensorFile::open(&weights_path)?;
        let mut reader = AdapterReader {
            config_path,
            file: &file,
            base: config,
            faults: Vec::new(),
        };
        let weights = reader.read(&config_bytes);
        let version = reader.manifest(&folder.join("manifest.json"), base_fingerprint);
        if !reader.faults.is_empty() {
            return Err(reader.faults.into());
        }
        let description = describe(&weights);
        Ok(Self {
            weights,
            fingerprint: adapter_hash(&config_bytes, file.bytes()),
            version,
            description,
        })
    }

    /// The delta of one linear layer, if the adapter has one.
    pub fn get(&self, layer: usize, projection: Projection) -> Option<&LoraWeights> {
        self.weights.get(&(layer, projection))
    }

    /// Content hash over the SHA-256 of the two PEFT files.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The version that its manifest names.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// For people: ranks and targets.
    pub fn description(&self) -> &str {
        &self.description
    }
}

fn describe(weights: &BTreeMap<(usize, Projection), LoraWeights>) -> String {
    let mut targets: Vec<Projection> = weights.keys().map(|&(_, projection)| projection).collect();
    targets.sort_unstable();
    targets.dedup();
    let mut ranks: Vec<usize> = weights.values().map(|lora| lora.a.dims()[0]).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let join = |parts: Vec<String>| parts.join(", ");
    let ranks = join(ranks.iter().map(usize::to_string).collect());
    format!(
        "rank {ranks} on {}",
        join(targets.iter().map(|target| target.name().to_owned()).collect())
    )
}
