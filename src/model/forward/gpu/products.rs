//! Matrix products with bf16 weights, by cuBLAS, with sums in f32.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::sys::{
    cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cublasSetWorkspace_v2, cudaDataType,
};
use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, result};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use candle_core::{CudaDevice, Result, bail};

use crate::model::device::gpu::sum_in_f32;
use crate::model::transfer::cuda_tensor::Address;

/// A matrix in GPU memory whose rows begin `stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix {
    pub(super) at: Address,
    pub(super) stride: usize,
}

impl Matrix {
    pub(super) fn new(at: Address, stride: usize) -> Self {
        Self { at, stride }
    }
}

/// A weight in GPU memory, (outputs, inputs), in bf16 and without gaps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weight {
    pub(super) at: Address,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// Products on one stream, with a handle of cuBLAS of their own: candle's is used by other threads.
#[derive(Debug)]
pub(super) struct Products {
    blas: ManuallyDrop<CudaBlas>,
    /// What cuBLAS may use while a product runs.
    workspace: Arc<CudaSlice<u8>>,
    stream: Arc<CudaStream>,
}

/// The size of the workspace that NVIDIA recommends for compute capability 9.0; earlier ones need less.
const WORKSPACE_BYTES: usize = 32 << 20;

impl Products {
    /// Prepares products on the stream of the device.
    pub(super) fn new(device: &CudaDevice) -> Result<Self> {
        #[expect(unsafe_code, reason = "cuBLAS writes the memory before it reads it")]
        // SAFETY: only cuBLAS uses the workspace.
        let workspace = unsafe { device.alloc::<u8>(WORKSPACE_BYTES)? };
        Self::with_workspace(device, &device.cuda_stream(), Arc::new(workspace))
    }

    /// Returns products that are captured on a stream. Their graphs run on the stream of the device, one after another
    /// with these products, so both can use one workspace.
    pub(super) fn captured_on(&self, device: &CudaDevice, stream: &Arc<CudaStream>) -> Result<Self> {
        Self::with_workspace(device, stream, Arc::clone(&self.workspace))
    }

    fn with_workspace(device: &CudaDevice, stream: &Arc<CudaStream>, workspace: Arc<CudaSlice<u8>>) -> Result<Self> {
        let blas = CudaBlas::new(Arc::clone(stream)).w()?;
        sum_in_f32(*blas.handle())?;
        let at = Address::of(&workspace, device).pointer::<c_void>().cast_mut();
        #[expect(unsafe_code, reason = "a foreign call")]
        // SAFETY: the workspace lives as long as the handle. A graph cannot use memory that cuBLAS allocates by itself.
        unsafe { cublasSetWorkspace_v2(*blas.handle(), at, WORKSPACE_BYTES) }
            .result()
            .w()?;
        Ok(Self {
            blas: ManuallyDrop::new(blas),
            workspace,
            stream: Arc::clone(stream),
        })
    }

    /// Returns the stream on which products are queued.
    pub(super) fn stream(&self) -> &CudaStream {
        &self.stream
    }

    /// Computes `x W'` for `rows` rows, rounded to bf16.
    pub(super) fn bf16(&self, rows: usize, x: Matrix, weight: Weight, out: Matrix) -> Result<()> {
        self.multiply(rows, x, weight, out, cudaDataType::CUDA_R_16BF)
    }

    /// Computes `x W'` for `rows` rows, in f32.
    pub(super) fn f32(&self, rows: usize, x: Matrix, weight: Weight, out: Matrix) -> Result<()> {
        self.multiply(rows, x, weight, out, cudaDataType::CUDA_R_32F)
    }

    fn multiply(&self, rows: usize, x: Matrix, weight: Weight, out: Matrix, dtype: cudaDataType) -> Result<()> {
        // cuBLAS stores matrices by columns, so it computes the transposed product, `W x'`.
        let [m, n, k] = [int(weight.outputs)?, int(rows)?, int(weight.inputs)?];
        let [x_stride, out_stride] = [int(x.stride)?, int(out.stride)?];
        let (one, zero) = (1f32, 0f32);
        #[expect(unsafe_code, reason = "a foreign call")]
        // SAFETY: the handle is open as long as the device is, the factors outlive the call, and the caller's buffers
        // hold matrices of these sizes.
        unsafe {
            result::gemm_ex(
                *self.blas.handle(),
                cublasOperation_t::CUBLAS_OP_T,
                cublasOperation_t::CUBLAS_OP_N,
                m,
                n,
                k,
                (&raw const one).cast(),
                weight.at.pointer(),
                cudaDataType::CUDA_R_16BF,
                k,
                x.at.pointer(),
                cudaDataType::CUDA_R_16BF,
                x_stride,
                (&raw const zero).cast(),
                out.at.pointer::<c_void>().cast_mut(),
                dtype,
                out_stride,
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        }
        .w()
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // The handle panics if it cannot be closed, which is the case once the device has failed.
        if self.stream.synchronize().is_ok() {
            #[expect(unsafe_code, reason = "the handle is closed here or never")]
            // SAFETY: the handle is not used again.
            unsafe {
                ManuallyDrop::drop(&mut self.blas)
            };
        }
    }
}

fn int(value: usize) -> Result<i32> {
    match i32::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => bail!("a product got a size of {value}, expected less than 2^31"),
    }
}
