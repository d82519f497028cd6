//! The decoder: one description of the layers for Gemma 1, 2 and 3, over packed rows.
//!
//! A forward pass does only the work that the answer needs: the tokens that rows share with the
//! cached prefix are not computed again, rows stand end to end without padding, and in the last
//! layer only each row's last position goes through the queries, the output projection and the MLP.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::config::{GemmaConfig, LayerConfig, Rope};
use super::kernels::{CachedKeysValues, PackedAttention, Span, add_rms_norm, geglu, norm_rope, rms_norm};
use super::linear::Linear;
use super::lora::Projection;

/// Weights and shape of one block; fields are named as in the checkpoint.
#[derive(Debug)]
pub struct Layer {
    pub(super) config: LayerConfig,
    pub(super) q_proj: Linear,
    pub(super) k_proj: Linear,
    pub(super) v_proj: Linear,
    pub(super) o_proj: Linear,
    pub(super) gate_proj: Linear,
    pub(super) up_proj: Linear,
    pub(super) down_proj: Linear,
    /// Per-head norms of queries and keys.
    pub(super) qk_norm: Option<(Tensor, Tensor)>,
    pub(super) input_layernorm: Tensor,
    /// Norm of the attention's output, before it joins the residual stream (Gemma 2 and 3).
    pub(super) post_attention_norm: Option<Tensor>,
    /// Norm of the MLP's input; Gemma 1's checkpoint calls it `post_attention_layernorm`.
    pub(super) pre_feedforward_norm: Tensor,
    /// Norm of the MLP's output (Gemma 2 and 3).
    pub(super) post_feedforward_norm: Option<Tensor>,
}

impl Layer {
    /// One of the seven linear layers.
    pub(super) fn projection_mut(&mut self, projection: Projection) -> &mut Linear {
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
    pub(super) config: GemmaConfig,
    /// (vocabulary, hidden), in the file's dtype: rows are widened as they are read.
    pub(super) embed_tokens: Tensor,
    /// The unembedding where it is not tied.
    pub(super) lm_head: Option<Tensor>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    pub(super) ropes: RopeTables,
}

/// The prefix that rows share: its token ids, and every layer's keys and values.
#[derive(Debug)]
pub struct PrefixCache {
    tokens: Vec<u32>,
    layers: Vec<CachedKeysValues>,
}

impl PrefixCache {
    /// The prefix's token ids.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

/// A row for the forward pass: its own token ids, after `shared` ids of the prefix.
#[derive(Debug, Clone, Copy)]
pub struct PackedRow<'a> {
    /// The ids that are not shared; at least one.
    pub own: &'a [u32],
    /// Leading ids of the prefix that come before them.
    pub shared: usize,
}

impl Gemma {
    /// The architecture.
    pub fn config(&self) -> &GemmaConfig {
        &self.config
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
        Ok(PrefixCache {
            tokens: tokens.to_vec(),
            layers,
        })
    }

    /// The final hidden state at each row's last position, normed: (rows, hidden), f32.
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

    /// Logits of the given vocabulary rows: `hidden` (rows, hidden) to (rows, ids), soft-capped.
    ///
    /// # Errors
    /// candle's; an id outside the vocabulary.
    pub fn logits(&self, hidden: &Tensor, ids: &[u32]) -> Result<Tensor> {
        let logits = hidden.matmul(&self.rows_of(self.unembedding(), ids)?.t()?)?;
        match self.config.final_logit_softcapping {
            None => Ok(logits),
            Some(cap) => (logits / cap)?.tanh()? * cap,
        }
    }

    /// (vocabulary, hidden), in the file's dtype.
    pub(super) fn unembedding(&self) -> &Tensor {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    pub(super) fn rows_of(&self, table: &Tensor, ids: &[u32]) -> Result<Tensor> {
        let vocabulary = self.config.vocab_size;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
            bail!("token id {id} is outside the vocabulary of {vocabulary}");
        }
        let ids = Tensor::new(ids, table.device())?;
        table.index_select(&ids, 0)?.to_dtype(DType::F32)
    }

