//! Launches of the kernels on addresses in GPU memory. Every launch checks nothing: the callers have compared shapes
//! and dtypes, and hold the memory until the stream has run the kernel.

use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::{CudaDevice, DType, Result, bail};

pub(in crate::model) use super::arguments::{
    AddRmsNorm, Attention, Delta, EmbedNorm, GatherRows, Geglu, LowRank, NormRope, SpanAddresses, Values,
};
use super::functions::Functions;
use crate::model::transfer::cuda_tensor::Address;

/// The last parameter of the attention kernels, with the same fields as in attention.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct AttentionShape {
    queries: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    q_stride: u32,
    kv_stride: u32,
    prefix_stride: u32,
    window: u32,
    scale: f32,
    softcap: f32,
}

#[expect(unsafe_code, reason = "cudarc passes only types with this trait to a kernel")]
// SAFETY: the fields are plain numbers in C's layout, as attention.cu declares them.
unsafe impl DeviceRepr for AttentionShape {}

/// The kernels of one device, and the stream that they are launched on.
#[derive(Debug)]
pub(in crate::model) struct Kernels {
    stream: Arc<CudaStream>,
    pub(super) functions: Arc<Functions>,
}

/// Launches a kernel: `launch!(self, function, grid, threads, shared bytes; arguments...)`.
macro_rules! launch {
    ($self:ident, $function:expr, $grid:expr, $threads:expr, $shared:expr; $($argument:expr),* $(,)?) => {{
        let mut builder = $self.stream.launch_builder($function);
        $(builder.arg($argument);)*
        let config = LaunchConfig { grid_dim: $grid, block_dim: ($threads, 1, 1), shared_mem_bytes: $shared };
        #[expect(unsafe_code, reason = "the compiler cannot check the arguments of a kernel")]
        // SAFETY: every caller passes the arguments that the kernel's source declares, in the same order.
        unsafe { builder.launch(config) }.w().map(|_| ())
    }};
}

/// The widest row of the norm kernels, as in rows.cuh.
pub(super) const MAX_NORM_WIDTH: usize = 8192;
/// The most pairs of elements of a head that `norm_rope` rotates, as in norm_rope.cu.
pub(super) const MAX_ROPE_PAIRS: usize = 128;
/// The columns of a row that one warp holds, as in rows.cuh.
const ROW_WARP_COLUMNS: u32 = 640;
/// The widths of heads that the bf16 attention is compiled for, as in attention.cu.
const ATTENTION_HEAD_DIMS: [usize; 4] = [32, 64, 128, 256];

impl Kernels {
    pub(super) fn new(device: &CudaDevice, functions: Functions) -> Self {
        Self {
            stream: device.cuda_stream(),
            functions: Arc::new(functions),
        }
    }

    /// Returns the same kernels, launched on another stream of the device.
    pub(in crate::model) fn on(&self, stream: &Arc<CudaStream>) -> Self {
        Self {
            stream: Arc::clone(stream),
            functions: Arc::clone(&self.functions),
        }
    }

    /// Returns whether the bf16 kernels support a model with these sizes.
    pub(in crate::model) fn supports(hidden: usize, inner: usize, head_dim: usize) -> bool {
        let fit = hidden.is_multiple_of(8) && hidden <= MAX_NORM_WIDTH && inner.is_multiple_of(8);
        fit && ATTENTION_HEAD_DIMS.contains(&head_dim)
    }

    pub(in crate::model) fn embed_norm(&self, op: EmbedNorm) -> Result<()> {
        let function = match op.table_dtype {
            DType::BF16 => &self.functions.embed_norm_bf16_bf16,
            DType::F16 => &self.functions.embed_norm_f16_bf16,
            DType::F32 => &self.functions.embed_norm_f32_bf16,
            other => bail!("an embedding on a GPU is expected in bf16, f16 or f32, found {other:?}"),
        };
        let (rows, width) = (op.rows as u32, op.width as u32);
        let (grid, threads) = row_launch(rows, width);
        launch!(self, function, grid, threads, 0;
            &op.table, &op.tokens, &op.scale, &op.weight, &op.residual, &op.normed, &rows, &width, &op.eps)
    }

