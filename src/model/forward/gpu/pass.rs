//! One pass: the kernels and products of all layers.

use candle_core::{DType, Result, Tensor, bail};
use half::bf16;

use super::deltas::{InputDeltas, LayerDeltas};
use super::inputs::Inputs;
use super::products::{Matrix, Products, Weight};
use super::weights::{LayerWeights, Mlp, Resident};
use super::workspace::Buffers;
use super::{Base, GpuDecoder};
use crate::model::forward::gemma::{Gemma, PrefixCache};
use crate::model::kernels::CachedKeysValues;
use crate::model::kernels::cuda::launch::{
    AddRmsNorm, Attention, EmbedNorm, GatherRows, Geglu, Kernels, LowRank, NormRope, SpanAddresses, Values,
};
use crate::model::transfer::cuda_tensor::{Address, CudaTensor, wrap};

/// The index of the values among the projections that read the attention's input.
const V: usize = 2;

/// One pass over buffers that are large enough for it. What it queues, it queues on one stream.
pub(super) struct Pass<'a> {
    pub(super) decoder: &'a GpuDecoder,
    pub(super) base: &'a Base,
    pub(super) gemma: &'a Gemma,
    pub(super) kernels: &'a Kernels,
    pub(super) products: &'a Products,
    pub(super) buffers: Buffers,
    pub(super) tokens: usize,
    pub(super) outputs: usize,
    pub(super) inputs: &'a Inputs,
}

/// The rows that the part of a layer after the keys and values computes, and where they are.
#[derive(Clone, Copy)]
struct Stream {
    rows: usize,
    residual: Address,
    normed: Address,
}

