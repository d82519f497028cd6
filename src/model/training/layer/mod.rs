//! A layer in training: its forward pass, which keeps what the gradients need, and its backward pass.
//!
//! Both are written out by hand over buffers that are allocated once a pass, because an automatic graph costs more than the
//! arithmetic of a batch: its operations copy, add and allocate whole tensors. The formulas of the gradients are in
//! [`crate::model::kernels::training`]. A test compares them with candle's gradients of plain operations
//! (`training/plain.rs`), and the forward pass with that of serving.

mod buffers;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod ops;
#[cfg(test)]
mod tests;

use candle_core::{Result, Tensor, bail};

pub(super) use self::buffers::{GradientBuffers, LayerSizes, SavedLayer};
pub(super) use self::cpu::CpuOps;
#[cfg(feature = "cuda")]
pub(super) use self::cuda::CudaOps;
pub(super) use self::ops::LayerOps;
use self::ops::{AttentionOutput, InputGradient, SavedInput};
use crate::config::Projection;
use crate::model::forward::gemma::{DecoderLayer, Gemma};
use crate::model::kernels::training::QueriesKeysValues;
use crate::model::kernels::{PackedAttention, RopeAngles, Spans};

/// The layout of the packed rows of a pass, and the positions whose output is needed.
pub(super) struct RowLayout<'a> {
    /// The span of each row that has queries.
    pub(super) spans: &'a Spans,
    /// The positions whose output is needed, (queries) of u32, or `None` for all of them.
    pub(super) ends: Option<&'a Tensor>,
    /// The rotary angles of all tokens in this layer.
    pub(super) angles: &'a RopeAngles,
    /// The rotary angles of the queries.
    pub(super) query_angles: &'a RopeAngles,
    /// Number of tokens in the first row, which is the prefix of the others.
    pub(super) prefix: usize,
}

/// One layer of a pass.
pub(super) struct TrainingLayer<'a, O> {
    pub(super) ops: &'a O,
    pub(super) model: &'a Gemma,
    pub(super) layer: &'a DecoderLayer,
    pub(super) rows: RowLayout<'a>,
}

/// The gradients of A and B of the projections of a layer that have a delta.
pub(super) type LayerGradients = Vec<(Projection, (Tensor, Tensor))>;

