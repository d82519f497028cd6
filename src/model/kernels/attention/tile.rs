//! The attention of a few (query, head) pairs that read the same keys and values.
//!
//! Several pairs are computed at once, so that each key and value is loaded once for all of them. The order of the
//! additions of a pair depends on its keys and the size of a head only, and not on the pairs beside it.

#![expect(
    clippy::needless_range_loop,
    reason = "the closures of iterators may be compiled without the chosen instruction set"
)]

use std::ops::Range;

use pulp::Simd;

use super::super::simd::{exp, tanh};

/// Number of (query, head) pairs that are computed at once.
pub(super) const PAIRS: usize = 4;

/// Number of keys, and of vectors of values, for which sums are held in registers at once. With four pairs, these are
/// eight sums, which hide the latency of a multiply-add.
const COLUMNS: usize = 2;

/// Keys or values of one kv-head: row `i` begins at `i * stride` and has as many elements as a head.
#[derive(Clone, Copy)]
pub(super) struct HeadRows<'a> {
    elements: &'a [f32],
    stride: usize,
}

impl<'a> HeadRows<'a> {
    /// Returns rows of which the first begins at `start`. There may be none.
    #[inline(always)]
    pub(super) fn new(elements: &'a [f32], start: usize, stride: usize) -> Self {
        Self {
            elements: elements.get(start..).unwrap_or_default(),
            stride,
        }
    }

    #[inline(always)]
    fn row(&self, index: usize, len: usize) -> &'a [f32] {
        &self.elements[index * self.stride..][..len]
    }
}

/// Consecutive keys with their values, in up to two parts: the visible end of the prefix, and the row's own.
pub(super) struct KeysValues<'a> {
    pub(super) keys: [HeadRows<'a>; 2],
    pub(super) values: [HeadRows<'a>; 2],
    /// The indices of the rows of each part.
    pub(super) parts: [Range<usize>; 2],
}

impl KeysValues<'_> {
    /// Returns the number of keys in both parts.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.parts[0].len() + self.parts[1].len()
    }
}

/// How a score follows from the inner product of a query and a key.
#[derive(Clone, Copy)]
pub(super) struct ScoreRule {
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
}

/// Writes the attention of each pair through `write(pair, column, elements)`, for all elements of a head.
///
/// `visible` holds the range of the keys that each pair attends to. `scores` is scratch space for all keys of all pairs.
#[inline(always)]
pub(super) fn attend<S: Simd>(
    simd: S,
    rule: ScoreRule,
    queries: [&[f32]; PAIRS],
    visible: &[Range<usize>; PAIRS],
    context: &KeysValues<'_>,
    scores: &mut [f32],
    mut write: impl FnMut(usize, usize, &[f32]),
) {
    let (count, head_dim) = (context.len(), queries[0].len());
    let mut position = 0;
    for part in 0..2 {
        let keys = context.keys[part];
        let (mut index, end) = (context.parts[part].start, context.parts[part].end);
        while index + COLUMNS <= end {
            let rows = [keys.row(index, head_dim), keys.row(index + 1, head_dim)];
            let products = inner_products(simd, queries, rows);
            for pair in 0..PAIRS {
                scores[pair * count + position..][..COLUMNS].copy_from_slice(&products[pair]);
            }
            (index, position) = (index + COLUMNS, position + COLUMNS);
        }
        if index < end {
            let products = inner_products(simd, queries, [keys.row(index, head_dim)]);
            for pair in 0..PAIRS {
                scores[pair * count + position] = products[pair][0];
            }
            position += 1;
        }
    }
    for pair in 0..PAIRS {
        let (scores, visible) = (&mut scores[pair * count..][..count], &visible[pair]);
        // Keys outside the range have the weight zero, which adds nothing to a sum.
        scores[..visible.start].fill(0.0);
        scores[visible.end..].fill(0.0);
        softmax(rule, &mut scores[visible.start..visible.end]);
    }
    let mut column = 0;
    while column + COLUMNS * S::F32_LANES <= head_dim {
        let sums = weighted_sums(simd, context, scores, column);
        for pair in 0..PAIRS {
            write(pair, column, bytemuck::cast_slice(&sums[pair]));
        }
        column += COLUMNS * S::F32_LANES;
    }
    for column in column..head_dim {
        let sums = weighted_sum(context, scores, column);
        for pair in 0..PAIRS {
            write(pair, column, &sums[pair..=pair]);
        }
    }
}