    pub(in crate::model) fn gather_rows(&self, op: GatherRows) -> Result<()> {
        let (rows, width) = (op.rows as u32, op.width as u32);
        let function = &self.functions.gather_rows_bf16;
        launch!(self, function, (rows, 1, 1), GATHER_THREADS, 0;
            &op.residual, &op.normed, &op.indices, &op.out_residual, &op.out_normed, &rows, &width)
    }

    #[expect(clippy::too_many_arguments, reason = "the parameters of the kernel")]
    pub(super) fn rms_norm(
        &self,
        dtype: DType,
        x: Address,
        weight: Address,
        out: Address,
        rows: usize,
        width: usize,
        eps: f32,
    ) -> Result<()> {
        let function = by_dtype(
            "rms-norm",
            dtype,
            &self.functions.rms_norm_f32,
            &self.functions.rms_norm_bf16,
        )?;
        let (rows, width) = (rows as u32, width as u32);
        let (grid, threads) = row_launch(rows, width);
        launch!(self, function, grid, threads, 0; &x, &weight, &out, &rows, &width, &eps)
    }

    pub(in crate::model) fn add_rms_norm(&self, dtype: DType, op: AddRmsNorm) -> Result<()> {
        let functions = &self.functions;
        let (rows, width) = (op.rows as u32, op.width as u32);
        let post = op.post.unwrap_or(Address::NULL);
        if let Some([delta]) = op.deltas {
            let (function, columns) = if width <= DELTA_WARP_COLUMNS * 32 {
                (&functions.add_rms_norm_delta_bf16, DELTA_WARP_COLUMNS)
            } else {
                (&functions.add_rms_norm_delta_wide_bf16, 2 * DELTA_WARP_COLUMNS)
            };
            let grid = (rows.div_ceil(DELTA_TOKENS), 1, 1);
            return launch!(self, function, grid, 32 * width.div_ceil(columns), 0;
                &op.residual, &op.y, &delta, &post, &op.next, &op.sum, &op.normed, &rows, &width, &op.eps);
        }
        let (grid, threads) = row_launch(rows, width);
        let function = by_dtype(
            "add-rms-norm",
            dtype,
            &functions.add_rms_norm_f32,
            &functions.add_rms_norm_bf16,
        )?;
        launch!(self, function, grid, threads, 0;
            &op.residual, &op.y, &post, &op.next, &op.sum, &op.normed, &rows, &width, &op.eps)
    }
}

/// Returns the kernel for a dtype; `op` names the operation in errors.
fn by_dtype<'a>(op: &str, dtype: DType, f32: &'a CudaFunction, bf16: &'a CudaFunction) -> Result<&'a CudaFunction> {
    match dtype {
        DType::F32 => Ok(f32),
        DType::BF16 => Ok(bf16),
        other => bail!("{op} expects f32 or bf16, found {other:?}"),
    }
}

/// Returns the grid and the block of the kernels that hold rows in registers, as in rows.cuh.
fn row_launch(rows: u32, width: u32) -> ((u32, u32, u32), u32) {
    let warps = width.div_ceil(ROW_WARP_COLUMNS);
    let rows_per_block = (4 / warps).max(1);
    ((rows.div_ceil(rows_per_block), 1, 1), 32 * warps * rows_per_block)
}

impl Kernels {
    /// Computes low-rank activations. Returns false if no kernel fits their sizes.
    pub(in crate::model) fn low_rank(&self, op: LowRank) -> Result<bool> {
        let functions = &self.functions;
        let function = match op.ranks {
            16 => &functions.low_rank_16,
            32 => &functions.low_rank_32,
            48 => &functions.low_rank_48,
            64 => &functions.low_rank_64,
            _ => return Ok(false),
        };
        if !op.width.is_multiple_of(32) {
            return Ok(false);
        }
        let (rows, width, stride) = (op.rows as u32, op.width as u32, op.stride as u32);
        // A warp has enough to do with 256 inputs.
        let warps = (width / 256).clamp(4, if op.ranks < 64 { 16 } else { 8 });
        let grid = (rows.div_ceil(LOW_RANK_TOKENS), 1, 1);
        launch!(self, function, grid, 32 * warps, 0; &op.x, &stride, &op.a, &op.out, &rows, &width)?;
        Ok(true)
    }

