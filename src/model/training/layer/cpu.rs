//! The operations of a layer in training on the CPU.

use candle_core::{CpuStorage, Device, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use super::ops::{AttentionOutput, InputGradient, LayerOps, SavedInput};
use crate::model::files::lora::LoraWeights;
use crate::model::forward::linear::{TrainingLinear, TrainingWeight};
use crate::model::kernels::training::{self as kernels, QueriesKeysValues};
use crate::model::kernels::{PackedAttention, RopeAngles, cpu_elements};
use crate::model::products::{DenseWeight, Factor, multiply_matrices};
use crate::model::training::attention::attention_backward;

/// The bytes that a pass may use to keep what the gradients of layers need: about what 128 tokens take in all layers of a
/// Gemma 3 of 270M, whose weights take 0.8 GB.
const BYTES_TO_KEEP: usize = 128 << 20;

/// Computes with rayon's threads, in f32.
pub(in crate::model::training) struct CpuOps {
    /// See [`LayerOps::bytes_to_keep`].
    pub(in crate::model::training) bytes_to_keep: usize,
}

impl Default for CpuOps {
    fn default() -> Self {
        Self {
            bytes_to_keep: BYTES_TO_KEEP,
        }
    }
}

/// Calls `work` with the elements of a contiguous f32 tensor.
fn with_elements<T>(x: &Tensor, work: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let (storage, layout) = x.storage_and_layout();
    work(cpu_elements("training", &storage, layout)?)
}

/// Calls `work` with the elements of a tensor, or with nothing.
fn with_optional<T>(x: Option<&Tensor>, work: impl FnOnce(Option<&[f32]>) -> Result<T>) -> Result<T> {
    match x {
        Some(x) => with_elements(x, |x| work(Some(x))),
        None => work(None),
    }
}

/// Calls `work` with the cosines, the sines, half the size of a head, and the norm of a head.
fn with_angles(
    angles: &RopeAngles,
    norm: Option<(&Tensor, f64)>,
    work: impl FnOnce((&[f32], &[f32]), usize, kernels::HeadNorm<'_>),
) -> Result<()> {
    let (tokens, half) = angles.cos.dims2()?;
    if angles.sin.dims() != [tokens, half] || norm.is_some_and(|(weight, _)| weight.dims() != [2 * half]) {
        bail!("the angles {angles:?} do not fit the norm of a head");
    }
    with_elements(&angles.cos, |cos| {
        with_elements(&angles.sin, |sin| {
            with_optional(norm.map(|(weight, _)| weight), |weight| {
                let norm = weight.zip(norm).map(|(weight, (_, eps))| (weight, eps as f32));
                work((cos, sin), half, norm);
                Ok(())
            })
        })
    })
}

/// Returns the weight of a linear layer on the CPU.
fn dense<'a>(linear: &TrainingLinear<'a>) -> Result<&'a DenseWeight> {
    match linear.weight {
        TrainingWeight::Cpu(weight) => Ok(weight),
        TrainingWeight::Gpu(_) => bail!("a weight on a GPU cannot be multiplied on the CPU"),
    }
}

/// Returns the elements of the indices of rows.
fn with_indices<T>(indices: &Tensor, work: impl FnOnce(&[u32]) -> T) -> Result<T> {
    let (storage, layout) = indices.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::U32(values)), Some((start, end))) => Ok(work(&values[start..end])),
        _ => bail!("the indices of rows are not u32 on the CPU"),
    }
}

/// The delta of a linear layer with its elements, for `rows` rows.
struct CpuDelta<'a> {
    rows: usize,
    rank: usize,
    inputs: usize,
    outputs: usize,
    scale: f32,
    a: &'a [f32],
    b: &'a [f32],
}

