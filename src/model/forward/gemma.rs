//! The decoder: one description of the layers for Gemma 1, 2 and 3, over packed rows.
//!
//! A forward pass does only the work that the answer needs: the tokens that rows share with the
//! cached prefix are not computed again, rows stand end to end without padding, and in the last
//! layer only each row's last position goes through the queries, the output projection and the MLP.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::linear::Linear;
pub use super::packing::PackedRow;
use super::packing::{Inputs, Packed, PassOutput, Prefix, Wanted, keep_last};
use super::rope::RopeTables;
use crate::config::Projection;
use crate::model::config::{GemmaConfig, LayerConfig};
use crate::model::kernels::{
    CachedKeysValues, PackedAttention, PackedSpans, Spans, Turn, add_rms_norm, geglu, norm_rope, rms_norm,
};
use crate::model::transfer::{Lists, PendingLogits, Transfer};

/// Weights and shape of one block; fields are named as in the checkpoint.
#[derive(Debug)]
pub struct DecoderLayer {
    pub(in crate::model) config: LayerConfig,
    pub(in crate::model) q_proj: Linear,
    pub(in crate::model) k_proj: Linear,
    pub(in crate::model) v_proj: Linear,
    pub(in crate::model) o_proj: Linear,
    pub(in crate::model) gate_proj: Linear,
    pub(in crate::model) up_proj: Linear,
    pub(in crate::model) down_proj: Linear,
    /// Per-head norms of queries and keys.
    pub(in crate::model) qk_norm: Option<(Tensor, Tensor)>,
    pub(in crate::model) input_layernorm: Tensor,
    /// Norm of the attention's output, before it joins the residual stream (Gemma 2 and 3).
    pub(in crate::model) post_attention_norm: Option<Tensor>,
    /// Norm of the MLP's input; Gemma 1's checkpoint calls it `post_attention_layernorm`.
    pub(in crate::model) pre_feedforward_norm: Tensor,
    /// Norm of the MLP's output (Gemma 2 and 3).
    pub(in crate::model) post_feedforward_norm: Option<Tensor>,
}