    pub(in crate::model) fn geglu(&self, dtype: DType, op: Geglu) -> Result<()> {
        let functions = &self.functions;
        let (rows, width, stride) = (op.rows as u32, op.width as u32, op.stride as u32);
        if let Some([gate, up]) = op.deltas {
            let grid = (rows.div_ceil(32), width.div_ceil(256), 1);
            return launch!(self, &functions.geglu_delta_bf16, grid, 256, 0;
                &op.gate, &op.up, &stride, &gate, &up, &op.out, &rows, &width);
        }
        let function = by_dtype("geglu", dtype, &functions.geglu_f32, &functions.geglu_bf16)?;
        // Each of the 128 threads of a block computes 16 bytes of four rows.
        let columns = 128 * 16 / dtype.size_in_bytes() as u32;
        let grid = (rows.div_ceil(4), width.div_ceil(columns), 1);
        launch!(self, function, grid, 128, 0; &op.gate, &op.up, &stride, &op.out, &rows, &width)
    }

    pub(in crate::model) fn norm_rope(&self, dtype: DType, op: NormRope) -> Result<()> {
        let functions = &self.functions;
        let (rows, stride, half) = (op.rows as u32, op.stride as u32, op.head_dim as u32 / 2);
        let (heads, kv_heads) = (op.heads as u32, op.kv_heads as u32);
        let [cos, sin, positions] = op.angles;
        let [q_norm, k_norm] = op.norms.unwrap_or([Address::NULL; 2]);
        if let Some([q, k, v]) = op.deltas {
            let values = op.values.map_or(Address::NULL, |values| values.at);
            let offset = op.values.map_or(0, |values| values.offset as u32);
            let heads_y = heads + kv_heads + if op.values.is_some() { kv_heads } else { 0 };
            let grid = (rows.div_ceil(32), heads_y, 1);
            return launch!(self, &functions.norm_rope_delta_bf16, grid, 128, 0;
                &op.x, &stride, &op.out, &stride, &heads, &kv_heads, &q_norm, &k_norm, &op.eps, &cos, &sin, &positions, &half,
                &rows, &q, &k, &v, &values, &offset);
        }
        let function = by_dtype("norm-rope", dtype, &functions.norm_rope_f32, &functions.norm_rope_bf16)?;
        let all = rows * (heads + kv_heads);
        let (grid, threads) = match dtype {
            DType::F32 => (all.div_ceil(4), 128),
            // A lane rotates eight pairs.
            _ => (all.div_ceil(256 / half.div_ceil(8).next_power_of_two()), 256),
        };
        launch!(self, function, (grid, 1, 1), threads, 0;
            &op.x, &stride, &op.out, &stride, &heads, &kv_heads, &q_norm, &k_norm, &op.eps, &cos, &sin, &positions, &half, &rows)
    }

    pub(in crate::model) fn attention(&self, dtype: DType, op: &Attention) -> Result<()> {
        const OP: &str = "packed-attention";
        let functions = &self.functions;
        let shape = AttentionShape {
            queries: op.spans.queries as u32,
            heads: op.heads as u32,
            kv_heads: op.kv_heads as u32,
            head_dim: op.head_dim as u32,
            q_stride: op.q_stride as u32,
            kv_stride: op.kv_stride as u32,
            prefix_stride: op.prefix_stride as u32,
            window: op.window.unwrap_or(0) as u32,
            scale: op.scale as f32,
            softcap: op.softcap.unwrap_or(0.0) as f32,
        };
        let (function, grid, threads, shared) = match (dtype, op.head_dim) {
            (DType::F32, 1..=256) => (&functions.attention_f32, (shape.queries, shape.heads, 1), 32, 0),
            (DType::BF16, dim @ (32 | 64 | 128 | 256)) => {
                let function = match dim {
                    32 => &functions.attention_bf16_32,
                    64 => &functions.attention_bf16_64,
                    128 => &functions.attention_bf16_128,
                    _ => &functions.attention_bf16_256,
                };
                let pairs = shape.queries * (shape.heads / shape.kv_heads);
                let grid = (pairs.div_ceil(ATTENTION_PAIRS), shape.kv_heads, 1);
                (
                    function,
                    grid,
                    ATTENTION_THREADS,
                    attention_shared_bytes(shape.head_dim),
                )
            }
            (DType::F32, dim) => bail!("{OP} supports heads of at most 256 elements, not {dim}"),
            (DType::BF16, dim) => bail!("{OP} in bf16 supports heads of {ATTENTION_HEAD_DIMS:?} elements, not {dim}"),
            (other, _) => bail!("{OP} expects f32 or bf16, found {other:?}"),
        };
        let (fields, row_of_query) = (op.spans.fields, op.spans.row_of_query);
        let [prefix_k, prefix_v] = op.prefix;
        launch!(self, function, grid, threads, shared;
            &op.q, &op.k, &op.v, &prefix_k, &prefix_v, &fields, &row_of_query, &op.out, &shape)
    }
}