fn with_delta<T>(lora: &LoraWeights, rows: usize, work: impl FnOnce(CpuDelta<'_>) -> Result<T>) -> Result<T> {
    let ((rank, inputs), (outputs, _)) = (lora.a.dims2()?, lora.b.dims2()?);
    let scale = lora.scale as f32;
    with_elements(&lora.a, |a| {
        with_elements(&lora.b, |b| {
            work(CpuDelta {
                rows,
                rank,
                inputs,
                outputs,
                scale,
                a,
                b,
            })
        })
    })
}

impl CpuDelta<'_> {
    fn a(&self) -> Factor<'_> {
        Factor::new(self.rank, self.inputs, self.a)
    }

    fn b(&self) -> Factor<'_> {
        Factor::new(self.outputs, self.rank, self.b)
    }

    fn low<'x>(&self, low: &'x [f32]) -> Factor<'x> {
        Factor::new(self.rows, self.rank, &low[..self.rows * self.rank])
    }

    fn forward(&self, x: &[f32], low: &mut [f32], y: &mut [f32]) -> Result<()> {
        let x = Factor::new(self.rows, self.inputs, x);
        let low = &mut low[..self.rows * self.rank];
        multiply_matrices(1.0, x, self.a().transposed(), 0.0, low)?;
        multiply_matrices(self.scale, self.low(low), self.b().transposed(), 1.0, y)
    }

    /// Returns the gradients of A and B, and writes `d_low`.
    fn backward(&self, x: &[f32], low: &[f32], gradient: &[f32], d_low: &mut [f32]) -> Result<(Tensor, Tensor)> {
        let gradient = Factor::new(self.rows, self.outputs, gradient);
        let d_low = &mut d_low[..self.rows * self.rank];
        multiply_matrices(self.scale, gradient, self.b(), 0.0, d_low)?;
        let mut d_a = vec![0f32; self.rank * self.inputs];
        let x = Factor::new(self.rows, self.inputs, x);
        multiply_matrices(1.0, self.low(d_low).transposed(), x, 0.0, &mut d_a)?;
        let mut d_b = vec![0f32; self.outputs * self.rank];
        multiply_matrices(self.scale, gradient.transposed(), self.low(low), 0.0, &mut d_b)?;
        Ok((
            Tensor::from_vec(d_a, (self.rank, self.inputs), &Device::Cpu)?,
            Tensor::from_vec(d_b, (self.outputs, self.rank), &Device::Cpu)?,
        ))
    }
}

impl LayerOps for CpuOps {
    type Buffer = Vec<f32>;

