//! The fused operations on CUDA, in f32 or bf16 according to their inputs.
//!
//! The residual stream, the norm weights and the rope angles are always f32, whatever dtype the matrix products use.
//! `build.rs` compiles each source to a fat binary with machine code for the supported GPUs. The functions of this file
//! launch kernels on tensors, and [`launch`] on addresses.

mod arguments;
#[cfg(test)]
pub(in crate::model) mod driver_calls;
pub(in crate::model) mod fp8;
mod functions;
pub(in crate::model) mod launch;
pub(in crate::model) mod loss;
mod module;
pub(in crate::model) mod optimizer;
#[cfg(test)]
mod tests;
pub(in crate::model) mod training;

use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use half::bf16;

use self::launch::{AddRmsNorm, Attention, Geglu, Kernels, NormRope, SpanAddresses};
use super::{PackedAttention, RopeAngles};
use crate::model::transfer::cuda_tensor::{Address, CudaTensor, wrap};

/// Returns the device that holds a tensor, and its kernels.
fn kernels(tensor: &Tensor) -> Result<(CudaDevice, std::sync::Arc<Kernels>)> {
    let device = tensor.device().as_cuda_device()?.clone();
    let kernels = Kernels::of(&device)?;
    Ok((device, kernels))
}

/// Returns a tensor that a kernel fills; `op` names the operation in errors.
fn new_tensor(op: &str, device: &CudaDevice, dtype: DType, like: &Tensor) -> Result<Tensor> {
    #[expect(unsafe_code, reason = "the kernel writes every element before it is read")]
    // SAFETY: the caller launches a kernel that writes every element.
    unsafe {
        Ok(match dtype {
            DType::F32 => wrap(device.alloc::<f32>(like.elem_count())?, device, like.shape()),
            DType::BF16 => wrap(device.alloc::<bf16>(like.elem_count())?, device, like.shape()),
            other => bail!("{op} expects f32 or bf16, found {other:?}"),
        })
    }
}

/// Borrows a tensor that must have the given dtype.
fn borrow<'a>(op: &str, tensor: &'a Tensor, dtype: DType) -> Result<CudaTensor<'a>> {
    if tensor.dtype() != dtype {
        bail!("{op} expects a tensor of {dtype:?}, found {tensor:?}");
    }
    CudaTensor::new(op, tensor)
}

/// Computes [`super::geglu()`] on the GPU.
pub(super) fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    const OP: &str = "geglu";
    if gate.shape() != up.shape() || gate.dtype() != up.dtype() {
        bail!("{OP} expects two tensors of the same shape and dtype, found {gate:?} and {up:?}");
    }
    let (device, kernels) = kernels(gate)?;
    let (rows, width) = gate.dims2()?;
    if width % 8 != 0 {
        bail!("{OP} on a GPU expects rows of a multiple of 8 elements, found {gate:?}");
    }
    let out = new_tensor(OP, &device, gate.dtype(), gate)?;
    let tensors = [
        CudaTensor::new(OP, gate)?,
        CudaTensor::new(OP, up)?,
        CudaTensor::new(OP, &out)?,
    ];
    kernels.geglu(
        gate.dtype(),
        Geglu {
            gate: tensors[0].address()?,
            up: tensors[1].address()?,
            stride: width,
            deltas: None,
            out: tensors[2].address()?,
            rows,
            width,
        },
    )?;
    drop(tensors);
    Ok(out)
}

/// Computes [`super::rms_norm`] on the GPU. `x` is f32, and the result has the given dtype.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, dtype: DType) -> Result<Tensor> {
    const OP: &str = "rms-norm";
    let (rows, width) = norm_shape(x, &[weight])?;
    let (device, kernels) = kernels(x)?;
    let out = new_tensor(OP, &device, dtype, x)?;
    let tensors = [
        borrow(OP, x, DType::F32)?,
        borrow(OP, weight, DType::F32)?,
        CudaTensor::new(OP, &out)?,
    ];
    let [x, weight, normed] = [tensors[0].address()?, tensors[1].address()?, tensors[2].address()?];
    kernels.rms_norm(dtype, x, weight, normed, rows, width, eps as f32)?;
    drop(tensors);
    Ok(out)
}

