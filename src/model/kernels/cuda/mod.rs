//! The same operations on CUDA: each launches a kernel of this folder, f32 or bf16 by its inputs.
//!
//! The residual stream, norm weights and angles are f32 whatever the matrix products compute in. The
//! kernels are compiled to PTX when the crate is built (`build.rs`), so the driver finishes them for the
//! card that is there.

#[cfg(test)]
mod tests;

use candle_core::cuda_backend::cudarc::driver::{CudaView, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Storage, Tensor, bail};
use half::bf16;

use super::{PackedAttention, Turn};
use crate::model::transfer::held::{Held, wrap};

const GEGLU: Module = Module("moderatord_geglu", include_str!(concat!(env!("OUT_DIR"), "/geglu.ptx")));
const NORM: Module = Module("moderatord_norm", include_str!(concat!(env!("OUT_DIR"), "/norm.ptx")));
const NORM_ROPE: Module = Module(
    "moderatord_norm_rope",
    include_str!(concat!(env!("OUT_DIR"), "/norm_rope.ptx")),
);
const ATTENTION: Module = Module(
    "moderatord_attention",
    include_str!(concat!(env!("OUT_DIR"), "/attention.ptx")),
);

/// Threads of a block of the norms, as in norm.cu, and the widest row that they take.
const NORM_THREADS: u32 = 256;
const NORM_WIDTH: usize = 256 * 32;
/// Warps of a block of `norm_rope`, and the widest head, as in norm_rope.cu.
const ROPE_WARPS: u32 = 4;
const ROPE_HEAD: usize = 256;
/// Warps of a block of `attention_bf16`, as in attention.cu.
const ATTENTION_WARPS: u32 = 3;
/// Heads that it is compiled for.
const ATTENTION_HEADS: [usize; 4] = [32, 64, 128, 256];

/// A compiled source: its name among the device's modules, and its PTX.
struct Module(&'static str, &'static str);

/// Types that kernels take and give: a suffix of their names.
trait Element: CudaDType + candle_core::cuda_backend::cudarc::driver::DeviceRepr {
    const SUFFIX: &'static str;
}

impl Element for f32 {
    const SUFFIX: &'static str = "f32";
}

impl Element for bf16 {
    const SUFFIX: &'static str = "bf16";
}

/// Runs a generic function in the dtype of a tensor.
macro_rules! by_dtype {
    ($op:literal, $x:expr, $function:ident($($argument:expr),*)) => {
        match $x.dtype() {
            DType::F32 => $function::<f32>($($argument),*),
            DType::BF16 => $function::<bf16>($($argument),*),
            other => bail!("{} expects f32 or bf16, found {other:?}", $op),
        }
    };
}

fn device(tensor: &Tensor) -> Result<CudaDevice> {
    tensor.device().as_cuda_device().cloned()
}

fn count(op: &str, value: usize) -> Result<u32> {
    match u32::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => bail!("{op} is given {value} elements, expected less than 2^32"),
    }
}

/// See [`super::geglu`].
pub(super) fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    fn typed<T: Element>(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let device = device(gate)?;
        let (held_gate, held_up) = (Held::new("geglu", gate)?, Held::new("geglu", up)?);
        let (views, elements) = ((held_gate.view::<T>()?, held_up.view::<T>()?), gate.elem_count());
        let count = count("geglu", elements)?;
        let function = device.get_or_load_custom_func(&format!("geglu_{}", T::SUFFIX), GEGLU.0, GEGLU.1)?;
        #[expect(unsafe_code, reason = "the kernel writes every element before anybody reads it")]
        // SAFETY: as the reason says; the kernel stays below `count` in all three buffers.
        let out = unsafe { device.alloc::<T>(elements)? };
        let mut builder = function.builder();
        builder.arg(&views.0).arg(&views.1).arg(&out).arg(&count);
        launch(builder, (count.div_ceil(256 * 4).max(1), 1), 256)?;
        Ok(wrap(out, &device, gate.shape()))
    }
    if gate.shape() != up.shape() || gate.dtype() != up.dtype() {
        bail!("geglu expects two tensors of one shape and dtype, found {gate:?} and {up:?}");
    }
    by_dtype!("geglu", gate, typed(gate, up))
}

