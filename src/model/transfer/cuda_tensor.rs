//! Access to the memory of candle's tensors on a GPU, for kernels and copies.

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Result, Shape, Storage, Tensor, bail};

/// A borrowed contiguous tensor on a GPU.
pub(in crate::model) struct CudaTensor<'a> {
    storage: candle_core::StorageRef<'a>,
    range: (usize, usize),
}

impl<'a> CudaTensor<'a> {
    /// Borrows a tensor. `op` names the operation in errors.
    pub(in crate::model) fn new(op: &str, tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some(range) = layout.contiguous_offsets() else {
            bail!("{op} expects a contiguous tensor")
        };
        Ok(Self { storage, range })
    }

    fn cuda(&self) -> Result<&CudaStorage> {
        match &*self.storage {
            Storage::Cuda(storage) => Ok(storage),
            _ => bail!("all tensors of a kernel must be on the GPU"),
        }
    }

    /// Returns the tensor's elements in device memory.
    pub(in crate::model) fn view<T: CudaDType>(&self) -> Result<CudaView<'_, T>> {
        let (start, end) = self.range;
        Ok(self.cuda()?.as_cuda_slice::<T>()?.slice(start..end))
    }
}

/// Makes a tensor of device memory that a kernel or a copy fills.
pub(in crate::model) fn wrap<T: CudaDType>(
    slice: CudaSlice<T>,
    device: &CudaDevice,
    shape: impl Into<Shape>,
) -> Tensor {
    let storage = CudaStorage::wrap_cuda_slice(slice, device.clone());
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}
