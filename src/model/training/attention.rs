//! The gradient of packed attention.
//!
//! For a query `q`, the keys `k_j` and values `v_j` that it attends to, `s_j = cap(scale q k_j)`, the weights
//! `p = softmax(s)` and the output `o = sum_j p_j v_j`, the gradients are (Dao et al., "FlashAttention", 2022, appendix
//! B.2): `dv_j = p_j do`, `dp_j = do v_j`, `ds_j = p_j (dp_j - sum_i p_i dp_i)`, `dq = scale sum_j ds_j cap'_j k_j` and
//! `dk_j = scale ds_j cap'_j q`, where `cap' = 1 - (s / cap)^2`. Each sum over queries or keys is a matrix product.

use candle_core::Result;
use rayon::prelude::*;

use crate::model::kernels::training::QueriesKeysValues;
use crate::model::kernels::{PackedAttention, Span, dispatch, exp, tanh};
use crate::model::products::{Factor, multiply_matrices};

/// Number of queries whose scores a task holds at a time. It bounds the memory that long rows take.
const QUERIES_PER_CHUNK: usize = 128;

/// Writes the gradients with respect to queries, keys and values, given that of the output: (queries, heads * head_dim).
///
/// The first tokens of `inputs` are the prefix that the rows of `attention` share, whose keys and values get gradients
/// from all rows. The sums are taken in the order of the rows, so they do not depend on the number of threads.
///
/// # Errors
/// Returns an error if a product fails.
pub(super) fn attention_backward(
    attention: &PackedAttention<'_>,
    inputs: &QueriesKeysValues<&[f32]>,
    gradient: &[f32],
    out: QueriesKeysValues<&mut [f32]>,
) -> Result<()> {
    let PackedAttention {
        heads,
        kv_heads,
        head_dim,
        ..
    } = *attention;
    let (group, kv_width) = (heads / kv_heads, kv_heads * head_dim);
    let tasks: Vec<(&Span, usize)> = attention
        .spans
        .iter()
        .flat_map(|span| (0..kv_heads).map(move |kv_head| (span, kv_head)))
        .collect();
    let parts: Vec<HeadGradients> = tasks
        .par_iter()
        .map(|&(span, kv_head)| {
            RowHead {
                attention,
                inputs,
                gradient,
                span,
                kv_head,
            }
            .gradients()
        })
        .collect::<Result<_>>()?;
    out.k.fill(0.0);
    out.v.fill(0.0);
    for ((span, kv_head), part) in tasks.into_iter().zip(parts) {
        for (index, values) in part.queries.chunks_exact(group * head_dim).enumerate() {
            let start = ((span.query_start + index) * kv_heads + kv_head) * group * head_dim;
            out.q[start..][..values.len()].copy_from_slice(values);
        }
        for (to, from) in [(&mut *out.k, &part.keys), (&mut *out.v, &part.values)] {
            for (index, values) in from.chunks_exact(head_dim).enumerate() {
                let start = key_of(span, index) * kv_width + kv_head * head_dim;
                for (to, value) in to[start..][..head_dim].iter_mut().zip(values) {
                    *to += value;
                }
            }
        }
    }
    Ok(())
}

/// Returns the index of the key at a position of a row, counted over the shared prefix and then the row's own tokens.
fn key_of(span: &Span, position: usize) -> usize {
    if position < span.shared {
        position
    } else {
        span.key_start + position - span.shared
    }
}

/// One row and one of its key-value heads.
struct RowHead<'a> {
    attention: &'a PackedAttention<'a>,
    inputs: &'a QueriesKeysValues<&'a [f32]>,
    gradient: &'a [f32],
    span: &'a Span,
    kv_head: usize,
}

