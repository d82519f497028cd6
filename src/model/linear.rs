//! A frozen linear layer, dense or quantised, with an optional low-rank delta beside it.

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Module, Result, Shape, Tensor, bail};

use super::lora::LoraWeights;

/// candle's VNNI kernels for Q8_0 want rows of whole 256-element blocks; narrower rows fall to a
/// path three to six times slower, so rows are padded with zeros.
const QUANTIZED_WIDTH: usize = 256;

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
    /// Rows padded to a multiple of [`QUANTIZED_WIDTH`].
    Quantized { matmul: QMatMul, padding: usize },
}

impl Linear {
    /// A dense layer with weight (outputs, inputs) and an optional delta, which is brought to where the
    /// weight is. Beside a weight that is not f32 it stays whatever `mode` says: such a weight would
    /// round a small delta away.
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
        let y = match &self.weight {
            Weight::Dense(weight) => x.matmul(&weight.t()?)?,
            Weight::Quantized { matmul, padding: 0 } => matmul.forward(x)?,
            Weight::Quantized { matmul, padding } => matmul.forward(&x.pad_with_zeros(1, 0, *padding)?)?,
        };
        match &self.lora {
            None => Ok(y),
            Some(lora) => {
                let y = (y.to_dtype(DType::F32)? + lora.forward(&x.to_dtype(DType::F32)?)?)?;
                y.to_dtype(x.dtype())
            }
        }
    }
}

impl Linear {
    /// Puts a delta beside the weight; the tensors may be variables, whose updates it then follows.
    pub(super) fn attach(&mut self, lora: LoraWeights) {
        self.lora = Some(lora);
    }

    /// As [`Linear::forward`], with gradients to `x` and to the delta, and none to the weight.
    ///
    /// # Errors
    /// candle's; a quantised weight.
    pub(super) fn differentiable(&self, x: &Tensor) -> Result<Tensor> {
        let Weight::Dense(weight) = &self.weight else {
            bail!("training needs weights that are not quantised")
        };
        let y = x.apply_op1(Frozen { weight: weight.clone() })?;
        match &self.lora {
            None => Ok(y),
            Some(lora) => y + lora.forward(x)?,
        }
    }
}

/// `x W'`, f32 whatever the weight is, whose backward gives the gradient of `x` only: a frozen weight's would be as large as the
/// weight, computed and thrown away.
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
