//! Launches the kernels of training that normalise and rotate heads, forward and backward.

use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaDevice, Result, Tensor, bail};

use super::super::super::RopeAngles;
use super::{CudaBuffer, MAX_HEAD_DIM, NULL, OP, TrainingKernels, address_of, count, launch, same_len};

/// Number of warps in a block of the kernels for rotation, as in training.cu.
const ROPE_WARPS: u32 = 4;

impl TrainingKernels {
    /// Computes [`crate::model::kernels::training::norm_rope`].
    pub(in crate::model) fn norm_rope(
        &self,
        x: &CudaBuffer,
        angles: &RopeAngles,
        norm: Option<(&Tensor, f64)>,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        let rope = Rope::new(&self.device, x, angles, norm)?;
        same_len([x, out])?;
        launch!(
            self,
            training_norm_rope,
            rope.grid(),
            ROPE_WARPS * 32,
            x.address(),
            rope.cos,
            rope.sin,
            rope.positions,
            rope.weight,
            rope.eps,
            out.address(),
            rope.tokens,
            rope.heads,
            rope.half
        )
    }

    /// Computes [`crate::model::kernels::training::norm_rope_backward`].
    pub(in crate::model) fn norm_rope_backward(
        &self,
        [x, gradient]: [&CudaBuffer; 2],
        angles: &RopeAngles,
        norm: Option<(&Tensor, f64)>,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        let rope = Rope::new(&self.device, x, angles, norm)?;
        same_len([x, gradient, out])?;
        launch!(
            self,
            training_norm_rope_backward,
            rope.grid(),
            ROPE_WARPS * 32,
            x.address(),
            rope.cos,
            rope.sin,
            rope.positions,
            rope.weight,
            rope.eps,
            gradient.address(),
            out.address(),
            out.half(),
            rope.tokens,
            rope.heads,
            rope.half
        )
    }
}

/// The arguments of a rotation.
struct Rope {
    cos: u64,
    sin: u64,
    positions: u64,
    weight: u64,
    eps: f32,
    tokens: u32,
    heads: u32,
    half: u32,
}

impl Rope {
    fn new(device: &CudaDevice, x: &CudaBuffer, angles: &RopeAngles, norm: Option<(&Tensor, f64)>) -> Result<Self> {
        let Some(positions) = &angles.positions else {
            bail!("{OP} on a GPU expects positions")
        };
        let (tokens, half) = (positions.dim(0)?, angles.cos.dim(1)?);
        let fits = half > 0
            && 2 * half <= MAX_HEAD_DIM
            && angles.sin.dims() == angles.cos.dims()
            && x.len.is_multiple_of(tokens * 2 * half)
            && norm.is_none_or(|(weight, _)| weight.dims() == [2 * half]);
        if !fits {
            bail!("{OP} cannot rotate {} elements by {angles:?}", x.len);
        }
        Ok(Self {
            cos: address_of::<f32>(device, &angles.cos)?,
            sin: address_of::<f32>(device, &angles.sin)?,
            positions: address_of::<u32>(device, positions)?,
            weight: match norm {
                Some((weight, _)) => address_of::<f32>(device, weight)?,
                None => NULL,
            },
            eps: norm.map_or(0.0, |(_, eps)| eps as f32),
            tokens: count(OP, tokens)?,
            heads: count(OP, x.len / (tokens * 2 * half))?,
            half: count(OP, half)?,
        })
    }

    fn grid(&self) -> (u32, u32) {
        ((self.tokens * self.heads).div_ceil(ROPE_WARPS), 1)
    }
}
