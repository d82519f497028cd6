//! A compiled source of this folder, loaded onto one GPU.

use std::fmt;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{CudaDevice, Result};

/// The dynamic shared memory with which every kernel may be launched.
const DEFAULT_SHARED_BYTES: i32 = 48 << 10;

/// The kernels of one fat binary, in the memory of one GPU. The driver takes the machine code for the GPU from the fat
/// binary, or compiles the PTX in it if there is none.
pub(super) struct Module {
    context: Arc<CudaContext>,
    module: Arc<CudaModule>,
}

impl Module {
    /// Loads a fat binary, which the driver copies.
    ///
    /// # Errors
    /// Returns an error if there is neither machine code nor PTX for the GPU, if the driver is too old for the PTX, or
    /// if the GPU has too little memory.
    pub(super) fn load(device: &CudaDevice, image: &[u8]) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        Ok(Self {
            context: Arc::clone(context),
            module: context.load_module(Ptx::from_binary(image.to_vec())).w()?,
        })
    }

    /// Returns the kernel with the given name, which may be launched with up to `shared_bytes` of dynamic shared memory.
    /// It keeps the module loaded.
    ///
    /// # Errors
    /// Returns an error if the module does not contain the kernel, or if the GPU has less shared memory for a block.
    pub(super) fn function(&self, name: &str, shared_bytes: i32) -> Result<CudaFunction> {
        self.context.bind_to_thread().w()?;
        let function = self.module.load_function(name).w()?;
        if shared_bytes > DEFAULT_SHARED_BYTES {
            let limit = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(limit, shared_bytes).w()?;
        }
        Ok(function)
    }
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Module").field("gpu", &self.context.ordinal()).finish()
    }
}
