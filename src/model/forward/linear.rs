//! A frozen linear layer with an optional low-rank delta.

use std::cell::OnceCell;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::delta::{Delta, PackedDelta, WeightWithDelta};
#[cfg(test)]
use super::frozen::{FrozenDenseProduct, FrozenProduct};
use crate::config::Quantize;
use crate::model::files::lora::LoraWeights;
use crate::model::products::{DenseWeight, Int8Rows, Int8Weight, PackedWeight, in_chunks, with_rows};

/// How a delta is combined with the frozen weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoraMode {
    /// The delta is added to the weight when it is loaded and then costs nothing per token. Only f32 weights are
    /// precise enough for this.
    Merged,
    /// The delta is computed separately: `x W' + scale (x A') B'`.
    Unmerged,
}

/// The input of linear layers, (tokens, inputs), which layers with 8-bit weights quantise only once.
pub(in crate::model) struct LinearInput<'a> {
    x: &'a Tensor,
    /// The input in chunks of [`rows_per_chunk`] rows.
    int8: OnceCell<Vec<Int8Rows>>,
}

impl<'a> LinearInput<'a> {
    pub(crate) fn new(x: &'a Tensor) -> Self {
        Self {
            x,
            int8: OnceCell::new(),
        }
    }

    fn int8(&self) -> Result<&[Int8Rows]> {
        if let Some(chunks) = self.int8.get() {
            return Ok(chunks);
        }
        let (rows, width) = self.x.dims2()?;
        let chunks = with_rows(self.x, width, |_, x| {
            let chunks = x.par_chunks((rows_per_chunk(rows) * width).max(1));
            chunks.map(|x| Int8Rows::new(x.len() / width, width, x)).collect()
        });
        let chunks: Vec<Int8Rows> = chunks?;
        Ok(self.int8.get_or_init(|| chunks))
    }
}

/// Returns the number of rows that one task computes at a time.
///
/// What a task writes between two layers then stays in the cache of its core, and all threads get several tasks. The
/// fewest rows are those that `rten-gemm` computes at once.
pub(super) fn rows_per_chunk(rows: usize) -> usize {
    let share = rows.div_ceil(4 * rayon::current_num_threads());
    share.next_multiple_of(64).min(CHUNK)
}

/// The most rows of a chunk.
const CHUNK: usize = 128;

/// A few rows of the input of packed layers, (rows * width), which layers with 8-bit weights quantise only once.
pub(super) struct RowsInput<'a> {
    rows: usize,
    x: &'a [f32],
    int8: OnceCell<Int8Rows>,
}

impl<'a> RowsInput<'a> {
    pub(super) fn new(rows: usize, x: &'a [f32]) -> Self {
        Self {
            rows,
            x,
            int8: OnceCell::new(),
        }
    }

    fn int8(&self) -> Result<&Int8Rows> {
        if let Some(quantised) = self.int8.get() {
            return Ok(quantised);
        }
        let width = self.x.len().checked_div(self.rows).unwrap_or_default();
        let quantised = Int8Rows::new(self.rows, width, self.x)?;
        Ok(self.int8.get_or_init(|| quantised))
    }
}

/// A weight that never changes, in the form in which it is multiplied.
#[derive(Debug, Clone)]
pub(in crate::model) enum FrozenWeight {
    /// On a GPU: (outputs, inputs).
    Dense(Tensor),
    /// On the CPU, in f32.
    Packed(Arc<PackedWeight>),
    /// On the CPU, in f32 and with gradients.
    Training(Arc<DenseWeight>),
    /// On the CPU, in 8-bit integers.
    Int8(Arc<Int8Weight>),
    /// On a GPU, in FP8. Only the fused pass multiplies by it, and holds it together with its delta.
    #[cfg(feature = "cuda")]
    Fp8,
}

impl FrozenWeight {
    /// Prepares a weight, (outputs, inputs), for products on its device. On the CPU, it is f32.
    pub(in crate::model) fn new(weight: Tensor, quantize: Quantize) -> Result<Self> {
        Ok(match quantize {
            _ if !weight.device().is_cpu() => Self::Dense(weight),
            // FP8 on the CPU has been refused when the device was opened, and the weights are only checked.
            Quantize::None | Quantize::Fp8 => Self::Packed(Arc::new(PackedWeight::new(&weight)?)),
            Quantize::Int8 => Self::Int8(Arc::new(Int8Weight::new(&weight)?)),
        })
    }

