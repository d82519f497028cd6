//! The decoder of Gemma 1, 2 and 3, whose forward pass runs over packed rows.
//!
//! A forward pass does only the work that its result needs. Tokens that rows share with the cached prefix are not
//! computed again, rows are laid end to end without padding, and in the last layer only the last position of each row
//! goes through the queries, the output projection and the MLP.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use super::gpu::{Fp8Mlp, GpuDecoder};
use super::linear::{Linear, LinearInput};
pub use super::packing::PackedRow;
use super::packing::{OutputPositions, PackedRows, PassInputs, PassOutput, SharedPrefix, last_queries};
use super::rope::RopeTables;
use crate::config::Projection;
use crate::model::config::{GemmaConfig, LayerConfig};
use crate::model::files::lora::Adapter;
use crate::model::kernels::{
    CachedKeysValues, PackedAttention, PackedSpans, RopeAngles, Spans, add_rms_norm, norm_rope, rms_norm,
};
use crate::model::transfer::{PendingLogits, Transfer, UploadBuffer};

/// The weights of one layer, which layers with other adapters can share. Fields have the checkpoint's names, except where families differ.
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

/// A decoder whose weights are on the device that computes. A clone shares the weights.
#[derive(Debug, Clone)]
pub struct Gemma {
    pub(in crate::model) config: GemmaConfig,
    /// (vocabulary, hidden), in the file's dtype. Rows are converted to f32 when they are used.
    pub(in crate::model) embed_tokens: Tensor,
    /// (vocabulary, hidden), in the file's dtype; `None` if the embedding is tied.
    pub(in crate::model) lm_head: Option<Tensor>,
    pub(in crate::model) layers: Vec<DecoderLayer>,
    pub(in crate::model) norm: Tensor,
    pub(in crate::model) ropes: Arc<RopeTables>,
    pub(in crate::model) transfer: Arc<Transfer>,
    pub(in crate::model) device: Device,
    /// The dtype of linear layers and their deltas. The residual stream, norms and logits are f32.
    pub(in crate::model) dtype: DType,
    /// The same decoder for scoring in bf16 on a GPU.
    #[cfg(feature = "cuda")]
    pub(in crate::model) gpu: Option<GpuDecoder>,
}

/// A prefix that rows share: its token ids, and the keys and values of every layer.
#[derive(Debug)]
pub struct PrefixCache {
    pub(in crate::model) tokens: Vec<u32>,
    pub(in crate::model) layers: Vec<CachedKeysValues>,
    /// Tells prefixes apart whose memory has the same address, one after the other.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(dead_code, reason = "only passes on a GPU repeat addresses")
    )]
    pub(in crate::model) id: u64,
}

