//! An MLP whose three products are in FP8.
//!
//! The kernels before a product write its input as e4m3 with a scale for each row. Deltas stay exact: a delta is
//! computed from inputs in bf16, which are then written as well and quantised by a kernel of their own, and it is added
//! in f32 as in [`super::deltas`]. The residual stream, the norms and the attention are the same as without FP8.

use candle_core::{DType, Result, Tensor, bail};

use super::deltas::LayerDeltas;
use super::pass::Pass;
use super::products::Matrix;
use crate::model::kernels::cuda::fp8::Fp8Weight;
use crate::model::kernels::cuda::launch::AddRmsNorm;
use crate::model::transfer::cuda_tensor::CudaTensor;

/// The weights of an MLP in FP8.
#[derive(Debug)]
pub(in crate::model) struct Fp8Mlp {
    /// (2 inner, hidden)
    gate_up: Fp8Weight,
    /// (hidden, inner)
    down: Fp8Weight,
}

impl Fp8Mlp {
    /// Quantises bf16 weights on a GPU: gate and up, stacked, (2 inner, hidden), and down, (hidden, inner).
    pub(in crate::model) fn new(gate_up: &Tensor, down: &Tensor) -> Result<Self> {
        let quantised = |weight: &Tensor| {
            let (outputs, inputs) = weight.dims2()?;
            if weight.dtype() != DType::BF16 {
                bail!(
                    "a weight that becomes FP8 is expected in bf16, found {:?}",
                    weight.dtype()
                );
            }
            let address = CudaTensor::new("fp8", weight)?.address()?;
            Fp8Weight::new(weight.device().as_cuda_device()?, address, outputs, inputs)
        };
        Ok(Self {
            gate_up: quantised(gate_up)?,
            down: quantised(down)?,
        })
    }
}

impl Pass<'_> {
    /// Computes the same as [`Pass::mlp`] over weights in FP8.
    pub(super) fn fp8_mlp(&self, mlp: &Fp8Mlp, norm: AddRmsNorm, deltas: Option<&LayerDeltas>) -> Result<()> {
        let (base, buffers, sizes, rows) = (self.base, &self.buffers, &self.base.sizes, norm.rows);
        let Some(products) = &base.fp8_products else {
            bail!("products in FP8 are not prepared")
        };
        let gate_up = deltas.and_then(|deltas| deltas.gate_up.as_ref());
        let down = deltas.and_then(|deltas| deltas.down.as_ref());

        if norm.deltas.is_none() && gate_up.is_none() {
            self.kernels.add_rms_norm_fp8(norm, buffers.fp8)?;
        } else {
            self.kernels.add_rms_norm(DType::BF16, norm)?;
            self.kernels
                .quantise_rows_fp8(norm.normed, rows, sizes.hidden, buffers.fp8)?;
        }
        products.multiply(self.products.stream(), rows, buffers.fp8, &mlp.gate_up, buffers.gate_up)?;
        if let Some(deltas) = gate_up {
            self.low(rows, Matrix::new(norm.normed, sizes.hidden), deltas.a(), buffers.low)?;
        }

        let geglu = self.activation(rows, gate_up);
        if gate_up.is_none() && down.is_none() {
            self.kernels.geglu_fp8(&geglu, buffers.fp8)?;
        } else {
            self.kernels.geglu(DType::BF16, geglu)?;
            self.kernels
                .quantise_rows_fp8(buffers.hidden, rows, sizes.inner, buffers.fp8)?;
        }
        products.multiply(self.products.stream(), rows, buffers.fp8, &mlp.down, buffers.y)?;
        match down {
            Some(delta) => self.low(rows, Matrix::new(buffers.hidden, sizes.inner), delta.a(), buffers.low),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, DeviceChoice, DtypeChoice, ModelConfig, Quantize, Sources};
    use crate::model::device::Placement;
    use crate::model::device::gpu::used_bytes;
    use crate::model::files::checkpoint::Checkpoint;
    use crate::model::forward::gemma::Gemma;
    use crate::model::forward::linear::LoraMode;
    use crate::model::forward::load::LoadOptions;
    use crate::model::kernels::cuda::fp8::WORKSPACE_BYTES;
    use crate::test_files::test_file;

    /// Needs a GPU.
    #[test]
    fn the_weights_in_bf16_are_freed() {
        let base = Config::load(&Sources::default()).unwrap().model;
        let used = |quantize| {
            let model = ModelConfig {
                path: Some(test_file("tests/fixtures/gemma3")),
                device: DeviceChoice::Cuda(0),
                dtype: DtypeChoice::Bf16,
                quantize,
                ..base.clone()
            };
            let placement = Placement::from_settings(&model).unwrap();
            let card = placement.device.as_cuda_device().unwrap().clone();
            let options = LoadOptions {
                lora: LoraMode::Unmerged,
                quantize,
                placement,
                for_training: false,
            };
            let (before, _) = used_bytes(&card).unwrap();
            let gemma = Gemma::load(&Checkpoint::from_settings(&model).unwrap(), None, options).unwrap();
            let config = gemma.config();
            let sizes = [config.num_layers(), config.hidden_size, config.intermediate_size].map(|size| size as u64);
            (used_bytes(&card).unwrap().0 - before, sizes)
        };
        let ((bf16, [layers, hidden, inner]), (fp8, _)) = (used(Quantize::None), used(Quantize::Fp8));
        let saved = layers * 3 * hidden * inner;
        // Scales, the workspace of cuBLAS, and the rounding of two more allocations for each weight.
        let added = layers * 4 * (2 * inner + hidden) + WORKSPACE_BYTES as u64 + layers * 4 * 512;
        assert!(fp8 + saved <= bf16 + added, "{fp8} bytes in FP8, {bf16} in bf16");
    }
}
