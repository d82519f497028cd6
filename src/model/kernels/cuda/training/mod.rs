//! Launches the kernels of a layer in training, `training.cu`, and the matrix products between them.
//!
//! Buffers are parts of a few large allocations, because an allocation costs the host as much as a launch.

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

mod attention;
mod products;
mod rotation;

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, LaunchArgs, LaunchConfig, PushKernelArg,
};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use half::bf16;

use super::launch::Kernels;
use crate::model::transfer::cuda_tensor::{CudaTensor, wrap};

pub(in crate::model) use self::products::Delta;

const OP: &str = "training";

/// A null pointer, for a parameter that the kernel does not read.
const NULL: u64 = 0;

/// Number of threads in a block of most kernels, as in training.cu.
const THREADS: u32 = 256;

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

    /// Computes [`crate::model::kernels::training::rms_norm`].
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

    /// Computes [`crate::model::kernels::training::add_norm`], for rows of `width` elements.
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

    /// Computes [`crate::model::kernels::training::rms_norm_backward`].
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

    /// Computes [`crate::model::kernels::training::geglu`].
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

    /// Computes [`crate::model::kernels::training::geglu_backward`].
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
