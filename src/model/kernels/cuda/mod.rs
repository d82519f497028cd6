//! The fused operations on CUDA. Each one launches a kernel of this folder, in f32 or bf16 according to its inputs.
//!
//! The residual stream, the norm weights and the rope angles are always f32, whatever dtype the matrix products use.
//! `build.rs` compiles each source to a fat binary with machine code for the supported GPUs.

mod module;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaDType, DeviceId, WrapErr};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use half::bf16;

use super::{PackedAttention, RopeAngles};
use crate::model::transfer::cuda_tensor::{CudaTensor, wrap};
use module::Module;

static GEGLU: FatBinary = FatBinary::new(include_bytes!(concat!(env!("OUT_DIR"), "/geglu.fatbin")));
static NORM: FatBinary = FatBinary::new(include_bytes!(concat!(env!("OUT_DIR"), "/norm.fatbin")));
static NORM_ROPE: FatBinary = FatBinary::new(include_bytes!(concat!(env!("OUT_DIR"), "/norm_rope.fatbin")));
static ATTENTION: FatBinary = FatBinary::new(include_bytes!(concat!(env!("OUT_DIR"), "/attention.fatbin")));

/// Number of threads in a block of the norm kernels, as in norm.cu.
const NORM_THREADS: u32 = 256;
/// The widest row that the norm kernels support, as in norm.cu.
const MAX_NORM_WIDTH: usize = 256 * 32;
/// Number of warps in a block of `norm_rope`, as in norm_rope.cu.
const ROPE_WARPS: u32 = 4;
/// The widest head that `norm_rope` supports, as in norm_rope.cu.
const MAX_ROPE_HEAD_DIM: usize = 256;
/// Number of warps in a block of `attention_bf16`, as in attention.cu.
const ATTENTION_WARPS: u32 = 3;
/// Widths of heads that `attention_bf16` is compiled for, as in attention.cu.
const ATTENTION_HEAD_DIMS: [usize; 4] = [32, 64, 128, 256];

/// A compiled CUDA source, and the GPUs that it has been loaded onto.
struct FatBinary {
    image: &'static [u8],
    loaded: Mutex<Vec<(DeviceId, Module)>>,
}

impl FatBinary {
    const fn new(image: &'static [u8]) -> Self {
        Self {
            image,
            loaded: Mutex::new(Vec::new()),
        }
    }

    /// Returns the kernel with the given name on a GPU. The first call for a GPU loads all kernels of the source.
    fn function(&self, device: &CudaDevice, name: &str) -> Result<CudaFunction> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, module)) = loaded.iter().find(|(id, _)| *id == device.id()) {
            return module.function(name, 0);
        }
        let module = Module::load(device, self.image)?;
        let function = module.function(name, 0);
        loaded.push((device.id(), module));
        function
    }
}

/// An element type that the kernels are compiled for. Its suffix completes the name of a kernel.
trait Element: CudaDType + candle_core::cuda_backend::cudarc::driver::DeviceRepr {
    const SUFFIX: &'static str;
}

impl Element for f32 {
    const SUFFIX: &'static str = "f32";
}

impl Element for bf16 {
    const SUFFIX: &'static str = "bf16";
}

/// Calls a generic function with the element type that matches the dtype of a tensor.
macro_rules! by_dtype {
    ($op:literal, $x:expr, $function:ident($($argument:expr),*)) => {
        match $x.dtype() {
            DType::F32 => $function::<f32>($($argument),*),
            DType::BF16 => $function::<bf16>($($argument),*),
            other => bail!("{} expects f32 or bf16, found {other:?}", $op),
        }
    };
}

/// Returns the CUDA device that holds a tensor.
fn device(tensor: &Tensor) -> Result<CudaDevice> {
    tensor.device().as_cuda_device().cloned()
}

/// Converts a count to the type that the kernels take; `op` names the operation in errors.
fn count(op: &str, value: usize) -> Result<u32> {
    match u32::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => bail!("{op} got {value} elements, expected fewer than 2^32"),
    }
}

