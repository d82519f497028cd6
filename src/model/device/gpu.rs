//! One GPU as candle and CUDA see it: opening it with a single stream, and managing its memory pool.

use std::ffi::{CStr, c_char, c_void};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::sys::{cublasHandle_t, cublasMath_t, cublasSetMathMode};
use candle_core::cuda_backend::cudarc::driver::result::{device, mem_pool};
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUDA_VERSION, CUmemPool_attribute, CUmemoryPool, cuDriverGetVersion,
};
use candle_core::{CudaDevice, Device, Result};

#[expect(unsafe_code, reason = "a foreign call")]
unsafe extern "C" {
    /// Defined in driver.c. Returns why the driver could not be loaded, or null if it was.
    safe fn moderatord_no_driver() -> *const c_char;
}

/// Returns why NVIDIA's driver could not be loaded, or `None` if it was.
pub(super) fn driver_load_error() -> Option<String> {
    let reason = moderatord_no_driver();
    if reason.is_null() {
        return None;
    }
    #[expect(unsafe_code, reason = "reads a C string")]
    // SAFETY: the pointer refers to a string that ends with a zero byte and does not change after the program has
    // started.
    let reason = unsafe { CStr::from_ptr(reason) };
    Some(reason.to_string_lossy().into_owned())
}

/// The version of CUDA that this binary was built for, such as 13000 for 13.0.
const BUILT_FOR: u32 = CUDA_VERSION;

/// Returns why NVIDIA's driver cannot run this binary, or `None` if it may.
///
/// A driver runs what was built with any toolkit of its own CUDA major version or of an earlier one. PTX and newer
/// functions are exceptions, for which [`versions`] explains a failure.
pub(super) fn driver_is_too_old() -> Option<String> {
    let supported = driver_version()?;
    (supported / 1000 < BUILT_FOR / 1000).then(|| format!("needs a newer driver: {}", versions()))
}

/// Returns the CUDA versions of the driver and of this binary, for a message.
pub(super) fn versions() -> String {
    describe_versions(driver_version(), BUILT_FOR)
}

/// Returns the newest version of CUDA that the driver supports, or `None` if it does not tell.
fn driver_version() -> Option<u32> {
    let mut version = 0;
    #[expect(unsafe_code, reason = "a foreign call")]
    // SAFETY: the driver writes a number to the address.
    let result = unsafe { cuDriverGetVersion(&raw mut version) };
    result.result().ok().and_then(|()| u32::try_from(version).ok())
}

fn describe_versions(driver: Option<u32>, built_for: u32) -> String {
    // CUDA writes 12.4 as 12040.
    let text = |version: u32| format!("CUDA {}.{}", version / 1000, version % 1000 / 10);
    let supported = driver.map_or_else(|| "an unknown version of CUDA".to_owned(), text);
    format!(
        "the driver supports {supported}, and this binary was built for {}",
        text(built_for)
    )
}

/// Opens a GPU with one stream that all threads share, so that work runs in the order in which threads queue it.
pub(super) fn open(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    let gpu = device.as_cuda_device()?;
    #[expect(unsafe_code, reason = "avoids an event for every tensor")]
    // SAFETY: there is only one stream, so no events are needed to order work between streams.
    unsafe {
        gpu.disable_event_tracking();
    }
    sum_in_f32(*gpu.cublas_handle().handle())?;
    if let Some(pool) = pool(gpu)?
        && pool_bytes(pool, THRESHOLD)? == 0
    {
        // Keeps all freed memory until `retain_freed_memory` sets a limit.
        set_pool_bytes(pool, THRESHOLD, u64::MAX)?;
    }
    Ok(device)
}

/// The amount of memory that the pool keeps when tensors are freed. The driver's default is zero, so that it would
/// return memory at every synchronisation and map it again for every batch.
const THRESHOLD: CUmemPool_attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;

