//! Attention for packed rows over a shared prefix.
//!
//! Each row attends to its own tokens and to the leading part of the cached prefix that it shares. Rows are not padded,
//! and the prefix is stored once for any number of rows. Grouped heads, the sliding window and the soft-cap work as in
//! Gemma 2 (`transformers/models/gemma2/modeling_gemma2.py`, `eager_attention_forward`).

mod tile;

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use self::tile::{HeadRows, KeysValues, PAIRS, ScoreRule};

use super::elements;
use super::norm::cpu_elements;
use super::spans::{Span, Spans};

/// The keys and values of the prefix in one layer.
#[derive(Debug, Clone)]
pub struct CachedKeysValues {
    /// Keys with rotary position embedding applied: (prefix tokens, kv_heads * head_dim).
    pub keys: Tensor,
    /// Values: (prefix tokens, kv_heads * head_dim).
    pub values: Tensor,
}

/// The attention of one layer over packed rows.
pub struct PackedAttention<'a> {
    /// The positions of the rows, whose queries are in order and without gaps.
    pub spans: &'a Spans,
    /// The shared prefix, if any row attends to one.
    pub prefix: Option<&'a CachedKeysValues>,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key-value heads.
    pub kv_heads: usize,
    /// Number of elements in a head.
    pub head_dim: usize,
    /// Factor that the attention scores are multiplied by.
    pub scale: f64,
    /// Soft-cap, if the architecture has one: scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f64>,
    /// Sliding window, if the layer has one: a query attends to itself and to the `window - 1` positions before it.
    pub window: Option<usize>,
}

impl PackedAttention<'_> {
    /// Returns the attention output: (queries, heads * head_dim).
    ///
    /// `q` is (queries, heads * head_dim); `k` and `v` are (keys, kv_heads * head_dim). Rotary position embedding is
    /// already applied to `q` and `k`.
    ///
    /// # Errors
    /// Returns an error if the tensors do not fit the spans or each other, have an unsupported dtype, or cannot be
    /// computed.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if q.device().is_cuda() {
            let prefix = self.prefix.map_or(Ok(0), |prefix| prefix.keys.dim(0))?;
            self.check(q.dims(), k.dims(), v.dims(), prefix)?;
            return super::cuda::attention(self, q, k, v);
        }
        q.apply_op3_no_bwd(k, v, self)
    }

    pub(super) fn check(&self, q: &[usize], k: &[usize], v: &[usize], prefix_tokens: usize) -> Result<()> {
        let kv_width = self.kv_heads * self.head_dim;
        let queries: usize = self.spans.iter().map(|span| span.queries).sum();
        if q != [queries, self.heads * self.head_dim] || k.len() != 2 || k[1] != kv_width || k != v {
            bail!("attention over {queries} queries does not fit q {q:?}, k {k:?}, v {v:?}");
        }
        let mut next = 0;
        for span in self.spans.iter() {
            let fits = span.query_start == next
                && span.queries <= span.keys
                && span.key_start + span.keys <= k[0]
                && span.shared <= prefix_tokens;
            if !fits {
                let Span {
                    query_start,
                    queries,
                    key_start,
                    keys,
                    shared,
                } = span;
                bail!(
                    "an attention span of {queries} queries from {query_start}, {keys} keys from {key_start} and {shared} \
                     shared keys does not fit {} keys and a prefix of {prefix_tokens} tokens",
                    k[0]
                );
            }
            next += span.queries;
        }
        Ok(())
    }
}

/// The elements of all keys and values that queries attend to.
struct Elements<'a> {
    queries: &'a [f32],
    keys: &'a [f32],
    values: &'a [f32],
    prefix_keys: &'a [f32],
    prefix_values: &'a [f32],
}

/// Number of queries that one parallel task computes.
const QUERIES_PER_TASK: usize = 8;

impl CustomOp3 for PackedAttention<'_> {
    fn name(&self) -> &'static str {
        "packed-attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let prefix = self
            .prefix
            .map(|prefix| (prefix.keys.storage_and_layout(), prefix.values.storage_and_layout()));
        let (prefix_keys, prefix_values) = match &prefix {
            Some(((keys, keys_layout), (values, values_layout))) => (
                cpu_elements(name, keys, keys_layout)?,
                cpu_elements(name, values, values_layout)?,
            ),
            None => (&[][..], &[][..]),
        };
        if prefix_keys.len() != prefix_values.len() {
            bail!(
                "the prefix has {} key elements and {} value elements",
                prefix_keys.len(),
                prefix_values.len()
            );
        }
        self.check(
            l1.dims(),
            l2.dims(),
            l3.dims(),
            prefix_keys.len() / (self.kv_heads * self.head_dim),
        )?;
        let elements = Elements {
            queries: elements(name, s1, l1)?,
            keys: elements(name, s2, l2)?,
            values: elements(name, s3, l3)?,
            prefix_keys,
            prefix_values,
        };
        let mut out = vec![0f32; elements.queries.len()];
        self.attend(&elements, &mut out);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