/// See [`super::rms_norm`]; `x` is f32, the result `dtype`.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, dtype: DType) -> Result<Tensor> {
    fn typed<T: Element>(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        let device = device(x)?;
        let (rows, width) = norm_shape(x, &[weight])?;
        let (held_x, held_weight) = (Held::new("rms-norm", x)?, Held::new("rms-norm", weight)?);
        let views = (held_x.view::<f32>()?, held_weight.view::<f32>()?);
        let function = device.get_or_load_custom_func(&format!("rms_norm_{}", T::SUFFIX), NORM.0, NORM.1)?;
        #[expect(unsafe_code, reason = "the kernel writes every element before anybody reads it")]
        // SAFETY: as the reason says; a block stays in its row.
        let out = unsafe { device.alloc::<T>(x.elem_count())? };
        let mut builder = function.builder();
        builder.arg(&views.0).arg(&views.1).arg(&out).arg(&width).arg(&eps);
        launch(builder, (rows, 1), NORM_THREADS)?;
        Ok(wrap(out, &device, x.shape()))
    }
    match dtype {
        DType::F32 => typed::<f32>(x, weight, eps as f32),
        DType::BF16 => typed::<bf16>(x, weight, eps as f32),
        other => bail!("rms-norm gives f32 or bf16, not {other:?}"),
    }
}

/// See [`super::add_rms_norm`]; `residual` and the sum are f32, `y` and the normed sum of one dtype.
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
            bail!("{OP} expects two tensors of one shape, found {residual:?} and {y:?}");
        }
        let held = (Held::new(OP, residual)?, Held::new(OP, y)?, Held::new(OP, next)?);
        let held_post = post.map(|post| Held::new(OP, post)).transpose()?;
        let views = (held.0.view::<f32>()?, held.1.view::<T>()?, held.2.view::<f32>()?);
        let post = held_post.as_ref().map(Held::view::<f32>).transpose()?;
        let function = device.get_or_load_custom_func(&format!("add_rms_norm_{}", T::SUFFIX), NORM.0, NORM.1)?;
        #[expect(unsafe_code, reason = "the kernel writes every element before anybody reads it")]
        // SAFETY: as the reason says; a block stays in its row.
        let (sum, normed) = unsafe { (device.alloc::<f32>(y.elem_count())?, device.alloc::<T>(y.elem_count())?) };
        let mut builder = function.builder();
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

/// See [`super::norm_rope`]; the result has the dtype of `x`.
pub(super) fn norm_rope(x: &Tensor, turn: &Turn, norm: Option<(&Tensor, f64)>) -> Result<Tensor> {
    fn typed<T: Element>(x: &Tensor, turn: &Turn, norm: Option<(&Tensor, f64)>) -> Result<Tensor> {
        const OP: &str = "norm-rope";
        let device = device(x)?;
        let (tokens, width) = x.dims2()?;
        let half = turn.cos.dim(1)?;
        let Some(positions) = &turn.positions else {
            bail!("{OP} on a GPU expects positions")
        };
        let is_misshapen = turn.sin.dims() != turn.cos.dims()
            || norm.is_some_and(|(weight, _)| weight.dims() != [2 * half])
            || positions.dims() != [tokens];
        if half == 0 || 2 * half > ROPE_HEAD || width % (2 * half) != 0 || is_misshapen {
            bail!("{OP} expects one position a token and heads of up to {ROPE_HEAD}, found {x:?} and {turn:?}");
        }
        let held = (Held::new(OP, x)?, Held::new(OP, &turn.cos)?, Held::new(OP, &turn.sin)?);
        let held_positions = Held::new(OP, positions)?;
        let held_norm = norm.map(|(weight, _)| Held::new(OP, weight)).transpose()?;
        let views = (held.0.view::<T>()?, held.1.view::<f32>()?, held.2.view::<f32>()?);
        let (positions, weight) = (
            held_positions.view::<u32>()?,
            held_norm.as_ref().map(Held::view::<f32>).transpose()?,
        );
        let eps = norm.map_or(0.0, |(_, eps)| eps as f32);
        let (tokens, heads, half) = (count(OP, tokens)?, count(OP, width / (2 * half))?, count(OP, half)?);
        let function = device.get_or_load_custom_func(&format!("norm_rope_{}", T::SUFFIX), NORM_ROPE.0, NORM_ROPE.1)?;
        #[expect(unsafe_code, reason = "the kernel writes every element before anybody reads it")]
        // SAFETY: as the reason says; a warp stays in its head, and `RopeTables::gather` has checked positions.
        let out = unsafe { device.alloc::<T>(x.elem_count())? };
        let mut builder = function.builder();
        builder.arg(&views.0).arg(&views.1).arg(&views.2).arg(&positions);
        match &weight {
            Some(weight) => builder.arg(weight),
            None => builder.arg(&NULL),
        };
        builder.arg(&eps).arg(&out).arg(&tokens).arg(&heads).arg(&half);
        launch(builder, ((tokens * heads).div_ceil(ROPE_WARPS), 1), ROPE_WARPS * 32)?;
        Ok(wrap(out, &device, x.shape()))
    }
    by_dtype!("norm-rope", x, typed(x, turn, norm))
}