/// The gradients of a [`RowHead`]: (queries * group, head_dim), and twice (shared + keys, head_dim).
struct HeadGradients {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl RowHead<'_> {
    fn gradients(&self) -> Result<HeadGradients> {
        let PackedAttention {
            heads,
            kv_heads,
            head_dim,
            ..
        } = *self.attention;
        let (span, group) = (self.span, heads / kv_heads);
        let tokens = span.shared + span.keys;
        let (keys, values) = (self.context(self.inputs.k), self.context(self.inputs.v));
        let mut out = HeadGradients {
            queries: vec![0.0; span.queries * group * head_dim],
            keys: vec![0.0; tokens * head_dim],
            values: vec![0.0; tokens * head_dim],
        };
        for first in (0..span.queries).step_by(QUERIES_PER_CHUNK) {
            let count = QUERIES_PER_CHUNK.min(span.queries - first);
            // The keys that at least one query of the chunk attends to.
            let (from, to) = (
                self.attention.visible(span, first).start,
                self.attention.visible(span, first + count - 1).end,
            );
            let (pairs, context) = (count * group, to - from);
            let [q, d_out] = [self.inputs.q, self.gradient].map(|x| self.pairs(x, first, count));
            let part = from * head_dim..to * head_dim;
            let (q, d_out) = (Factor::new(pairs, head_dim, &q), Factor::new(pairs, head_dim, &d_out));
            let keys = Factor::new(context, head_dim, &keys[part.clone()]);
            let values = Factor::new(context, head_dim, &values[part.clone()]);
            let (mut weights, mut d_scores) = (vec![0.0; pairs * context], vec![0.0; pairs * context]);
            multiply_matrices(1.0, q, keys.transposed(), 0.0, &mut weights)?;
            multiply_matrices(1.0, d_out, values.transposed(), 0.0, &mut d_scores)?;
            for (pair, (weights, d_scores)) in weights
                .chunks_exact_mut(context)
                .zip(d_scores.chunks_exact_mut(context))
                .enumerate()
            {
                let visible = self.attention.visible(span, first + pair / group);
                let visible = visible.start - from..visible.end - from;
                for outside in [0..visible.start, visible.end..context] {
                    weights[outside.clone()].fill(0.0);
                    d_scores[outside].fill(0.0);
                }
                self.softmax_backward(&mut weights[visible.clone()], &mut d_scores[visible]);
            }
            let (weights, d_scores) = (
                Factor::new(pairs, context, &weights),
                Factor::new(pairs, context, &d_scores),
            );
            let queries = first * group * head_dim..(first + count) * group * head_dim;
            multiply_matrices(1.0, d_scores, keys, 0.0, &mut out.queries[queries])?;
            multiply_matrices(1.0, d_scores.transposed(), q, 1.0, &mut out.keys[part.clone()])?;
            multiply_matrices(1.0, weights.transposed(), d_out, 1.0, &mut out.values[part])?;
        }
        Ok(out)
    }

    /// Returns the keys or values that the row attends to, those of the prefix first: (shared + keys, head_dim).
    fn context(&self, x: &[f32]) -> Vec<f32> {
        let PackedAttention { kv_heads, head_dim, .. } = *self.attention;
        let tokens = self.span.shared + self.span.keys;
        let mut packed = Vec::with_capacity(tokens * head_dim);
        for position in 0..tokens {
            let start = (key_of(self.span, position) * kv_heads + self.kv_head) * head_dim;
            packed.extend_from_slice(&x[start..][..head_dim]);
        }
        packed
    }

    /// Returns the elements of `count` queries from `first` on, for the heads that share the key-value head: (count *
    /// group, head_dim).
    fn pairs(&self, x: &[f32], first: usize, count: usize) -> Vec<f32> {
        let PackedAttention {
            heads,
            kv_heads,
            head_dim,
            ..
        } = *self.attention;
        let width = heads / kv_heads * head_dim;
        let mut packed = Vec::with_capacity(count * width);
        for query in first..first + count {
            let start = ((self.span.query_start + query) * kv_heads + self.kv_head) * width;
            packed.extend_from_slice(&x[start..][..width]);
        }
        packed
    }

