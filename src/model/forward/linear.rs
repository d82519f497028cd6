//! A frozen linear layer, dense or quantised, with an optional low-rank delta.

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Module, Result, Shape, Tensor, bail};

use crate::model::files::lora::LoraWeights;

/// candle's VNNI kernels for Q8_0 need rows of whole 256-element blocks. Other rows take a path that is three to six
/// times slower, so rows are padded with zeros.
const QUANTIZED_WIDTH: usize = 256;

/// Half-precision matrix products are fast if rows are multiples of 16 bytes, which are eight elements.
const RANK_MULTIPLE: usize = 8;

/// How a delta is combined with the frozen weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoraMode {
    /// The delta is added to the weight when it is loaded and then costs nothing per token. Only f32 weights are
    /// precise enough for this.
    Merged,
    /// The delta is computed separately: `x W' + scale (x A') B'`.
    Unmerged,
}

/// A linear layer without bias: `y = x W'`, plus the unmerged delta if there is one.
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Weight,
    lora: Option<LoraWeights>,
}

#[derive(Debug)]
enum Weight {
    /// (outputs, inputs)
    Dense(Tensor),
    /// A weight that is not f32, together with its delta.
    WithDelta(WeightWithDelta),
    /// A Q8_0 weight with rows padded to a multiple of [`QUANTIZED_WIDTH`].
    Quantized { matmul: QMatMul, padding: usize },
}

impl Linear {
    /// Creates a dense layer from a weight (outputs, inputs) and an optional delta, which is copied to the weight's
    /// device.
    ///
    /// If the weight is not f32, `mode` has no effect and the delta is not merged, because rounding the sum would lose
    /// a small delta. The delta is converted to the weight's dtype, which rounds it relative to its own size.
    pub(crate) fn dense(weight: Tensor, lora: Option<&LoraWeights>, mode: LoraMode) -> Result<Self> {
        let lora = lora.map(|lora| lora.to_device(weight.device())).transpose()?;
        match (lora, mode) {
            (Some(lora), LoraMode::Merged) if weight.dtype() == DType::F32 => {
                let delta = (lora.b.matmul(&lora.a)? * lora.scale)?;
                Ok(Self {
                    weight: Weight::Dense((weight + delta)?),
                    lora: None,
                })
            }
            (Some(lora), _) if weight.dtype() != DType::F32 => Ok(Self {
                weight: Weight::WithDelta(WeightWithDelta::new(&weight, &lora)?),
                lora: None,
            }),
            (lora, _) => Ok(Self {
                weight: Weight::Dense(weight),
                lora,
            }),
        }
    }

    /// Creates a Q8_0 layer from a weight (outputs, inputs) and an optional delta. The delta is not merged and stays
    /// in f32, because quantising the sum would lose a small delta.
    pub(crate) fn quantized(weight: &Tensor, lora: Option<&LoraWeights>) -> Result<Self> {
        let inputs = weight.dims()[1];
        let padding = inputs.next_multiple_of(QUANTIZED_WIDTH) - inputs;
        let padded = if padding == 0 {
            weight.clone()
        } else {
            weight.pad_with_zeros(1, 0, padding)?
        };
        let matmul = QMatMul::from_qtensor(QTensor::quantize(&padded, GgmlDType::Q8_0)?)?;
        Ok(Self {
            weight: Weight::Quantized { matmul, padding },
            lora: lora.cloned(),
        })
    }

    /// Computes the outputs (tokens, outputs) for `x` (tokens, inputs).
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let (Weight::Dense(weight), Some(lora)) = (&self.weight, &self.lora)
            && weight.dtype() != DType::F32
        {
            return WeightWithDelta::new(weight, lora)?.forward(x);
        }
        let y = match &self.weight {
            Weight::Dense(weight) => x.matmul(&weight.t()?)?,
            Weight::WithDelta(weight) => weight.forward(x)?,
            Weight::Quantized { matmul, padding: 0 } => matmul.forward(x)?,
            Weight::Quantized { matmul, padding } => matmul.forward(&x.pad_with_zeros(1, 0, *padding)?)?,
        };
        match &self.lora {
            None => Ok(y),
            Some(lora) => y + lora.forward(x)?,
        }
    }

    /// Sets the unmerged delta. If its tensors are variables, later updates of them take effect.
    pub(crate) fn attach(&mut self, lora: LoraWeights) {
        self.lora = Some(lora);
    }

    /// Computes the same as [`Linear::forward`], with gradients for `x` and the delta but not for the weight. Fails if
    /// the weight is quantised or was loaded with a delta.
    pub(crate) fn differentiable(&self, x: &Tensor) -> Result<Tensor> {
        let Weight::Dense(weight) = &self.weight else {
            bail!("training needs weights that are not quantised and were loaded without an adapter")
        };
        let y = x.apply_op1(FrozenProduct { weight: weight.clone() })?;
        match &self.lora {
            None => Ok(y),
            Some(lora) => y + lora.forward(x)?,
        }
    }
}

