//! The decoder of Gemma 1, 2 and 3, whose forward pass runs over packed rows.
//!
//! A forward pass does only the work that its result needs. Tokens that rows share with the cached prefix are not
//! computed again, rows are laid end to end without padding, and in the last layer only the last position of each row
//! goes through the queries, the output projection and the MLP.

mod layer;
mod pass;
#[cfg(test)]
pub(super) mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use super::gpu::GpuDecoder;
pub use super::packing::PackedRow;
use super::packing::{OutputPositions, SharedPrefix};
use super::rope::RopeTables;
use crate::config::Projection;
use crate::model::config::GemmaConfig;
use crate::model::files::lora::Adapter;
use crate::model::kernels::CachedKeysValues;
use crate::model::transfer::{PendingLogits, Transfer};
pub(in crate::model) use layer::DecoderLayer;
#[cfg(feature = "cuda")]
pub(in crate::model) use layer::{StackedMlp, StackedWeights};

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
}
