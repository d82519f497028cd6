//! The operations of a layer in training on a GPU.

use candle_core::{CudaDevice, DType, Result, Tensor, bail};

use super::ops::{AttentionOutput, InputGradient, LayerOps, SavedInput};
use crate::model::files::lora::LoraWeights;
use crate::model::forward::linear::{TrainingLinear, TrainingWeight};
use crate::model::kernels::cuda::training::{CudaBuffer, Delta, TrainingKernels};
use crate::model::kernels::training::QueriesKeysValues;
use crate::model::kernels::{PackedAttention, RopeAngles};

/// Launches our kernels. Activations and gradients are f32, and products with frozen weights read them rounded to the
/// dtype of the weights.
pub(in crate::model::training) struct CudaOps(TrainingKernels);

impl CudaOps {
    /// Prepares the operations for weights of this dtype.
    pub(in crate::model::training) fn new(device: &CudaDevice, dtype: DType) -> Result<Self> {
        TrainingKernels::new(device, dtype).map(Self)
    }
}

/// Returns the weight of a linear layer on a GPU.
fn tensor<'a>(linear: &TrainingLinear<'a>) -> Result<&'a Tensor> {
    match linear.weight {
        TrainingWeight::Gpu(weight) => Ok(weight),
        TrainingWeight::Cpu(_) => bail!("a weight on the CPU cannot be multiplied on a GPU"),
    }
}

fn delta(lora: &LoraWeights) -> Delta<'_> {
    Delta {
        a: &lora.a,
        b: &lora.b,
        scale: lora.scale as f32,
    }
}

impl LayerOps for CudaOps {
    type Buffer = CudaBuffer;

    fn buffer(&self, len: usize) -> Result<CudaBuffer> {
        self.0.buffer(len, false)
    }

    fn factor(&self, len: usize) -> Result<CudaBuffer> {
        self.0.buffer(len, true)
    }

    fn bytes_to_keep(&self) -> Result<usize> {
        self.0.bytes_to_keep()
    }

    fn copy_of(&self, x: &Tensor) -> Result<CudaBuffer> {
        self.0.copy_of(x)
    }

    fn to_tensor(&self, x: &CudaBuffer, width: usize) -> Result<Tensor> {
        self.0.to_tensor(x, width)
    }

    fn linear(
        &self,
        linear: &TrainingLinear<'_>,
        x: &CudaBuffer,
        low: &mut CudaBuffer,
        y: &mut CudaBuffer,
    ) -> Result<()> {
        self.0.frozen(tensor(linear)?, x, y)?;
        match linear.lora {
            Some(lora) => self.0.delta(&delta(lora), x, low, y),
            None => Ok(()),
        }
    }

    fn linear_backward(
        &self,
        linear: &TrainingLinear<'_>,
        saved: SavedInput<'_, CudaBuffer>,
        gradient: &CudaBuffer,
        d_low: &mut CudaBuffer,
        out: InputGradient<'_, CudaBuffer>,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let mut out = match out {
            InputGradient::Skip => None,
            InputGradient::Write(out) => Some((out, 0.0)),
            InputGradient::Add(out) => Some((out, 1.0)),
        };
        if let Some((out, beta)) = &mut out {
            self.0.frozen_backward(tensor(linear)?, gradient, *beta, out)?;
        }
        let Some(lora) = linear.lora else {
            return Ok(None);
        };
        let inputs = [saved.x, saved.low, gradient];
        let out = out.map(|(out, _)| out);
        self.0.delta_backward(&delta(lora), inputs, d_low, out).map(Some)
    }

    fn rms_norm(&self, x: &CudaBuffer, weight: &Tensor, eps: f64, out: &mut CudaBuffer) -> Result<()> {
        self.0.rms_norm(x, weight, eps, out)
    }

    fn add_norm(
        &self,
        residual: &CudaBuffer,
        y: &CudaBuffer,
        post: Option<&Tensor>,
        eps: f64,
        width: usize,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        self.0.add_norm([residual, y], post, eps, width, out)
    }

    fn rms_norm_backward(
        &self,
        x: &CudaBuffer,
        weight: &Tensor,
        eps: f64,
        gradient: &CudaBuffer,
        residual: Option<&CudaBuffer>,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        self.0.rms_norm_backward([x, gradient], weight, eps, residual, out)
    }

    fn geglu(&self, gate: &CudaBuffer, up: &CudaBuffer, out: &mut CudaBuffer) -> Result<()> {
        self.0.geglu(gate, up, out)
    }

    fn geglu_backward(&self, gate: &mut CudaBuffer, up: &mut CudaBuffer, gradient: &CudaBuffer) -> Result<()> {
        self.0.geglu_backward(gate, up, gradient)
    }

    fn norm_rope(
        &self,
        x: &CudaBuffer,
        angles: &RopeAngles,
        norm: Option<(&Tensor, f64)>,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        self.0.norm_rope(x, angles, norm, out)
    }

    fn norm_rope_backward(
        &self,
        x: &CudaBuffer,
        angles: &RopeAngles,
        norm: Option<(&Tensor, f64)>,
        gradient: &mut CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        self.0.norm_rope_backward([x, gradient], angles, norm, out)
    }

    fn attention(
        &self,
        attention: &PackedAttention<'_>,
        inputs: &QueriesKeysValues<&CudaBuffer>,
        prefix: usize,
        log_sums: &mut CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        self.0.attention(attention, inputs, prefix, log_sums, out)
    }

    fn attention_backward(
        &self,
        attention: &PackedAttention<'_>,
        inputs: &QueriesKeysValues<&CudaBuffer>,
        saved: AttentionOutput<'_, CudaBuffer>,
        gradient: &CudaBuffer,
        out: QueriesKeysValues<&mut CudaBuffer>,
    ) -> Result<()> {
        let AttentionOutput {
            output,
            log_sums,
            space,
            prefix,
        } = saved;
        self.0
            .attention_backward(attention, inputs, prefix, [output, log_sums, gradient], space, out)
    }

    fn select(&self, x: &CudaBuffer, indices: &Tensor, out: &mut CudaBuffer) -> Result<()> {
        self.0.select(x, indices, out)
    }

    fn add_at(&self, x: &CudaBuffer, indices: &Tensor, out: &mut CudaBuffer) -> Result<()> {
        self.0.add_at(x, indices, out)
    }
}
