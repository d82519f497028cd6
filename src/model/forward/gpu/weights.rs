//! The weights of a decoder as the scoring pass on a GPU reads them.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};

use super::fp8::Fp8Mlp;
use super::products::Weight;
use crate::model::config::LayerConfig;
use crate::model::forward::gemma::{Gemma, StackedMlp};
use crate::model::transfer::cuda_tensor::{Address, CudaTensor};

/// A tensor that stays in GPU memory, and its address.
#[derive(Debug, Clone)]
pub(super) struct Resident {
    /// Keeps the memory.
    pub(super) tensor: Tensor,
    pub(super) address: Address,
}

impl Resident {
    pub(super) fn new(tensor: &Tensor) -> Result<Self> {
        Ok(Self {
            address: CudaTensor::new("weight", tensor)?.address()?,
            tensor: tensor.clone(),
        })
    }

    /// Returns some rows of a bf16 weight, (outputs, inputs).
    pub(super) fn rows(&self, start: usize, outputs: usize) -> Weight {
        let inputs = self.tensor.dims()[1];
        Weight {
            at: self.address.bf16(start * inputs),
            outputs,
            inputs,
        }
    }

    /// Returns all rows of a bf16 weight, (outputs, inputs).
    pub(super) fn whole(&self) -> Weight {
        self.rows(0, self.tensor.dims()[0])
    }
}

/// The weights of an MLP.
#[derive(Debug)]
pub(super) enum Mlp {
    Bf16 { gate_up: Resident, down: Resident },
    Fp8(Arc<Fp8Mlp>),
}

/// The weights of one layer. Linear weights are bf16, except in an MLP in FP8, and norms are
/// f32.
#[derive(Debug)]
pub(super) struct LayerWeights {
    pub(super) config: LayerConfig,
    qkv: Resident,
    o: Resident,
    pub(super) mlp: Mlp,
    qk_norms: Option<[Resident; 2]>,
    pub(super) input_norm: Resident,
    pub(super) post_attention_norm: Option<Resident>,
    pub(super) pre_feedforward_norm: Resident,
    pub(super) post_feedforward_norm: Option<Resident>,
}

impl LayerWeights {
    /// Returns the weights of all layers, or `None` if they are not stacked in bf16.
    pub(super) fn of(gemma: &Gemma) -> Result<Option<Vec<Self>>> {
        let mut layers = Vec::with_capacity(gemma.layers.len());
        for layer in &gemma.layers {
            let (Some(stacked), DType::BF16) = (&layer.stacked, gemma.dtype) else {
                return Ok(None);
            };
            let optional = |norm: &Option<Tensor>| norm.as_ref().map(Resident::new).transpose();
            layers.push(Self {
                config: layer.config,
                qkv: Resident::new(&stacked.qkv)?,
                o: Resident::new(layer.o_proj.dense()?)?,
                mlp: match &stacked.mlp {
                    StackedMlp::Bf16 { gate_up } => Mlp::Bf16 {
                        gate_up: Resident::new(gate_up)?,
                        down: Resident::new(layer.down_proj.dense()?)?,
                    },
                    StackedMlp::Fp8(mlp) => Mlp::Fp8(Arc::clone(mlp)),
                },
                qk_norms: match &layer.qk_norm {
                    Some((q, k)) => Some([Resident::new(q)?, Resident::new(k)?]),
                    None => None,
                },
                input_norm: Resident::new(&layer.input_layernorm)?,
                post_attention_norm: optional(&layer.post_attention_norm)?,
                pre_feedforward_norm: Resident::new(&layer.pre_feedforward_norm)?,
                post_feedforward_norm: optional(&layer.post_feedforward_norm)?,
            });
        }
        Ok(Some(layers))
    }

    /// Returns some rows of the stacked weights of queries, keys and values.
    pub(super) fn qkv(&self, start: usize, outputs: usize) -> Weight {
        self.qkv.rows(start, outputs)
    }

    pub(super) fn o(&self) -> Weight {
        self.o.whole()
    }

    /// Returns the per-head norms of queries and keys.
    pub(super) fn qk_norms(&self) -> Option<[Address; 2]> {
        self.qk_norms.as_ref().map(|norms| [norms[0].address, norms[1].address])
    }
}
