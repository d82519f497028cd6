//! Per-head RMSNorm (where the architecture has it) and rotary position embedding, in one pass.
//!
//! Su et al., "RoFormer", 2021, in the half-split layout of Hugging Face checkpoints: element `i` of
//! the first half turns with element `i` of the second by `position * frequency_i`.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::elements;
use super::norm::cpu_elements;
use super::simd::{dispatch, dot};

/// By which angles tokens turn.
#[derive(Debug, Clone)]
pub struct Turn {
    /// (tokens, head_dim / 2), or (all positions, head_dim / 2) where `positions` says which a token takes.
    pub cos: Tensor,
    /// As `cos`.
    pub sin: Tensor,
    /// (tokens) of u32; on the CPU each token's angles are gathered beforehand, on a GPU by the kernel.
    pub positions: Option<Tensor>,
}

impl Turn {
    /// Of the tokens at these indices.
    ///
    /// # Errors
    /// candle's.
    pub fn select(&self, indices: &Tensor) -> Result<Self> {
        Ok(match &self.positions {
            None => Self {
                cos: self.cos.index_select(indices, 0)?,
                sin: self.sin.index_select(indices, 0)?,
                positions: None,
            },
            Some(positions) => Self {
                positions: Some(positions.index_select(indices, 0)?),
                ..self.clone()
            },
        })
    }

    /// (cos, sin) of each token, (tokens, head_dim / 2) each.
    ///
    /// # Errors
    /// candle's.
    pub fn gathered(&self) -> Result<(Tensor, Tensor)> {
        Ok(match &self.positions {
            None => (self.cos.clone(), self.sin.clone()),
            Some(positions) => (
                self.cos.index_select(positions, 0)?,
                self.sin.index_select(positions, 0)?,
            ),
        })
    }
}

/// Norms and rotates every head of every token.
///
/// `x` (tokens, heads * head_dim); `norm` is the weight (head_dim) and the epsilon.
///
/// # Errors
/// candle's, on other shapes and dtypes.
pub fn norm_rope(x: &Tensor, turn: &Turn, norm: Option<(&Tensor, f64)>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda::norm_rope(x, turn, norm);
    }
    let norm = norm.map(|(weight, eps)| (weight.clone(), eps as f32));
    x.apply_op3_no_bwd(&turn.cos, &turn.sin, &NormRope { norm })
}

struct NormRope {
    norm: Option<(Tensor, f32)>,
}

/// Tokens of one task.
const TOKENS: usize = 8;

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
                "norm-rope expects one angle a token, found {:?} for {:?}",
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
            bail!("norm-rope expects a weight of {}", 2 * half);
        }
        let mut out = vec![0f32; x.len()];
        let angles = cos.par_chunks(TOKENS * half).zip(sin.par_chunks(TOKENS * half));
        let rows = out.par_chunks_mut(TOKENS * width).zip(x.par_chunks(TOKENS * width));
        rows.zip(angles).for_each(|((out, x), (cos, sin))| {
            dispatch(
                #[inline(always)]
                || {
                    let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
                    let tokens = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
                    for ((out, x), (cos, sin)) in tokens.zip(angles) {
                        for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                            turn_head(x, cos, sin, norm, out);
                        }
                    }
                },
            );
        });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

#[inline(always)]
fn turn_head(x: &[f32], cos: &[f32], sin: &[f32], norm: Option<(&[f32], f32)>, out: &mut [f32]) {
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

    /// `rope_slow` of candle-nn on (1, heads, tokens, head_dim), norm in plain operations.
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
            let turn = Turn {
                cos: random((tokens, head_dim / 2), 2)?,
                sin: random((tokens, head_dim / 2), 3)?,
                positions: None,
            };
            let weight = random(head_dim, 4)?;
            for norm in [None, Some((&weight, 1e-6))] {
                let found = norm_rope(&x, &turn, norm)?;
                assert_close(&found, &plain(&x, heads, &turn.cos, &turn.sin, norm)?, 3e-6);
            }
        }
        Ok(())
    }
}