/// Computes [`super::add_rms_norm`] on the GPU. `residual` and the sum are f32; the normalised sum has the dtype of
/// `y`.
pub(super) fn add_rms_norm(
    residual: &Tensor,
    y: &Tensor,
    post: Option<&Tensor>,
    next: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "add-rms-norm";
    let weights: Vec<&Tensor> = post.into_iter().chain([next]).collect();
    let (rows, width) = norm_shape(residual, &weights)?;
    if y.dims() != residual.dims() {
        bail!("{OP} expects two tensors of the same shape, found {residual:?} and {y:?}");
    }
    let (device, kernels) = kernels(residual)?;
    let sum = new_tensor(OP, &device, DType::F32, residual)?;
    let normed = new_tensor(OP, &device, y.dtype(), y)?;
    let post = post.map(|post| borrow(OP, post, DType::F32)?.address()).transpose()?;
    kernels.add_rms_norm(
        y.dtype(),
        AddRmsNorm {
            residual: borrow(OP, residual, DType::F32)?.address()?,
            y: CudaTensor::new(OP, y)?.address()?,
            deltas: None,
            post,
            next: borrow(OP, next, DType::F32)?.address()?,
            sum: CudaTensor::new(OP, &sum)?.address()?,
            normed: CudaTensor::new(OP, &normed)?.address()?,
            rows,
            width,
            eps: eps as f32,
        },
    )?;
    Ok((sum, normed))
}

/// Computes [`super::norm_rope()`] on the GPU. The result has the dtype of `x`.
pub(super) fn norm_rope(x: &Tensor, angles: &RopeAngles, norm: Option<(&Tensor, f64)>) -> Result<Tensor> {
    const OP: &str = "norm-rope";
    let (rows, width) = x.dims2()?;
    let half = angles.cos.dim(1)?;
    let Some(positions) = &angles.positions else {
        bail!("{OP} on a GPU expects positions")
    };
    let is_misshapen = angles.sin.dims() != angles.cos.dims()
        || norm.is_some_and(|(weight, _)| weight.dims() != [2 * half])
        || positions.dims() != [rows];
    if half == 0 || half > launch::MAX_ROPE_PAIRS || width % (2 * half) != 0 || is_misshapen {
        bail!(
            "{OP} expects a position per token and heads of at most {} elements, found {x:?} and {angles:?}",
            2 * launch::MAX_ROPE_PAIRS
        );
    }
    let (device, kernels) = kernels(x)?;
    let out = new_tensor(OP, &device, x.dtype(), x)?;
    let norms = norm
        .map(|(weight, _)| borrow(OP, weight, DType::F32)?.address())
        .transpose()?;
    kernels.norm_rope(
        x.dtype(),
        NormRope {
            x: CudaTensor::new(OP, x)?.address()?,
            out: CudaTensor::new(OP, &out)?.address()?,
            stride: width,
            heads: width / (2 * half),
            kv_heads: 0,
            head_dim: 2 * half,
            rows,
            angles: [
                borrow(OP, &angles.cos, DType::F32)?.address()?,
                borrow(OP, &angles.sin, DType::F32)?.address()?,
                borrow(OP, positions, DType::U32)?.address()?,
            ],
            norms: norms.map(|weight| [weight; 2]),
            eps: norm.map_or(0.0, |(_, eps)| eps as f32),
            deltas: None,
            values: None,
        },
    )?;
    Ok(out)
}

/// Computes [`PackedAttention::forward`] on the GPU. The caller has checked the shapes.
pub(super) fn attention(op: &PackedAttention<'_>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    const OP: &str = "packed-attention";
    let (device, kernels) = kernels(q)?;
    let dtype = q.dtype();
    let out = new_tensor(OP, &device, dtype, q)?;
    let kv_width = op.kv_heads * op.head_dim;
    let prefix = match op.prefix {
        Some(prefix) => [
            borrow(OP, &prefix.keys, dtype)?.address()?,
            borrow(OP, &prefix.values, dtype)?.address()?,
        ],
        None => [Address::NULL; 2],
    };
    kernels.attention(
        dtype,
        &Attention {
            q: CudaTensor::new(OP, q)?.address()?,
            k: borrow(OP, k, dtype)?.address()?,
            v: borrow(OP, v, dtype)?.address()?,
            prefix,
            spans: SpanAddresses::of(op.spans)?,
            out: CudaTensor::new(OP, &out)?.address()?,
            heads: op.heads,
            kv_heads: op.kv_heads,
            head_dim: op.head_dim,
            q_stride: op.heads * op.head_dim,
            kv_stride: kv_width,
            prefix_stride: kv_width,
            window: op.window,
            scale: op.scale,
            softcap: op.softcap,
        },
    )?;
    Ok(out)
}

/// Returns the rows and the width of `x`, or an error if the weights do not fit it.
fn norm_shape(x: &Tensor, weights: &[&Tensor]) -> Result<(usize, usize)> {
    let (rows, width) = x.dims2()?;
    if width > launch::MAX_NORM_WIDTH || width % 8 != 0 || weights.iter().any(|weight| weight.dims() != [width]) {
        bail!(
            "a norm expects weights as wide as its rows, a multiple of 8 and at most {}, found {x:?} and {weights:?}",
            launch::MAX_NORM_WIDTH
        );
    }
    Ok((rows, width))
}
