//! Tensors on a GPU as a kernel's arguments, and what a kernel wrote as a tensor.

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Result, Shape, Storage, Tensor, bail};

/// A contiguous tensor's storage, held while a kernel is launched.
pub(in crate::model) struct Held<'a> {
    storage: candle_core::StorageRef<'a>,
    range: (usize, usize),
}

impl<'a> Held<'a> {
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
            _ => bail!("a kernel's tensors must all be on the GPU"),
        }
    }

    pub(in crate::model) fn view<T: CudaDType>(&self) -> Result<CudaView<'_, T>> {
        let (start, end) = self.range;
        Ok(self.cuda()?.as_cuda_slice::<T>()?.slice(start..end))
    }
}

/// A tensor around what a kernel wrote.
pub(in crate::model) fn wrap<T: CudaDType>(
    slice: CudaSlice<T>,
    device: &CudaDevice,
    shape: impl Into<Shape>,
) -> Tensor {
    let storage = CudaStorage::wrap_cuda_slice(slice, device.clone());
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}