/// The (query, head) pairs and the threads of a block of the bf16 attention, as in attention.cu.
const ATTENTION_PAIRS: u32 = 64;
const ATTENTION_THREADS: u32 = 128;

/// Returns the dynamic shared memory of a block of the bf16 attention, as in attention.cu.
pub(super) const fn attention_shared_bytes(head_dim: u32) -> u32 {
    320 * head_dim
}

/// The columns of a row that one warp computes, and the tokens of a block, in the norm kernels with a delta.
const DELTA_WARP_COLUMNS: u32 = 128;
const DELTA_TOKENS: u32 = 8;
/// The tokens of a block of the low-rank kernels, as in low_rank.cu.
const LOW_RANK_TOKENS: u32 = 32;
/// The threads that copy one row in `gather_rows`.
const GATHER_THREADS: u32 = 128;

/// Rows in FP8 (e4m3) with a scale each, as fp8.cu writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::model) struct Fp8Rows {
    /// (rows, width), bytes
    pub(in crate::model) codes: Address,
    /// (rows), f32
    pub(in crate::model) scales: Address,
}

/// The widest row that `geglu_fp8` and `quantise_rows_fp8` hold in the registers of a block, as in fp8.cu.
const MAX_FP8_WIDTH: usize = 32 * FP8_WARP_COLUMNS as usize;
/// The columns of a row that one warp of these kernels holds, as in fp8.cu.
const FP8_WARP_COLUMNS: u32 = 1024;

impl Kernels {
    /// Returns whether the FP8 kernels support an MLP of these sizes. cuBLAS needs rows of a multiple of 16 bytes.
    pub(in crate::model) fn support_fp8(hidden: usize, inner: usize) -> bool {
        let fit = hidden.is_multiple_of(16) && hidden <= MAX_NORM_WIDTH;
        fit && inner.is_multiple_of(16) && inner <= MAX_FP8_WIDTH
    }

    /// Computes [`Kernels::add_rms_norm`] without a delta, but writes the normed rows to `normed` in FP8.
    pub(in crate::model) fn add_rms_norm_fp8(&self, op: AddRmsNorm, normed: Fp8Rows) -> Result<()> {
        let (rows, width) = (op.rows as u32, op.width as u32);
        let post = op.post.unwrap_or(Address::NULL);
        let (grid, threads) = row_launch(rows, width);
        launch!(self, &self.functions.add_rms_norm_fp8, grid, threads, 0;
            &op.residual, &op.y, &post, &op.next, &op.sum, &normed.codes, &normed.scales, &rows, &width, &op.eps)
    }

    /// Computes [`Kernels::geglu`] without deltas, but writes the result to `out` in FP8.
    pub(in crate::model) fn geglu_fp8(&self, op: &Geglu, out: Fp8Rows) -> Result<()> {
        let (width, stride) = (op.width as u32, op.stride as u32);
        launch!(self, &self.functions.geglu_fp8, (op.rows as u32, 1, 1), 32 * width.div_ceil(FP8_WARP_COLUMNS), 0;
            &op.gate, &op.up, &stride, &out.codes, &out.scales, &width)
    }

    /// Quantises bf16 rows without gaps between them, (rows, width).
    pub(in crate::model) fn quantise_rows_fp8(
        &self,
        x: Address,
        rows: usize,
        width: usize,
        out: Fp8Rows,
    ) -> Result<()> {
        let width = width as u32;
        launch!(self, &self.functions.quantise_rows_fp8, (rows as u32, 1, 1), 32 * width.div_ceil(FP8_WARP_COLUMNS), 0;
            &x, &out.codes, &out.scales, &width)
    }
}
