//! A decoder layer in candle's plain operations, whose gradients the tests of [`super::layer`] compare with ours.

use candle_core::{D, Device, Result, Tensor};

use crate::model::forward::gemma::{DecoderLayer, Gemma};
use crate::model::kernels::{RopeAngles, Span};

/// The layout of the packed rows of a pass, and the positions whose output is needed.
pub(super) struct PlainRows<'a> {
    /// The span of each row that has queries.
    pub(super) spans: &'a [Span],
    /// The positions whose output is needed, (positions) of u32, or `None` for all of them.
    pub(super) ends: Option<&'a Tensor>,
    /// The rotary angles of the tokens in this layer.
    pub(super) angles: &'a RopeAngles,
    /// Number of tokens in the first row, which is the prefix of the others.
    pub(super) prefix: usize,
}

impl Gemma {
    /// Returns the residual stream after layer `index`, (positions, hidden size), given the one before it,
    /// (tokens, hidden size).
    ///
    /// # Errors
    /// Returns an error if the computation fails.
    pub(super) fn differentiable_layer(&self, index: usize, x: &Tensor, rows: &PlainRows<'_>) -> Result<Tensor> {
        let layer = &self.layers[index];
        let eps = self.config.rms_norm_eps;
        let normed = rms_norm(x, &layer.input_layernorm, eps)?;
        let (q_norm, k_norm) = match &layer.qk_norm {
            Some((q_norm, k_norm)) => (Some(q_norm), Some(k_norm)),
            None => (None, None),
        };
        let (cos, sin) = &rows.angles.of_tokens()?;
        let k = self.normed_and_rotated_heads(&layer.k_proj.differentiable(&normed)?, k_norm, cos, sin)?;
        let v = self.heads(&layer.v_proj.differentiable(&normed)?)?;
        let (x, q) = match rows.ends {
            None => (
                x.clone(),
                self.normed_and_rotated_heads(&layer.q_proj.differentiable(&normed)?, q_norm, cos, sin)?,
            ),
            Some(ends) => {
                let at_ends = |tensor: &Tensor| tensor.index_select(ends, 0);
                let q = layer.q_proj.differentiable(&at_ends(&normed)?)?;
                (
                    at_ends(x)?,
                    self.normed_and_rotated_heads(&q, q_norm, &at_ends(cos)?, &at_ends(sin)?)?,
                )
            }
        };
        let y = layer.o_proj.differentiable(&self.attend(layer, &q, &k, &v, rows)?)?;
        let y = match &layer.post_attention_norm {
            Some(norm) => rms_norm(&y, norm, eps)?,
            None => y,
        };
        let x = (x + y)?;
        let normed = rms_norm(&x, &layer.pre_feedforward_norm, eps)?;
        let hidden = (layer.gate_proj.differentiable(&normed)?.gelu()? * layer.up_proj.differentiable(&normed)?)?;
        let y = layer.down_proj.differentiable(&hidden)?;
        let y = match &layer.post_feedforward_norm {
            Some(norm) => rms_norm(&y, norm, eps)?,
            None => y,
        };
        x + y
    }

    /// Splits (tokens, heads * head_dim) into (heads, tokens, head_dim).
    fn heads(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, width) = x.dims2()?;
        let head_dim = self.config.head_dim;
        x.reshape((tokens, width / head_dim, head_dim))?
            .transpose(0, 1)?
            .contiguous()
    }

    /// Splits `x` as [`Gemma::heads`] does, then normalises each head if `norm` is set, and rotates it.
    fn normed_and_rotated_heads(
        &self,
        x: &Tensor,
        norm: Option<&Tensor>,
        cos: &Tensor,
        sin: &Tensor,
    ) -> Result<Tensor> {
        let x = self.heads(x)?;
        let x = match norm {
            Some(norm) => rms_norm(&x, norm, self.config.rms_norm_eps)?,
            None => x,
        };
        let half = self.config.head_dim / 2;
        let (first, second) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let rotated = [
            (first.broadcast_mul(cos)? - second.broadcast_mul(sin)?)?,
            (second.broadcast_mul(cos)? + first.broadcast_mul(sin)?)?,
        ];
        Tensor::cat(&rotated, 2)
    }

    /// Computes the attention row by row. The inputs are (heads, tokens, head_dim) each, and the output
    /// is (queries, heads * head_dim).
    fn attend(&self, layer: &DecoderLayer, q: &Tensor, k: &Tensor, v: &Tensor, rows: &PlainRows<'_>) -> Result<Tensor> {
        let config = &self.config;
        let (heads, kv_heads, head_dim) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let group = heads / kv_heads;
        let mut outputs = Vec::with_capacity(rows.spans.len());
        for span in rows.spans {
            let with_prefix = |x: &Tensor| {
                let own = x.narrow(1, span.key_start, span.keys)?;
                if span.shared == 0 {
                    Ok(own)
                } else {
                    Tensor::cat(&[x.narrow(1, 0, span.shared)?, own], 1)
                }
            };
            let tokens = span.shared + span.keys;
            debug_assert!(span.shared <= rows.prefix);
            // The query heads of a group become one longer list of queries: (kv_heads, group * queries, head_dim).
            let q = q.narrow(1, span.query_start, span.queries)?.contiguous()?;
            let q = q.reshape((kv_heads, group * span.queries, head_dim))?;
            let scores = (q.matmul(&with_prefix(k)?.transpose(1, 2)?.contiguous()?)? * config.query_scale)?;
            let scores = match config.attn_logit_softcapping {
                Some(cap) => ((scores / cap)?.tanh()? * cap)?,
                None => scores,
            };
            let scores = scores.reshape((kv_heads, group, span.queries, tokens))?;
            let scores = scores.broadcast_add(&mask(span, layer.config.window, scores.device())?)?;
            let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
            let weights = weights.reshape((kv_heads, group * span.queries, tokens))?;
            let output = weights
                .matmul(&with_prefix(v)?.contiguous()?)?
                .reshape((heads, span.queries, head_dim))?;
            outputs.push(output.transpose(0, 1)?.reshape((span.queries, heads * head_dim))?);
        }
        Tensor::cat(&outputs, 0)
    }
}

/// Returns `x / sqrt(mean(x^2) + eps) * weight`, with the mean over the last dimension.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + eps)?.sqrt()?)?.broadcast_mul(weight)
}

/// Returns the attention mask of a row, (1, 1, queries, shared + keys): zero where a query attends to a key, and minus
/// infinity elsewhere.
fn mask(span: &Span, window: Option<usize>, device: &Device) -> Result<Tensor> {
    let tokens = span.shared + span.keys;
    let mut mask = Vec::with_capacity(span.queries * tokens);
    for query in 0..span.queries {
        let position = tokens - span.queries + query;
        mask.extend((0..tokens).map(|key| {
            let visible = key <= position && window.is_none_or(|window| position - key < window);
            if visible { 0f32 } else { f32::NEG_INFINITY }
        }));
    }
    Tensor::from_vec(mask, (1, 1, span.queries, tokens), device)
}