    /// The pass itself. `observe` sees every layer's input (tokens, hidden), keys and values.
    pub(super) fn run(
        &self,
        rows: &[PackedRow<'_>],
        prefix: Prefix<'_>,
        wanted: Wanted,
        observe: &mut dyn FnMut(&Tensor, &Tensor, &Tensor),
    ) -> Result<Output> {
        let packed = Packed::new(rows)?;
        if let Some(span) = packed.spans.iter().find(|span| span.shared > prefix.tokens(rows)) {
            bail!(
                "a row shares {} ids of a prefix of {}",
                span.shared,
                prefix.tokens(rows)
            );
        }
        let angles = self
            .ropes
            .gather(&packed.positions, self.config.max_position_embeddings)?;
        let eps = self.config.rms_norm_eps;
        let mut residual = self.embed(&packed.tokens)?;
        let Some(first) = self.layers.first() else {
            bail!("the model has no layers")
        };
        let mut normed = rms_norm(&residual, &first.input_layernorm, eps)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let angles = angles.of(&layer.config.rope);
            let (k, v) = self.keys_values(layer, &normed, angles)?;
            observe(&residual, &k, &v);
            let mut spans = packed.spans.clone();
            let (mut cos, mut sin) = angles.clone();
            match wanted {
                _ if index + 1 < self.layers.len() => {}
                Wanted::All => {}
                Wanted::KeysValues => break,
                Wanted::Last { skip } => {
                    let ends = keep_last(&mut spans, skip)?;
                    residual = residual.index_select(&ends, 0)?;
                    normed = normed.index_select(&ends, 0)?;
                    (cos, sin) = (cos.index_select(&ends, 0)?, sin.index_select(&ends, 0)?);
                }
            }
            let norm = layer.qk_norm.as_ref().map(|(q_norm, _)| (q_norm, eps));
            let q = norm_rope(&layer.q_proj.forward(&normed)?, &cos, &sin, norm)?;
            let prefix = prefix.keys_values(index, rows, &k, &v)?;
            let attention = self.attention(layer, &spans, prefix.as_ref());
            let y = layer.o_proj.forward(&attention.forward(&q, &k, &v)?)?;
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
        Ok(Output { residual, normed })
    }

    /// Scaled embeddings: (tokens, hidden), f32.
    pub(super) fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        self.rows_of(&self.embed_tokens, tokens)? * self.config.embedding_scale()
    }

    fn keys_values(&self, layer: &Layer, normed: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
        let norm = layer
            .qk_norm
            .as_ref()
            .map(|(_, k_norm)| (k_norm, self.config.rms_norm_eps));
        let k = norm_rope(&layer.k_proj.forward(normed)?, cos, sin, norm)?;
        Ok((k, layer.v_proj.forward(normed)?))
    }