impl Pass<'_> {
    /// Computes all layers but the last, and returns the index of that. `observe` is called in each layer after the
    /// keys and values.
    pub(super) fn layers_but_the_last(
        &self,
        prefix: Option<&PrefixCache>,
        observe: &mut dyn FnMut(&Self) -> Result<()>,
    ) -> Result<usize> {
        let (base, buffers) = (self.base, &self.buffers);
        let Some(first) = base.layers.first() else {
            bail!("the model has no layers")
        };
        self.kernels.embed_norm(EmbedNorm {
            table: base.embed_tokens.address,
            table_dtype: base.embed_tokens.tensor.dtype(),
            tokens: self.inputs.tokens,
            scale: base.embedding_scale,
            weight: first.input_norm.address,
            residual: buffers.residual,
            normed: buffers.normed,
            rows: self.tokens,
            width: base.sizes.hidden,
            eps: base.eps,
        })?;
        let all = Stream {
            rows: self.tokens,
            residual: buffers.residual,
            normed: buffers.normed,
        };
        for (index, layers) in base.layers.windows(2).enumerate() {
            let [layer, next] = layers else { continue };
            #[cfg(test)]
            crate::model::forward::memory_limit::check(index, self.tokens, &self.gemma.device)?;
            self.qkv(index, true)?;
            observe(self)?;
            let prefix = prefix.map(|prefix| &prefix.layers[index]);
            self.attention(layer, self.inputs.spans, prefix, buffers.qkv, base.sizes.qkv())?;
            self.after_attention(index, all, &next.input_norm, buffers.normed)?;
        }
        let last = base.layers.len() - 1;
        #[cfg(test)]
        crate::model::forward::memory_limit::check(last, self.tokens, &self.gemma.device)?;
        Ok(last)
    }

    /// Computes the last layer, whose queries, output projection and MLP run only for the last position of each row, and
    /// writes the normed hidden states, (outputs, hidden), bf16.
    pub(super) fn last_layer(&self, index: usize, prefix: Option<&PrefixCache>, hidden: Address) -> Result<()> {
        let (base, buffers) = (self.base, &self.buffers);
        let layer = &base.layers[index];
        let Some(inputs) = &self.inputs.last else {
            bail!("a scoring pass needs the last position of each row")
        };
        self.qkv(index, false)?;
        let last = Stream {
            rows: self.outputs,
            residual: buffers.last_residual,
            normed: buffers.last_normed,
        };
        self.kernels.gather_rows(GatherRows {
            residual: buffers.residual,
            normed: buffers.normed,
            indices: inputs.ends,
            out_residual: last.residual,
            out_normed: last.normed,
            rows: last.rows,
            width: base.sizes.hidden,
        })?;
        self.last_queries(index, inputs.positions)?;
        let prefix = prefix.map(|prefix| &prefix.layers[index]);
        self.attention(layer, inputs.spans, prefix, buffers.last_queries, base.sizes.queries)?;
        self.after_attention(index, last, &base.norm, hidden)
    }

    /// Returns a bf16 tensor that the caller fills.
    pub(super) fn new_tensor(&self, rows: usize, width: usize) -> Result<Tensor> {
        #[expect(unsafe_code, reason = "the memory is written before it is read")]
        // SAFETY: the kernel or copy that the caller queues next writes every element.
        let memory = unsafe { self.base.device.alloc::<bf16>(rows * width)? };
        Ok(wrap(memory, &self.base.device, (rows, width)))
    }

    fn deltas(&self, layer: usize) -> Option<&LayerDeltas> {
        self.decoder.deltas[layer].as_deref()
    }

    /// Computes the rotated keys and the values of all tokens, and the rotated queries if they are wanted, and writes them
    /// to [`Buffers::qkv`].
    pub(super) fn qkv(&self, layer: usize, with_queries: bool) -> Result<()> {
        let (base, buffers, sizes) = (self.base, &self.buffers, &self.base.sizes);
        let weights = &base.layers[layer];
        let (first, heads) = if with_queries {
            (0, sizes.heads)
        } else {
            (sizes.queries, 0)
        };
        // The columns before the values.
        let rotated = sizes.queries + sizes.keys - first;
        let x = Matrix::new(buffers.normed, sizes.hidden);
        let at = buffers.qkv.bf16(first);
        let out = Matrix::new(at, sizes.qkv());
        let deltas = self.deltas(layer).and_then(|deltas| deltas.qkv.as_ref());
        // Values that get a delta are computed in f32, so that their sum is rounded to bf16 only once.
        let values = deltas.filter(|deltas| deltas.has(V)).map(|_| Values {
            at: buffers.values,
            offset: rotated,
        });
        match values {
            None => {
                let weight = weights.qkv(first, rotated + sizes.keys);
                self.products.bf16(self.tokens, x, weight, out)?;
            }
            Some(values) => {
                self.products.bf16(self.tokens, x, weights.qkv(first, rotated), out)?;
                let weight = weights.qkv(first + rotated, sizes.keys);
                self.products
                    .f32(self.tokens, x, weight, Matrix::new(values.at, sizes.keys))?;
            }
        }
        if let Some(deltas) = deltas {
            self.low(self.tokens, x, deltas.a(), buffers.low)?;
        }
        self.kernels.norm_rope(
            DType::BF16,
            NormRope {
                x: at,
                out: at,
                stride: sizes.qkv(),
                heads,
                kv_heads: sizes.kv_heads,
                head_dim: sizes.head_dim,
                rows: self.tokens,
                angles: self.inputs.angles(&weights.config.rope, self.inputs.positions)?,
                norms: weights.qk_norms(),
                eps: base.eps,
                deltas: deltas.map(|deltas| deltas.given(buffers.low)),
                values,
            },
        )
    }

    /// Computes the rotated queries of the last position of each row.
    fn last_queries(&self, layer: usize, positions: Address) -> Result<()> {
        let (base, buffers, sizes) = (self.base, &self.buffers, &self.base.sizes);
        let weights = &base.layers[layer];
        let x = Matrix::new(buffers.last_normed, sizes.hidden);
        let out = Matrix::new(buffers.last_queries, sizes.queries);
        self.products
            .bf16(self.outputs, x, weights.qkv(0, sizes.queries), out)?;
        let deltas = self.deltas(layer).and_then(|deltas| deltas.qkv.as_ref());
        if let Some(deltas) = deltas {
            self.low(self.outputs, x, deltas.a(), buffers.low)?;
        }
        self.kernels.norm_rope(
            DType::BF16,
            NormRope {
                x: buffers.last_queries,
                out: buffers.last_queries,
                stride: sizes.queries,
                heads: sizes.heads,
                kv_heads: 0,
                head_dim: sizes.head_dim,
                rows: self.outputs,
                angles: self.inputs.angles(&weights.config.rope, positions)?,
                norms: weights.qk_norms(),
                eps: base.eps,
                deltas: deltas.map(|deltas| deltas.given(buffers.low)),
                values: None,
            },
        )
    }

    fn attention(
        &self,
        layer: &LayerWeights,
        spans: SpanAddresses,
        prefix: Option<&CachedKeysValues>,
        queries: Address,
        stride: usize,
    ) -> Result<()> {
        let (sizes, config) = (&self.base.sizes, &self.gemma.config);
        let keys = self.buffers.qkv.bf16(sizes.queries);
        let prefix = match prefix {
            Some(prefix) => {
                let address = |x| CudaTensor::new("attention", x)?.address();
                [address(&prefix.keys)?, address(&prefix.values)?]
            }
            None => [Address::NULL; 2],
        };
        self.kernels.attention(
            DType::BF16,
            &Attention {
                q: queries,
                k: keys,
                v: keys.bf16(sizes.keys),
                prefix,
                spans,
                out: self.buffers.attention,
                heads: sizes.heads,
                kv_heads: sizes.kv_heads,
                head_dim: sizes.head_dim,
                q_stride: stride,
                kv_stride: sizes.qkv(),
                prefix_stride: sizes.keys,
                window: layer.config.window,
                scale: config.query_scale,
                softcap: config.attn_logit_softcapping,
            },
        )
    }

    /// Computes the rest of a layer after the attention, and the norm of the next one.
    fn after_attention(&self, layer: usize, stream: Stream, next: &Resident, normed: Address) -> Result<()> {
        let (base, buffers, sizes) = (self.base, &self.buffers, &self.base.sizes);
        let (weights, deltas) = (&base.layers[layer], self.deltas(layer));
        let rows = stream.rows;
        let attention = Matrix::new(buffers.attention, sizes.queries);
        self.products
            .bf16(rows, attention, weights.o(), Matrix::new(buffers.y, sizes.hidden))?;
        let o = deltas.and_then(|deltas| deltas.o.as_ref());
        if let Some(delta) = o {
            self.low(rows, attention, delta.a(), buffers.low)?;
        }
        let add_rms_norm = AddRmsNorm {
            residual: stream.residual,
            y: buffers.y,
            deltas: o.map(|delta| delta.given(buffers.low)),
            post: weights.post_attention_norm.as_ref().map(|norm| norm.address),
            next: weights.pre_feedforward_norm.address,
            sum: stream.residual,
            normed: stream.normed,
            rows,
            width: sizes.hidden,
            eps: base.eps,
        };
        match &weights.mlp {
            Mlp::Bf16 { gate_up, down } => self.mlp([gate_up.whole(), down.whole()], add_rms_norm, deltas)?,
            Mlp::Fp8(mlp) => self.fp8_mlp(mlp, add_rms_norm, deltas)?,
        }
        let down = deltas.and_then(|deltas| deltas.down.as_ref());
        self.kernels.add_rms_norm(
            DType::BF16,
            AddRmsNorm {
                deltas: down.map(|delta| delta.given(buffers.low)),
                post: weights.post_feedforward_norm.as_ref().map(|norm| norm.address),
                next: next.address,
                normed,
                ..add_rms_norm
            },
        )
    }

    /// Computes the norm before an MLP, the MLP, and the low-rank activations of its last delta. The weights are gate and
    /// up, stacked, and down.
    fn mlp(&self, [gate_up, down]: [Weight; 2], norm: AddRmsNorm, deltas: Option<&LayerDeltas>) -> Result<()> {
        let (buffers, sizes, rows) = (&self.buffers, &self.base.sizes, norm.rows);
        self.kernels.add_rms_norm(DType::BF16, norm)?;

        let x = Matrix::new(norm.normed, sizes.hidden);
        self.products
            .bf16(rows, x, gate_up, Matrix::new(buffers.gate_up, 2 * sizes.inner))?;
        let gate_up = deltas.and_then(|deltas| deltas.gate_up.as_ref());
        if let Some(deltas) = gate_up {
            self.low(rows, x, deltas.a(), buffers.low)?;
        }
        self.kernels.geglu(DType::BF16, self.activation(rows, gate_up))?;
        let hidden = Matrix::new(buffers.hidden, sizes.inner);
        self.products
            .bf16(rows, hidden, down, Matrix::new(buffers.y, sizes.hidden))?;
        match deltas.and_then(|deltas| deltas.down.as_ref()) {
            Some(delta) => self.low(rows, hidden, delta.a(), buffers.low),
            None => Ok(()),
        }
    }

    /// Returns the activation of an MLP, from [`Buffers::gate_up`] to [`Buffers::hidden`].
    pub(super) fn activation(&self, rows: usize, deltas: Option<&InputDeltas>) -> Geglu {
        let (buffers, sizes) = (&self.buffers, &self.base.sizes);
        Geglu {
            gate: buffers.gate_up,
            up: buffers.gate_up.bf16(sizes.inner),
            stride: 2 * sizes.inner,
            deltas: deltas.map(|deltas| deltas.given(buffers.low)),
            out: buffers.hidden,
            rows,
            width: sizes.inner,
        }
    }

    /// Computes the low-rank activations `x A'` of all projections that read `x`.
    pub(super) fn low(&self, rows: usize, x: Matrix, a: Weight, out: Address) -> Result<()> {
        let is_done = self.kernels.low_rank(LowRank {
            x: x.at,
            stride: x.stride,
            a: a.at,
            out,
            rows,
            width: a.inputs,
            ranks: a.outputs,
        })?;
        if is_done {
            return Ok(());
        }
        self.products.bf16(rows, x, a, Matrix::new(out, a.outputs))
    }

    /// Returns a copy of the keys and values of all tokens.
    pub(super) fn copy_keys_values(&self) -> Result<CachedKeysValues> {
        let sizes = &self.base.sizes;
        let copy = self.new_tensor(self.tokens, sizes.qkv())?;
        let to = CudaTensor::new("keys and values", &copy)?.address()?;
        self.buffers.qkv.copy(to, 2 * copy.elem_count(), &self.base.device)?;
        let part = |start| copy.narrow(1, start, sizes.keys)?.contiguous();
        Ok(CachedKeysValues {
            keys: part(sizes.queries)?,
            values: part(sizes.queries + sizes.keys)?,
        })
    }
}
