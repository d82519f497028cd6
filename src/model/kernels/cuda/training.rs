//! Launches the kernels of a layer in training, `training.cu`, and the matrix products between them.
//!
//! Buffers are parts of a few large allocations, because an allocation costs the host as much as a launch.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::result::gemm_strided_batched_ex;
use candle_core::cuda_backend::cudarc::cublas::sys::{
    cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, LaunchArgs, LaunchConfig, PushKernelArg,
};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use half::bf16;

use super::super::training::QueriesKeysValues;
use super::super::{PackedAttention, RopeAngles};
use super::launch::Kernels;
use crate::model::transfer::cuda_tensor::{CudaTensor, wrap};

const OP: &str = "training";

/// A null pointer, for a parameter that the kernel does not read.
const NULL: u64 = 0;

/// Number of threads in a block of most kernels, as in training.cu.
const THREADS: u32 = 256;
/// Number of warps in a block of the kernels for rotation and for the gradients of keys, as in training.cu.
const ROPE_WARPS: u32 = 4;
const KEY_WARPS: u32 = 8;

/// The widest head that the kernels support, as in training.cu.
const MAX_HEAD_DIM: usize = 256;

/// The least bytes of an allocation. Most buffers of a layer are smaller.
const CHUNK_BYTES: usize = 16 << 20;
/// The boundary that parts of an allocation begin at, which is cuBLAS's preferred one.
const ALIGNMENT: usize = 256;

/// A part of an allocation.
struct Part {
    /// Keeps the allocation alive.
    _chunk: Arc<CudaSlice<u8>>,
    address: u64,
}

/// Elements in f32 on a GPU, and the same elements in bf16 if products with frozen weights need them.
pub(in crate::model) struct CudaBuffer {
    len: usize,
    wide: Part,
    half: Option<Part>,
}

impl CudaBuffer {
    fn address(&self) -> u64 {
        self.wide.address
    }

    /// Returns the address of the elements in bf16, or null.
    fn half(&self) -> u64 {
        self.half.as_ref().map_or(NULL, |half| half.address)
    }
}

/// A factor of a product: its address, and the row length of the matrix that lies there.
#[derive(Clone, Copy)]
struct Operand {
    address: u64,
    row: usize,
    is_transposed: bool,
}

impl Operand {
    fn new(address: u64, row: usize) -> Self {
        Self {
            address,
            row,
            is_transposed: false,
        }
    }

    fn transposed(self) -> Self {
        Self {
            is_transposed: !self.is_transposed,
            ..self
        }
    }

    fn operation(self) -> cublasOperation_t {
        match self.is_transposed {
            true => cublasOperation_t::CUBLAS_OP_T,
            false => cublasOperation_t::CUBLAS_OP_N,
        }
    }
}

/// A product `alpha a b + beta c`, for `c` of (rows, columns), row by row.
struct Product {
    rows: usize,
    columns: usize,
    inner: usize,
    /// Whether the factors are bf16 instead of f32. The result is f32.
    is_half: bool,
    alpha: f32,
    beta: f32,
}

/// The current allocation, and how many of its bytes are in use.
#[derive(Default)]
struct Chunk {
    memory: Option<Arc<CudaSlice<u8>>>,
    used: usize,
}

/// Launches the kernels of training on one device.
pub(in crate::model) struct TrainingKernels {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    /// Whether frozen weights are bf16.
    is_half: bool,
    chunk: RefCell<Chunk>,
    kernels: Arc<Kernels>,
}

/// Launches a kernel with arguments, which are numbers and addresses.
macro_rules! launch {
    ($self:ident, $kernel:ident, $grid:expr, $threads:expr, $($argument:expr),+) => {{
        let mut builder = $self.stream.launch_builder(&$self.kernels.functions.$kernel);
        $(
            let argument = $argument;
            builder.arg(&argument);
        )+
        launch(builder, $grid, $threads)
    }};
}

