//! What a forward pass runs over: rows end to end, and what they share.

use candle_core::{Result, Tensor, bail};

use super::gemma::PrefixCache;
use super::rope::Angles;
use crate::model::kernels::{CachedKeysValues, Span, Spans};

/// A row for the forward pass: its own token ids, after `shared` ids of the prefix.
#[derive(Debug, Clone, Copy)]
pub struct PackedRow<'a> {
    /// The ids that are not shared; at least one.
    pub own: &'a [u32],
    /// Leading ids of the prefix that come before them.
    pub shared: usize,
}

/// Where the keys and values come from that rows share.
#[derive(Clone, Copy)]
pub(crate) enum Prefix<'a> {
    /// Rows share nothing.
    None,
    /// Computed before.
    Cached(&'a PrefixCache),
    /// The first row of the pass is the prefix of the others.
    FirstRow,
}

impl Prefix<'_> {
    pub(crate) fn tokens(&self, rows: &[PackedRow<'_>]) -> usize {
        match self {
            Self::None => 0,
            Self::Cached(cache) => cache.tokens.len(),
            Self::FirstRow => rows.first().map_or(0, |row| row.own.len()),
        }
    }

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

/// What a pass is run for; the last layer does only the work that this needs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wanted {
    /// Every position.
    All,
    /// The last position of each row after the first `skip`.
    Last { skip: usize },
    /// No position: keys and values only.
    KeysValues,
}

/// The end of the residual stream, and that normed: (positions, hidden) each.
pub(crate) struct PassOutput {
    pub(crate) residual: Tensor,
    pub(crate) normed: Tensor,
}

/// Rows end to end.
pub(crate) struct Packed {
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<usize>,
    pub(crate) spans: Vec<Span>,
}

impl Packed {
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

/// What a pass is given, where it computes.
pub(crate) struct Inputs {
    /// (tokens) of u32.
    pub(crate) tokens: Tensor,
    pub(crate) angles: Angles,
    pub(crate) spans: Spans,
    /// Where only each row's last position is wanted: the last layer's rows, and the indices of those positions.
    pub(crate) last: Option<(Spans, Tensor)>,
}

/// The spans after the first `skip`, narrowed to their last query, and the indices of those queries.
pub(crate) fn keep_last(spans: &[Span], skip: usize) -> (Vec<Span>, Vec<u32>) {
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
