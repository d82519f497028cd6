//! The gated activation of the MLP, `gelu(gate) * up`, in one pass.
//!
//! GELU is computed in its tanh approximation (Hendrycks & Gimpel, 2016), rewritten as a logistic function:
//! `x (1 + tanh z) / 2 = x / (1 + e^(-2z))`, where `z = sqrt(2/pi) (x + 0.044715 x^3)`.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::elements;
use super::simd::{dispatch, exp};

/// Returns `gelu_tanh(gate) * up` for each element, in the shape and dtype of the two tensors.
///
/// # Errors
/// Returns an error if the shapes or dtypes differ, the dtype is not supported, or the computation fails.
pub fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if gate.device().is_cuda() {
        return super::cuda::geglu(gate, up);
    }
    gate.apply_op2_no_bwd(up, &Geglu)
}

/// Replaces each element of `gate` by `gelu_tanh(gate) * up`, on the CPU.
pub(crate) fn geglu_rows(gate: &mut [f32], up: &[f32]) {
    dispatch(
        #[inline(always)]
        || {
            for (gate, &up) in gate.iter_mut().zip(up) {
                *gate = gelu(*gate) * up;
            }
        },
    );
}

struct Geglu;

/// Number of elements that one parallel task computes.
pub(super) const ELEMENTS_PER_TASK: usize = 1 << 14;

impl CustomOp2 for Geglu {
    fn name(&self) -> &'static str {
        "geglu"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        if l1.shape() != l2.shape() {
            bail!(
                "geglu expects two tensors of the same shape, found {:?} and {:?}",
                l1.shape(),
                l2.shape()
            );
        }
        let (gate, up) = (elements(self.name(), s1, l1)?, elements(self.name(), s2, l2)?);
        let mut out = vec![0f32; gate.len()];
        let inputs = gate.par_chunks(ELEMENTS_PER_TASK).zip(up.par_chunks(ELEMENTS_PER_TASK));
        out.par_chunks_mut(ELEMENTS_PER_TASK)
            .zip(inputs)
            .for_each(|(out, (gate, up))| {
                dispatch(
                    #[inline(always)]
                    || {
                        for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                            *out = gelu(gate) * up;
                        }
                    },
                );
            });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

#[inline(always)]
pub(super) fn gelu(x: f32) -> f32 {
    // -2 sqrt(2/pi).
    const FACTOR: f32 = -1.595_769_2;
    let cubic = (0.044_715 * x * x).mul_add(x, x);
    x / (1.0 + exp(FACTOR * cubic))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, random};
    use super::*;

    #[test]
    fn geglu_equals_the_plain_formula() -> Result<()> {
        let (gate, up) = ((random((33, 700), 1)? * 4.0)?, random((33, 700), 2)?);
        assert_close(&geglu(&gate, &up)?, &(gate.gelu()? * &up)?, 3e-6);
        Ok(())
    }

    #[test]
    fn gelu_is_zero_at_zero_and_approaches_its_limits() {
        assert_eq!(gelu(0.0), 0.0);
        assert_eq!(gelu(100.0), 100.0);
        assert!(gelu(-100.0).abs() < 1e-30);
    }
}
