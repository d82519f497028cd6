//! The operations of a layer in training on the CPU, forward and backward, over contiguous f32 elements.
//!
//! Each file states the formula of a gradient; that of attention is in [`crate::model::training`], because it consists of
//! matrix products. The forward operations compute the same as those of serving, but write
//! into buffers that all layers share. On a GPU, the kernels of `cuda/training.cu` do the same.

mod geglu;
mod norm;
mod norm_rope;

pub(in crate::model) use geglu::{geglu, geglu_backward};
pub(in crate::model) use norm::{add_norm, rms_norm, rms_norm_backward};
pub(in crate::model) use norm_rope::{HeadNorm, norm_rope, norm_rope_backward};

/// Queries, keys and values, or their gradients: (queries, heads * head_dim), and twice (keys, kv_heads * head_dim).
pub(in crate::model) struct QueriesKeysValues<T> {
    pub(in crate::model) q: T,
    pub(in crate::model) k: T,
    pub(in crate::model) v: T,
}

/// Returns the largest difference between two lists, relative to the largest expected value.
#[cfg(test)]
pub(in crate::model) fn relative_error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let pairs = found.iter().zip(expected);
    let difference = pairs.fold(0f32, |worst, (found, expected)| {
        let difference = (found - expected).abs();
        // NaN counts as the largest difference.
        if difference <= worst { worst } else { difference }
    });
    difference / largest
}
