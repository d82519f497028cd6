//! Writes an adapter in PEFT's file format, so that both PEFT and this daemon can load it.

use std::collections::BTreeMap;

use candle_core::Tensor;
use safetensors::tensor::{Dtype, SafeTensorError, TensorView};
use serde_json::json;

use super::trainer::TrainerConfig;
use crate::config::Projection;
use crate::model::training::Variables;

/// The contents of an adapter's two files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFiles {
    /// Contents of `adapter_config.json`.
    pub config: Vec<u8>,
    /// Contents of `adapter_model.safetensors`.
    pub weights: Vec<u8>,
}

/// Why an adapter cannot be serialised.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A tensor cannot be copied from the device.
    #[error("cannot read an adapter tensor: {0}")]
    Tensor(#[from] candle_core::Error),
    /// The tensors cannot be stored as safetensors.
    #[error("cannot serialise the adapter's tensors: {0}")]
    Tensors(#[from] SafeTensorError),
    /// The config cannot be serialised as JSON.
    #[error("cannot serialise the adapter's config: {0}")]
    Config(#[from] serde_json::Error),
}

/// Returns the files of a trained adapter. `base` becomes `base_model_name_or_path` in its config.
///
/// The same weights and settings always give the same bytes.
///
/// # Errors
/// Returns an error if a tensor cannot be copied from the device, or a file cannot be serialised.
pub fn write(variables: &Variables, config: &TrainerConfig, base: &str) -> Result<AdapterFiles, WriteError> {
    let mut tensors = BTreeMap::new();
    for (&(layer, projection), lora) in variables {
        for (matrix, tensor) in [('A', lora.a.as_tensor()), ('B', lora.b.as_tensor())] {
            let name = format!(
                "base_model.model.model.layers.{layer}.{}.lora_{matrix}.weight",
                projection.path()
            );
            tensors.insert(name, (tensor.dims().to_vec(), little_endian_bytes(tensor)?));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, (shape, bytes))| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views: Vec<(&str, TensorView<'_>)> = views.collect::<Result<_, SafeTensorError>>()?;
    // PyTorch's loaders check this tag.
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut targets: Vec<Projection> = config.targets.clone();
    targets.sort_unstable();
    targets.dedup();
    let json = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.use_rslora,
        "use_dora": false,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "target_modules": targets.iter().map(|target| target.name()).collect::<Vec<_>>(),
        "rank_pattern": {},
        "alpha_pattern": {},
    });
    Ok(AdapterFiles {
        config: serde_json::to_vec_pretty(&json)?,
        weights: safetensors::serialize(views, Some(metadata))?,
    })
}

fn little_endian_bytes(tensor: &Tensor) -> Result<Vec<u8>, candle_core::Error> {
    Ok(tensor
        .flatten_all()?
        .to_vec1::<f32>()?
        .into_iter()
        .flat_map(f32::to_le_bytes)
        .collect())
}