/// A weight and its delta, concatenated so that one product computes both: `[x, x A'] [W, scale B]'`, in the weight's
/// dtype.
///
/// The product is summed in f32 and rounded once. If the delta were added to outputs that are already rounded, it would
/// vanish wherever it is smaller than half a unit in their last place.
#[derive(Debug)]
struct WeightWithDelta {
    /// (outputs, inputs + rank)
    weight: Tensor,
    /// (rank, inputs), where the rank is padded with zeros to a multiple of [`RANK_MULTIPLE`].
    a: Tensor,
}

impl WeightWithDelta {
    fn new(weight: &Tensor, lora: &LoraWeights) -> Result<Self> {
        let rank = lora.a.dim(0)?;
        let padding = rank.next_multiple_of(RANK_MULTIPLE) - rank;
        let a = lora.a.pad_with_zeros(0, 0, padding)?.to_dtype(weight.dtype())?;
        let b = (&lora.b * lora.scale)?.pad_with_zeros(1, 0, padding)?;
        Ok(Self {
            weight: Tensor::cat(&[weight, &b.to_dtype(weight.dtype())?], 1)?,
            a,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let low = x.matmul(&self.a.t()?)?;
        Tensor::cat(&[x, &low], 1)?.matmul(&self.weight.t()?)
    }
}

/// Computes `x W'` in f32 for a weight of any dtype. Its backward pass returns only the gradient of `x`, because the
/// gradient of the weight would be as large as the weight and is not needed.
struct FrozenProduct {
    weight: Tensor,
}

impl FrozenProduct {
    /// Returns the numbers of rows, outputs and inputs.
    fn sizes(&self, x: &Layout) -> Result<(usize, usize, usize)> {
        let (m, k) = x.shape().dims2()?;
        let (n, inputs) = self.weight.dims2()?;
        if k != inputs {
            bail!("a linear layer has {inputs} inputs, but was given {k}");
        }
        Ok((m, n, k))
    }
}

impl CustomOp1 for FrozenProduct {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let (m, n, k) = self.sizes(layout)?;
        let weight = self.weight.t()?;
        let (weight, weight_layout) = weight.storage_and_layout();
        let candle_core::Storage::Cpu(weight) = &*weight else {
            bail!("the weight is not on the CPU")
        };
        Ok((
            storage.matmul(weight, (1, m, n, k), layout, weight_layout)?,
            Shape::from((m, n)),
        ))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let (m, n, k) = self.sizes(layout)?;
        let weight = self.weight.t()?;
        let (weight, weight_layout) = weight.storage_and_layout();
        let candle_core::Storage::Cuda(weight) = &*weight else {
            bail!("the weight is not on the GPU")
        };
        let x = storage.to_dtype(layout, self.weight.dtype())?;
        let y = x.matmul(weight, (1, m, n, k), &Layout::contiguous((m, k)), weight_layout)?;
        let shape = Shape::from((m, n));
        Ok((y.to_dtype(&Layout::contiguous(&shape), DType::F32)?, shape))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.to_dtype(self.weight.dtype())?.contiguous()?;
        Ok(Some(grad.matmul(&self.weight)?.to_dtype(DType::F32)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::kernels::tests::random;

    /// The delta is a thousandth of the weight, so rounding their sum to bf16 would lose it.
    #[test]
    fn a_small_delta_of_a_bf16_weight_takes_effect() -> Result<()> {
        for (outputs, inputs, rank) in [(96, 64, 4), (64, 96, 8), (64, 64, 3)] {
            let bf16 = |x: Tensor| x.to_dtype(DType::BF16);
            let weight = bf16(random((outputs, inputs), 1)?)?;
            let lora = LoraWeights {
                a: random((rank, inputs), 2)?,
                b: random((outputs, rank), 3)?,
                scale: 1e-3,
            };
            let x = bf16(random((500, inputs), 4)?)?;
            let wide = x.to_dtype(DType::F32)?;
            let delta = lora.forward(&wide)?;
            let expected = (wide.matmul(&weight.to_dtype(DType::F32)?.t()?)? + &delta)?;
            let found = Linear::dense(weight, Some(&lora), LoraMode::Merged)?.forward(&x)?;
            assert_eq!(found.dtype(), DType::BF16);
            let error = (found.to_dtype(DType::F32)? - expected)?;
            // Rounding errors have no common direction, so their projection on the delta must be small.
            let along =
                (&error * &delta)?.sum_all()?.to_scalar::<f32>()? / delta.sqr()?.sum_all()?.to_scalar::<f32>()?;
            assert!(
                along.abs() < 0.1,
                "{outputs} x {inputs}: {along} of the delta is missing"
            );
            let worst = error.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(worst < 0.06, "{outputs} x {inputs}: {worst}");
        }
        Ok(())
    }
}
