//! A decoder of a given shape with random weights, made where it computes: for measuring speed, where the
//! true weights are not needed and a checkpoint of that size would only have to be carried.

use candle_core::{DType, Result, Tensor};

use super::gemma::{DecoderLayer, Gemma};
use super::linear::{Linear, LoraMode};
use super::rope::RopeTables;
use crate::config::Projection;
use crate::model::config::GemmaConfig;
use crate::model::device::Placement;
use crate::model::files::lora::LoraWeights;
use crate::model::transfer::Transfer;

impl Gemma {
    /// Weights are normal with the variance that keeps activations of order one; the same on no two runs. With a
    /// rank, every linear layer has a small delta of it, as an adapter would give it.
    ///
    /// # Errors
    /// candle's; too little memory, for one.
    pub fn random(config: &GemmaConfig, placement: &Placement, rank: Option<usize>) -> Result<Self> {
        let (device, hidden) = (&placement.device, config.hidden_size);
        let normal = |shape: [usize; 2], deviation: f64| {
            Tensor::randn(0f32, deviation as f32, &shape[..], device)?.to_dtype(placement.dtype)
        };
        let ones = |width: usize| Tensor::ones(width, DType::F32, device);
        let linear = |projection: Projection| {
            let [outputs, inputs] = projection.shape(config);
            let weight = normal([outputs, inputs], (inputs as f64).powf(-0.5))?;
            let delta = |rank: usize| -> Result<LoraWeights> {
                Ok(LoraWeights {
                    a: Tensor::randn(0f32, (inputs as f32).powf(-0.5), (rank, inputs), device)?,
                    b: Tensor::randn(0f32, 1.0, (outputs, rank), device)?,
                    scale: 1e-3,
                })
            };
            Linear::dense(weight, rank.map(delta).transpose()?.as_ref(), LoraMode::Merged)
        };
        let mut layers = Vec::with_capacity(config.num_layers());
        for layer in &config.layers {
            let post_norm = || config.family.has_post_norms().then(|| ones(hidden)).transpose();
            layers.push(DecoderLayer {
                config: *layer,
                q_proj: linear(Projection::Q)?,
                k_proj: linear(Projection::K)?,
                v_proj: linear(Projection::V)?,
                o_proj: linear(Projection::O)?,
                gate_proj: linear(Projection::Gate)?,
                up_proj: linear(Projection::Up)?,
                down_proj: linear(Projection::Down)?,
                qk_norm: if config.family.has_qk_norm() {
                    Some((ones(config.head_dim)?, ones(config.head_dim)?))
                } else {
                    None
                },
                input_layernorm: ones(hidden)?,
                post_attention_norm: post_norm()?,
                pre_feedforward_norm: ones(hidden)?,
                post_feedforward_norm: post_norm()?,
            });
        }
        Ok(Self {
            config: config.clone(),
            embed_tokens: normal([config.vocab_size, hidden], (hidden as f64).powf(-0.5))?,
            lm_head: None,
            layers,
            norm: ones(hidden)?,
            ropes: RopeTables::new(config),
            transfer: Transfer::new(device),
            device: device.clone(),
            dtype: placement.dtype,
        })
    }
}