/// Launches a kernel whose arguments have been given.
pub(super) fn launch(mut builder: LaunchArgs<'_>, (x, y): (u32, u32), threads: u32) -> Result<()> {
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

/// Converts a count to the type that the kernels take; `op` names the operation in errors.
pub(super) fn count(op: &str, value: usize) -> Result<u32> {
    match u32::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => bail!("{op} got {value} elements, expected fewer than 2^32"),
    }
}

/// Returns the address of a contiguous tensor on the GPU.
///
/// The caller keeps the tensor until the work that reads it is queued. Memory is freed in the order of the queue.
pub(super) fn address_of<T: candle_core::cuda_backend::CudaDType>(device: &CudaDevice, x: &Tensor) -> Result<u64> {
    let held = CudaTensor::new(OP, x)?;
    let view = held.view::<T>()?;
    let stream = device.cuda_stream();
    let (address, _) = view.device_ptr(&stream);
    Ok(address)
}

impl TrainingKernels {
    /// Prepares kernels for frozen weights of this dtype: f32 or bf16.
    pub(in crate::model) fn new(device: &CudaDevice, dtype: DType) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            stream: device.cuda_stream(),
            is_half: dtype == DType::BF16,
            chunk: RefCell::default(),
            kernels: Kernels::of(device)?,
        })
    }

    /// Returns uninitialised memory.
    fn part(&self, bytes: usize) -> Result<Part> {
        let mut chunk = self.chunk.borrow_mut();
        let bytes = bytes.next_multiple_of(ALIGNMENT);
        let memory = match &chunk.memory {
            Some(memory) if chunk.used + bytes <= memory.len() => Arc::clone(memory),
            _ => {
                #[expect(unsafe_code, reason = "clearing the memory first takes time")]
                // SAFETY: kernels and products write the elements of a buffer before others read them.
                let memory = Arc::new(unsafe { self.device.alloc::<u8>(bytes.max(CHUNK_BYTES))? });
                // A large buffer does not end the use of the current allocation.
                if bytes < CHUNK_BYTES {
                    *chunk = Chunk {
                        memory: Some(Arc::clone(&memory)),
                        used: 0,
                    };
                } else {
                    let address = memory.device_ptr(&self.stream).0;
                    return Ok(Part {
                        _chunk: memory,
                        address,
                    });
                }
                memory
            }
        };
        let address = memory.device_ptr(&self.stream).0 + chunk.used as u64;
        chunk.used += bytes;
        Ok(Part {
            _chunk: memory,
            address,
        })
    }

    /// Returns the bytes of f32 that a pass may use to keep what the gradients of layers need: a sixteenth of the GPU's
    /// memory, which leaves room for the weights on every card, or a quarter of what is free, if a daemon uses the card
    /// too.
    pub(in crate::model) fn bytes_to_keep(&self) -> Result<usize> {
        let (free, total) = self.stream.context().mem_get_info().w()?;
        let room = (total / 16).min(free / 4);
        // A factor takes six bytes for each element if weights are bf16.
        Ok(if self.is_half { room * 2 / 3 } else { room })
    }

    /// Returns a buffer of `len` elements with unspecified values. A factor also holds them in the dtype of the weights.
    pub(in crate::model) fn buffer(&self, len: usize, is_factor: bool) -> Result<CudaBuffer> {
        let half = match is_factor && self.is_half {
            true => Some(self.part(len * size_of::<bf16>())?),
            false => None,
        };
        Ok(CudaBuffer {
            len,
            wide: self.part(len * size_of::<f32>())?,
            half,
        })
    }

    /// Returns a factor with the elements of a tensor of f32.
    pub(in crate::model) fn copy_of(&self, x: &Tensor) -> Result<CudaBuffer> {
        let elements = count(OP, x.elem_count())?;
        let out = self.buffer(x.elem_count(), true)?;
        let from = address_of::<f32>(&self.device, x)?;
        launch!(
            self,
            training_copy,
            blocks(elements),
            THREADS,
            from,
            out.address(),
            out.half(),
            elements
        )?;
        Ok(out)
    }

    /// Copies a buffer into a tensor of rows of `width` elements.
    pub(in crate::model) fn to_tensor(&self, x: &CudaBuffer, width: usize) -> Result<Tensor> {
        let elements = count(OP, x.len)?;
        let (tensor, address) = self.tensor(x.len / width, width)?;
        launch!(
            self,
            training_copy,
            blocks(elements),
            THREADS,
            x.address(),
            address,
            NULL,
            elements
        )?;
        Ok(tensor)
    }

    /// Returns a tensor of f32 that the caller fills, and its address.
    fn tensor(&self, rows: usize, width: usize) -> Result<(Tensor, u64)> {
        #[expect(unsafe_code, reason = "clearing the memory first takes time")]
        // SAFETY: the callers write every element before others read it.
        let slice = unsafe { self.device.alloc::<f32>(rows * width)? };
        let address = slice.device_ptr(&self.stream).0;
        Ok((wrap(slice, &self.device, (rows, width)), address))
    }

    /// Queues a product and writes its result at address `c`. `a` is (rows, inner) and `b` (inner, columns).
    fn multiply(&self, product: &Product, a: Operand, b: Operand, c: u64) -> Result<()> {
        let size = |value: usize| match i32::try_from(value) {
            Ok(value) => Ok(value),
            Err(_) => bail!("{OP} got a matrix with {value} rows or columns, expected fewer than 2^31"),
        };
        let dtype = match product.is_half {
            true => cudaDataType_t::CUDA_R_16BF,
            false => cudaDataType_t::CUDA_R_32F,
        };
        let blas = self.device.cublas_handle();
        #[expect(unsafe_code, reason = "the compiler cannot check the arguments of a product")]
        // SAFETY: the callers give the sizes of the matrices at these addresses. cuBLAS expects columns where we have
        // rows, and thus computes the transposed product from its factors in the opposite order.
        unsafe {
            gemm_strided_batched_ex(
                *blas.handle(),
                b.operation(),
                a.operation(),
                size(product.columns)?,
                size(product.rows)?,
                size(product.inner)?,
                (&raw const product.alpha).cast(),
                b.address as *const _,
                dtype,
                size(b.row)?,
                0,
                a.address as *const _,
                dtype,
                size(a.row)?,
                0,
                (&raw const product.beta).cast(),
                c as *mut _,
                cudaDataType_t::CUDA_R_32F,
                size(product.columns)?,
                0,
                1,
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        }
        .w()
    }

    /// Returns the address of a frozen weight in the dtype of the weights.
    fn weight(&self, weight: &Tensor) -> Result<u64> {
        match self.is_half {
            true => address_of::<bf16>(&self.device, weight),
            false => address_of::<f32>(&self.device, weight),
        }
    }

    /// Returns the address of a factor in the dtype of the weights.
    fn factor(&self, x: &CudaBuffer) -> Result<u64> {
        match (&x.half, self.is_half) {
            (Some(half), true) => Ok(half.address),
            (_, false) => Ok(x.address()),
            (None, true) => bail!("{OP} got a factor without elements in bf16"),
        }
    }

    /// Writes `y = x W'` for a weight of (outputs, inputs).
    pub(in crate::model) fn frozen(&self, weight: &Tensor, x: &CudaBuffer, y: &mut CudaBuffer) -> Result<()> {
        let (outputs, inputs) = weight.dims2()?;
        let rows = rows_of(x, inputs, y, outputs)?;
        let product = Product {
            rows,
            columns: outputs,
            inner: inputs,
            is_half: self.is_half,
            alpha: 1.0,
            beta: 0.0,
        };
        let weight = Operand::new(self.weight(weight)?, inputs).transposed();
        self.multiply(&product, Operand::new(self.factor(x)?, inputs), weight, y.address())
    }

    /// Writes `dx = dy W + beta dx`.
    pub(in crate::model) fn frozen_backward(
        &self,
        weight: &Tensor,
        gradient: &CudaBuffer,
        beta: f32,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        let (outputs, inputs) = weight.dims2()?;
        let rows = rows_of(gradient, outputs, out, inputs)?;
        let product = Product {
            rows,
            columns: inputs,
            inner: outputs,
            is_half: self.is_half,
            alpha: 1.0,
            beta,
        };
        let weight = Operand::new(self.weight(weight)?, inputs);
        let gradient = Operand::new(self.factor(gradient)?, outputs);
        self.multiply(&product, gradient, weight, out.address())
    }

    /// Writes `low = x A'`, and adds `scale low B'` to `y`.
    pub(in crate::model) fn delta(
        &self,
        delta: &Delta<'_>,
        x: &CudaBuffer,
        low: &mut CudaBuffer,
        y: &mut CudaBuffer,
    ) -> Result<()> {
        let sizes = delta.sizes(x, y, low)?;
        let a = Operand::new(address_of::<f32>(&self.device, delta.a)?, sizes.inputs);
        let b = Operand::new(address_of::<f32>(&self.device, delta.b)?, sizes.rank);
        let input = Operand::new(x.address(), sizes.inputs);
        let product = sizes.product([sizes.rows, sizes.rank, sizes.inputs], 1.0, 0.0);
        self.multiply(&product, input, a.transposed(), low.address())?;
        let product = sizes.product([sizes.rows, sizes.outputs, sizes.rank], delta.scale, 1.0);
        let low = Operand::new(low.address(), sizes.rank);
        self.multiply(&product, low, b.transposed(), y.address())
    }

    /// Writes `d_low = scale dy B`, adds `d_low A` to `out` if there is one, and returns the gradients of A, `d_low' x`,
    /// and B, `scale dy' low`.
    pub(in crate::model) fn delta_backward(
        &self,
        delta: &Delta<'_>,
        [x, low, gradient]: [&CudaBuffer; 3],
        d_low: &mut CudaBuffer,
        out: Option<&mut CudaBuffer>,
    ) -> Result<(Tensor, Tensor)> {
        let sizes = delta.sizes(x, gradient, low)?;
        let Sizes {
            rows,
            rank,
            inputs,
            outputs,
        } = sizes;
        let a = Operand::new(address_of::<f32>(&self.device, delta.a)?, inputs);
        let b = Operand::new(address_of::<f32>(&self.device, delta.b)?, rank);
        let gradient = Operand::new(gradient.address(), outputs);
        self.multiply(
            &sizes.product([rows, rank, outputs], delta.scale, 0.0),
            gradient,
            b,
            d_low.address(),
        )?;
        let d_low = Operand::new(d_low.address(), rank);
        if let Some(out) = out {
            self.multiply(&sizes.product([rows, inputs, rank], 1.0, 1.0), d_low, a, out.address())?;
        }
        let (d_a, address) = self.tensor(rank, inputs)?;
        let x = Operand::new(x.address(), inputs);
        self.multiply(
            &sizes.product([rank, inputs, rows], 1.0, 0.0),
            d_low.transposed(),
            x,
            address,
        )?;
        let (d_b, address) = self.tensor(outputs, rank)?;
        let low = Operand::new(low.address(), rank);
        self.multiply(
            &sizes.product([outputs, rank, rows], delta.scale, 0.0),
            gradient.transposed(),
            low,
            address,
        )?;
        Ok((d_a, d_b))
    }

    /// Computes [`super::super::training::rms_norm`].
    pub(in crate::model) fn rms_norm(
        &self,
        x: &CudaBuffer,
        weight: &Tensor,
        eps: f64,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        let (rows, width) = (rows_of(x, weight.dim(0)?, out, weight.dim(0)?)?, weight.dim(0)?);
        launch!(
            self,
            training_rms_norm,
            (count(OP, rows)?, 1),
            THREADS,
            x.address(),
            address_of::<f32>(&self.device, weight)?,
            out.address(),
            out.half(),
            count(OP, width)?,
            eps as f32
        )
    }

    /// Computes [`super::super::training::add_norm`], for rows of `width` elements.
    pub(in crate::model) fn add_norm(
        &self,
        [residual, y]: [&CudaBuffer; 2],
        post: Option<&Tensor>,
        eps: f64,
        width: usize,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        let rows = rows_of(y, width, out, width)?;
        if residual.len != y.len || post.is_some_and(|post| post.dims() != [width]) {
            bail!("{OP} cannot add {} elements to {}", y.len, residual.len);
        }
        let post = match post {
            Some(post) => address_of::<f32>(&self.device, post)?,
            None => NULL,
        };
        launch!(
            self,
            training_add_norm,
            (count(OP, rows)?, 1),
            THREADS,
            residual.address(),
            y.address(),
            post,
            out.address(),
            count(OP, width)?,
            eps as f32
        )
    }

    /// Computes [`super::super::training::rms_norm_backward`].
    pub(in crate::model) fn rms_norm_backward(
        &self,
        [x, gradient]: [&CudaBuffer; 2],
        weight: &Tensor,
        eps: f64,
        residual: Option<&CudaBuffer>,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        let width = weight.dim(0)?;
        let rows = rows_of(x, width, out, width)?;
        if gradient.len != x.len || residual.is_some_and(|residual| residual.len != x.len) {
            bail!("{OP} got a gradient of {} elements for {}", gradient.len, x.len);
        }
        launch!(
            self,
            training_rms_norm_backward,
            (count(OP, rows)?, 1),
            THREADS,
            x.address(),
            address_of::<f32>(&self.device, weight)?,
            gradient.address(),
            residual.map_or(NULL, CudaBuffer::address),
            out.address(),
            out.half(),
            count(OP, width)?,
            eps as f32
        )
    }

    /// Computes [`super::super::training::geglu`].
    pub(in crate::model) fn geglu(&self, gate: &CudaBuffer, up: &CudaBuffer, out: &mut CudaBuffer) -> Result<()> {
        let elements = same_len([gate, up, out])?;
        launch!(
            self,
            training_geglu,
            blocks(elements),
            THREADS,
            gate.address(),
            up.address(),
            out.address(),
            out.half(),
            elements
        )
    }

    /// Computes [`super::super::training::geglu_backward`].
    pub(in crate::model) fn geglu_backward(
        &self,
        gate: &mut CudaBuffer,
        up: &mut CudaBuffer,
        gradient: &CudaBuffer,
    ) -> Result<()> {
        let elements = same_len([gate, up, gradient])?;
        launch!(
            self,
            training_geglu_backward,
            blocks(elements),
            THREADS,
            gate.address(),
            gate.half(),
            up.address(),
            up.half(),
            gradient.address(),
            elements
        )
    }

    /// Computes [`super::super::training::norm_rope`].
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

    /// Computes [`super::super::training::norm_rope_backward`].
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

    /// Computes [`PackedAttention::forward_rows`], and writes the logarithms of the sums of the exponentials of the
    /// scores: (queries * heads).
    pub(in crate::model) fn attention(
        &self,
        attention: &PackedAttention<'_>,
        inputs: &QueriesKeysValues<&CudaBuffer>,
        prefix: usize,
        log_sums: &mut CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        let rows = Rows::new(&self.device, attention, inputs, prefix)?;
        same_len([inputs.q, out])?;
        rows.check_pairs(log_sums)?;
        launch!(
            self,
            training_attention,
            (rows.queries, rows.shape.heads),
            32,
            inputs.q.address(),
            inputs.k.address(),
            inputs.v.address(),
            rows.spans,
            rows.span_of,
            out.address(),
            out.half(),
            log_sums.address(),
            rows.shape
        )
    }

    /// Computes [`super::super::training::attention_backward`], given what [`TrainingKernels::attention`] wrote. `along`
    /// is space of the size of `log_sums`.
    pub(in crate::model) fn attention_backward(
        &self,
        attention: &PackedAttention<'_>,
        inputs: &QueriesKeysValues<&CudaBuffer>,
        prefix: usize,
        [output, log_sums, gradient]: [&CudaBuffer; 3],
        along: &mut CudaBuffer,
        out: QueriesKeysValues<&mut CudaBuffer>,
    ) -> Result<()> {
        let rows = Rows::new(&self.device, attention, inputs, prefix)?;
        same_len([inputs.q, output, gradient, out.q])?;
        same_len([inputs.k, out.k, out.v])?;
        rows.check_pairs(log_sums)?;
        rows.check_pairs(along)?;
        launch!(
            self,
            training_attention_queries,
            (rows.queries, rows.shape.heads),
            32,
            inputs.q.address(),
            inputs.k.address(),
            inputs.v.address(),
            output.address(),
            gradient.address(),
            log_sums.address(),
            rows.spans,
            rows.span_of,
            out.q.address(),
            along.address(),
            rows.shape
        )?;
        launch!(
            self,
            training_attention_keys,
            (rows.keys, rows.shape.kv_heads),
            KEY_WARPS * 32,
            inputs.q.address(),
            inputs.k.address(),
            inputs.v.address(),
            gradient.address(),
            log_sums.address(),
            along.address(),
            rows.spans,
            count(OP, attention.spans.len())?,
            count(OP, prefix)?,
            out.k.address(),
            out.v.address(),
            out.v.half(),
            rows.shape
        )
    }

    /// Writes the rows of `x` at these indices, (rows) of u32, whose values the caller has checked.
    pub(in crate::model) fn select(&self, x: &CudaBuffer, indices: &Tensor, out: &mut CudaBuffer) -> Result<()> {
        let (rows, width) = indexed_rows(indices, out)?;
        launch!(
            self,
            training_select,
            (rows, 1),
            THREADS,
            x.address(),
            address_of::<u32>(&self.device, indices)?,
            out.address(),
            out.half(),
            width
        )
    }

    /// Adds rows to those of `out` at these distinct indices, (rows) of u32, whose values the caller has checked.
    pub(in crate::model) fn add_at(&self, x: &CudaBuffer, indices: &Tensor, out: &mut CudaBuffer) -> Result<()> {
        let (rows, width) = indexed_rows(indices, x)?;
        launch!(
            self,
            training_add_at,
            (rows, 1),
            THREADS,
            x.address(),
            address_of::<u32>(&self.device, indices)?,
            out.address(),
            out.half(),
            width
        )
    }
}

