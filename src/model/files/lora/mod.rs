//! LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! LoRA is described in Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. The file format and the
//! matching of module names follow PEFT (`peft/tuners/lora`, `peft/utils/other.py`). Options that change the arithmetic
//! and are not computed here, such as DoRA, biases and replicated layers, are reported as faults, and so is every tensor
//! that would not be used.

mod names;
mod options;
mod pattern;
mod raw;
mod read;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Result, Tensor};

use self::read::AdapterReader;
use super::checkpoint::{MAX_JSON_BYTES, read_bytes};
use super::formats;
use super::tensor_file::TensorFile;
use crate::config::Projection;
use crate::fault::{Fault, Faults};
use crate::hash::adapter_hash;
use crate::model::config::GemmaConfig;

/// The low-rank delta of one linear layer, `scale * B A`, in f32.
#[derive(Debug, Clone)]
pub struct LoraWeights {
    /// The matrix A, (rank, inputs).
    pub a: Tensor,
    /// The matrix B, (outputs, rank).
    pub b: Tensor,
    /// The factor of the delta: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub scale: f64,
}

impl LoraWeights {
    /// Computes `scale (x A') B'` in f32: (tokens, outputs) from `x` (tokens, inputs).
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

/// The weight (outputs, hidden) of a classification head, in f32.
#[derive(Debug, Clone)]
pub(crate) struct HeadWeight(pub(crate) Tensor);

/// An adapter whose tensors have the shapes that its base model requires.
#[derive(Debug)]
pub struct Adapter {
    weights: BTreeMap<(usize, Projection), LoraWeights>,
    head: Option<HeadWeight>,
    notes: Vec<String>,
    fingerprint: String,
    manifest: Option<Manifest>,
    description: String,
}

/// What the manifest says that accompanies an adapter from a registry.
#[derive(Debug)]
struct Manifest {
    path: PathBuf,
    version: Option<String>,
    /// The fingerprint of the base model that the adapter was made for.
    base: Option<String>,
}

impl Adapter {
    /// Reads an adapter and checks every tensor against the shapes of the base model.
    ///
    /// If the folder contains a manifest, its base fingerprint must equal `base_fingerprint`.
    ///
    /// # Errors
    /// Returns every fault found: files that cannot be read, unsupported options, tensors that are missing, misshapen
    /// or unexpected, values that are not finite, and a manifest that names another base model.
    pub fn load(folder: &Path, config: &GemmaConfig, base_fingerprint: &str) -> std::result::Result<Self, Faults> {
        let adapter = Self::read(folder, config)?;
        adapter.require_base(base_fingerprint)?;
        Ok(adapter)
    }

    /// Reads an adapter like [`Adapter::load`], while the fingerprint of the base model is not known yet:
    /// [`Adapter::require_base`] must be called before the adapter is used.
    ///
    /// # Errors
    /// Returns every fault found, except for a manifest that names another base model.
    pub(crate) fn read(folder: &Path, config: &GemmaConfig) -> std::result::Result<Self, Faults> {
        if let Some(fault) = formats::not_an_adapter(folder) {
            return Err(fault.into());
        }
        let config_path = folder.join("adapter_config.json");
        let weights_path = folder.join("adapter_model.safetensors");
        let config_bytes = read_bytes(&config_path, MAX_JSON_BYTES)?;
        let file = TensorFile::open(&weights_path)?;
        let mut reader = AdapterReader {
            config_path,
            file: &file,
            base: config,
            faults: Faults::default(),
        };
        let read::AdapterParts { weights, head, notes } = reader.read(&config_bytes);
        let manifest = reader.read_manifest(&folder.join("manifest.json"));
        if !reader.faults.is_empty() {
            return Err(reader.faults);
        }
        let description = describe(&weights);
        Ok(Self {
            weights,
            head,
            notes,
            fingerprint: adapter_hash(&config_bytes, file.bytes()),
            manifest,
            description,
        })
    }

    /// Checks that the adapter was made for the base model with this fingerprint, as far as a manifest tells.
    ///
    /// # Errors
    /// Returns a fault that names both fingerprints.
    pub(crate) fn require_base(&self, fingerprint: &str) -> std::result::Result<(), Fault> {
        match &self.manifest {
            Some(Manifest {
                path, base: Some(base), ..
            }) if base != fingerprint => Err(Fault::file(
                path,
                format!("the adapter was made for base model `{base}`, expected `{fingerprint}`"),
            )),
            _ => Ok(()),
        }
    }

    /// Returns the delta of one linear layer, if the adapter has one.
    pub fn get(&self, layer: usize, projection: Projection) -> Option<&LoraWeights> {
        self.weights.get(&(layer, projection))
    }

    /// Returns whether the adapter in this folder has a classification head, as far as its config can be read.
    pub(crate) fn declares_head(folder: &Path) -> bool {
        read::declares_head(&folder.join("adapter_config.json"))
    }

    /// Returns the classification head, if the adapter has one.
    pub(crate) fn head(&self) -> Option<&HeadWeight> {
        self.head.as_ref()
    }

    /// Returns remarks for the operator, such as parts that are left out.
    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Returns the content hash of the adapter, which is computed from the SHA-256 of its two PEFT files.
    pub(crate) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Returns the version that the manifest names, if there is a manifest.
    pub(crate) fn version(&self) -> Option<&str> {
        self.manifest.as_ref()?.version.as_deref()
    }

    /// Returns the ranks and the adapted layers in a form for logs.
    pub(crate) fn description(&self) -> &str {
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
    let ranks: Vec<String> = ranks.iter().map(usize::to_string).collect();
    let targets: Vec<&str> = targets.into_iter().map(Projection::name).collect();
    format!("rank {} on {}", ranks.join(", "), targets.join(", "))
}
