//! The input of a forward pass: rows laid end to end, and the prefix that they share.

use candle_core::{Result, Tensor, bail};

use super::gemma::PrefixCache;
use super::rope::PassAngles;
use crate::model::kernels::{CachedKeysValues, Span, Spans};

/// A row in a forward pass: its own tokens, preceded by the first `shared` tokens of the prefix.
#[derive(Debug, Clone, Copy)]
pub struct PackedRow<'a> {
    /// The token ids that are not shared, at least one.
    pub own: &'a [u32],
    /// The number of leading tokens of the prefix that come before the own tokens.
    pub shared: usize,
}

/// The source of the keys and values that rows share.
#[derive(Clone, Copy)]
pub(crate) enum SharedPrefix<'a> {
    /// No prefix; the rows share nothing.
    None,
    /// A prefix whose keys and values have been computed.
    Cached(&'a PrefixCache),
    /// The first row of the pass is the prefix of the others, as in training.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests compare training with this pass"))]
    FirstRow,
}

impl SharedPrefix<'_> {
    /// Returns the number of tokens of the prefix.
    pub(crate) fn tokens(&self, rows: &[PackedRow<'_>]) -> usize {
        match self {
            Self::None => 0,
            Self::Cached(cache) => cache.tokens.len(),
            Self::FirstRow => rows.first().map_or(0, |row| row.own.len()),
        }
    }

    /// Returns the prefix's keys and values in one layer, given those of the whole pass: (tokens, kv_heads * head_dim)
    /// each.
    pub(crate) fn keys_values(
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

/// The positions whose output is needed. In the last layer, nothing else is computed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum OutputPositions {
    /// All positions.
    All,
    /// The last position of each row, leaving out the first `skip` rows.
    Last { skip: usize },
    /// No positions; only keys and values are needed.
    KeysValues,
}

/// The residual stream after the last layer, before and after the final norm: (positions, hidden) each.
pub(crate) struct PassOutput {
    #[cfg_attr(not(test), expect(dead_code, reason = "tests compare training with it"))]
    pub(crate) residual: Tensor,
    pub(crate) normed: Tensor,
}

/// Rows laid end to end, without padding.
pub(crate) struct PackedRows {
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<usize>,
    pub(crate) spans: Vec<Span>,
}

impl PackedRows {
    pub(crate) fn new(rows: &[PackedRow<'_>]) -> Result<Self> {
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

/// The input of a pass on the device.
pub(crate) struct PassInputs {
    /// (tokens), u32
    pub(crate) tokens: Tensor,
    pub(crate) angles: PassAngles,
    pub(crate) spans: Spans,
    /// For [`OutputPositions::Last`], the spans of the last layer and the indices of the positions, (positions), u32.
    pub(crate) last: Option<(Spans, Tensor)>,
    /// On a GPU and for [`OutputPositions::Last`], the distances of these positions from the beginnings of their
    /// prompts, (positions), u32.
    pub(crate) last_positions: Option<Tensor>,
    /// The memory that holds all of these: (numbers), u32.
    #[cfg(feature = "cuda")]
    pub(crate) uploaded: Tensor,
}

/// Narrows each span after the first `skip` to its last query, and returns the indices of those queries too.
pub(crate) fn last_queries(spans: &[Span], skip: usize) -> (Vec<Span>, Vec<u32>) {
    let last = |(row, span): (usize, &Span)| {
        let end = span.query_start + span.queries - 1;
        let span = Span {
            query_start: row,
            queries: 1,
            ..*span
        };
        (span, end as u32)
    };
    spans[skip..].iter().enumerate().map(last).unzip()
}
