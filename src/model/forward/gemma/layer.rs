//! The weights of one layer.

#[cfg(feature = "cuda")]
use std::sync::Arc;

use candle_core::Tensor;

use crate::config::Projection;
use crate::model::config::LayerConfig;
#[cfg(feature = "cuda")]
use crate::model::forward::gpu::Fp8Mlp;
use crate::model::forward::linear::Linear;

/// The weights of one layer, which layers with other adapters can share. Fields have the checkpoint's names, except
/// where families differ.
#[derive(Debug, Clone)]
pub(in crate::model) struct DecoderLayer {
    pub(in crate::model) config: LayerConfig,
    pub(in crate::model) q_proj: Linear,
    pub(in crate::model) k_proj: Linear,
    pub(in crate::model) v_proj: Linear,
    pub(in crate::model) o_proj: Linear,
    pub(in crate::model) gate_proj: Linear,
    pub(in crate::model) up_proj: Linear,
    pub(in crate::model) down_proj: Linear,
    /// The weights that the scoring pass on a GPU multiplies by at once, of which the projections hold parts.
    #[cfg(feature = "cuda")]
    pub(in crate::model) stacked: Option<StackedWeights>,
    /// Per-head norms of queries and keys (Gemma 3).
    pub(in crate::model) qk_norm: Option<(Tensor, Tensor)>,
    pub(in crate::model) input_layernorm: Tensor,
    /// Norm of the attention's output before it is added to the residual stream (Gemma 2 and 3).
    pub(in crate::model) post_attention_norm: Option<Tensor>,
    /// Norm of the MLP's input, which Gemma 1 checkpoints call `post_attention_layernorm`.
    pub(in crate::model) pre_feedforward_norm: Tensor,
    /// Norm of the MLP's output before it is added to the residual stream (Gemma 2 and 3).
    pub(in crate::model) post_feedforward_norm: Option<Tensor>,
}

/// Weights of projections with the same input, one below the other, in GPU memory.
#[cfg(feature = "cuda")]
#[derive(Debug, Clone)]
pub(in crate::model) struct StackedWeights {
    /// Queries, keys and values: (queries + 2 keys, hidden).
    pub(in crate::model) qkv: Tensor,
    pub(in crate::model) mlp: StackedMlp,
}

/// The weights of an MLP, in GPU memory.
#[cfg(feature = "cuda")]
#[derive(Debug, Clone)]
pub(in crate::model) enum StackedMlp {
    /// Gate and up: (2 intermediate, hidden). Down is that of its projection.
    Bf16 { gate_up: Tensor },
    /// All of them. The projections hold none.
    Fp8(Arc<Fp8Mlp>),
}

impl DecoderLayer {
    pub(in crate::model) fn projection(&self, projection: Projection) -> &Linear {
        match projection {
            Projection::Q => &self.q_proj,
            Projection::K => &self.k_proj,
            Projection::V => &self.v_proj,
            Projection::O => &self.o_proj,
            Projection::Gate => &self.gate_proj,
            Projection::Up => &self.up_proj,
            Projection::Down => &self.down_proj,
        }
    }

    pub(in crate::model) fn projection_mut(&mut self, projection: Projection) -> &mut Linear {
        match projection {
            Projection::Q => &mut self.q_proj,
            Projection::K => &mut self.k_proj,
            Projection::V => &mut self.v_proj,
            Projection::O => &mut self.o_proj,
            Projection::Gate => &mut self.gate_proj,
            Projection::Up => &mut self.up_proj,
            Projection::Down => &mut self.down_proj,
        }
    }
}
