//! The buffers of a layer in training.

use candle_core::Result;

use super::ops::LayerOps;
use crate::config::Projection;
use crate::model::config::GemmaConfig;

/// The sizes of the buffers of a layer.
///
/// `tokens` rows go through keys and values, and the rows that have queries through everything else.
pub(in crate::model::training) struct LayerSizes<'a> {
    pub(in crate::model::training) config: &'a GemmaConfig,
    pub(in crate::model::training) tokens: usize,
    /// Number of rows that have queries, or `None` if all do.
    pub(in crate::model::training) queries: Option<usize>,
    /// The largest rank of a delta.
    pub(in crate::model::training) rank: usize,
}

impl LayerSizes<'_> {
    fn queries(&self) -> usize {
        self.queries.unwrap_or(self.tokens)
    }

    fn q_width(&self) -> usize {
        self.config.num_attention_heads * self.config.head_dim
    }

    fn kv_width(&self) -> usize {
        self.config.num_key_value_heads * self.config.head_dim
    }

    /// Returns the number of elements that [`SavedLayer`] holds and an input of the layer has, if all rows have queries.
    pub(in crate::model::training) fn saved_elements(&self) -> usize {
        let config = self.config;
        let widths = 6 * config.hidden_size
            + 3 * self.q_width()
            + 3 * self.kv_width()
            + 3 * config.intermediate_size
            + config.num_attention_heads
            + Projection::ALL.len() * self.rank;
        self.tokens * widths
    }
}

/// What the forward pass of a layer keeps for its backward pass, in the order in which it is written.
pub(in crate::model::training) struct SavedLayer<B> {
    /// (tokens, hidden)
    pub(super) normed: B,
    /// The rows of the input and of `normed` that have queries, if not all do: (queries, hidden) each.
    pub(super) selected: Option<[B; 2]>,
    /// Queries before norm and rotation, and after: (queries, heads * head_dim).
    pub(super) q: [B; 2],
    /// Keys before norm and rotation, and after: (tokens, kv_heads * head_dim).
    pub(super) k: [B; 2],
    pub(super) v: B,
    /// (queries * heads)
    pub(super) log_sums: B,
    /// The output of attention: (queries, heads * head_dim).
    pub(super) attended: B,
    /// The output of the attention block: (queries, hidden).
    pub(super) attention_output: B,
    /// The residual stream between the blocks, before and after its norm: (queries, hidden) each.
    pub(super) middle: B,
    pub(super) middle_normed: B,
    /// (queries, intermediate) each. The backward pass replaces the first two by their gradients.
    pub(super) gate: B,
    pub(super) up: B,
    pub(super) hidden: B,
    /// The output of the MLP: (queries, hidden).
    pub(super) mlp_output: B,
    /// The products of the inputs of the projections and the matrices A of their deltas, in the order of
    /// [`Projection::ALL`]: (tokens or queries, rank) each.
    pub(super) low: [B; Projection::ALL.len()],
}

impl<B> SavedLayer<B> {
    pub(in crate::model::training) fn new<O: LayerOps<Buffer = B>>(ops: &O, sizes: &LayerSizes<'_>) -> Result<Self> {
        let (tokens, queries, config) = (sizes.tokens, sizes.queries(), sizes.config);
        let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
        let (q_width, kv_width) = (sizes.q_width(), sizes.kv_width());
        let buffer = |rows: usize, width: usize| ops.buffer(rows * width);
        let factor = |rows: usize, width: usize| ops.factor(rows * width);
        let low = || buffer(tokens, sizes.rank);
        Ok(Self {
            normed: factor(tokens, hidden)?,
            selected: match sizes.queries {
                Some(queries) => Some([buffer(queries, hidden)?, factor(queries, hidden)?]),
                None => None,
            },
            q: [buffer(queries, q_width)?, buffer(queries, q_width)?],
            k: [buffer(tokens, kv_width)?, buffer(tokens, kv_width)?],
            v: buffer(tokens, kv_width)?,
            log_sums: buffer(queries, config.num_attention_heads)?,
            attended: factor(queries, q_width)?,
            attention_output: buffer(queries, hidden)?,
            middle: buffer(queries, hidden)?,
            middle_normed: factor(queries, hidden)?,
            gate: factor(queries, mlp)?,
            up: factor(queries, mlp)?,
            hidden: factor(queries, mlp)?,
            mlp_output: buffer(queries, hidden)?,
            low: [low()?, low()?, low()?, low()?, low()?, low()?, low()?],
        })
    }
}

/// What the backward pass of a layer writes, which layers use in turn. Each field is the gradient of what its name says.
pub(in crate::model::training) struct GradientBuffers<B> {
    /// The output of a block before its post-norm: (queries, hidden).
    pub(super) output: B,
    pub(super) hidden: B,
    pub(super) middle_normed: B,
    pub(super) middle: B,
    pub(super) attended: B,
    /// Space of the size of [`SavedLayer::log_sums`].
    pub(super) attention_space: B,
    /// After norm and rotation, and before.
    pub(super) q: [B; 2],
    pub(super) k: [B; 2],
    pub(super) v: B,
    pub(super) normed: B,
    /// The selected rows of `normed`.
    pub(super) selected: Option<B>,
    /// The largest of [`SavedLayer::low`].
    pub(super) low: B,
}

impl<B> GradientBuffers<B> {
    pub(in crate::model::training) fn new<O: LayerOps<Buffer = B>>(ops: &O, sizes: &LayerSizes<'_>) -> Result<Self> {
        let (tokens, queries, config) = (sizes.tokens, sizes.queries(), sizes.config);
        let (hidden, q_width, kv_width) = (config.hidden_size, sizes.q_width(), sizes.kv_width());
        let buffer = |rows: usize, width: usize| ops.buffer(rows * width);
        let factor = |rows: usize, width: usize| ops.factor(rows * width);
        Ok(Self {
            output: factor(queries, hidden)?,
            hidden: buffer(queries, config.intermediate_size)?,
            middle_normed: buffer(queries, hidden)?,
            middle: factor(queries, hidden)?,
            attended: buffer(queries, q_width)?,
            attention_space: buffer(queries, config.num_attention_heads)?,
            q: [buffer(queries, q_width)?, factor(queries, q_width)?],
            k: [buffer(tokens, kv_width)?, factor(tokens, kv_width)?],
            v: factor(tokens, kv_width)?,
            normed: buffer(tokens, hidden)?,
            selected: match sizes.queries {
                Some(queries) => Some(buffer(queries, hidden)?),
                None => None,
            },
            low: buffer(tokens, sizes.rank)?,
        })
    }
}