/// Returns the inner product of each query with each key.
#[inline(always)]
fn inner_products<S: Simd, const KEYS: usize>(
    simd: S,
    queries: [&[f32]; PAIRS],
    keys: [&[f32]; KEYS],
) -> [[f32; KEYS]; PAIRS] {
    let head_dim = queries[0].len();
    let blocks = head_dim / S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); KEYS]; PAIRS];
    let mut query_blocks: [&[S::f32s]; PAIRS] = [&[]; PAIRS];
    let mut key_blocks: [&[S::f32s]; KEYS] = [&[]; KEYS];
    for pair in 0..PAIRS {
        query_blocks[pair] = &S::as_simd_f32s(queries[pair]).0[..blocks];
    }
    for key in 0..KEYS {
        key_blocks[key] = &S::as_simd_f32s(keys[key]).0[..blocks];
    }
    for block in 0..blocks {
        for pair in 0..PAIRS {
            for key in 0..KEYS {
                sums[pair][key] = simd.mul_add_f32s(query_blocks[pair][block], key_blocks[key][block], sums[pair][key]);
            }
        }
    }
    let mut products = [[0f32; KEYS]; PAIRS];
    for pair in 0..PAIRS {
        for key in 0..KEYS {
            let mut product = simd.reduce_sum_f32s(sums[pair][key]);
            for index in blocks * S::F32_LANES..head_dim {
                product = queries[pair][index].mul_add(keys[key][index], product);
            }
            products[pair][key] = product;
        }
    }
    products
}

/// Replaces inner products by the softmax of their scores.
#[inline(always)]
fn softmax(rule: ScoreRule, scores: &mut [f32]) {
    let mut max = f32::NEG_INFINITY;
    for score in scores.iter_mut() {
        *score *= rule.scale;
        if let Some(cap) = rule.softcap {
            *score = cap * tanh(*score / cap);
        }
        max = max.max(*score);
    }
    for score in scores.iter_mut() {
        *score = exp(*score - max);
    }
    let mut sum = 0.0;
    for score in scores.iter() {
        sum += score;
    }
    let inverse = 1.0 / sum;
    for score in scores.iter_mut() {
        *score *= inverse;
    }
}

/// Returns the sum of the values times the weights of each pair, for [`COLUMNS`] vectors of the head from `column` on.
#[inline(always)]
fn weighted_sums<S: Simd>(
    simd: S,
    context: &KeysValues<'_>,
    weights: &[f32],
    column: usize,
) -> [[S::f32s; COLUMNS]; PAIRS] {
    let count = context.len();
    let width = COLUMNS * S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); COLUMNS]; PAIRS];
    let mut position = 0;
    for part in 0..2 {
        let values = context.values[part];
        for index in context.parts[part].start..context.parts[part].end {
            let values = S::as_simd_f32s(&values.row(index, column + width)[column..]).0;
            for pair in 0..PAIRS {
                let weight = simd.splat_f32s(weights[pair * count + position]);
                for vector in 0..COLUMNS {
                    sums[pair][vector] = simd.mul_add_f32s(weight, values[vector], sums[pair][vector]);
                }
            }
            position += 1;
        }
    }
    sums
}

/// Returns the sum of the values times the weights of each pair, for one element of the head.
#[inline(always)]
fn weighted_sum(context: &KeysValues<'_>, weights: &[f32], column: usize) -> [f32; PAIRS] {
    let count = context.len();
    let mut sums = [0f32; PAIRS];
    let mut position = 0;
    for part in 0..2 {
        let values = context.values[part];
        for index in context.parts[part].start..context.parts[part].end {
            let value = values.row(index, column + 1)[column];
            for pair in 0..PAIRS {
                sums[pair] = weights[pair * count + position].mul_add(value, sums[pair]);
            }
            position += 1;
        }
    }
    sums
}
