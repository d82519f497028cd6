//! Page-locked host memory, which a GPU reads and writes on its own while the CPU does other work.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, DeviceRepr, PinnedHostSlice, ValidAsZeroBits};
use candle_core::{CudaDevice, Result, Tensor};

use crate::model::transfer::cuda_tensor::{CudaTensor, wrap};

/// The smallest number of elements of a buffer. Most passes need no more, and page-locked memory is allocated in whole
/// pages anyway.
const MIN_ELEMENTS: usize = 1 << 14;

/// Reusable page-locked buffers for both directions. Their number is the largest number of passes that have ever been
/// in progress at once.
#[derive(Debug, Default)]
pub(super) struct PinnedMemory {
    uploads: IdleBuffers<u32>,
    downloads: Arc<IdleBuffers<f32>>,
}

impl PinnedMemory {
    /// Queues a copy of the numbers to the GPU and returns the tensor that work queued later can read.
    pub(super) fn upload(&self, numbers: &[u32], device: &CudaDevice) -> Result<Tensor> {
        let stream = device.cuda_stream();
        let mut buffer = self.uploads.take(numbers.len(), device)?;
        let host = &mut buffer.host.as_mut_slice().w()?[..numbers.len()];
        host.copy_from_slice(numbers);
        #[expect(unsafe_code, reason = "the copy writes every element before anything reads it")]
        // SAFETY: the memory is uninitialised, and the copy below writes all of it before any kernel reads it.
        let mut slice = unsafe { device.alloc::<u32>(numbers.len())? };
        // This copies from a plain slice because copying from a `PinnedHostSlice` always copies the whole buffer. The
        // driver recognises page-locked memory by its address.
        stream.memcpy_htod(&*host, &mut slice).w()?;
        buffer.record_use(&stream)?;
        self.uploads.put(buffer);
        Ok(wrap(slice, device, numbers.len()))
    }

    /// Queues a copy of a contiguous tensor to the host, which runs after all work that was queued before.
    pub(super) fn download(&self, tensor: &Tensor, device: &CudaDevice) -> Result<PinnedDownload> {
        let stream = device.cuda_stream();
        let source = CudaTensor::new("download", tensor)?;
        let (view, count) = (source.view::<f32>()?, tensor.elem_count());
        let mut buffer = self.downloads.take(count, device)?;
        stream
            .memcpy_dtoh(&view, &mut buffer.host.as_mut_slice().w()?[..count])
            .w()?;
        buffer.record_use(&stream)?;
        Ok(PinnedDownload {
            buffer: Some(buffer),
            count,
            idle: Arc::clone(&self.downloads),
        })
    }
}

/// A copy from the GPU that may still be in progress.
#[derive(Debug)]
pub(super) struct PinnedDownload {
    /// `None` once the buffer has been returned to `idle`.
    buffer: Option<PinnedBuffer<f32>>,
    count: usize,
    idle: Arc<IdleBuffers<f32>>,
}

impl PinnedDownload {
    pub(super) fn is_ready(&self) -> bool {
        self.buffer.as_ref().is_none_or(PinnedBuffer::is_unused)
    }

    pub(super) fn wait(mut self) -> Result<Vec<f32>> {
        let Some(buffer) = self.buffer.take() else {
            return Ok(Vec::new());
        };
        buffer.wait()?;
        let values = buffer.host.as_slice().w()?[..self.count].to_vec();
        self.idle.put(buffer);
        Ok(values)
    }
}

/// Buffers that no download owns. The GPU may still be reading some of them.
#[derive(Debug)]
struct IdleBuffers<T>(Mutex<Vec<PinnedBuffer<T>>>);

impl<T> Default for IdleBuffers<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: DeviceRepr + ValidAsZeroBits> IdleBuffers<T> {
    /// Removes a buffer with at least `count` elements that the GPU does not use, or allocates one.
    fn take(&self, count: usize, device: &CudaDevice) -> Result<PinnedBuffer<T>> {
        // Events are created and queried in the context that is bound to the calling thread.
        device.cuda_stream().context().bind_to_thread().w()?;
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |buffer: &PinnedBuffer<T>| buffer.host.len() >= count && buffer.is_unused();
        match buffers.iter().position(fits) {
            Some(index) => Ok(buffers.swap_remove(index)),
            None => PinnedBuffer::new(count.next_power_of_two().max(MIN_ELEMENTS), device),
        }
    }

    fn put(&self, buffer: PinnedBuffer<T>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}

/// One page-locked buffer, which the GPU may be reading or writing.
#[derive(Debug)]
pub(super) struct PinnedBuffer<T> {
    host: PinnedHostSlice<T>,
    /// Completes when the GPU no longer uses the buffer. `host` has an event of its own, but cudarc records it only in
    /// its multi-stream mode.
    last_use: CudaEvent,
}

impl<T: DeviceRepr + ValidAsZeroBits> PinnedBuffer<T> {
    /// Allocates a buffer of `count` zeros in the context that is bound to the calling thread.
    pub(super) fn new(count: usize, device: &CudaDevice) -> Result<Self> {
        #[expect(unsafe_code, reason = "page-locked memory is allocated uninitialised")]
        // SAFETY: all of it is set to zero before anything reads it, and zero is a valid value of `T`.
        let host = unsafe {
            let mut host: PinnedHostSlice<T> = device.cuda_stream().context().alloc_pinned_with_flags(count, 0).w()?;
            host.as_mut_ptr().w()?.write_bytes(0, count);
            host
        };
        let context = host.context();
        let last_use = context.new_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)).w()?;
        Ok(Self { host, last_use })
    }

    /// Returns the number of elements.
    pub(super) fn len(&self) -> usize {
        self.host.len()
    }

    /// Returns the elements. The GPU must have finished using them.
    pub(super) fn as_mut_slice(&mut self) -> Result<&mut [T]> {
        self.host.as_mut_slice().w()
    }
}

impl<T> PinnedBuffer<T> {
    /// Marks the buffer as used by all work that has been queued on `stream`.
    pub(super) fn record_use(&self, stream: &CudaStream) -> Result<()> {
        let recorded = self.last_use.record(stream);
        if recorded.is_err() {
            // Without the event, waiting for the whole stream is the only way to know that the work is done. If that
            // fails too, the GPU has failed and uses no memory.
            let _ = stream.synchronize();
        }
        recorded.w()
    }

    /// Returns whether the GPU has finished using the buffer, or has failed.
    fn is_unused(&self) -> bool {
        !matches!(self.last_use.try_is_complete(), Ok(false))
    }

    /// Waits until the GPU has finished using the buffer.
    pub(super) fn wait(&self) -> Result<()> {
        self.last_use.synchronize().w()
    }
}

impl<T> Drop for PinnedBuffer<T> {
    fn drop(&mut self) {
        // The memory must stay valid until the GPU has finished using it. An error means that the GPU has failed and
        // no longer uses it.
        let _ = self.wait();
    }
}