/// Computes [`super::geglu`] on the GPU.
pub(super) fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    fn typed<T: Element>(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let device = device(gate)?;
        let (held_gate, held_up) = (CudaTensor::new("geglu", gate)?, CudaTensor::new("geglu", up)?);
        let (views, elements) = ((held_gate.view::<T>()?, held_up.view::<T>()?), gate.elem_count());
        let count = count("geglu", elements)?;
        let function = GEGLU.function(&device, &format!("geglu_{}", T::SUFFIX))?;
        #[expect(unsafe_code, reason = "the kernel writes every element before it is read")]
        // SAFETY: the kernel writes every element, and stays below index `count` in all three buffers.
        let out = unsafe { device.alloc::<T>(elements)? };
        let stream = device.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        builder.arg(&views.0).arg(&views.1).arg(&out).arg(&count);
        launch(builder, (count.div_ceil(256 * 4).max(1), 1), 256)?;
        Ok(wrap(out, &device, gate.shape()))
    }
    if gate.shape() != up.shape() || gate.dtype() != up.dtype() {
        bail!("geglu expects two tensors of the same shape and dtype, found {gate:?} and {up:?}");
    }
    by_dtype!("geglu", gate, typed(gate, up))
}

/// Computes [`super::rms_norm`] on the GPU. `x` is f32, and the result has the given dtype.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, dtype: DType) -> Result<Tensor> {
    fn typed<T: Element>(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        let device = device(x)?;
        let (rows, width) = norm_shape(x, &[weight])?;
        let (held_x, held_weight) = (CudaTensor::new("rms-norm", x)?, CudaTensor::new("rms-norm", weight)?);
        let views = (held_x.view::<f32>()?, held_weight.view::<f32>()?);
        let function = NORM.function(&device, &format!("rms_norm_{}", T::SUFFIX))?;
        #[expect(unsafe_code, reason = "the kernel writes every element before it is read")]
        // SAFETY: the kernel writes every element, and each block accesses only its own row.
        let out = unsafe { device.alloc::<T>(x.elem_count())? };
        let stream = device.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        builder.arg(&views.0).arg(&views.1).arg(&out).arg(&width).arg(&eps);
        launch(builder, (rows, 1), NORM_THREADS)?;
        Ok(wrap(out, &device, x.shape()))
    }
    match dtype {
        DType::F32 => typed::<f32>(x, weight, eps as f32),
        DType::BF16 => typed::<bf16>(x, weight, eps as f32),
        other => bail!("rms-norm returns f32 or bf16, not {other:?}"),
    }
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
    fn typed<T: Element>(
        residual: &Tensor,
        y: &Tensor,
        post: Option<&Tensor>,
        next: &Tensor,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        const OP: &str = "add-rms-norm";
        let device = device(residual)?;
        let weights: Vec<&Tensor> = post.into_iter().chain([next]).collect();
        let (rows, width) = norm_shape(residual, &weights)?;
        if y.dims() != residual.dims() {
            bail!("{OP} expects two tensors of the same shape, found {residual:?} and {y:?}");
        }
        let held = (
            CudaTensor::new(OP, residual)?,
            CudaTensor::new(OP, y)?,
            CudaTensor::new(OP, next)?,
        );
        let held_post = post.map(|post| CudaTensor::new(OP, post)).transpose()?;
        let views = (held.0.view::<f32>()?, held.1.view::<T>()?, held.2.view::<f32>()?);
        let post = held_post.as_ref().map(CudaTensor::view::<f32>).transpose()?;
        let function = NORM.function(&device, &format!("add_rms_norm_{}", T::SUFFIX))?;
        #[expect(unsafe_code, reason = "the kernel writes every element before it is read")]
        // SAFETY: the kernel writes every element, and each block accesses only its own row.
        let (sum, normed) = unsafe { (device.alloc::<f32>(y.elem_count())?, device.alloc::<T>(y.elem_count())?) };
        let stream = device.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        builder.arg(&views.0).arg(&views.1);
        match &post {
            Some(post) => builder.arg(post),
            None => builder.arg(&NULL),
        };
        builder.arg(&views.2).arg(&sum).arg(&normed).arg(&width).arg(&eps);
        launch(builder, (rows, 1), NORM_THREADS)?;
        Ok((
            wrap(sum, &device, residual.shape()),
            wrap(normed, &device, residual.shape()),
        ))
    }
    by_dtype!("add-rms-norm", y, typed(residual, y, post, next, eps as f32))
}