impl DecoderLayer {
    /// One of the seven linear layers.
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

/// A loaded decoder.
#[derive(Debug)]
pub struct Gemma {
    pub(in crate::model) config: GemmaConfig,
    /// (vocabulary, hidden), in the file's dtype: rows are widened as they are read.
    pub(in crate::model) embed_tokens: Tensor,
    /// The unembedding where it is not tied.
    pub(in crate::model) lm_head: Option<Tensor>,
    pub(in crate::model) layers: Vec<DecoderLayer>,
    pub(in crate::model) norm: Tensor,
    pub(in crate::model) ropes: RopeTables,
    /// Between the host and where all of it is.
    pub(in crate::model) transfer: Transfer,
    /// Where all of it is.
    pub(in crate::model) device: Device,
    /// What linear layers and their deltas compute in; the residual stream, norms and logits are f32.
    pub(in crate::model) dtype: DType,
}

/// The prefix that rows share: its token ids, and every layer's keys and values.
#[derive(Debug)]
pub struct PrefixCache {
    pub(in crate::model) tokens: Vec<u32>,
    pub(in crate::model) layers: Vec<CachedKeysValues>,
}

impl PrefixCache {
    /// The prefix's token ids.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

impl Gemma {
    /// The architecture.
    pub fn config(&self) -> &GemmaConfig {
        &self.config
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What its linear layers compute in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Parameters of the architecture, the tied unembedding counted once.
    pub fn parameters(&self) -> usize {
        let config = &self.config;
        let linear: usize = Projection::ALL
            .iter()
            .map(|projection| projection.shape(config).iter().product::<usize>())
            .sum();
        let norms = if config.family.has_post_norms() { 4 } else { 2 } * config.hidden_size
            + if config.family.has_qk_norm() {
                2 * config.head_dim
            } else {
                0
            };
        let embeddings = if config.tie_word_embeddings { 1 } else { 2 } * config.vocab_size * config.hidden_size;
        embeddings + config.num_layers() * (linear + norms) + config.hidden_size
    }

    /// Computes the keys and values of a prefix, once.
    ///
    /// # Errors
    /// candle's; an empty prefix or an id outside the vocabulary.
    pub fn cache_prefix(&self, tokens: &[u32]) -> Result<PrefixCache> {
        let mut layers = Vec::with_capacity(self.layers.len());
        let rows = [PackedRow { own: tokens, shared: 0 }];
        self.run(&rows, Prefix::None, Wanted::KeysValues, &mut |_, keys, values| {
            layers.push(CachedKeysValues {
                keys: keys.clone(),
                values: values.clone(),
            });
        })?;
        // What failed on the way here shows now, not in the first batch.
        self.device.synchronize()?;
        Ok(PrefixCache {
            tokens: tokens.to_vec(),
            layers,
        })
    }

    /// The final hidden state at each row's last position, normed: (rows, hidden), in [`Gemma::dtype`].
    ///
    /// # Errors
    /// candle's; an empty row, an id outside the vocabulary, a row longer than the checkpoint's
    /// positions, more shared ids than the prefix has.
    pub fn forward(&self, rows: &[PackedRow<'_>], prefix: Option<&PrefixCache>) -> Result<Tensor> {
        let prefix = prefix.map_or(Prefix::None, Prefix::Cached);
        Ok(self
            .run(rows, prefix, Wanted::Last { skip: 0 }, &mut |_, _, _| ())?
            .normed)
    }

    /// Rows of the unembedding: (ids, hidden), f32.
    ///
    /// # Errors
    /// candle's; an id outside the vocabulary.
    pub fn unembedding_of(&self, ids: &[u32]) -> Result<Tensor> {
        self.known(ids)?;
        self.rows_of(self.unembedding(), &Tensor::new(ids, &self.device)?)
    }

    /// Logits of the vocabulary rows that `unembedding` (ids, hidden) holds: `hidden` (rows, hidden) to
    /// (rows, ids), soft-capped, f32.
    ///
    /// # Errors
    /// candle's.
    pub fn logits(&self, hidden: &Tensor, unembedding: &Tensor) -> Result<Tensor> {
        let logits = hidden.to_dtype(DType::F32)?.matmul(&unembedding.t()?)?;
        match self.config.final_logit_softcapping {
            None => Ok(logits),
            Some(cap) => (logits / cap)?.tanh()? * cap,
        }
    }

    /// [`Gemma::forward`] and [`Gemma::logits`], row by row; on a GPU begun and not waited for.
    ///
    /// # Errors
    /// Theirs; what fails on the device later, the answer tells.
    pub fn begin(
        &self,
        rows: &[PackedRow<'_>],
        prefix: Option<&PrefixCache>,
        unembedding: &Tensor,
    ) -> Result<PendingLogits> {
        let hidden = self.forward(rows, prefix)?;
        self.transfer.fetch(&self.logits(&hidden, unembedding)?)
    }

    /// (vocabulary, hidden), in the file's dtype.
    pub(in crate::model) fn unembedding(&self) -> &Tensor {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    fn known(&self, ids: &[u32]) -> Result<()> {
        let vocabulary = self.config.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocabulary) {
            None => Ok(()),
            Some(id) => bail!("token id {id} is outside the vocabulary of {vocabulary}"),
        }
    }

    /// Rows of a table at ids that are in it, f32.
    fn rows_of(&self, table: &Tensor, ids: &Tensor) -> Result<Tensor> {
        table.index_select(ids, 0)?.to_dtype(DType::F32)
    }

    /// Brings a pass's numbers to where it computes.
    pub(in crate::model) fn inputs(&self, packed: Packed, wanted: Wanted) -> Result<Inputs> {
        self.known(&packed.tokens)?;
        let group = self.config.num_attention_heads / self.config.num_key_value_heads;
        let mut lists = Lists::default();
        let tokens = lists.push(packed.tokens);
        let positions = if self.device.is_cpu() {
            None
        } else {
            let positions = packed.positions.iter();
            // Checked below to be less than the config's, which u32 holds.
            Some(lists.push(positions.map(|&position| position as u32)))
        };
        let last = match wanted {
            Wanted::Last { skip } => {
                let (spans, ends) = keep_last(&packed.spans, skip);
                let ends = lists.push(ends);
                Some((PackedSpans::new(spans, group, &self.device, &mut lists)?, ends))
            }
            Wanted::All | Wanted::KeysValues => None,
        };
        let spans = PackedSpans::new(packed.spans, group, &self.device, &mut lists)?;
        let sent = self.transfer.send(lists)?;
        let there = positions.map(|positions| sent.get(&positions)).transpose()?;
        Ok(Inputs {
            tokens: sent.get(&tokens)?,
            angles: self.ropes.gather(&packed.positions, there.as_ref())?,
            spans: spans.arrived(&sent)?,
            last: match last {
                Some((spans, ends)) => Some((spans.arrived(&sent)?, sent.get(&ends)?)),
                None => None,
            },
        })
    }

    /// The pass itself. `observe` sees every layer's input (tokens, hidden), keys and values.
    pub(in crate::model) fn run(
        &self,
        rows: &[PackedRow<'_>],
        prefix: Prefix<'_>,
        wanted: Wanted,
        observe: &mut dyn FnMut(&Tensor, &Tensor, &Tensor),
    ) -> Result<PassOutput> {
        let packed = Packed::new(rows)?;
        if let Some(span) = packed.spans.iter().find(|span| span.shared > prefix.tokens(rows)) {
            bail!(
                "a row shares {} ids of a prefix of {}",
                span.shared,
                prefix.tokens(rows)
            );
        }
        let Inputs {
            tokens,
            angles,
            mut spans,
            last,
        } = self.inputs(packed, wanted)?;
        let eps = self.config.rms_norm_eps;
        let mut residual = (self.rows_of(&self.embed_tokens, &tokens)? * self.config.embedding_scale())?;
        let Some(first) = self.layers.first() else {
            bail!("the model has no layers")
        };
        let mut normed = rms_norm(&residual, &first.input_layernorm, eps, self.dtype)?;
        for (index, layer) in self.layers.iter().enumerate() {
            #[cfg(test)]
            super::faults::check(index, residual.dim(0)?, &self.device)?;
            let mut turn = angles.of(&layer.config.rope).clone();
            let (k, v) = self.keys_values(layer, &normed, &turn)?;
            observe(&residual, &k, &v);
            if index + 1 == self.layers.len() {
                if let Wanted::KeysValues = wanted {
                    break;
                }
                if let Some((last, ends)) = &last {
                    spans = last.clone();
                    residual = residual.index_select(ends, 0)?;
                    normed = normed.index_select(ends, 0)?;
                    turn = turn.select(ends)?;
                }
            }
            let norm = layer.qk_norm.as_ref().map(|(q_norm, _)| (q_norm, eps));
            let q = norm_rope(&layer.q_proj.forward(&normed)?, &turn, norm)?;
            let prefix = prefix.keys_values(index, rows, &k, &v)?;
            let attention = self.attention(layer, &spans, prefix.as_ref());
            let y = layer.o_proj.forward(&attention.forward(&q, &k, &v)?)?;
            // The MLP is where a pass holds most: these would stand beside it until the layer's end.
            drop((q, k, v, prefix));
            let post = layer.post_attention_norm.as_ref();
            (residual, normed) = add_rms_norm(&residual, &y, post, &layer.pre_feedforward_norm, eps)?;
            let hidden = geglu(&layer.gate_proj.forward(&normed)?, &layer.up_proj.forward(&normed)?)?;
            let y = layer.down_proj.forward(&hidden)?;
            let next = self
                .layers
                .get(index + 1)
                .map_or(&self.norm, |next| &next.input_layernorm);
            (residual, normed) = add_rms_norm(&residual, &y, layer.post_feedforward_norm.as_ref(), next, eps)?;
        }
        Ok(PassOutput { residual, normed })
    }

    fn keys_values(&self, layer: &DecoderLayer, normed: &Tensor, turn: &Turn) -> Result<(Tensor, Tensor)> {
        let norm = layer
            .qk_norm
            .as_ref()
            .map(|(_, k_norm)| (k_norm, self.config.rms_norm_eps));
        let k = norm_rope(&layer.k_proj.forward(normed)?, turn, norm)?;
        Ok((k, layer.v_proj.forward(normed)?))
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
