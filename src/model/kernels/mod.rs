//! Fused operations of the forward pass that candle lacks or computes slowly.
//!
//! Each file states a formula, implements it for the CPU as a candle custom op on contiguous f32 tensors, and tests it
//! against the same formula in candle's plain operations. The ops have no backward pass. With the feature `cuda`,
//! tensors on a GPU are computed by the kernels in `cuda/`.

mod attention;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
#[cfg(any(test, feature = "cuda"))]
pub(super) mod fragments;
mod geglu;
mod norm;
mod norm_rope;
mod simd;
mod spans;
pub(super) mod training;

use candle_core::{CpuStorage, Layout, Result, bail};

pub use attention::{CachedKeysValues, PackedAttention};
pub use geglu::geglu;
pub(super) use geglu::geglu_rows;
pub use norm::add_rms_norm;
pub(super) use norm::cpu_elements;
pub(crate) use norm::rms_norm;
pub use norm_rope::{RopeAngles, norm_rope};
pub(super) use simd::{dispatch, dot, exp, tanh};
pub(super) use spans::PackedSpans;
pub use spans::{Span, Spans};

/// Returns the elements of a contiguous f32 tensor on the CPU; `op` names the operation in errors.
pub(super) fn elements<'a>(op: &'static str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("{op} expects a contiguous tensor")
    };
    match storage {
        CpuStorage::F32(values) => Ok(&values[start..end]),
        other => bail!(
            "{op} expects f32, found {:?}",
            candle_core::backend::BackendStorage::dtype(other)
        ),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use candle_core::{Device, Result, Shape, Tensor};

    /// Returns values from -1 to 1 that depend only on the shape and the seed. They come from a 64-bit linear
    /// congruential generator with the constants of Knuth's MMIX.
    pub fn random(shape: impl Into<Shape>, seed: u64) -> Result<Tensor> {
        let shape = shape.into();
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
        let values: Vec<f32> = (0..shape.elem_count())
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu)
    }

    /// Panics unless every element of `found` is within `tolerance` of the one in `expected`.
    pub fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f32) {
        assert_eq!(found.dims(), expected.dims());
        let values = |x: &Tensor| x.flatten_all().and_then(|x| x.to_vec1::<f32>()).unwrap();
        for (index, (found, expected)) in values(found).into_iter().zip(values(expected)).enumerate() {
            assert!(
                (found - expected).abs() <= tolerance,
                "element {index}: {found}, expected {expected}"
            );
        }
    }
}
