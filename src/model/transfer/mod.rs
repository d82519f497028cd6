//! Copies between host and device: weights when a model is loaded, and for each pass token ids and indices to the device
//! and logits back.
//!
//! On a GPU, all of them use page-locked memory and none is waited for, so that a pass can be prepared and begun while
//! another one runs.

#[cfg(feature = "cuda")]
pub(super) mod cuda_tensor;
#[cfg(feature = "cuda")]
mod pinned;
#[cfg(feature = "cuda")]
mod staging;
pub(super) mod upload;

use std::ops::Range;

use candle_core::{Device, Result, Tensor};

/// Lists of numbers on the host, end to end, so that one copy moves them all to a device.
#[derive(Debug, Default)]
pub(in crate::model) struct UploadBuffer(Vec<u32>);

/// The position of one list in an [`UploadBuffer`], and in the [`DeviceBuffer`] made from it.
#[derive(Debug, Clone)]
pub(in crate::model) struct UploadRange(Range<usize>);

impl UploadBuffer {
    /// Appends a list, which must not be empty.
    pub(in crate::model) fn push(&mut self, numbers: impl IntoIterator<Item = u32>) -> UploadRange {
        let start = self.0.len();
        self.0.extend(numbers);
        UploadRange(start..self.0.len())
    }
}

/// The device's copy of an [`UploadBuffer`]. On a GPU the copy may still be in progress, but work that is queued later
/// runs after it.
#[derive(Debug)]
pub(in crate::model) struct DeviceBuffer(Tensor);

impl DeviceBuffer {
    /// Copies the lists to a device and waits for the copy.
    pub(in crate::model) fn new(buffer: UploadBuffer, device: &Device) -> Result<Self> {
        Ok(Self(Tensor::new(buffer.0, device)?))
    }

    /// Returns all lists as one tensor (numbers) of u32.
    #[cfg(feature = "cuda")]
    pub(in crate::model) fn whole(&self) -> Tensor {
        self.0.clone()
    }

    /// Returns one list as a tensor (numbers) of u32.
    pub(in crate::model) fn get(&self, UploadRange(range): &UploadRange) -> Result<Tensor> {
        self.0.narrow(0, range.start, range.len())
    }
}

/// Copies numbers between the host and one device.
#[derive(Debug)]
pub(in crate::model) struct Transfer {
    device: Device,
    #[cfg(feature = "cuda")]
    pinned: pinned::PinnedMemory,
}

impl Transfer {
    pub(in crate::model) fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            #[cfg(feature = "cuda")]
            pinned: pinned::PinnedMemory::default(),
        }
    }

    /// Copies lists to the device. On a GPU, this does not wait for the copy.
    pub(in crate::model) fn upload(&self, buffer: UploadBuffer) -> Result<DeviceBuffer> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &self.device {
            return Ok(DeviceBuffer(self.pinned.upload(&buffer.0, device)?));
        }
        DeviceBuffer::new(buffer, &self.device)
    }

    /// Copies the elements of a contiguous f32 tensor to the host. On a GPU, this does not wait for the copy.
    pub(in crate::model) fn download(&self, tensor: &Tensor) -> Result<PendingLogits> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &self.device {
            return Ok(PendingLogits(Download::Pinned(self.pinned.download(tensor, device)?)));
        }
        Ok(PendingLogits(Download::Ready(tensor.flatten_all()?.to_vec1()?)))
    }
}

/// The logits of a pass that may still be running.
#[derive(Debug)]
pub struct PendingLogits(Download);

#[derive(Debug)]
enum Download {
    Ready(Vec<f32>),
    /// A GPU writes the logits once it has done all work that was queued before.
    #[cfg(feature = "cuda")]
    Pinned(pinned::PinnedDownload),
}

impl PendingLogits {
    /// Returns whether [`PendingLogits::wait`] returns at once. This is also the case after a failure.
    pub fn is_ready(&self) -> bool {
        match &self.0 {
            Download::Ready(_) => true,
            #[cfg(feature = "cuda")]
            Download::Pinned(download) => download.is_ready(),
        }
    }

    /// Waits for the pass and returns its logits, row by row.
    ///
    /// # Errors
    /// Returns an error if the device has failed since the pass was begun.
    pub fn wait(self) -> Result<Vec<f32>> {
        match self.0 {
            Download::Ready(values) => Ok(values),
            #[cfg(feature = "cuda")]
            Download::Pinned(download) => download.wait(),
        }
    }
}