/// attention.cu's `Shape`.
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

#[expect(unsafe_code, reason = "a kernel's parameter")]
// SAFETY: plain numbers in C's layout, as attention.cu declares them.
unsafe impl candle_core::cuda_backend::cudarc::driver::DeviceRepr for AttentionShape {}

/// See [`PackedAttention::forward`]; the shapes are checked there.
pub(super) fn attention(op: &PackedAttention<'_>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    fn typed<T: Element>(op: &PackedAttention<'_>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        const OP: &str = "packed-attention";
        let device = device(q)?;
        let Some(spans) = &op.spans.device else {
            bail!("{OP} on a GPU expects its spans there")
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
            let queries = count(OP, spans.span_of.dim(0)?)?;
            ("attention_f32".to_owned(), &spans.span_of, (queries, shape.heads), 32)
        } else {
            let blocks = count(OP, spans.tiles.elem_count() / 2)?;
            let name = format!("attention_bf16_{}", op.head_dim);
            (name, &spans.tiles, (blocks, shape.kv_heads), ATTENTION_WARPS * 32)
        };
        if !is_exact && !ATTENTION_HEADS.contains(&op.head_dim) {
            bail!(
                "{OP} in bf16 is compiled for heads of {ATTENTION_HEADS:?}, not {}",
                op.head_dim
            );
        }
        if is_exact && op.head_dim > 256 {
            bail!("{OP} takes heads of up to 256, not {}", op.head_dim);
        }
        let (held_q, held_k, held_v) = (Held::new(OP, q)?, Held::new(OP, k)?, Held::new(OP, v)?);
        let held_rows = (Held::new(OP, &spans.fields)?, Held::new(OP, rows)?);
        let held_prefix = match op.prefix {
            Some(prefix) => Some((Held::new(OP, &prefix.keys)?, Held::new(OP, &prefix.values)?)),
            None => None,
        };
        let views = (held_q.view::<T>()?, held_k.view::<T>()?, held_v.view::<T>()?);
        let rows = (held_rows.0.view::<u32>()?, held_rows.1.view::<u32>()?);
        let prefix = match &held_prefix {
            Some((keys, values)) => Some((keys.view::<T>()?, values.view::<T>()?)),
            None => None,
        };
        let function = device.get_or_load_custom_func(&name, ATTENTION.0, ATTENTION.1)?;
        #[expect(unsafe_code, reason = "the kernel writes every element before anybody reads it")]
        // SAFETY: as the reason says; the spans were checked against the tensors.
        let out = unsafe { device.alloc::<T>(q.elem_count())? };
        let mut builder = function.builder();
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

/// A pointer that a kernel does not follow.
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
    #[expect(unsafe_code, reason = "a launch is a foreign call")]
    // SAFETY: every caller gives the kernel the arguments that its source declares, in order.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

fn norm_shape(x: &Tensor, weights: &[&Tensor]) -> Result<(u32, u32)> {
    let (rows, width) = x.dims2()?;
    if width > NORM_WIDTH || weights.iter().any(|weight| weight.dims() != [width]) {
        bail!("a norm expects weights as wide as its rows, at most {NORM_WIDTH}, found {x:?} and {weights:?}");
    }
    Ok((count("a norm", rows)?, count("a norm", width)?))
}
