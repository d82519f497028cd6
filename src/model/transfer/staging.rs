//! Copies large amounts of host memory to a GPU through page-locked buffers: while the GPU reads one buffer, all cores
//! fill the next one.

use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaViewMut, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaDevice, DType, Result, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::cuda_tensor::wrap;
use super::pinned::PinnedBuffer;
use super::upload::{TASK_BYTES, UploadError, is_finite};

/// The largest size of a buffer. A copy of so many bytes takes about a millisecond, far more than starting it. Tests use
/// small buffers, so that small tensors need all of them.
const BUFFER_BYTES: usize = if cfg!(test) { TASK_BYTES } else { 32 << 20 };

/// The number of buffers: one that the GPU reads, one that the cores fill, and one that is ready to be read.
const BUFFERS: usize = 3;

/// The buffers, in the order in which they are used next. They are allocated when they are first needed.
#[derive(Debug, Default)]
pub(super) struct StagingBuffers(Mutex<Vec<PinnedBuffer<u8>>>);

impl StagingBuffers {
    /// Computes [`super::upload::WeightUpload::stack`] for a GPU. The parts have as many bytes as the shape.
    pub(super) fn stack(
        &self,
        parts: &[&[u8]],
        dtype: DType,
        shape: &[usize],
        device: &CudaDevice,
    ) -> std::result::Result<Tensor, UploadError> {
        match dtype {
            DType::F16 => self.stack_typed::<f16>(parts, dtype, shape, device),
            DType::BF16 => self.stack_typed::<bf16>(parts, dtype, shape, device),
            _ => self.stack_typed::<f32>(parts, dtype, shape, device),
        }
    }

    fn stack_typed<T: CudaDType + DeviceRepr>(
        &self,
        parts: &[&[u8]],
        dtype: DType,
        shape: &[usize],
        device: &CudaDevice,
    ) -> std::result::Result<Tensor, UploadError> {
        let count = shape.iter().product::<usize>();
        let bytes = count * size_of::<T>();
        #[expect(unsafe_code, reason = "the copies write every element before anything reads it")]
        // SAFETY: the memory is uninitialised, and the parts fill all of it. Kernels that read it are queued later, and
        // if a copy fails, the memory is freed unread.
        let mut slice = unsafe { device.alloc::<T>(count)? };
        #[expect(unsafe_code, reason = "the numbers are copied as bytes")]
        // SAFETY: every bit pattern is a valid `T`.
        let view = unsafe { slice.transmute_mut::<u8>(bytes) };
        if let Some(mut view) = view {
            let mut start = 0;
            for (index, part) in parts.iter().enumerate() {
                let mut destination = view.slice_mut(start..start + part.len());
                if !self.copy(part, dtype, &mut destination, device)? {
                    return Err(UploadError::NotFinite(index));
                }
                start += part.len();
            }
        }
        Ok(wrap(slice, device, shape))
    }

    /// Queues a copy of all bytes, which have been read when this returns. Returns whether they are finite numbers of
    /// the given dtype.
    fn copy(
        &self,
        bytes: &[u8],
        dtype: DType,
        destination: &mut CudaViewMut<'_, u8>,
        device: &CudaDevice,
    ) -> Result<bool> {
        let stream = device.cuda_stream();
        // Events are created and waited for in the context that is bound to the calling thread.
        stream.context().bind_to_thread().w()?;
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, piece) in bytes.chunks(BUFFER_BYTES).enumerate() {
            let mut buffer = take(&mut buffers, piece.len(), device)?;
            let host = &mut buffer.as_mut_slice()?[..piece.len()];
            // What is checked is what is served, even if the file changes.
            let tasks = host.par_chunks_mut(TASK_BYTES).zip(piece.par_chunks(TASK_BYTES));
            let is_piece_finite = tasks.map(|(host, piece)| {
                host.copy_from_slice(piece);
                is_finite(dtype, host)
            });
            if !is_piece_finite.reduce(|| true, |left, right| left && right) {
                return Ok(false);
            }
            let start = index * BUFFER_BYTES;
            stream
                .memcpy_htod(&*host, &mut destination.slice_mut(start..start + piece.len()))
                .w()?;
            buffer.record_use(&stream)?;
            buffers.push(buffer);
        }
        Ok(true)
    }
}

/// Removes the buffer that was used longest ago and waits until the GPU has read it, or allocates one. The buffer has
/// at least `count` bytes.
fn take(buffers: &mut Vec<PinnedBuffer<u8>>, count: usize, device: &CudaDevice) -> Result<PinnedBuffer<u8>> {
    if buffers.len() == BUFFERS {
        let buffer = buffers.remove(0);
        if buffer.len() >= count {
            buffer.wait()?;
            return Ok(buffer);
        }
    }
    PinnedBuffer::new(count.next_power_of_two().clamp(TASK_BYTES, BUFFER_BYTES), device)
}
