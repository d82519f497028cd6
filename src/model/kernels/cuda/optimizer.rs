//! Launches the kernels of the optimiser, each for all variables at once. A launch for each variable would take the host
//! longer than the arithmetic takes the GPU.

use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg};
use candle_core::{CudaDevice, Result, Tensor, bail};

use super::launch::Kernels;
use super::training::{address_of, count, launch};

const OP: &str = "the optimiser";

/// Number of threads in a block, as in training.cu.
const THREADS: u32 = 256;
/// Number of elements that a thread computes. The largest tensor of an adapter then has some tens of blocks.
const ELEMENTS_PER_THREAD: usize = 8;

/// A variable with its state in f32, all of the same shape. A table of gradients alone has only these.
pub(crate) struct OptimizerTensor<'a> {
    pub(crate) gradient: &'a Tensor,
    /// The variable and the moments of its gradient.
    pub(crate) state: Option<[&'a Tensor; 3]>,
}

/// The parameters of a step, with the same fields as in training.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamWStep {
    /// The decay rate of the first moment, and the share of a new gradient, which is one minus the rate.
    pub(crate) beta1: f32,
    pub(crate) share1: f32,
    /// The same of the second moment.
    pub(crate) beta2: f32,
    pub(crate) share2: f32,
    /// Constant that is added to the root of the second moment.
    pub(crate) eps: f32,
    /// The learning rate divided by the bias correction of the first moment.
    pub(crate) rate: f32,
    /// The root of the bias correction of the second moment.
    pub(crate) root_correction: f32,
    /// The factor by which weight decay shrinks a variable.
    pub(crate) decay: f32,
}

#[expect(unsafe_code, reason = "cudarc passes only types with this trait to a kernel")]
// SAFETY: the fields are plain numbers in C's layout, as training.cu declares them.
unsafe impl DeviceRepr for AdamWStep {}

/// The addresses and lengths of tensors in GPU memory.
pub(crate) struct TensorTable {
    device: CudaDevice,
    kernels: Arc<Kernels>,
    fields: CudaSlice<u64>,
    tensors: u32,
    /// Number of blocks for the largest tensor.
    blocks: u32,
}

impl TensorTable {
    /// Copies the addresses to the GPU. The caller keeps the tensors while it uses the table.
    ///
    /// # Errors
    /// Returns an error if there is no tensor, shapes differ, a tensor is of another kind, or the copy fails.
    pub(crate) fn new(device: &CudaDevice, tensors: &[OptimizerTensor<'_>]) -> Result<Self> {
        let mut fields = Vec::with_capacity(5 * tensors.len());
        let mut largest = 0;
        for OptimizerTensor { gradient, state } in tensors {
            let mut addresses = [0; 3];
            if let Some(state) = state {
                for (address, tensor) in addresses.iter_mut().zip(state) {
                    if tensor.shape() != gradient.shape() {
                        bail!("{OP} got a gradient {gradient:?} for {tensor:?}");
                    }
                    *address = address_of::<f32>(device, tensor)?;
                }
            }
            fields.extend(addresses);
            fields.push(address_of::<f32>(device, gradient)?);
            fields.push(gradient.elem_count() as u64);
            largest = largest.max(gradient.elem_count());
        }
        if tensors.is_empty() {
            bail!("{OP} got no tensors");
        }
        Ok(Self {
            device: device.clone(),
            kernels: Kernels::of(device)?,
            fields: device.clone_htod(&fields)?,
            tensors: count(OP, tensors.len())?,
            blocks: count(OP, largest.div_ceil(THREADS as usize * ELEMENTS_PER_THREAD).max(1))?,
        })
    }

    /// Returns the sum of the squares of all gradients.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub(crate) fn square_sum(&self) -> Result<f64> {
        #[expect(unsafe_code, reason = "the kernel writes every element before it is read")]
        // SAFETY: each block writes the element of its tensor.
        let sums = unsafe { self.device.alloc::<f64>(self.tensors as usize)? };
        let stream = self.device.cuda_stream();
        let mut builder = stream.launch_builder(&self.kernels.functions.training_square_sums);
        builder.arg(&self.fields).arg(&sums);
        launch(builder, (self.tensors, 1), THREADS)?;
        Ok(self.device.cuda_stream().clone_dtoh(&sums).w()?.iter().sum())
    }

    /// Multiplies all gradients by a factor, in place.
    ///
    /// # Errors
    /// Returns an error if the launch fails.
    pub(crate) fn scale_gradients(&self, factor: f32) -> Result<()> {
        let stream = self.device.cuda_stream();
        let mut builder = stream.launch_builder(&self.kernels.functions.training_scale_gradients);
        builder.arg(&self.fields).arg(&factor);
        launch(builder, (self.blocks, self.tensors), THREADS)
    }

    /// Updates all variables and their moments, in place.
    ///
    /// # Errors
    /// Returns an error if the launch fails.
    pub(crate) fn adamw(&self, step: &AdamWStep) -> Result<()> {
        let stream = self.device.cuda_stream();
        let mut builder = stream.launch_builder(&self.kernels.functions.training_adamw);
        builder.arg(&self.fields).arg(step);
        launch(builder, (self.blocks, self.tensors), THREADS)
    }
}
