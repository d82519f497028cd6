//! A GPU as candle and CUDA know it: opened with one queue, its memory kept, counted and given back.

use std::ffi::{CStr, c_char, c_void};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::sys::{cublasMath_t, cublasSetMathMode};
use candle_core::cuda_backend::cudarc::driver::result::{device, mem_pool};
use candle_core::cuda_backend::cudarc::driver::sys::{CUmemPool_attribute, CUmemoryPool};
use candle_core::{CudaDevice, Device, Result};

#[expect(unsafe_code, reason = "a foreign call")]
unsafe extern "C" {
    /// Of driver.c: why there is no driver; null where there is one.
    safe fn moderatord_no_driver() -> *const c_char;
}

/// Why there is no driver, if there is none.
pub(super) fn missing_driver() -> Option<String> {
    let reason = moderatord_no_driver();
    if reason.is_null() {
        return None;
    }
    #[expect(unsafe_code, reason = "a string of C")]
    // SAFETY: it is a constant, ended by zero, once the program has started.
    let reason = unsafe { CStr::from_ptr(reason) };
    Some(reason.to_string_lossy().into_owned())
}

/// Opens a card with a queue of its own that all threads share, so that what one thread gives to it comes
/// before what another gives later.
pub(super) fn open(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    let card = device.as_cuda_device()?;
    #[expect(unsafe_code, reason = "events between queues would be made for every tensor")]
    // SAFETY: there is one queue, so there is nothing to order between queues.
    unsafe {
        card.disable_event_tracking();
    }
    sum_in_f32(card)?;
    if let Some(pool) = pool(card)?
        && pool_bytes(pool, THRESHOLD)? == 0
    {
        // Until somebody says how much is worth keeping.
        set_pool_bytes(pool, THRESHOLD, u64::MAX)?;
    }
    Ok(device)
}

/// Freed memory up to here stays with this process. The driver's default is none: it would return it at every
/// wait, and map it anew for every batch.
const THRESHOLD: CUmemPool_attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;

/// Keeps so many bytes beside what is in use now, and gives back what is more.
pub(super) fn keep_memory(card: &CudaDevice, bytes: u64) -> Result<()> {
    if let Some(pool) = pool(card)? {
        let used = pool_bytes(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        set_pool_bytes(pool, THRESHOLD, used + bytes)?;
    }
    release(card)
}

/// Has matrix products in half precision add up what they computed in parts in f32, and not in half precision too.
fn sum_in_f32(card: &CudaDevice) -> Result<()> {
    let mode = cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    #[expect(unsafe_code, reason = "a foreign call")]
    // SAFETY: the handle is open as long as the device is.
    unsafe { cublasSetMathMode(*card.cublas_handle().handle(), mode) }
        .result()
        .w()
}

/// Bytes that this process could still use: what the card has free, and what it keeps unused.
pub(super) fn free_bytes(card: &CudaDevice) -> Result<u64> {
    let (free, _) = card.cuda_stream().context().mem_get_info().w()?;
    let kept = match pool(card)? {
        None => 0,
        Some(pool) => {
            let reserved = pool_bytes(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
            reserved.saturating_sub(pool_bytes(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?)
        }
    };
    Ok(free as u64 + kept)
}

/// Waits for the card and gives back what this process keeps unused: after a failure for want of memory others
/// may be in want too, and libraries take theirs from elsewhere than the pool.
pub(super) fn release(card: &CudaDevice) -> Result<()> {
    card.cuda_stream().synchronize().w()?;
    if let Some(pool) = pool(card)? {
        #[expect(unsafe_code, reason = "a foreign call")]
        // SAFETY: the pool is the device's.
        unsafe {
            mem_pool::trim_to(pool, 0).w()?;
        }
    }
    Ok(())
}

/// Bytes that tensors hold now, and the most that they held since this was asked before.
#[cfg(test)]
pub(in crate::model) fn used_bytes(card: &CudaDevice) -> Result<(u64, u64)> {
    card.cuda_stream().synchronize().w()?;
    let Some(pool) = pool(card)? else {
        candle_core::bail!("the card has no memory pool")
    };
    let now = pool_bytes(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
    let highest = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    let most = pool_bytes(pool, highest)?;
    // Zero resets it.
    set_pool_bytes(pool, highest, 0)?;
    Ok((now, most))
}

/// Where the card's memory comes from; very old ones have none.
fn pool(card: &CudaDevice) -> Result<Option<CUmemoryPool>> {
    let stream = card.cuda_stream();
    let context = stream.context();
    if !context.has_async_alloc() {
        return Ok(None);
    }
    context.bind_to_thread().w()?;
    #[expect(unsafe_code, reason = "a foreign call")]
    // SAFETY: the device is an open context's.
    let pool = unsafe { device::get_mem_pool(context.cu_device()) };
    Ok(Some(pool.w()?))
}

fn set_pool_bytes(pool: CUmemoryPool, attribute: CUmemPool_attribute, mut bytes: u64) -> Result<()> {
    #[expect(unsafe_code, reason = "a foreign call")]
    // SAFETY: the pool is the device's, and the attributes set are 64-bit numbers.
    unsafe { mem_pool::set_attribute(pool, attribute, (&raw mut bytes).cast::<c_void>()) }.w()
}

fn pool_bytes(pool: CUmemoryPool, attribute: CUmemPool_attribute) -> Result<u64> {
    let mut bytes = 0u64;
    #[expect(unsafe_code, reason = "a foreign call")]
    // SAFETY: the pool is the device's, and the attributes asked for are 64-bit numbers.
    unsafe {
        mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast::<c_void>()).w()?;
    }
    Ok(bytes)
}
