//! Products with frozen weights that have a gradient for their input and none for the weight, which would be as large
//! as the weight and is not needed.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

use crate::model::kernels::elements;
use crate::model::products::{DenseWeight, with_rows};

/// Computes `x W'` on the CPU.
pub(super) struct FrozenDenseProduct {
    pub(super) weight: Arc<DenseWeight>,
}

impl CustomOp1 for FrozenDenseProduct {
    fn name(&self) -> &'static str {
        "frozen-dense-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let rows = layout.shape().dims2()?.0;
        let y = self.weight.multiply(rows, elements(self.name(), storage, layout)?)?;
        Ok((CpuStorage::F32(y), Shape::from((rows, self.weight.outputs()))))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        let product = with_rows(&gradient, self.weight.outputs(), |rows, gradient| {
            self.weight.multiply_back(rows, gradient)
        })?;
        Tensor::from_vec(product, x.shape(), x.device()).map(Some)
    }
}

/// Computes `x W'` in f32 on a GPU, for a weight of any dtype.
pub(super) struct FrozenProduct {
    pub(super) weight: Tensor,
}

#[cfg(feature = "cuda")]
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

    fn cpu_fwd(&self, _storage: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("a weight on a GPU cannot be multiplied on the CPU")
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
