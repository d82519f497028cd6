//! Page-locked host memory: what a card reads and writes by itself while the CPU goes on.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, DeviceRepr, PinnedHostSlice, ValidAsZeroBits};
use candle_core::{CudaDevice, Result, Tensor};

use crate::model::transfer::held::{Held, wrap};

/// The smallest buffer: most passes fit, and page-locked memory comes in pages anyway.
const SMALLEST: usize = 1 << 14;

/// Buffers that are used again; there are as many as passes were ever under way at once.
#[derive(Debug, Default)]
pub struct Pinned {
    outgoing: BufferPool<u32>,
    incoming: Arc<BufferPool<f32>>,
}

impl Pinned {
    /// Numbers to a tensor on the card, which work given to it later finds there.
    pub fn send(&self, numbers: &[u32], device: &CudaDevice) -> Result<Tensor> {
        let stream = device.cuda_stream();
        let mut buffer = self.outgoing.take(numbers.len(), device)?;
        let host = &mut buffer.host.as_mut_slice().w()?[..numbers.len()];
        host.copy_from_slice(numbers);
        #[expect(unsafe_code, reason = "the copy writes every element before anybody reads it")]
        // SAFETY: as the reason says.
        let mut slice = unsafe { device.alloc::<u32>(numbers.len())? };
        // A plain slice, since the wrapper of a whole buffer would copy all of it; that the memory is
        // page-locked the driver knows by its address.
        stream.memcpy_htod(&*host, &mut slice).w()?;
        buffer.used_by(&stream)?;
        self.outgoing.put(buffer);
        Ok(wrap(slice, device, numbers.len()))
    }

    /// A tensor's elements, once the card has done all that it was given before.
    pub fn fetch(&self, tensor: &Tensor, device: &CudaDevice) -> Result<PinnedRead> {
        let stream = device.cuda_stream();
        let held = Held::new("fetch", tensor)?;
        let (view, count) = (held.view::<f32>()?, tensor.elem_count());
        let mut buffer = self.incoming.take(count, device)?;
        stream
            .memcpy_dtoh(&view, &mut buffer.host.as_mut_slice().w()?[..count])
            .w()?;
        buffer.used_by(&stream)?;
        Ok(PinnedRead {
            buffer: Some(buffer),
            count,
            pool: Arc::clone(&self.incoming),
        })
    }
}

/// Elements that the card will write.
#[derive(Debug)]
pub struct PinnedRead {
    /// Taken out when it goes back to its pool.
    buffer: Option<Buffer<f32>>,
    count: usize,
    pool: Arc<BufferPool<f32>>,
}

impl PinnedRead {
    pub fn is_here(&self) -> bool {
        self.buffer.as_ref().is_none_or(Buffer::is_free)
    }

    pub fn wait(mut self) -> Result<Vec<f32>> {
        let Some(buffer) = self.buffer.take() else {
            return Ok(Vec::new());
        };
        buffer.wait()?;
        let values = buffer.host.as_slice().w()?[..self.count].to_vec();
        self.pool.put(buffer);
        Ok(values)
    }
}

/// Buffers that nobody holds; the card may still be at work on them.
#[derive(Debug)]
struct BufferPool<T>(Mutex<Vec<Buffer<T>>>);

impl<T> Default for BufferPool<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: DeviceRepr + ValidAsZeroBits> BufferPool<T> {
    /// One of at least so many elements.
    fn take(&self, count: usize, device: &CudaDevice) -> Result<Buffer<T>> {
        // Events are asked for in the context of the thread.
        device.cuda_stream().context().bind_to_thread().w()?;
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |buffer: &Buffer<T>| buffer.host.len() >= count && buffer.is_free();
        match buffers.iter().position(fits) {
            Some(at) => Ok(buffers.swap_remove(at)),
            None => Buffer::new(count.next_power_of_two().max(SMALLEST), device),
        }
    }

    fn put(&self, buffer: Buffer<T>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}

#[derive(Debug)]
struct Buffer<T> {
    host: PinnedHostSlice<T>,
    /// Comes to pass when the card has no more to do with it. The slice's own event is recorded in cudarc's
    /// many-stream mode only.
    used: CudaEvent,
}

impl<T: DeviceRepr + ValidAsZeroBits> Buffer<T> {
    fn new(count: usize, device: &CudaDevice) -> Result<Self> {
        #[expect(
            unsafe_code,
            reason = "page-locked memory is unset until it is written, which is done here"
        )]
        // SAFETY: zeros are a value of `T`, and all of it is set to zero before anybody reads it.
        let host = unsafe {
            let mut host: PinnedHostSlice<T> = device.cuda_stream().context().alloc_pinned_with_flags(count, 0).w()?;
            host.as_mut_ptr().w()?.write_bytes(0, count);
            host
        };
        let context = host.context();
        let used = context.new_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)).w()?;
        Ok(Self { host, used })
    }
}

impl<T> Buffer<T> {
    /// Work that `stream` was given uses it.
    fn used_by(&self, stream: &CudaStream) -> Result<()> {
        let recorded = self.used.record(stream);
        if recorded.is_err() {
            // Nobody will know when that work is done, so it is waited for; if that fails, the card is dead.
            let _ = stream.synchronize();
        }
        recorded.w()
    }

    /// Whether the card is through with it, or nothing is to be expected of the card any more.
    fn is_free(&self) -> bool {
        !matches!(self.used.try_is_complete(), Ok(false))
    }

    fn wait(&self) -> Result<()> {
        self.used.synchronize().w()
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // The memory must outlive the card's use of it; if the card failed, there is none.
        let _ = self.wait();
    }
}
