//! A frozen linear layer, dense or quantised, with an optional low-rank delta beside it.

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Module, Result, Shape, Tensor, bail};

use crate::model::files::lora::LoraWeights;

/// candle's VNNI kernels for Q8_0 want rows of whole 256-element blocks; narrower rows fall to a
/// path three to six times slower, so rows are padded with zeros.
const QUANTIZED_WIDTH: usize = 256;

/// Half-precision matrix products want rows of whole 16-byte pieces.
const RANK_MULTIPLE: usize = 8;

/// How a delta meets the frozen weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoraMode {
    /// Added into the weight when it is loaded: no cost per token. Exact enough in f32 only.
    Merged,
    /// Computed beside the weight: `x W' + scale (x A') B'`.
    Unmerged,
}

/// `y = x W'`, plus the delta where one is unmerged.
#[derive(Debug)]
pub struct Linear {
    weight: Weight,
    lora: Option<LoraWeights>,
}

#[derive(Debug)]
enum Weight {
    /// (outputs, inputs).
    Dense(Tensor),
    /// A weight that is not f32 with its delta.
    Widened(Widened),
    /// Rows padded to a multiple of [`QUANTIZED_WIDTH`].
    Quantized { matmul: QMatMul, padding: usize },
}

impl Linear {
    /// A dense layer with weight (outputs, inputs) and an optional delta, which is brought to where the
    /// weight is. A weight that is not f32 would round a small delta away: there it stays beside the weight,
    /// whatever `mode` says, in the weight's dtype, which rounds it by its own size only.
    ///
    /// # Errors
    /// candle's, on shapes that do not fit; callers check shapes first.
    pub fn dense(weight: Tensor, lora: Option<&LoraWeights>, mode: LoraMode) -> Result<Self> {
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
                weight: Weight::Widened(Widened::new(&weight, &lora)?),
                lora: None,
            }),
            (lora, _) => Ok(Self {
                weight: Weight::Dense(weight),
                lora,
            }),
        }
    }

    /// The same in Q8_0. The delta stays beside the weight, in f32: quantising it away is what a
    /// merge would do to a small one.
    ///
    /// # Errors
    /// candle's.
    pub fn quantized(weight: &Tensor, lora: Option<&LoraWeights>) -> Result<Self> {
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

    /// (tokens, inputs) to (tokens, outputs).
    ///
    /// # Errors
    /// candle's.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let (Weight::Dense(weight), Some(live)) = (&self.weight, &self.lora)
            && weight.dtype() != DType::F32
        {
            return Widened::new(weight, live)?.forward(x);
        }
        let y = match &self.weight {
            Weight::Dense(weight) => x.matmul(&weight.t()?)?,
            Weight::Widened(widened) => widened.forward(x)?,
            Weight::Quantized { matmul, padding: 0 } => matmul.forward(x)?,
            Weight::Quantized { matmul, padding } => matmul.forward(&x.pad_with_zeros(1, 0, *padding)?)?,
        };
        match &self.lora {
            None => Ok(y),
            Some(lora) => y + lora.forward(x)?,
        }
    }
}

impl Linear {
    /// Puts a delta beside the weight; the tensors may be variables, whose updates it then follows.
    pub(crate) fn attach(&mut self, lora: LoraWeights) {
        self.lora = Some(lora);
    }

    /// As [`Linear::forward`], with gradients to `x` and to the delta, and none to the weight.
    ///
    /// # Errors
    /// candle's; a quantised weight, or one that was loaded with a delta.
    pub(crate) fn differentiable(&self, x: &Tensor) -> Result<Tensor> {
        let Weight::Dense(weight) = &self.weight else {
            bail!("training needs plain weights, neither quantised nor joined with a delta")
        };
        let y = x.apply_op1(Frozen { weight: weight.clone() })?;
        match &self.lora {
            None => Ok(y),
            Some(lora) => y + lora.forward(x)?,
        }
    }
}

/// A weight and its delta as one product, `[x, x A'] [W, scale B]'`, in the weight's dtype.
///
/// The products are summed in f32 and the sum is rounded once. Added to outputs that were rounded already, a
/// delta below half of their last place would vanish, as it would in the weight.
#[derive(Debug)]
struct Widened {
    /// (outputs, inputs + rank).
    weight: Tensor,
    /// (rank, inputs); the rank is padded with zeros.
    a: Tensor,
}

impl Widened {
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

/// `x W'`, f32 whatever the weight is, whose backward gives the gradient of `x` only: a frozen weight's would be as
/// large as the weight, computed and thrown away.
struct Frozen {
    weight: Tensor,
}

impl Frozen {
    /// Rows, outputs and inputs of the product.
    fn sizes(&self, x: &Layout) -> Result<(usize, usize, usize)> {
        let (m, k) = x.shape().dims2()?;
        let (n, inputs) = self.weight.dims2()?;
        if k != inputs {
            bail!("a linear layer of {inputs} inputs was given {k}");
        }
        Ok((m, n, k))
    }
}

impl CustomOp1 for Frozen {
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

    /// A delta of a thousandth of the weight, which bf16 would lose in a sum with it.
    #[test]
    fn a_small_delta_beside_a_bf16_weight_is_kept() -> Result<()> {
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
            // Rounding has no direction: along the delta, next to nothing of the delta may be missing.
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