    /// Replaces inner products of a query with its keys by the weights of the keys, and the gradients of these weights by
    /// those of the inner products.
    fn softmax_backward(&self, products: &mut [f32], gradients: &mut [f32]) {
        let scale = self.attention.scale as f32;
        let softcap = self.attention.softcap.map(|cap| cap as f32);
        dispatch(
            #[inline(always)]
            || {
                let mut max = f32::NEG_INFINITY;
                for product in products.iter_mut() {
                    *product *= scale;
                    if let Some(cap) = softcap {
                        *product = cap * tanh(*product / cap);
                    }
                    max = max.max(*product);
                }
                // The slopes of the soft-cap, which follow from the scores that the weights replace.
                let mut slopes = Vec::new();
                if let Some(cap) = softcap {
                    slopes.extend(products.iter().map(|score| 1.0 - (score / cap) * (score / cap)));
                }
                let mut sum = 0.0;
                for product in products.iter_mut() {
                    *product = exp(*product - max);
                    sum += *product;
                }
                let inverse = 1.0 / sum;
                let mut mean = 0.0;
                for (weight, gradient) in products.iter_mut().zip(gradients.iter()) {
                    *weight *= inverse;
                    mean += *weight * gradient;
                }
                for (weight, gradient) in products.iter().zip(gradients.iter_mut()) {
                    *gradient = scale * weight * (*gradient - mean);
                }
                for (gradient, slope) in gradients.iter_mut().zip(&slopes) {
                    *gradient *= slope;
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device, Tensor, Var};
    use proptest::prelude::*;

    use super::*;
    use crate::model::kernels::Spans;
    use crate::model::kernels::tests::random;
    use crate::model::kernels::training::relative_error;

    /// Computes the attention of one row in candle's plain operations. `context` selects the tokens that the row attends
    /// to.
    fn plain_row(op: &PackedAttention<'_>, span: &Span, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let tokens = span.shared + span.keys;
        let context: Vec<u32> = (0..tokens).map(|position| key_of(span, position) as u32).collect();
        let context = Tensor::from_vec(context, tokens, &Device::Cpu)?;
        let group = op.heads / op.kv_heads;
        let repeated = |x: &Tensor| {
            let x = x
                .index_select(&context, 0)?
                .reshape((tokens, op.kv_heads, 1, op.head_dim))?;
            x.broadcast_as((tokens, op.kv_heads, group, op.head_dim))?
                .reshape((tokens, op.heads, op.head_dim))?
                .transpose(0, 1)?
                .contiguous()
        };
        let q = q.narrow(0, span.query_start, span.queries)?;
        let q = q
            .reshape((span.queries, op.heads, op.head_dim))?
            .transpose(0, 1)?
            .contiguous()?;
        let mut scores = (q.matmul(&repeated(k)?.t()?.contiguous()?)? * op.scale)?;
        if let Some(cap) = op.softcap {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        let mut mask = vec![f32::NEG_INFINITY; span.queries * tokens];
        for (query, mask) in mask.chunks_exact_mut(tokens).enumerate() {
            mask[op.visible(span, query)].fill(0.0);
        }
        let mask = Tensor::from_vec(mask, (1, span.queries, tokens), &Device::Cpu)?;
        let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
        weights
            .matmul(&repeated(v)?)?
            .transpose(0, 1)?
            .reshape((span.queries, op.heads * op.head_dim))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// The first row is the prefix. It may have no queries, as in the last layer.
        #[test]
        fn the_gradients_equal_those_of_plain_operations(
            rows in prop::collection::vec((1usize..200, 0usize..=13), 1..4),
            (last_only, prefix_has_queries) in any::<(bool, bool)>(),
            (heads, kv_heads, head_dim) in prop::sample::select(vec![(1, 1, 32), (4, 1, 64), (4, 2, 16), (6, 3, 80)]),
            softcap in prop::option::of(1.0..20.0),
            window in prop::option::of(1usize..24),
            seed in 0u64..1000,
        ) {
            let mut list = Vec::new();
            let (mut query_start, mut key_start) = (0, 0);
            for (index, (keys, shared)) in std::iter::once((13, 0)).chain(rows).enumerate() {
                let queries = if last_only { 1 } else { keys };
                if index > 0 || prefix_has_queries {
                    list.push(Span { query_start, queries, key_start, keys, shared });
                    query_start += queries;
                }
                key_start += keys;
            }
            let spans = Spans::new(list, &Device::Cpu).unwrap();
            let op = PackedAttention {
                spans: &spans, prefix: None, heads, kv_heads, head_dim,
                scale: (head_dim as f64).powf(-0.5), softcap, window,
            };
            let tensor = |rows: usize, heads: usize, salt| random((rows, heads * head_dim), seed * 8 + salt).unwrap();
            let vars = [
                tensor(query_start, heads, 0), tensor(key_start, kv_heads, 1), tensor(key_start, kv_heads, 2),
            ].map(|x| Var::from_tensor(&x).unwrap());
            let [q, k, v] = [&vars[0], &vars[1], &vars[2]].map(Var::as_tensor);
            let gradient = tensor(query_start, heads, 3);
            let outputs: Vec<Tensor> = spans.iter().map(|span| plain_row(&op, span, q, k, v).unwrap()).collect();
            let loss = (Tensor::cat(&outputs, 0).unwrap() * &gradient).unwrap().sum_all().unwrap();
            let gradients = loss.backward().unwrap();
            let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let inputs = vars.each_ref().map(|var| values(var.as_tensor()));
            let mut found = inputs.each_ref().map(|values| vec![f32::NAN; values.len()]);
            let [d_q, d_k, d_v] = &mut found;
            attention_backward(
                &op,
                &QueriesKeysValues { q: &inputs[0], k: &inputs[1], v: &inputs[2] },
                &values(&gradient),
                QueriesKeysValues { q: d_q, k: d_k, v: d_v },
            ).unwrap();
            for (found, var) in found.iter().zip(&vars) {
                let expected = gradients.get(var.as_tensor()).unwrap();
                // A query that sees only itself has no gradient but rounding errors.
                if expected.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 1e-4 {
                    prop_assert!(relative_error(found, &values(expected)) < 1e-5);
                }
            }
        }
    }
}
