//! RMSNorm, alone and fused with the residual addition before it.
//!
//! `rms_norm(x, w) = x / sqrt(mean(x^2) + eps) * w`, over the last dimension. Gemma's checkpoints store `w - 1`, and
//! the loader adds the one.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::elements;
use super::simd::{dispatch, dot};

/// Returns each row of `x` normalised with `weight`, in the given dtype.
///
/// `x` is (rows, width) and `weight` is (width); both are f32. On the CPU, the result must be f32 too.
///
/// # Errors
/// Returns an error if a shape or dtype does not fit, or the computation fails.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, dtype: DType) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda::rms_norm(x, weight, eps, dtype);
    }
    if dtype != DType::F32 {
        bail!("rms-norm on the CPU returns f32, not {dtype:?}");
    }
    x.apply_op1_no_bwd(&RmsNorm {
        weight: weight.clone(),
        eps: eps as f32,
    })
}

/// Adds a block's output `y` to the residual stream, and normalises the sum for the next block.
///
/// Returns `sum = residual + rms_norm(y, post)`, or `sum = residual + y` if the architecture has no post-norm, and
/// `rms_norm(sum, next)`. All of these are (rows, width), and both weights are (width). The residual stream and the
/// weights are f32; the normalised sum has the dtype of `y`.
///
/// # Errors
/// Returns an error if a shape or dtype does not fit, or the computation fails.
pub fn add_rms_norm(
    residual: &Tensor,
    y: &Tensor,
    post: Option<&Tensor>,
    next: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if residual.device().is_cuda() {
        return super::cuda::add_rms_norm(residual, y, post, next, eps);
    }
    let op = AddRmsNorm {
        post: post.cloned(),
        next: next.clone(),
        eps: eps as f32,
    };
    let both = residual.apply_op2_no_bwd(y, &op)?;
    Ok((both.get(0)?, both.get(1)?))
}

struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

struct AddRmsNorm {
    post: Option<Tensor>,
    next: Tensor,
    eps: f32,
}

/// Number of rows that one parallel task normalises, which takes some tens of microseconds.
pub(super) const ROWS_PER_TASK: usize = 16;

#[inline(always)]
pub(super) fn norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let inverse = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * inverse * weight;
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = elements(self.name(), storage, layout)?;
        let (weight, weight_layout) = self.weight.storage_and_layout();
        let weight = cpu_elements(self.name(), &weight, weight_layout)?;
        let width = weight.len();
        if layout.dims().last() != Some(&width) {
            bail!("rms-norm expects rows of {width} elements, found {:?}", layout.shape());
        }
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(ROWS_PER_TASK * width)
            .zip(x.par_chunks(ROWS_PER_TASK * width))
            .for_each(|(out, x)| {
                dispatch(
                    #[inline(always)]
                    || {
                        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                            norm_row(x, weight, self.eps, out);
                        }
                    },
                );
            });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

impl CustomOp2 for AddRmsNorm {
    fn name(&self) -> &'static str {
        "add-rms-norm"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let residual = elements(self.name(), s1, l1)?;
        let y = elements(self.name(), s2, l2)?;
        let (rows, width) = l1.shape().dims2()?;
        if l2.dims() != [rows, width] {
            bail!(
                "add-rms-norm expects two tensors of the same shape, found {:?} and {:?}",
                l1.shape(),
                l2.shape()
            );
        }
        let (next, next_layout) = self.next.storage_and_layout();
        let next = cpu_elements(self.name(), &next, next_layout)?;
        let post = self.post.as_ref().map(Tensor::storage_and_layout);
        let post = post
            .as_ref()
            .map(|(post, layout)| cpu_elements(self.name(), post, layout))
            .transpose()?;
        if next.len() != width || post.is_some_and(|post| post.len() != width) {
            bail!("add-rms-norm expects weights of {width} elements");
        }
        let mut out = vec![0f32; 2 * rows * width];
        let (sums, normed) = out.split_at_mut(rows * width);
        let chunk = ROWS_PER_TASK * width;
        let inputs = residual.par_chunks(chunk).zip(y.par_chunks(chunk));
        let outputs = sums.par_chunks_mut(chunk).zip(normed.par_chunks_mut(chunk));
        outputs.zip(inputs).for_each(|((sums, normed), (residual, y))| {
            dispatch(
                #[inline(always)]
                || {
                    for (((sum, normed), residual), y) in sums
                        .chunks_exact_mut(width)
                        .zip(normed.chunks_exact_mut(width))
                        .zip(residual.chunks_exact(width))
                        .zip(y.chunks_exact(width))
                    {
                        match post {
                            Some(post) => norm_row(y, post, self.eps, sum),
                            None => sum.copy_from_slice(y),
                        }
                        for (sum, residual) in sum.iter_mut().zip(residual) {
                            *sum += residual;
                        }
                        norm_row(sum, next, self.eps, normed);
                    }
                },
            );
        });
        Ok((CpuStorage::F32(out), Shape::from((2, rows, width))))
    }
}

/// Returns the elements of a contiguous f32 tensor that the operation `op` holds as a parameter.
pub(in crate::model) fn cpu_elements<'a>(
    op: &'static str,
    storage: &'a candle_core::Storage,
    layout: &Layout,
) -> Result<&'a [f32]> {
    match storage {
        candle_core::Storage::Cpu(storage) => elements(op, storage, layout),
        _ => bail!("{op} expects its parameters on the CPU"),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device};

    use super::super::tests::{assert_close, random};
    use super::*;

    fn plain(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        x.broadcast_div(&(mean + eps)?.sqrt()?)?.broadcast_mul(weight)
    }

    #[test]
    fn rms_norm_equals_the_plain_formula() -> Result<()> {
        for (rows, width) in [(1, 64), (3, 640), (40, 33)] {
            let (x, weight) = (random((rows, width), 1)?, random(width, 2)?);
            assert_close(
                &rms_norm(&x, &weight, 1e-6, DType::F32)?,
                &plain(&x, &weight, 1e-6)?,
                2e-6,
            );
        }
        Ok(())
    }

    #[test]
    fn add_rms_norm_equals_the_plain_formula() -> Result<()> {
        let (x, y) = (random((37, 96), 1)?, random((37, 96), 2)?);
        let (post, next) = (random(96, 3)?, random(96, 4)?);
        let (sum, normed) = add_rms_norm(&x, &y, Some(&post), &next, 1e-6)?;
        let expected = (&x + plain(&y, &post, 1e-6)?)?;
        assert_close(&sum, &expected, 2e-6);
        assert_close(&normed, &plain(&expected, &next, 1e-6)?, 4e-6);
        let (sum, _) = add_rms_norm(&x, &y, None, &next, 1e-6)?;
        assert_close(&sum, &(&x + &y)?, 1e-7);
        Ok(())
    }

    #[test]
    fn unsupported_shapes_and_dtypes_are_errors() -> Result<()> {
        let (x, weight) = (random((2, 8), 1)?, random(7, 2)?);
        assert!(rms_norm(&x, &weight, 1e-6, DType::F32).is_err());
        assert!(rms_norm(&x, &random(8, 2)?, 1e-6, DType::BF16).is_err());
        assert!(rms_norm(&x.t()?, &random(2, 2)?, 1e-6, DType::F32).is_err());
        assert!(
            rms_norm(
                &Tensor::zeros((2, 8), DType::F64, &Device::Cpu)?,
                &weight,
                1e-6,
                DType::F32
            )
            .is_err()
        );
        Ok(())
    }
}
