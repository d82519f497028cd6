//! RMSNorm of each head, if the architecture has it, and rotary position embedding, in one pass.
//!
//! Rotary position embedding (Su et al., "RoFormer", 2021) is applied in the half-split layout of Hugging Face
//! checkpoints: element `i` of a head's first half and element `i` of its second half form a pair, which is rotated by
//! the angle `position * frequency_i`.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::elements;
use super::norm::cpu_elements;
use super::simd::{dispatch, dot};

/// The angles that rotate each token, as cosines and sines.
#[derive(Debug, Clone)]
pub struct RopeAngles {
    /// Cosines: (tokens, head_dim / 2), or a table of (positions, head_dim / 2) if `positions` is set.
    pub cos: Tensor,
    /// Sines, with the same shape as the cosines.
    pub sin: Tensor,
    /// The index of each token's row in the tables, (tokens) of u32, which the GPU kernel uses to look the angles up.
    /// It is `None` on the CPU, where `cos` and `sin` already have one row per token.
    pub positions: Option<Tensor>,
}

impl RopeAngles {
    /// Returns the angles of the tokens at these indices, given their positions if the angles are looked up.
    ///
    /// # Errors
    /// Returns an error if the selection fails on the device.
    pub(crate) fn select(&self, indices: &Tensor, positions: Option<&Tensor>) -> Result<Self> {
        Ok(match positions {
            None => Self {
                cos: self.cos.index_select(indices, 0)?,
                sin: self.sin.index_select(indices, 0)?,
                positions: None,
            },
            Some(positions) => Self {
                positions: Some(positions.clone()),
                ..self.clone()
            },
        })
    }

    /// Returns the cosines and the sines of each token: (tokens, head_dim / 2) each.
    ///
    /// # Errors
    /// Returns an error if the selection fails on the device.
    #[cfg(test)]
    pub(crate) fn of_tokens(&self) -> Result<(Tensor, Tensor)> {
        Ok(match &self.positions {
            None => (self.cos.clone(), self.sin.clone()),
            Some(positions) => (
                self.cos.index_select(positions, 0)?,
                self.sin.index_select(positions, 0)?,
            ),
        })
    }
}

/// Normalises and rotates each head of each token of `x`: (tokens, heads * head_dim).
///
/// `norm` is the weight (head_dim) and the epsilon of the RMSNorm; without it, heads are only rotated.
///
/// # Errors
/// Returns an error if a shape or dtype does not fit, or the computation fails.
pub fn norm_rope(x: &Tensor, angles: &RopeAngles, norm: Option<(&Tensor, f64)>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda::norm_rope(x, angles, norm);
    }
    let norm = norm.map(|(weight, eps)| (weight.clone(), eps as f32));
    x.apply_op3_no_bwd(&angles.cos, &angles.sin, &NormRope { norm })
}

struct NormRope {
    norm: Option<(Tensor, f32)>,
}

/// Number of tokens that one parallel task computes.
pub(super) const TOKENS_PER_TASK: usize = 8;

impl CustomOp3 for NormRope {
    fn name(&self) -> &'static str {
        "norm-rope"
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
        let (tokens, width) = l1.shape().dims2()?;
        let (cos_tokens, half) = l2.shape().dims2()?;
        if cos_tokens != tokens || l3.shape() != l2.shape() || half == 0 || width % (2 * half) != 0 {
            bail!(
                "norm-rope expects the angles of each token, found {:?} for {:?}",
                l2.shape(),
                l1.shape()
            );
        }
        let x = elements(self.name(), s1, l1)?;
        let (cos, sin) = (elements(self.name(), s2, l2)?, elements(self.name(), s3, l3)?);
        let weight = self
            .norm
            .as_ref()
            .map(|(weight, eps)| (weight.storage_and_layout(), *eps));
        let norm = match &weight {
            Some(((storage, layout), eps)) => Some((cpu_elements(self.name(), storage, layout)?, *eps)),
            None => None,
        };
        if norm.is_some_and(|(weight, _)| weight.len() != 2 * half) {
            bail!("norm-rope expects a weight of {} elements", 2 * half);
        }
        let mut out = vec![0f32; x.len()];
        let angles = cos
            .par_chunks(TOKENS_PER_TASK * half)
            .zip(sin.par_chunks(TOKENS_PER_TASK * half));
        let rows = out
            .par_chunks_mut(TOKENS_PER_TASK * width)
            .zip(x.par_chunks(TOKENS_PER_TASK * width));
        rows.zip(angles).for_each(|((out, x), (cos, sin))| {
            dispatch(
                #[inline(always)]
                || {
                    let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
                    let tokens = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
                    for ((out, x), (cos, sin)) in tokens.zip(angles) {
                        for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                            rotate_head(x, cos, sin, norm, out);
                        }
                    }
                },
            );
        });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

/// Normalises one head if `norm` is set, and rotates it.
#[inline(always)]
pub(super) fn rotate_head(x: &[f32], cos: &[f32], sin: &[f32], norm: Option<(&[f32], f32)>, out: &mut [f32]) {
    match norm {
        Some((weight, eps)) => {
            let inverse = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * inverse * weight;
            }
        }
        None => out.copy_from_slice(x),
    }
    let (first, second) = out.split_at_mut(cos.len());
    for (((first, second), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let (x, y) = (*first, *second);
        *first = x * cos - y * sin;
        *second = y * cos + x * sin;
    }
}

#[cfg(test)]
mod tests {
    use candle_core::D;

    use super::super::tests::{assert_close, random};
    use super::*;

    /// Computes the norm in plain operations and rotates with candle-nn's `rope_slow`, which takes
    /// (1, heads, tokens, head_dim).
    fn plain(x: &Tensor, heads: usize, cos: &Tensor, sin: &Tensor, norm: Option<(&Tensor, f64)>) -> Result<Tensor> {
        let (tokens, width) = x.dims2()?;
        let mut x = x.reshape((tokens, heads, width / heads))?;
        if let Some((weight, eps)) = norm {
            let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
            x = x.broadcast_div(&(mean + eps)?.sqrt()?)?.broadcast_mul(weight)?;
        }
        let x = x.transpose(0, 1)?.unsqueeze(0)?.contiguous()?;
        let y = candle_nn::rotary_emb::rope_slow(&x, cos, sin)?;
        y.squeeze(0)?.transpose(0, 1)?.reshape((tokens, width))
    }

    #[test]
    fn norm_rope_equals_the_plain_formula() -> Result<()> {
        for (tokens, heads, head_dim) in [(1, 1, 32), (19, 4, 64), (9, 3, 10)] {
            let x = random((tokens, heads * head_dim), 1)?;
            let angles = RopeAngles {
                cos: random((tokens, head_dim / 2), 2)?,
                sin: random((tokens, head_dim / 2), 3)?,
                positions: None,
            };
            let weight = random(head_dim, 4)?;
            for norm in [None, Some((&weight, 1e-6))] {
                let found = norm_rope(&x, &angles, norm)?;
                assert_close(&found, &plain(&x, heads, &angles.cos, &angles.sin, norm)?, 3e-6);
            }
        }
        Ok(())
    }
}