impl PackedAttention<'_> {
    /// Writes the output of [`PackedAttention::forward`] on the CPU, where the prefix of the rows is the first `prefix`
    /// tokens of `k` and `v`.
    ///
    /// # Errors
    /// Returns an error if the lengths do not fit the spans or each other.
    pub(in crate::model) fn forward_rows(
        &self,
        q: &[f32],
        [k, v]: [&[f32]; 2],
        prefix: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let (width, kv_width) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let shape = |x: &[f32], width| [x.len() / width, width];
        self.check(&shape(q, width), &shape(k, kv_width), &shape(v, kv_width), prefix)?;
        if q.len() != out.len() || prefix * kv_width > k.len() {
            bail!("attention over a prefix of {prefix} tokens does not fit its tensors");
        }
        let elements = Elements {
            queries: q,
            keys: k,
            values: v,
            prefix_keys: &k[..prefix * kv_width],
            prefix_values: &v[..prefix * kv_width],
        };
        self.attend(&elements, out);
        Ok(())
    }

    /// Writes the output of tensors that fit the spans.
    fn attend(&self, elements: &Elements<'_>, out: &mut [f32]) {
        let width = self.heads * self.head_dim;
        let mut tasks = Vec::new();
        let mut rest = out;
        for span in self.spans.iter() {
            for first in (0..span.queries).step_by(QUERIES_PER_TASK) {
                let queries = first..(first + QUERIES_PER_TASK).min(span.queries);
                let (out, after) = rest.split_at_mut(queries.len() * width);
                rest = after;
                tasks.push((span, queries, out));
            }
        }
        tasks.into_par_iter().for_each(|(span, queries, out)| {
            let task = Task {
                attention: self,
                span,
                queries,
                elements,
                out,
            };
            Arch::new().dispatch(task);
        });
    }
}

/// All heads of some queries of a row.
struct Task<'a> {
    attention: &'a PackedAttention<'a>,
    span: &'a Span,
    /// The queries, of which the row's first is number 0.
    queries: Range<usize>,
    elements: &'a Elements<'a>,
    /// The outputs of these queries.
    out: &'a mut [f32],
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            attention,
            span,
            queries,
            elements,
            out,
        } = self;
        let PackedAttention {
            heads,
            kv_heads,
            head_dim,
            ..
        } = *attention;
        let group = heads / kv_heads;
        let (width, stride) = (heads * head_dim, kv_heads * head_dim);
        let rule = ScoreRule {
            scale: attention.scale as f32,
            softcap: attention.softcap.map(|cap| cap as f32),
        };
        let mut scores = Vec::new();
        for kv_head in 0..kv_heads {
            // The pairs of a query and a head that read the keys of this kv-head, query by query.
            let pairs = queries.len() * group;
            let (query_of, column_of) = (
                |pair: usize| pair / group,
                |pair: usize| (kv_head * group + pair % group) * head_dim,
            );
            for first in (0..pairs).step_by(PAIRS) {
                // The last pair fills up an incomplete tile.
                let tile: [usize; PAIRS] = std::array::from_fn(|index| (first + index).min(pairs - 1));
                let visible = tile.map(|pair| attention.visible(span, queries.start + query_of(pair)));
                let (from, to) = (visible[0].start, visible[PAIRS - 1].end);
                let rows =
                    |elements, start: usize| HeadRows::new(elements, start * stride + kv_head * head_dim, stride);
                let own = |elements| rows(elements, span.key_start);
                let context = KeysValues {
                    keys: [rows(elements.prefix_keys, 0), own(elements.keys)],
                    values: [rows(elements.prefix_values, 0), own(elements.values)],
                    parts: [
                        from.min(span.shared)..span.shared,
                        from.saturating_sub(span.shared)..to - span.shared,
                    ],
                };
                let queries_of_tile = tile.map(|pair| {
                    let query = span.query_start + queries.start + query_of(pair);
                    &elements.queries[query * width + column_of(pair)..][..head_dim]
                });
                scores.resize(PAIRS * context.len(), 0.0);
                let visible = visible.map(|visible| visible.start - from..visible.end - from);
                tile::attend(
                    simd,
                    rule,
                    queries_of_tile,
                    &visible,
                    &context,
                    &mut scores,
                    |index, column, sums| {
                        let pair = tile[index];
                        out[query_of(pair) * width + column_of(pair) + column..][..sums.len()].copy_from_slice(sums);
                    },
                );
            }
        }
    }
}