impl PrefixCache {
    fn new(tokens: &[u32], layers: Vec<CachedKeysValues>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            tokens: tokens.to_vec(),
            layers,
            id: NEXT.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Returns the token ids of the prefix.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

impl Gemma {
    /// Returns the shape and constants of the decoder.
    pub fn config(&self) -> &GemmaConfig {
        &self.config
    }

    /// Returns the device that the weights are on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Returns the dtype of linear layers and hidden states.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Returns a decoder with the same base weights, which the two share, and with an adapter beside them.
    ///
    /// # Errors
    /// Returns an error if this decoder has an adapter, or if the device fails.
    pub fn with_adapter(&self, adapter: &Adapter) -> Result<Self> {
        let mut adapted = self.clone();
        for (index, layer) in adapted.layers.iter_mut().enumerate() {
            for projection in Projection::ALL {
                if let Some(lora) = adapter.get(index, projection) {
                    let linear = layer.projection_mut(projection);
                    *linear = linear.with_delta(lora)?;
                }
            }
        }
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &mut adapted.gpu {
            *gpu = gpu.with_adapter(adapter)?;
        }
        Ok(adapted)
    }

    /// Returns the decoder with logits that are not soft-capped, which is how a classification head computes them.
    pub(crate) fn without_softcap(mut self) -> Self {
        self.config.final_logit_softcapping = None;
        self
    }

    /// Returns the bytes of GPU memory that hold the buffers of passes while no pass runs.
    pub(crate) fn buffer_bytes(&self) -> u64 {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            return gpu.buffer_bytes();
        }
        0
    }

    /// Frees the buffers of passes on a GPU if they are for passes of more than `max_tokens` tokens. The next pass
    /// allocates smaller ones.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(unused_variables, reason = "only passes on a GPU keep buffers")
    )]
    pub(crate) fn limit_buffers(&self, max_tokens: usize) {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            gpu.limit_buffers(max_tokens);
        }
    }

    /// Returns the number of parameters. A tied embedding counts once.
    pub(crate) fn parameters(&self) -> usize {
        let config = &self.config;
        let norms = if config.family.has_post_norms() { 4 } else { 2 } * config.hidden_size
            + if config.family.has_qk_norm() {
                2 * config.head_dim
            } else {
                0
            };
        let embeddings = if config.tie_word_embeddings { 1 } else { 2 } * config.vocab_size * config.hidden_size;
        embeddings + config.num_layers() * (config.linear_weights_per_layer() + norms) + config.hidden_size
    }

    /// Computes the keys and values of a prefix.
    ///
    /// # Errors
    /// Returns an error if the prefix is empty, if an id is outside the vocabulary, or if the device fails.
    pub fn cache_prefix(&self, tokens: &[u32]) -> Result<PrefixCache> {
        let rows = [PackedRow { own: tokens, shared: 0 }];
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            let layers = gpu.keys_values(
                self,
                &self.pass_inputs(&rows, SharedPrefix::None, OutputPositions::KeysValues)?,
            )?;
            self.device.synchronize()?;
            return Ok(PrefixCache::new(tokens, layers));
        }
        let mut layers = Vec::with_capacity(self.layers.len());
        self.run(
            &rows,
            SharedPrefix::None,
            OutputPositions::KeysValues,
            &mut |_, keys, values| {
                layers.push(CachedKeysValues {
                    keys: keys.clone(),
                    values: values.clone(),
                });
            },
        )?;
        // An earlier failure of the device is reported here instead of in the first batch.
        self.device.synchronize()?;
        Ok(PrefixCache::new(tokens, layers))
    }

    /// Computes the normed final hidden state at the last position of each row: (rows, hidden), in [`Gemma::dtype`].
    ///
    /// # Errors
    /// Returns an error if a row is empty, is longer than the checkpoint supports, contains an id outside the
    /// vocabulary or shares more tokens than the prefix has, or if the device fails.
    pub fn forward(&self, rows: &[PackedRow<'_>], prefix: Option<&PrefixCache>) -> Result<Tensor> {
        let outputs = OutputPositions::Last { skip: 0 };
        let shared = prefix.map_or(SharedPrefix::None, SharedPrefix::Cached);
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            return gpu.last_hidden(self, rows, prefix);
        }
        Ok(self.run(rows, shared, outputs, &mut |_, _, _| ())?.normed)
    }

    /// Returns the rows of the unembedding that belong to the given token ids: (ids, hidden), f32.
    ///
    /// # Errors
    /// Returns an error if an id is outside the vocabulary or the device fails.
    pub fn unembedding_rows(&self, ids: &[u32]) -> Result<Tensor> {
        self.check_ids(ids)?;
        self.embedding_rows(self.unembedding(), &Tensor::new(ids, &self.device)?)
    }

    /// Computes soft-capped logits (rows, ids) in f32 from `hidden` (rows, hidden) and from rows of the unembedding
    /// (ids, hidden).
    ///
    /// # Errors
    /// Returns an error if the shapes do not match or the device fails.
    pub fn logits(&self, hidden: &Tensor, unembedding: &Tensor) -> Result<Tensor> {
        let logits = hidden.to_dtype(DType::F32)?.matmul(&unembedding.t()?)?;
        match self.config.final_logit_softcapping {
            None => Ok(logits),
            Some(cap) => (logits / cap)?.tanh()? * cap,
        }
    }

    /// Begins [`Gemma::forward`] followed by [`Gemma::logits`], and returns the logits row by row. On a GPU, this does
    /// not wait for the result.
    ///
    /// # Errors
    /// Returns the errors of these functions. If the device fails later, [`PendingLogits::wait`] returns the error.
    pub fn begin(
        &self,
        rows: &[PackedRow<'_>],
        prefix: Option<&PrefixCache>,
        unembedding: &Tensor,
    ) -> Result<PendingLogits> {
        let hidden = self.forward(rows, prefix)?;
        self.transfer.download(&self.logits(&hidden, unembedding)?)
    }

    /// Returns the unembedding: (vocabulary, hidden), in the file's dtype.
    pub(in crate::model) fn unembedding(&self) -> &Tensor {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// Returns an error if an id is outside the vocabulary.
    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocabulary = self.config.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocabulary) {
            None => Ok(()),
            Some(id) => bail!("token id {id} is outside the vocabulary of {vocabulary}"),
        }
    }

    /// Returns the rows of an embedding (vocabulary, hidden) for valid ids: (ids, hidden), f32.
    pub(in crate::model) fn embedding_rows(&self, table: &Tensor, ids: &Tensor) -> Result<Tensor> {
        table.index_select(ids, 0)?.to_dtype(DType::F32)
    }

    /// Copies the input of a pass to the device.
    pub(in crate::model) fn inputs(&self, packed: PackedRows, outputs: OutputPositions) -> Result<PassInputs> {
        self.check_ids(&packed.tokens)?;
        let mut upload = UploadBuffer::default();
        let tokens = upload.push(packed.tokens);
        // They fit in u32, because `RopeTables::angles` below refuses positions beyond the config's limit.
        let position = |&position: &usize| position as u32;
        let is_gpu = !self.device.is_cpu();
        let positions = is_gpu.then(|| upload.push(packed.positions.iter().map(position)));
        let mut last_positions = None;
        let last = match outputs {
            OutputPositions::Last { skip } => {
                let (spans, ends) = last_queries(&packed.spans, skip);
                let at_ends = ends.iter().map(|&end| position(&packed.positions[end as usize]));
                last_positions = is_gpu.then(|| upload.push(at_ends));
                let ends = upload.push(ends);
                Some((PackedSpans::new(spans, &self.device, &mut upload)?, ends))
            }
            OutputPositions::All | OutputPositions::KeysValues => None,
        };
        let spans = PackedSpans::new(packed.spans, &self.device, &mut upload)?;
        let uploaded = self.transfer.upload(upload)?;
        let positions = positions.map(|positions| uploaded.get(&positions)).transpose()?;
        Ok(PassInputs {
            tokens: uploaded.get(&tokens)?,
            angles: self.ropes.angles(&packed.positions, positions.as_ref())?,
            spans: spans.on_device(&uploaded)?,
            last: match last {
                Some((spans, ends)) => Some((spans.on_device(&uploaded)?, uploaded.get(&ends)?)),
                None => None,
            },
            last_positions: last_positions.map(|positions| uploaded.get(&positions)).transpose()?,
            #[cfg(feature = "cuda")]
            uploaded: uploaded.whole(),
        })
    }

    /// Checks the rows of a pass and copies them to the device.
    pub(super) fn pass_inputs(
        &self,
        rows: &[PackedRow<'_>],
        prefix: SharedPrefix<'_>,
        outputs: OutputPositions,
    ) -> Result<PassInputs> {
        let packed = PackedRows::new(rows)?;
        let prefix = prefix.tokens(rows);
        match packed.spans.iter().find(|span| span.shared > prefix) {
            None => self.inputs(packed, outputs),
            Some(span) => bail!("a row shares {} tokens, but the prefix has only {prefix}", span.shared),
        }
    }

    /// Runs a pass. `observe` is called in each layer with its input (tokens, hidden), its keys and its values.
    pub(in crate::model) fn run(
        &self,
        rows: &[PackedRow<'_>],
        prefix: SharedPrefix<'_>,
        outputs: OutputPositions,
        observe: &mut dyn FnMut(&Tensor, &Tensor, &Tensor),
    ) -> Result<PassOutput> {
        let PassInputs {
            tokens,
            angles,
            mut spans,
            last,
            last_positions,
            ..
        } = self.pass_inputs(rows, prefix, outputs)?;
        let eps = self.config.rms_norm_eps;
        let mut residual = (self.embedding_rows(&self.embed_tokens, &tokens)? * self.config.embedding_scale())?;
        let Some(first) = self.layers.first() else {
            bail!("the model has no layers")
        };
        let mut normed = rms_norm(&residual, &first.input_layernorm, eps, self.dtype)?;
        for (index, layer) in self.layers.iter().enumerate() {
            #[cfg(test)]
            super::memory_limit::check(index, residual.dim(0)?, &self.device)?;
            let last_normed;
            let mut layer_angles = angles.of(&layer.config.rope).clone();
            let mut input = LinearInput::new(&normed);
            let (k, v) = self.keys_values(layer, &input, &layer_angles)?;
            observe(&residual, &k, &v);
            if index + 1 == self.layers.len() {
                if let OutputPositions::KeysValues = outputs {
                    break;
                }
                if let Some((last, ends)) = &last {
                    spans = last.clone();
                    residual = residual.index_select(ends, 0)?;
                    last_normed = normed.index_select(ends, 0)?;
                    input = LinearInput::new(&last_normed);
                    layer_angles = layer_angles.select(ends, last_positions.as_ref())?;
                }
            }
            let norm = layer.qk_norm.as_ref().map(|(q_norm, _)| (q_norm, eps));
            let q = norm_rope(&layer.q_proj.forward(&input)?, &layer_angles, norm)?;
            let prefix = prefix.keys_values(index, rows, &k, &v)?;
            let attention = self.attention(layer, &spans, prefix.as_ref());
            let y = layer
                .o_proj
                .forward(&LinearInput::new(&attention.forward(&q, &k, &v)?))?;
            // Memory use peaks in the MLP, so these are freed before it.
            drop((q, k, v, prefix));
            let post = layer.post_attention_norm.as_ref();
            (residual, normed) = add_rms_norm(&residual, &y, post, &layer.pre_feedforward_norm, eps)?;
            let y = layer.mlp(&normed)?;
            let next = self
                .layers
                .get(index + 1)
                .map_or(&self.norm, |next| &next.input_layernorm);
            (residual, normed) = add_rms_norm(&residual, &y, layer.post_feedforward_norm.as_ref(), next, eps)?;
        }
        Ok(PassOutput { residual, normed })
    }

    /// Computes the keys and values of a layer: (tokens, kv_heads * head_dim) each.
    fn keys_values(
        &self,
        layer: &DecoderLayer,
        input: &LinearInput<'_>,
        angles: &RopeAngles,
    ) -> Result<(Tensor, Tensor)> {
        let norm = layer
            .qk_norm
            .as_ref()
            .map(|(_, k_norm)| (k_norm, self.config.rms_norm_eps));
        let k = norm_rope(&layer.k_proj.forward(input)?, angles, norm)?;
        Ok((k, layer.v_proj.forward(input)?))
    }

    pub(in crate::model) fn attention<'a>(
        &self,
        layer: &DecoderLayer,
        spans: &'a Spans,
        prefix: Option<&'a CachedKeysValues>,
    ) -> PackedAttention<'a> {
        PackedAttention {
            spans,
            prefix,
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
            scale: self.config.query_scale,
            softcap: self.config.attn_logit_softcapping,
            window: layer.config.window,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::config::Quantize;
    use crate::model::device::Placement;
    use crate::model::files::checkpoint::Checkpoint;
    use crate::model::forward::linear::LoraMode;
    use crate::model::forward::load::LoadOptions;

    fn folder() -> PathBuf {
        crate::test_files::test_file("tests/fixtures/gemma3")
    }

    /// Returns a small Gemma 3 without an adapter.
    pub fn base(quantize: Quantize) -> Gemma {
        let options = LoadOptions {
            lora: LoraMode::Unmerged,
            quantize,
            placement: Placement::cpu(),
            for_training: false,
        };
        Gemma::load(&Checkpoint::open(&folder()).unwrap(), None, options).unwrap()
    }

    /// Returns an adapter of [`base`].
    pub fn adapter(name: &str, base: &Gemma) -> Adapter {
        Adapter::load(&folder().join(name), base.config(), "sha256:0").unwrap()
    }

    /// During a swap, two versions serve at once. They hold one base between them.
    #[test]
    fn decoders_with_different_adapters_hold_one_base() {
        for quantize in [Quantize::None, Quantize::Int8] {
            let base = base(quantize);
            let adapted = |name: &str| base.with_adapter(&adapter(name, &base)).unwrap();
            for (one, other) in [
                (adapted("lora_qv"), adapted("lora_all_rslora")),
                (base.clone(), adapted("lora_qv")),
            ] {
                assert_eq!(one.embed_tokens.id(), other.embed_tokens.id());
                for (mut one, mut other) in one.layers.into_iter().zip(other.layers) {
                    for projection in Projection::ALL {
                        let (one, other) = (one.projection_mut(projection), other.projection_mut(projection));
                        assert!(one.shares_weight_with(other), "{projection:?}, {quantize:?}");
                    }
                }
            }
        }
    }
}