/// A delta in training: A is (rank, inputs) and B (outputs, rank).
pub(in crate::model) struct Delta<'a> {
    pub(in crate::model) a: &'a Tensor,
    pub(in crate::model) b: &'a Tensor,
    pub(in crate::model) scale: f32,
}

/// The sizes of the products of a delta.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    rank: usize,
    inputs: usize,
    outputs: usize,
}

impl Delta<'_> {
    fn sizes(&self, x: &CudaBuffer, y: &CudaBuffer, low: &CudaBuffer) -> Result<Sizes> {
        let ((rank, inputs), (outputs, b_rank)) = (self.a.dims2()?, self.b.dims2()?);
        let rows = rows_of(x, inputs, y, outputs)?;
        if rank != b_rank || low.len < rows * rank {
            bail!(
                "{OP} got a delta of ranks {rank} and {b_rank} and space for {} elements",
                low.len
            );
        }
        Ok(Sizes {
            rows,
            rank,
            inputs,
            outputs,
        })
    }
}

impl Sizes {
    /// Returns a product in f32 with these numbers of rows, columns and summands.
    fn product(&self, [rows, columns, inner]: [usize; 3], alpha: f32, beta: f32) -> Product {
        Product {
            rows,
            columns,
            inner,
            is_half: false,
            alpha,
            beta,
        }
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

/// The parameter of the attention kernels, with the same fields as in training.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct TrainingAttention {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    window: u32,
    scale: f32,
    softcap: f32,
}

#[expect(unsafe_code, reason = "cudarc passes only types with this trait to a kernel")]
// SAFETY: the fields are plain numbers in C's layout, as training.cu declares them.
unsafe impl candle_core::cuda_backend::cudarc::driver::DeviceRepr for TrainingAttention {}

/// The arguments of attention.
struct Rows {
    spans: u64,
    span_of: u64,
    queries: u32,
    keys: u32,
    shape: TrainingAttention,
}

impl Rows {
    fn new(
        device: &CudaDevice,
        attention: &PackedAttention<'_>,
        inputs: &QueriesKeysValues<&CudaBuffer>,
        prefix: usize,
    ) -> Result<Self> {
        let Some(spans) = &attention.spans.device else {
            bail!("{OP} on a GPU expects spans in GPU memory")
        };
        let (width, kv_width) = (
            attention.heads * attention.head_dim,
            attention.kv_heads * attention.head_dim,
        );
        let shape = |x: &CudaBuffer, width: usize| [x.len / width, width];
        let [q, k, v] = [
            shape(inputs.q, width),
            shape(inputs.k, kv_width),
            shape(inputs.v, kv_width),
        ];
        attention.check(&q, &k, &v, prefix)?;
        if attention.head_dim > MAX_HEAD_DIM || prefix > k[0] {
            bail!(
                "{OP} supports heads of at most {MAX_HEAD_DIM} elements, not {}",
                attention.head_dim
            );
        }
        Ok(Self {
            spans: address_of::<u32>(device, &spans.fields)?,
            span_of: address_of::<u32>(device, &spans.row_of_query)?,
            queries: count(OP, q[0])?,
            keys: count(OP, k[0])?,
            shape: TrainingAttention {
                heads: count(OP, attention.heads)?,
                kv_heads: count(OP, attention.kv_heads)?,
                head_dim: count(OP, attention.head_dim)?,
                window: count(OP, attention.window.unwrap_or(0))?,
                scale: attention.scale as f32,
                softcap: attention.softcap.unwrap_or(0.0) as f32,
            },
        })
    }