impl PackedAttention<'_> {
    /// Returns the positions that a query of a row attends to. The first query is number 0.
    #[inline(always)]
    pub(in crate::model) fn visible(&self, span: &Span, query: usize) -> Range<usize> {
        let end = span.shared + span.keys - span.queries + query + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device};
    use proptest::prelude::*;

    use super::super::tests::{assert_close, random};
    use super::*;

    /// Computes one row in candle's plain operations. `keys` and `values` are those of the prefix followed by the row's
    /// own.
    fn plain(op: &PackedAttention<'_>, q: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
        let heads = |x: &Tensor, count: usize| {
            x.reshape((x.dim(0)?, count, op.head_dim))?
                .transpose(0, 1)?
                .contiguous()
        };
        let group = op.heads / op.kv_heads;
        let repeat = |x: &Tensor| {
            let x = heads(x, op.kv_heads)?;
            let (kv_heads, tokens, dim) = x.dims3()?;
            x.unsqueeze(1)?
                .expand((kv_heads, group, tokens, dim))?
                .reshape((op.heads, tokens, dim))
        };
        let (q, k, v) = (heads(q, op.heads)?, repeat(keys)?, repeat(values)?);
        let mut scores = (q.matmul(&k.t()?.contiguous()?)? * op.scale)?;
        if let Some(cap) = op.softcap {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        let (_, queries, tokens) = scores.dims3()?;
        let mask: Vec<f32> = (0..queries)
            .flat_map(|query| (0..tokens).map(move |key| (query + tokens - queries, key)))
            .map(|(query, key)| {
                let visible = key <= query && op.window.is_none_or(|window| query - key < window);
                if visible { 0.0 } else { f32::NEG_INFINITY }
            })
            .collect();
        let mask = Tensor::from_vec(mask, (1, queries, tokens), &Device::Cpu)?;
        let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
        weights
            .matmul(&v)?
            .transpose(0, 1)?
            .reshape((queries, op.heads * op.head_dim))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Packed rows over a shared prefix give the same output as each row alone with its keys and values
        /// concatenated.
        #[test]
        fn packed_rows_equal_rows_alone(
            rows in prop::collection::vec((1usize..40, 0usize..=13, any::<bool>()), 1..6),
            shape in prop::sample::select(vec![(1, 1, 32), (4, 1, 64), (4, 2, 16), (6, 3, 80)]),
            softcap in prop::option::of(1.0..20.0),
            window in prop::option::of(1usize..24),
            seed in 0u64..1000,
        ) {
            let (heads, kv_heads, head_dim) = shape;
            let mut spans = Vec::new();
            let (mut query_start, mut key_start) = (0, 0);
            for (keys, shared, last_only) in rows {
                let queries = if last_only { 1 } else { keys };
                spans.push(Span { query_start, queries, key_start, keys, shared });
                query_start += queries;
                key_start += keys;
            }
            let tensor = |rows: usize, heads: usize, salt| random((rows, heads * head_dim), seed * 8 + salt).unwrap();
            let q = tensor(query_start, heads, 0);
            let (k, v) = (tensor(key_start, kv_heads, 1), tensor(key_start, kv_heads, 2));
            let prefix = CachedKeysValues { keys: tensor(13, kv_heads, 3), values: tensor(13, kv_heads, 4) };
            let spans = Spans::new(spans, &Device::Cpu).unwrap();
            let op = PackedAttention {
                spans: &spans, prefix: Some(&prefix), heads, kv_heads, head_dim,
                scale: (head_dim as f64).powf(-0.5), softcap, window,
            };
            let out = op.forward(&q, &k, &v).unwrap();
            for span in spans.iter() {
                let own = |x: &Tensor, prefix: &Tensor| {
                    let own = x.narrow(0, span.key_start, span.keys).unwrap();
                    Tensor::cat(&[&prefix.narrow(0, 0, span.shared).unwrap(), &own], 0).unwrap()
                };
                let q = q.narrow(0, span.query_start, span.queries).unwrap();
                let expected = plain(&op, &q, &own(&k, &prefix.keys), &own(&v, &prefix.values)).unwrap();
                assert_close(&out.narrow(0, span.query_start, span.queries).unwrap(), &expected, 3e-6);
            }
        }
    }

    #[test]
    fn spans_that_do_not_fit_are_an_error() -> Result<()> {
        let (q, k) = (random((2, 8), 1)?, random((2, 8), 2)?);
        let good = Span {
            query_start: 0,
            queries: 2,
            key_start: 0,
            keys: 2,
            shared: 0,
        };
        for (span, fits) in [
            (good, true),
            (Span { shared: 1, ..good }, false),
            (Span { key_start: 1, ..good }, false),
            (Span { queries: 1, ..good }, false),
            (Span { query_start: 1, ..good }, false),
        ] {
            let op = PackedAttention {
                spans: &Spans::new(vec![span], &Device::Cpu)?,
                prefix: None,
                heads: 1,
                kv_heads: 1,
                head_dim: 8,
                scale: 1.0,
                softcap: None,
                window: None,
            };
            assert_eq!(op.forward(&q, &k, &k).is_ok(), fits, "{span:?}");
        }
        Ok(())
    }
}