/// See [`retain_freed_memory`](super::retain_freed_memory).
pub(super) fn retain_freed_memory(gpu: &CudaDevice, bytes: u64) -> Result<()> {
    if let Some(pool) = pool(gpu)? {
        let used = pool_bytes(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        set_pool_bytes(pool, THRESHOLD, used + bytes)?;
    }
    release_unused_memory(gpu)
}

/// Makes cuBLAS add up partial results of half-precision products in f32 instead of half precision.
pub(in crate::model) fn sum_in_f32(handle: cublasHandle_t) -> Result<()> {
    let mode = cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    #[expect(unsafe_code, reason = "a foreign call")]
    // SAFETY: the caller's handle is open.
    unsafe { cublasSetMathMode(handle, mode) }.result().w()
}

/// Returns the bytes that this process can still allocate: the GPU's free memory plus what the pool holds unused.
pub(super) fn free_bytes(gpu: &CudaDevice) -> Result<u64> {
    let (free, _) = gpu.cuda_stream().context().mem_get_info().w()?;
    let unused = match pool(gpu)? {
        None => 0,
        Some(pool) => {
            let reserved = pool_bytes(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
            reserved.saturating_sub(pool_bytes(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?)
        }
    };
    Ok(free as u64 + unused)
}

/// See [`release_unused_memory`](super::release_unused_memory).
pub(super) fn release_unused_memory(gpu: &CudaDevice) -> Result<()> {
    gpu.cuda_stream().synchronize().w()?;
    if let Some(pool) = pool(gpu)? {
        #[expect(unsafe_code, reason = "a foreign call")]
        // SAFETY: the pool belongs to the device.
        unsafe {
            mem_pool::trim_to(pool, 0).w()?;
        }
    }
    Ok(())
}

/// Returns the bytes that tensors use now, and the maximum since the previous call.
#[cfg(test)]
pub(crate) fn used_bytes(gpu: &CudaDevice) -> Result<(u64, u64)> {
    gpu.cuda_stream().synchronize().w()?;
    let Some(pool) = pool(gpu)? else {
        candle_core::bail!("the GPU has no memory pool")
    };
    let now = pool_bytes(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
    let high_watermark = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    let maximum = pool_bytes(pool, high_watermark)?;
    // Writing zero resets the maximum.
    set_pool_bytes(pool, high_watermark, 0)?;
    Ok((now, maximum))
}

/// Returns the pool from which tensors are allocated. Very old GPUs have none.
fn pool(gpu: &CudaDevice) -> Result<Option<CUmemoryPool>> {
    let stream = gpu.cuda_stream();
    let context = stream.context();
    if !context.has_async_alloc() {
        return Ok(None);
    }
    context.bind_to_thread().w()?;
    #[expect(unsafe_code, reason = "a foreign call")]
    // SAFETY: the device belongs to an open context.
    let pool = unsafe { device::get_mem_pool(context.cu_device()) };
    Ok(Some(pool.w()?))
}

fn set_pool_bytes(pool: CUmemoryPool, attribute: CUmemPool_attribute, mut bytes: u64) -> Result<()> {
    #[expect(unsafe_code, reason = "a foreign call")]
    // SAFETY: the pool belongs to the device, and every attribute that is set here is a 64-bit number.
    unsafe { mem_pool::set_attribute(pool, attribute, (&raw mut bytes).cast::<c_void>()) }.w()
}

fn pool_bytes(pool: CUmemoryPool, attribute: CUmemPool_attribute) -> Result<u64> {
    let mut bytes = 0u64;
    #[expect(unsafe_code, reason = "a foreign call")]
    // SAFETY: the pool belongs to the device, and every attribute that is read here is a 64-bit number.
    unsafe {
        mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast::<c_void>()).w()?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_named_as_cuda_writes_them() {
        let text = describe_versions(Some(12_080), 13_000);
        assert_eq!(
            text,
            "the driver supports CUDA 12.8, and this binary was built for CUDA 13.0"
        );
        let text = describe_versions(None, 12_040);
        assert_eq!(
            text,
            "the driver supports an unknown version of CUDA, and this binary was built for CUDA 12.4"
        );
    }
}