impl<O: LayerOps> TrainingLayer<'_, O> {
    /// Writes the residual stream after the layer, (queries, hidden), given the one before it, (tokens, hidden).
    ///
    /// # Errors
    /// Returns an error if the computation fails.
    pub(super) fn forward(&self, x: &O::Buffer, saved: &mut SavedLayer<O::Buffer>, out: &mut O::Buffer) -> Result<()> {
        let Self { ops, layer, rows, .. } = self;
        let (eps, width) = (self.model.config.rms_norm_eps, self.model.config.hidden_size);
        let SavedLayer { normed, low, .. } = saved;
        ops.rms_norm(x, &layer.input_layernorm, eps, normed)?;
        let [k_in, k] = &mut saved.k;
        self.linear(Projection::K, normed, low, k_in)?;
        ops.norm_rope(k_in, rows.angles, self.k_norm(), k)?;
        self.linear(Projection::V, normed, low, &mut saved.v)?;
        let (x, normed) = match (&mut saved.selected, rows.ends) {
            (None, None) => (x, &*normed),
            (Some([selected, selected_normed]), Some(ends)) => {
                ops.select(x, ends, selected)?;
                ops.select(normed, ends, selected_normed)?;
                (&*selected, &*selected_normed)
            }
            _ => bail!("the buffers of a layer do not fit its rows"),
        };
        let [q_in, q] = &mut saved.q;
        self.linear(Projection::Q, normed, low, q_in)?;
        ops.norm_rope(q_in, rows.query_angles, self.q_norm(), q)?;
        let inputs = QueriesKeysValues {
            q: &*q,
            k: &*k,
            v: &saved.v,
        };
        ops.attention(
            &self.attention(),
            &inputs,
            rows.prefix,
            &mut saved.log_sums,
            &mut saved.attended,
        )?;
        self.linear(Projection::O, &saved.attended, low, &mut saved.attention_output)?;
        let post = layer.post_attention_norm.as_ref();
        ops.add_norm(x, &saved.attention_output, post, eps, width, &mut saved.middle)?;
        ops.rms_norm(
            &saved.middle,
            &layer.pre_feedforward_norm,
            eps,
            &mut saved.middle_normed,
        )?;
        self.linear(Projection::Gate, &saved.middle_normed, low, &mut saved.gate)?;
        self.linear(Projection::Up, &saved.middle_normed, low, &mut saved.up)?;
        ops.geglu(&saved.gate, &saved.up, &mut saved.hidden)?;
        self.linear(Projection::Down, &saved.hidden, low, &mut saved.mlp_output)?;
        let post = layer.post_feedforward_norm.as_ref();
        ops.add_norm(&saved.middle, &saved.mlp_output, post, eps, width, out)
    }

    /// Returns the gradients of the layer's deltas, given that of its output, (queries, hidden), and writes the gradient
    /// of its input, (tokens, hidden), unless `d_x` is `None`. `saved` holds what the forward pass of this layer wrote,
    /// and is overwritten in part.
    ///
    /// # Errors
    /// Returns an error if the computation fails.
    pub(super) fn backward(
        &self,
        x: &O::Buffer,
        saved: &mut SavedLayer<O::Buffer>,
        space: &mut GradientBuffers<O::Buffer>,
        gradient: &O::Buffer,
        d_x: Option<&mut O::Buffer>,
    ) -> Result<LayerGradients> {
        let mut found = LayerGradients::new();
        self.mlp_backward(saved, space, gradient, &mut found)?;
        self.attention_block_backward(saved, space, d_x.is_some(), &mut found)?;
        let Some(d_x) = d_x else {
            return Ok(found);
        };
        let (ops, weight, eps) = (self.ops, &self.layer.input_layernorm, self.model.config.rms_norm_eps);
        match (&space.selected, self.rows.ends) {
            (Some(selected), Some(ends)) => {
                ops.add_at(selected, ends, &mut space.normed)?;
                ops.rms_norm_backward(x, weight, eps, &space.normed, None, d_x)?;
                ops.add_at(&space.middle, ends, d_x)?;
            }
            _ => ops.rms_norm_backward(x, weight, eps, &space.normed, Some(&space.middle), d_x)?,
        }
        Ok(found)
    }

    /// Writes the gradient of the residual stream between the blocks.
    fn mlp_backward(
        &self,
        saved: &mut SavedLayer<O::Buffer>,
        space: &mut GradientBuffers<O::Buffer>,
        gradient: &O::Buffer,
        found: &mut LayerGradients,
    ) -> Result<()> {
        let Self { ops, layer, .. } = self;
        let eps = self.model.config.rms_norm_eps;
        let d_output = match &layer.post_feedforward_norm {
            Some(post) => {
                ops.rms_norm_backward(&saved.mlp_output, post, eps, gradient, None, &mut space.output)?;
                &space.output
            }
            None => gradient,
        };
        let (low, d_low) = (&saved.low, &mut space.low);
        let out = InputGradient::Write(&mut space.hidden);
        self.linear_backward(Projection::Down, [&saved.hidden, d_output], low, d_low, out, found)?;
        ops.geglu_backward(&mut saved.gate, &mut saved.up, &space.hidden)?;
        let normed = &saved.middle_normed;
        let out = InputGradient::Write(&mut space.middle_normed);
        self.linear_backward(Projection::Gate, [normed, &saved.gate], low, d_low, out, found)?;
        let out = InputGradient::Add(&mut space.middle_normed);
        self.linear_backward(Projection::Up, [normed, &saved.up], low, d_low, out, found)?;
        let (weight, d_normed) = (&layer.pre_feedforward_norm, &space.middle_normed);
        ops.rms_norm_backward(&saved.middle, weight, eps, d_normed, Some(gradient), &mut space.middle)
    }

    /// Writes the gradient of the normed input of the layer, if it is needed, given that of the residual stream after the
    /// attention block.
    fn attention_block_backward(
        &self,
        saved: &SavedLayer<O::Buffer>,
        space: &mut GradientBuffers<O::Buffer>,
        is_input_needed: bool,
        found: &mut LayerGradients,
    ) -> Result<()> {
        let Self { ops, layer, rows, .. } = self;
        let eps = self.model.config.rms_norm_eps;
        let d_output = match &layer.post_attention_norm {
            Some(post) => {
                let (x, gradient) = (&saved.attention_output, &space.middle);
                ops.rms_norm_backward(x, post, eps, gradient, None, &mut space.output)?;
                &space.output
            }
            None => &space.middle,
        };
        let (low, d_low) = (&saved.low, &mut space.low);
        let out = InputGradient::Write(&mut space.attended);
        self.linear_backward(Projection::O, [&saved.attended, d_output], low, d_low, out, found)?;
        let ([q_in, q], [k_in, k], v) = (&saved.q, &saved.k, &saved.v);
        let ([d_q, d_q_in], [d_k, d_k_in], d_v) = (&mut space.q, &mut space.k, &mut space.v);
        let output = AttentionOutput {
            output: &saved.attended,
            log_sums: &saved.log_sums,
            space: &mut space.attention_space,
            prefix: rows.prefix,
        };
        ops.attention_backward(
            &self.attention(),
            &QueriesKeysValues { q, k, v },
            output,
            &space.attended,
            QueriesKeysValues {
                q: &mut *d_q,
                k: &mut *d_k,
                v: &mut *d_v,
            },
        )?;
        ops.norm_rope_backward(q_in, rows.query_angles, self.q_norm(), d_q, d_q_in)?;
        ops.norm_rope_backward(k_in, rows.angles, self.k_norm(), d_k, d_k_in)?;
        let (normed, d_normed) = (&saved.normed, &mut space.normed);
        let out = InputGradient::Write(&mut *d_normed).only_if(is_input_needed);
        self.linear_backward(Projection::K, [normed, d_k_in], low, d_low, out, found)?;
        let out = InputGradient::Add(&mut *d_normed).only_if(is_input_needed);
        self.linear_backward(Projection::V, [normed, d_v], low, d_low, out, found)?;
        let (normed, out) = match (&saved.selected, &mut space.selected) {
            (Some([_, selected]), Some(d_selected)) => (selected, InputGradient::Write(d_selected)),
            _ => (normed, InputGradient::Add(d_normed)),
        };
        let out = out.only_if(is_input_needed);
        self.linear_backward(Projection::Q, [normed, d_q_in], low, d_low, out, found)
    }

    /// Computes a projection with its delta.
    fn linear(&self, projection: Projection, x: &O::Buffer, low: &mut [O::Buffer], y: &mut O::Buffer) -> Result<()> {
        let linear = self.layer.projection(projection).for_training()?;
        self.ops.linear(&linear, x, &mut low[projection as usize], y)
    }

    /// Goes back through a projection, given its input and the gradient of its output, and adds the gradients of its
    /// delta to `found`.
    fn linear_backward(
        &self,
        projection: Projection,
        [x, gradient]: [&O::Buffer; 2],
        low: &[O::Buffer],
        d_low: &mut O::Buffer,
        out: InputGradient<'_, O::Buffer>,
        found: &mut LayerGradients,
    ) -> Result<()> {
        let linear = self.layer.projection(projection).for_training()?;
        let saved = SavedInput {
            x,
            low: &low[projection as usize],
        };
        let gradients = self.ops.linear_backward(&linear, saved, gradient, d_low, out)?;
        found.extend(gradients.map(|gradients| (projection, gradients)));
        Ok(())
    }

    fn attention(&self) -> PackedAttention<'_> {
        self.model.attention(self.layer, self.rows.spans, None)
    }

    fn q_norm(&self) -> Option<(&Tensor, f64)> {
        let norm = self.layer.qk_norm.as_ref();
        norm.map(|(q_norm, _)| (q_norm, self.model.config.rms_norm_eps))
    }

    fn k_norm(&self) -> Option<(&Tensor, f64)> {
        let norm = self.layer.qk_norm.as_ref();
        norm.map(|(_, k_norm)| (k_norm, self.model.config.rms_norm_eps))
    }
}
