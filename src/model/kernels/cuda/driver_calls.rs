//! Counts the calls of the emulated driver (`tests/gpu/emulated`), for tests that limit them.

use std::ffi::{CStr, c_char, c_int, c_ulonglong, c_void};

#[expect(unsafe_code, reason = "the functions are those of the C library")]
unsafe extern "C" {
    fn dlopen(file: *const c_char, mode: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// Binds all symbols at once, as on Linux.
const RTLD_NOW: c_int = 2;

/// Returns how often this process has called the driver to launch a kernel or a product, to allocate or free memory, or
/// to copy or fill it.
///
/// # Panics
/// Panics if the driver is not the emulated one, which alone counts its calls.
pub(crate) fn driver_calls() -> u64 {
    const LIBRARY: &CStr = c"libcuda.so.1";
    const COUNTER: &CStr = c"emulated_calls";
    #[expect(unsafe_code, reason = "only the dynamic loader knows whether the driver is emulated")]
    // SAFETY: both strings end with a null byte, `dlsym` accepts a null library, and the emulated driver declares the
    // function with this type.
    unsafe {
        let counter = dlsym(dlopen(LIBRARY.as_ptr(), RTLD_NOW), COUNTER.as_ptr());
        assert!(!counter.is_null(), "only the emulated driver counts its calls");
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_ulonglong>(counter)()
    }
}

mod tests {
    use candle_core::{DType, Device, Result, Tensor};

    use super::driver_calls;
    use crate::model::kernels::geglu;

    #[test]
    #[ignore = "only the emulated driver counts its calls; tests/gpu/emulated/checks runs this test"]
    fn driver_calls_are_counted() -> Result<()> {
        let gpu = Device::new_cuda(0)?;
        let x = Tensor::zeros((3, 8), DType::F32, &gpu)?;
        let before = driver_calls();
        // An allocation, a launch, and the end of the allocation.
        drop(geglu(&x, &x)?);
        assert_eq!(driver_calls() - before, 3);
        Ok(())
    }
}