    /// Prepares an f32 weight for training on the CPU: (outputs, inputs).
    pub(in crate::model) fn training(weight: &Tensor) -> Result<Self> {
        DenseWeight::new(weight).map(Arc::new).map(Self::Training)
    }
}

/// A linear layer without bias: `y = x W'`, plus the delta if there is one. A clone shares both.
#[derive(Debug, Clone)]
pub(in crate::model) struct Linear {
    weight: FrozenWeight,
    delta: Option<Delta>,
}

/// A linear layer in training: its frozen weight, and the variables of its delta if it has one.
pub(in crate::model) struct TrainingLinear<'a> {
    pub(in crate::model) weight: TrainingWeight<'a>,
    pub(in crate::model) lora: Option<&'a LoraWeights>,
}

/// A frozen weight, (outputs, inputs), in the form in which training multiplies with it.
pub(in crate::model) enum TrainingWeight<'a> {
    /// On the CPU.
    Cpu(&'a DenseWeight),
    /// On a GPU, in f32 or bf16.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only GPUs read it"))]
    Gpu(&'a Tensor),
}

impl Linear {
    /// Creates a layer from a frozen weight and an optional delta, which stays beside the weight.
    ///
    /// The delta of a weight that is not f32 is not merged either, because rounding the sum would lose a small delta.
    /// It is converted to the dtype of a weight on a GPU, which rounds it relative to its own size.
    pub(in crate::model) fn new(weight: FrozenWeight, lora: Option<&LoraWeights>) -> Result<Self> {
        let delta = match (&weight, lora) {
            (_, None) => None,
            #[cfg(feature = "cuda")]
            (FrozenWeight::Fp8, Some(_)) => None,
            (FrozenWeight::Dense(weight), Some(lora)) => Some(Delta::Tensors(lora.to_device(weight.device())?)),
            (_, Some(lora)) => Some(Delta::Packed(Arc::new(PackedDelta::new(lora)?))),
        };
        Ok(Self { weight, delta })
    }

    /// Returns a layer that shares the weight of this one and has a delta beside it. Fails if this one has a delta.
    pub(in crate::model) fn with_delta(&self, lora: &LoraWeights) -> Result<Self> {
        match &self.delta {
            None => Self::new(self.weight.clone(), Some(lora)),
            Some(_) => bail!("the layer already has a delta"),
        }
    }

    /// Returns the weight of a layer on a GPU, without its delta: (outputs, inputs).
    #[cfg(feature = "cuda")]
    pub(super) fn dense(&self) -> Result<&Tensor> {
        match &self.weight {
            FrozenWeight::Dense(weight) => Ok(weight),
            _ => bail!("the weight is not on a GPU"),
        }
    }

    /// Returns whether two layers on the CPU hold one packed weight.
    #[cfg(test)]
    pub(super) fn shares_weight_with(&self, other: &Self) -> bool {
        use FrozenWeight::{Int8, Packed};
        match (&self.weight, &other.weight) {
            (Packed(one), Packed(other)) => Arc::ptr_eq(one, other),
            (Int8(one), Int8(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }

    /// Computes the outputs: (tokens, outputs).
    pub(crate) fn forward(&self, input: &LinearInput<'_>) -> Result<Tensor> {
        let x = input.x;
        match &self.weight {
            FrozenWeight::Dense(weight) => match &self.delta {
                Some(Delta::Tensors(lora)) if weight.dtype() != DType::F32 => {
                    WeightWithDelta::new(weight, lora)?.forward(x)
                }
                _ => self.add_tensors(x.matmul(&weight.t()?)?, x),
            },
            FrozenWeight::Packed(weight) => {
                self.on_cpu(x, || with_rows(x, weight.inputs(), |rows, x| weight.multiply(rows, x)))
            }
            FrozenWeight::Training(weight) => {
                self.on_cpu(x, || with_rows(x, weight.inputs(), |rows, x| weight.multiply(rows, x)))
            }
            FrozenWeight::Int8(weight) => self.on_cpu(x, || {
                let (rows, chunks) = (x.dim(0)?, input.int8()?);
                in_chunks(rows, weight.outputs(), rows_per_chunk(rows), |index| {
                    weight.multiply(&chunks[index])
                })
            }),
            #[cfg(feature = "cuda")]
            FrozenWeight::Fp8 => bail!("a weight in FP8 is multiplied only in the fused pass"),
        }
    }

    /// Returns whether [`Linear::forward_rows`] can compute the layer.
    pub(super) fn is_packed(&self) -> bool {
        let is_packed = matches!(self.weight, FrozenWeight::Packed(_) | FrozenWeight::Int8(_));
        is_packed && !matches!(self.delta, Some(Delta::Tensors(_)))
    }

    /// Computes the outputs of a packed layer for a few rows: (rows * outputs).
    pub(super) fn forward_rows(&self, x: &RowsInput<'_>) -> Result<Vec<f32>> {
        let mut y = match &self.weight {
            FrozenWeight::Packed(weight) => weight.multiply(x.rows, x.x)?,
            FrozenWeight::Int8(weight) => weight.multiply(x.int8()?)?,
            _ => bail!("the layer is not packed"),
        };
        if let Some(Delta::Packed(delta)) = &self.delta {
            delta.add(x.rows, x.x, &mut y)?;
        }
        Ok(y)
    }

    /// Computes the outputs for a weight on the CPU.
    fn on_cpu(&self, x: &Tensor, multiply: impl FnOnce() -> Result<Vec<f32>>) -> Result<Tensor> {
        let (rows, inputs) = x.dims2()?;
        let mut y = multiply()?;
        if let Some(Delta::Packed(delta)) = &self.delta {
            with_rows(x, inputs, |rows, x| delta.add(rows, x, &mut y))?;
        }
        let outputs = y.len().checked_div(rows).unwrap_or_default();
        self.add_tensors(Tensor::from_vec(y, (rows, outputs), x.device())?, x)
    }

    /// Adds the delta to `y` if it consists of tensors.
    fn add_tensors(&self, y: Tensor, x: &Tensor) -> Result<Tensor> {
        match &self.delta {
            Some(Delta::Tensors(lora)) => y + lora.forward(x)?,
            _ => Ok(y),
        }
    }

    /// Sets the delta. If its tensors are variables, later updates of them take effect.
    pub(crate) fn attach(&mut self, lora: LoraWeights) {
        self.delta = Some(Delta::Tensors(lora));
    }

    /// Returns what training multiplies with. Fails if the layer was not loaded for training.
    pub(in crate::model) fn for_training(&self) -> Result<TrainingLinear<'_>> {
        let weight = match &self.weight {
            FrozenWeight::Training(weight) => TrainingWeight::Cpu(weight),
            FrozenWeight::Dense(weight) => TrainingWeight::Gpu(weight),
            _ => bail!("training needs weights that were loaded for training"),
        };
        let lora = match &self.delta {
            None => None,
            Some(Delta::Tensors(lora)) => Some(lora),
            Some(Delta::Packed(_)) => bail!("training needs a delta that consists of tensors"),
        };
        Ok(TrainingLinear { weight, lora })
    }

    /// Computes the same as [`Linear::forward`], with gradients for `x` and the delta but not for the weight. Fails if
    /// the layer was not loaded for training.
    #[cfg(test)]
    pub(crate) fn differentiable(&self, x: &Tensor) -> Result<Tensor> {
        let y = match &self.weight {
            FrozenWeight::Training(weight) => x.apply_op1(FrozenDenseProduct {
                weight: Arc::clone(weight),
            })?,
            FrozenWeight::Dense(weight) => x.apply_op1(FrozenProduct { weight: weight.clone() })?,
            _ => bail!("training needs weights that were loaded for training"),
        };
        if let Some(Delta::Packed(_)) = &self.delta {
            bail!("training needs a delta that consists of tensors");
        }
        self.add_tensors(y, x)
    }
}