    pub(super) fn attention<'a>(
        &self,
        layer: &Layer,
        spans: &'a [Span],
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

/// Where the keys and values come from that rows share.
#[derive(Clone, Copy)]
pub(super) enum Prefix<'a> {
    /// Rows share nothing.
    None,
    /// Computed before.
    Cached(&'a PrefixCache),
    /// The first row of the pass is the prefix of the others.
    FirstRow,
}

impl Prefix<'_> {
    fn tokens(&self, rows: &[PackedRow<'_>]) -> usize {
        match self {
            Self::None => 0,
            Self::Cached(cache) => cache.tokens.len(),
            Self::FirstRow => rows.first().map_or(0, |row| row.own.len()),
        }
    }

    fn keys_values(
        &self,
        layer: usize,
        rows: &[PackedRow<'_>],
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<Option<CachedKeysValues>> {
        Ok(match self {
            Self::None => None,
            Self::Cached(cache) => Some(cache.layers[layer].clone()),
            Self::FirstRow => {
                let first = |x: &Tensor| x.narrow(0, 0, self.tokens(rows));
                Some(CachedKeysValues {
                    keys: first(keys)?,
                    values: first(values)?,
                })
            }
        })
    }
}

/// What a pass is run for; the last layer does only the work that this needs.
#[derive(Debug, Clone, Copy)]
pub(super) enum Wanted {
    /// Every position.
    All,
    /// The last position of each row after the first `skip`.
    Last { skip: usize },
    /// No position: keys and values only.
    KeysValues,
}

/// The end of the residual stream, and that normed: (positions, hidden) each.
pub(super) struct Output {
    pub(super) residual: Tensor,
    pub(super) normed: Tensor,
}

/// Rows end to end.
pub(super) struct Packed {
    pub(super) tokens: Vec<u32>,
    pub(super) positions: Vec<usize>,
    pub(super) spans: Vec<Span>,
}

impl Packed {
    pub(super) fn new(rows: &[PackedRow<'_>]) -> Result<Self> {
        let total = rows.iter().map(|row| row.own.len()).sum();
        let mut packed = Self {
            tokens: Vec::with_capacity(total),
            positions: Vec::with_capacity(total),
            spans: Vec::new(),
        };
        for (index, row) in rows.iter().enumerate() {
            if row.own.is_empty() {
                bail!("row {index} has no token of its own");
            }
            let start = packed.tokens.len();
            let keys = row.own.len();
            packed.spans.push(Span {
                query_start: start,
                queries: keys,
                key_start: start,
                keys,
                shared: row.shared,
            });
            packed.tokens.extend_from_slice(row.own);
            packed.positions.extend(row.shared..row.shared + keys);
        }
        if packed.spans.is_empty() {
            bail!("a forward pass needs at least one row");
        }
        Ok(packed)
    }
}

/// Leaves out the first `skip` spans and narrows the others to their last query; gives the indices
/// of those.
pub(super) fn keep_last(spans: &mut Vec<Span>, skip: usize) -> Result<Tensor> {
    spans.drain(..skip);
    let mut ends = Vec::with_capacity(spans.len());
    for (row, span) in spans.iter_mut().enumerate() {
        ends.push((span.query_start + span.queries - 1) as u32);
        (span.query_start, span.queries) = (row, 1);
    }
    Tensor::new(ends, &Device::Cpu)
}

/// Cosines and sines by position, for each distinct rope of the model.
///
/// Computed in f32 as the reference does: `1 / theta^(2i/d)` rounded to f32, then position times
/// frequency in f32 (`transformers/modeling_rope_utils.py`).
#[derive(Debug)]
pub(super) struct RopeTables {
    frequencies: Vec<(Rope, Vec<f32>)>,
}

impl RopeTables {
    pub(super) fn new(config: &GemmaConfig) -> Self {
        let mut frequencies: Vec<(Rope, Vec<f32>)> = Vec::new();
        for layer in &config.layers {
            if frequencies.iter().all(|(rope, _)| *rope != layer.rope) {
                frequencies.push((layer.rope, inverse_frequencies(&layer.rope, config.head_dim)));
            }
        }
        Self { frequencies }
    }

    /// Angles at the given positions, (tokens, head_dim / 2) each.
    pub(super) fn gather(&self, positions: &[usize], max: usize) -> Result<Angles> {
        if let Some(position) = positions.iter().find(|&&position| position >= max) {
            bail!("position {position} is beyond the checkpoint's {max} positions");
        }
        let mut ropes = Vec::with_capacity(self.frequencies.len());
        for (rope, frequencies) in &self.frequencies {
            let shape = (positions.len(), frequencies.len());
            let angles = positions
                .iter()
                .flat_map(|&position| frequencies.iter().map(move |frequency| position as f32 * frequency));
            let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(f32::sin_cos).unzip();
            let tensor = |values| Tensor::from_vec(values, shape, &Device::Cpu);
            ropes.push((*rope, (tensor(cos)?, tensor(sin)?)));
        }
        Ok(Angles { ropes })
    }
}

fn inverse_frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    (0..head_dim)
        .step_by(2)
        .map(|i| 1.0 / (rope.theta as f32).powf(i as f32 / head_dim as f32) / rope.factor as f32)
        .collect()
}

/// (cos, sin) of the packed tokens, by rope.
pub(super) struct Angles {
    ropes: Vec<(Rope, (Tensor, Tensor))>,
}

impl Angles {
    pub(super) fn of(&self, rope: &Rope) -> &(Tensor, Tensor) {
        let index = self.ropes.iter().position(|(other, _)| other == rope);
        // The tables were built from the same layers that ask here.
        &self.ropes[index.unwrap_or_default()].1
    }
}