    /// Returns an error unless `x` has an element for each query and head.
    fn check_pairs(&self, x: &CudaBuffer) -> Result<()> {
        if x.len != self.queries as usize * self.shape.heads as usize {
            bail!("{OP} got {} sums for {} queries", x.len, self.queries);
        }
        Ok(())
    }
}

/// Returns the number of rows of two buffers, or an error unless it is the same for these widths.
fn rows_of(x: &CudaBuffer, width: usize, y: &CudaBuffer, y_width: usize) -> Result<usize> {
    let rows = x.len.checked_div(width).unwrap_or_default();
    if rows * width != x.len || rows * y_width != y.len {
        bail!(
            "{OP} got {} and {} elements for rows of {width} and {y_width}",
            x.len,
            y.len
        );
    }
    Ok(rows)
}

/// Returns the number of elements of buffers, or an error unless it is the same.
fn same_len<const COUNT: usize>(buffers: [&CudaBuffer; COUNT]) -> Result<u32> {
    let lens = buffers.map(|buffer| buffer.len);
    if lens.iter().any(|len| *len != lens[0]) {
        bail!("{OP} got buffers of {lens:?} elements, expected the same length");
    }
    count(OP, lens[0])
}

/// Returns the number of indices, and the width of the rows in `x` that there is one for.
fn indexed_rows(indices: &Tensor, x: &CudaBuffer) -> Result<(u32, u32)> {
    let rows = indices.dim(0)?;
    if rows == 0 || !x.len.is_multiple_of(rows) {
        bail!("{OP} got {rows} indices for {} elements", x.len);
    }
    Ok((count(OP, rows)?, count(OP, x.len / rows)?))
}

/// Returns the grid of a kernel whose threads compute one element at a time, about four each.
fn blocks(elements: u32) -> (u32, u32) {
    (elements.div_ceil(THREADS * 4).max(1), 1)
}