/// Computes [`super::norm_rope`] on the GPU. The result has the dtype of `x`.
pub(super) fn norm_rope(x: &Tensor, angles: &RopeAngles, norm: Option<(&Tensor, f64)>) -> Result<Tensor> {
    fn typed<T: Element>(x: &Tensor, angles: &RopeAngles, norm: Option<(&Tensor, f64)>) -> Result<Tensor> {
        const OP: &str = "norm-rope";
        let device = device(x)?;
        let (tokens, width) = x.dims2()?;
        let half = angles.cos.dim(1)?;
        let Some(positions) = &angles.positions else {
            bail!("{OP} on a GPU expects positions")
        };
        let is_misshapen = angles.sin.dims() != angles.cos.dims()
            || norm.is_some_and(|(weight, _)| weight.dims() != [2 * half])
            || positions.dims() != [tokens];
        if half == 0 || 2 * half > MAX_ROPE_HEAD_DIM || width % (2 * half) != 0 || is_misshapen {
            bail!(
                "{OP} expects a position per token and heads of at most {MAX_ROPE_HEAD_DIM} elements, found {x:?} and \
                 {angles:?}"
            );
        }
        let held = (
            CudaTensor::new(OP, x)?,
            CudaTensor::new(OP, &angles.cos)?,
            CudaTensor::new(OP, &angles.sin)?,
        );
        let held_positions = CudaTensor::new(OP, positions)?;
        let held_norm = norm.map(|(weight, _)| CudaTensor::new(OP, weight)).transpose()?;
        let views = (held.0.view::<T>()?, held.1.view::<f32>()?, held.2.view::<f32>()?);
        let (positions, weight) = (
            held_positions.view::<u32>()?,
            held_norm.as_ref().map(CudaTensor::view::<f32>).transpose()?,
        );
        let eps = norm.map_or(0.0, |(_, eps)| eps as f32);
        let (tokens, heads, half) = (count(OP, tokens)?, count(OP, width / (2 * half))?, count(OP, half)?);
        let function = NORM_ROPE.function(&device, &format!("norm_rope_{}", T::SUFFIX))?;
        #[expect(unsafe_code, reason = "the kernel writes every element before it is read")]
        // SAFETY: the kernel writes every element, each warp accesses only its own head, and `RopeTables::angles`
        // has checked the positions.
        let out = unsafe { device.alloc::<T>(x.elem_count())? };
        let stream = device.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        builder.arg(&views.0).arg(&views.1).arg(&views.2).arg(&positions);
        match &weight {
            Some(weight) => builder.arg(weight),
            None => builder.arg(&NULL),
        };
        builder.arg(&eps).arg(&out).arg(&tokens).arg(&heads).arg(&half);
        launch(builder, ((tokens * heads).div_ceil(ROPE_WARPS), 1), ROPE_WARPS * 32)?;
        Ok(wrap(out, &device, x.shape()))
    }
    by_dtype!("norm-rope", x, typed(x, angles, norm))
}

/// The parameter `Shape` of the attention kernels, with the same fields as in attention.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct AttentionShape {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    window: u32,
    scale: f32,
    softcap: f32,
}

#[expect(unsafe_code, reason = "cudarc passes only types with this trait to a kernel")]
// SAFETY: the fields are plain numbers in C's layout, as attention.cu declares them.
unsafe impl candle_core::cuda_backend::cudarc::driver::DeviceRepr for AttentionShape {}

