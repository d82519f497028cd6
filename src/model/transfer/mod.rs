//! What goes between the host and a device in each pass: a few lists of numbers there, the logits back.
//!
//! On a GPU both go through page-locked memory and neither is waited for, so that a pass can be prepared and
//! begun while another runs.

#[cfg(feature = "cuda")]
pub(super) mod held;
#[cfg(feature = "cuda")]
mod pinned;

use std::ops::Range;

use candle_core::{Device, Result, Tensor};

/// Lists of numbers that go to a device in one copy.
#[derive(Debug, Default)]
pub struct Lists(Vec<u32>);

/// Where one of them stands.
#[derive(Debug, Clone)]
pub struct List(Range<usize>);

impl Lists {
    /// Adds one, which is not empty.
    pub fn push(&mut self, numbers: impl IntoIterator<Item = u32>) -> List {
        let start = self.0.len();
        self.0.extend(numbers);
        List(start..self.0.len())
    }
}

/// Lists that are on their way to a device, or there: work that is given to it later finds them.
#[derive(Debug)]
pub struct Sent(Tensor);

impl Sent {
    /// Copies lists from where they are.
    ///
    /// # Errors
    /// candle's.
    pub fn new(lists: Lists, device: &Device) -> Result<Self> {
        Ok(Self(Tensor::new(lists.0, device)?))
    }

    /// (numbers) of u32.
    ///
    /// # Errors
    /// candle's, for a list of others.
    pub fn get(&self, List(range): &List) -> Result<Tensor> {
        self.0.narrow(0, range.start, range.len())
    }
}

/// Moves numbers between the host and one device.
#[derive(Debug)]
pub struct Transfer {
    device: Device,
    #[cfg(feature = "cuda")]
    pinned: pinned::Pinned,
}

impl Transfer {
    /// To and from a device.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            #[cfg(feature = "cuda")]
            pinned: pinned::Pinned::default(),
        }
    }

    /// Sends lists; on a GPU without waiting.
    ///
    /// # Errors
    /// candle's.
    pub fn send(&self, lists: Lists) -> Result<Sent> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &self.device {
            return Ok(Sent(self.pinned.send(&lists.0, device)?));
        }
        Sent::new(lists, &self.device)
    }

    /// Asks for a contiguous f32 tensor's elements; on a GPU without waiting.
    ///
    /// # Errors
    /// candle's.
    pub fn fetch(&self, tensor: &Tensor) -> Result<PendingLogits> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &self.device {
            return Ok(PendingLogits::PinnedRead(self.pinned.fetch(tensor, device)?));
        }
        Ok(PendingLogits::Here(tensor.flatten_all()?.to_vec1()?))
    }
}

/// Numbers that a device was asked for.
#[derive(Debug)]
pub enum PendingLogits {
    /// They are here.
    Here(Vec<f32>),
    /// A GPU writes them when all work that it was given before is done.
    #[cfg(feature = "cuda")]
    PinnedRead(pinned::PinnedRead),
}

impl PendingLogits {
    /// Whether [`PendingLogits::wait`] would not wait. True also of one that failed.
    pub fn is_here(&self) -> bool {
        match self {
            Self::Here(_) => true,
            #[cfg(feature = "cuda")]
            Self::PinnedRead(read) => read.is_here(),
        }
    }

    /// The elements, in order.
    ///
    /// # Errors
    /// What failed on the device since the pass was begun.
    pub fn wait(self) -> Result<Vec<f32>> {
        match self {
            Self::Here(values) => Ok(values),
            #[cfg(feature = "cuda")]
            Self::PinnedRead(read) => read.wait(),
        }
    }
}