    fn buffer(&self, len: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; len])
    }

    fn factor(&self, len: usize) -> Result<Vec<f32>> {
        self.buffer(len)
    }

    fn bytes_to_keep(&self) -> Result<usize> {
        Ok(self.bytes_to_keep)
    }

    fn copy_of(&self, x: &Tensor) -> Result<Vec<f32>> {
        with_elements(x, |x| Ok(x.to_vec()))
    }

    fn to_tensor(&self, x: &Vec<f32>, width: usize) -> Result<Tensor> {
        Tensor::from_slice(x, (x.len() / width, width), &Device::Cpu)
    }

    fn linear(&self, linear: &TrainingLinear<'_>, x: &Vec<f32>, low: &mut Vec<f32>, y: &mut Vec<f32>) -> Result<()> {
        let weight = dense(linear)?;
        let rows = x.len() / weight.inputs();
        weight.multiply_into(rows, x, y)?;
        match linear.lora {
            Some(lora) => with_delta(lora, rows, |delta| delta.forward(x, low, y)),
            None => Ok(()),
        }
    }

    fn linear_backward(
        &self,
        linear: &TrainingLinear<'_>,
        saved: SavedInput<'_, Vec<f32>>,
        gradient: &Vec<f32>,
        d_low: &mut Vec<f32>,
        out: InputGradient<'_, Vec<f32>>,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let weight = dense(linear)?;
        let rows = saved.x.len() / weight.inputs();
        let mut out = match out {
            InputGradient::Skip => None,
            InputGradient::Write(out) => Some((out, 0.0)),
            InputGradient::Add(out) => Some((out, 1.0)),
        };
        if let Some((out, beta)) = &mut out {
            weight.multiply_back_into(rows, gradient, *beta, out)?;
        }
        let Some(lora) = linear.lora else {
            return Ok(None);
        };
        with_delta(lora, rows, |delta| {
            let gradients = delta.backward(saved.x, saved.low, gradient, d_low)?;
            if let Some((out, _)) = out {
                multiply_matrices(1.0, delta.low(d_low), delta.a(), 1.0, out)?;
            }
            Ok(Some(gradients))
        })
    }

    fn rms_norm(&self, x: &Vec<f32>, weight: &Tensor, eps: f64, out: &mut Vec<f32>) -> Result<()> {
        with_elements(weight, |weight| {
            kernels::rms_norm(x, weight, eps as f32, out);
            Ok(())
        })
    }

    fn add_norm(
        &self,
        residual: &Vec<f32>,
        y: &Vec<f32>,
        post: Option<&Tensor>,
        eps: f64,
        width: usize,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        with_optional(post, |post| {
            kernels::add_norm(residual, y, post, eps as f32, width, out);
            Ok(())
        })
    }

    fn rms_norm_backward(
        &self,
        x: &Vec<f32>,
        weight: &Tensor,
        eps: f64,
        gradient: &Vec<f32>,
        residual: Option<&Vec<f32>>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        with_elements(weight, |weight| {
            kernels::rms_norm_backward(x, weight, eps as f32, gradient, residual.map(Vec::as_slice), out);
            Ok(())
        })
    }

    fn geglu(&self, gate: &Vec<f32>, up: &Vec<f32>, out: &mut Vec<f32>) -> Result<()> {
        kernels::geglu(gate, up, out);
        Ok(())
    }

    fn geglu_backward(&self, gate: &mut Vec<f32>, up: &mut Vec<f32>, gradient: &Vec<f32>) -> Result<()> {
        kernels::geglu_backward(gate, up, gradient);
        Ok(())
    }

    fn norm_rope(
        &self,
        x: &Vec<f32>,
        angles: &RopeAngles,
        norm: Option<(&Tensor, f64)>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        with_angles(angles, norm, |angles, half, norm| {
            kernels::norm_rope(x, angles, half, norm, out);
        })
    }

    fn norm_rope_backward(
        &self,
        x: &Vec<f32>,
        angles: &RopeAngles,
        norm: Option<(&Tensor, f64)>,
        gradient: &mut Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        with_angles(angles, norm, |angles, half, norm| {
            kernels::norm_rope_backward(x, angles, half, norm, gradient, out);
        })
    }

    fn attention(
        &self,
        attention: &PackedAttention<'_>,
        inputs: &QueriesKeysValues<&Vec<f32>>,
        prefix: usize,
        _log_sums: &mut Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        attention.forward_rows(inputs.q, [inputs.k, inputs.v], prefix, out)
    }

    /// Computes the sums of the exponentials again: they cost less than the products that give the scores.
    fn attention_backward(
        &self,
        attention: &PackedAttention<'_>,
        inputs: &QueriesKeysValues<&Vec<f32>>,
        _saved: AttentionOutput<'_, Vec<f32>>,
        gradient: &Vec<f32>,
        out: QueriesKeysValues<&mut Vec<f32>>,
    ) -> Result<()> {
        let inputs = QueriesKeysValues {
            q: inputs.q.as_slice(),
            k: inputs.k,
            v: inputs.v,
        };
        let out = QueriesKeysValues {
            q: out.q.as_mut_slice(),
            k: out.k,
            v: out.v,
        };
        attention_backward(attention, &inputs, gradient, out)
    }

    fn select(&self, x: &Vec<f32>, indices: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        with_indices(indices, |indices| {
            let width = out.len() / indices.len();
            out.par_chunks_mut(width).zip(indices).for_each(|(out, &index)| {
                out.copy_from_slice(&x[index as usize * width..][..width]);
            });
        })
    }

    fn add_at(&self, x: &Vec<f32>, indices: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        with_indices(indices, |indices| {
            let width = x.len() / indices.len();
            for (x, &index) in x.chunks_exact(width).zip(indices) {
                for (out, x) in out[index as usize * width..][..width].iter_mut().zip(x) {
                    *out += x;
                }
            }
        })
    }
}