/// Computes [`PackedAttention::forward`] on the GPU. The caller has checked the shapes.
pub(super) fn attention(op: &PackedAttention<'_>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    fn typed<T: Element>(op: &PackedAttention<'_>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        const OP: &str = "packed-attention";
        let device = device(q)?;
        let Some(spans) = &op.spans.device else {
            bail!("{OP} on a GPU expects spans in GPU memory")
        };
        let shape = AttentionShape {
            heads: count(OP, op.heads)?,
            kv_heads: count(OP, op.kv_heads)?,
            head_dim: count(OP, op.head_dim)?,
            window: count(OP, op.window.unwrap_or(0))?,
            scale: op.scale as f32,
            softcap: op.softcap.unwrap_or(0.0) as f32,
        };
        let is_exact = T::SUFFIX == f32::SUFFIX;
        let (name, rows, grid, threads) = if is_exact {
            let queries = count(OP, spans.row_of_query.dim(0)?)?;
            (
                "attention_f32".to_owned(),
                &spans.row_of_query,
                (queries, shape.heads),
                32,
            )
        } else {
            let blocks = count(OP, spans.tiles.elem_count() / 2)?;
            let name = format!("attention_bf16_{}", op.head_dim);
            (name, &spans.tiles, (blocks, shape.kv_heads), ATTENTION_WARPS * 32)
        };
        if !is_exact && !ATTENTION_HEAD_DIMS.contains(&op.head_dim) {
            bail!(
                "{OP} in bf16 is compiled for heads of {ATTENTION_HEAD_DIMS:?} elements, not {}",
                op.head_dim
            );
        }
        if is_exact && op.head_dim > 256 {
            bail!("{OP} supports heads of at most 256 elements, not {}", op.head_dim);
        }
        let (held_q, held_k, held_v) = (
            CudaTensor::new(OP, q)?,
            CudaTensor::new(OP, k)?,
            CudaTensor::new(OP, v)?,
        );
        let held_rows = (CudaTensor::new(OP, &spans.fields)?, CudaTensor::new(OP, rows)?);
        let held_prefix = match op.prefix {
            Some(prefix) => Some((CudaTensor::new(OP, &prefix.keys)?, CudaTensor::new(OP, &prefix.values)?)),
            None => None,
        };
        let views = (held_q.view::<T>()?, held_k.view::<T>()?, held_v.view::<T>()?);
        let rows = (held_rows.0.view::<u32>()?, held_rows.1.view::<u32>()?);
        let prefix = match &held_prefix {
            Some((keys, values)) => Some((keys.view::<T>()?, values.view::<T>()?)),
            None => None,
        };
        let function = ATTENTION.function(&device, &name)?;
        #[expect(unsafe_code, reason = "the kernel writes every element before it is read")]
        // SAFETY: the kernel writes every element, and `PackedAttention::check` has compared the spans with the
        // tensors.
        let out = unsafe { device.alloc::<T>(q.elem_count())? };
        let stream = device.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        builder.arg(&views.0).arg(&views.1).arg(&views.2);
        match &prefix {
            Some((keys, values)) => builder.arg(keys).arg(values),
            None => builder.arg(&NULL).arg(&NULL),
        };
        builder.arg(&rows.0).arg(&rows.1).arg(&out).arg(&shape);
        launch(builder, grid, threads)?;
        Ok(wrap(out, &device, q.shape()))
    }
    by_dtype!("packed-attention", q, typed(op, q, k, v))
}

/// A null pointer, for a parameter that the kernel does not read.
const NULL: u64 = 0;

fn launch(
    mut builder: candle_core::cuda_backend::cudarc::driver::LaunchArgs<'_>,
    (x, y): (u32, u32),
    threads: u32,
) -> Result<()> {
    let config = LaunchConfig {
        grid_dim: (x, y, 1),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: 0,
    };
    #[expect(unsafe_code, reason = "the compiler cannot check the arguments of a kernel")]
    // SAFETY: every caller passes the arguments that the kernel's source declares, in the same order.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// Returns the rows and the width of `x`, or an error if the weights do not fit it.
fn norm_shape(x: &Tensor, weights: &[&Tensor]) -> Result<(u32, u32)> {
    let (rows, width) = x.dims2()?;
    if width > MAX_NORM_WIDTH || weights.iter().any(|weight| weight.dims() != [width]) {
        bail!("a norm expects weights as wide as its rows, at most {MAX_NORM_WIDTH}, found {x:?} and {weights:?}");
    }
    Ok((count("a norm", rows)?, count("a norm", width)?))
}
