//! Access to the memory of candle's tensors on a GPU, for kernels and copies.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::result::memcpy_dtod_async;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Result, Shape, Storage, Tensor, bail};

/// The address of an element in the memory of a GPU, as kernels take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub(in crate::model) struct Address(u64);

#[expect(unsafe_code, reason = "cudarc passes only types with this trait to a kernel")]
// SAFETY: it has the representation of a pointer in device memory.
unsafe impl DeviceRepr for Address {}

impl Address {
    /// The address of an argument that a kernel does not read.
    pub(in crate::model) const NULL: Self = Self(0);

    /// Returns the address of memory. It is valid as long as the memory is allocated.
    pub(in crate::model) fn of<T>(memory: &CudaSlice<T>, device: &CudaDevice) -> Self {
        // The guard orders work between streams; there is only one.
        Self(memory.device_ptr(&device.cuda_stream()).0)
    }

    /// Returns the address so many bytes after this one.
    pub(in crate::model) fn bytes(self, count: usize) -> Self {
        Self(self.0 + count as u64)
    }

    /// Returns the address so many bf16 elements after this one.
    pub(in crate::model) fn bf16(self, count: usize) -> Self {
        self.bytes(2 * count)
    }

    /// Returns the address in the copy at `to` of the memory at `from`, of which this one is an address.
    pub(in crate::model) fn moved(self, from: Self, to: Self) -> Self {
        Self(to.0 + (self.0 - from.0))
    }

    /// Returns the address as foreign functions take it.
    pub(in crate::model) fn pointer<T>(self) -> *const T {
        self.0 as *const T
    }

    /// Queues a copy of so many bytes to another address of the same GPU.
    pub(in crate::model) fn copy(self, to: Self, bytes: usize, device: &CudaDevice) -> Result<()> {
        let stream = device.cuda_stream();
        #[expect(unsafe_code, reason = "a foreign call")]
        // SAFETY: the caller's buffers hold so many bytes, and the stream runs the copy before it frees them.
        unsafe { memcpy_dtod_async(to.0, self.0, bytes, stream.cu_stream()) }.w()
    }
}

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

    /// Returns the address of the tensor's first element, whatever its dtype.
    pub(in crate::model) fn address(&self) -> Result<Address> {
        let storage = self.cuda()?;
        let start = self.range.0 * storage.dtype().size_in_bytes();
        let device = storage.device();
        let base = match &storage.slice {
            CudaStorageSlice::BF16(memory) => Address::of(memory, device),
            CudaStorageSlice::F16(memory) => Address::of(memory, device),
            CudaStorageSlice::F32(memory) => Address::of(memory, device),
            CudaStorageSlice::U32(memory) => Address::of(memory, device),
            _ => bail!(
                "kernels read tensors of f32, bf16, f16 and u32, not {:?}",
                storage.dtype()
            ),
        };
        Ok(base.bytes(start))
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
