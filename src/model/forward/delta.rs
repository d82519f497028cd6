//! The low-rank delta of a linear layer, beside its frozen weight: `scale * B A`.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::model::files::lora::LoraWeights;
use crate::model::products::PackedWeight;

/// A delta that is added to the outputs of a layer.
#[derive(Debug, Clone)]
pub(super) enum Delta {
    /// A and B as tensors. In training they are variables, and their updates take effect.
    Tensors(LoraWeights),
    /// A and B in f32, packed for the CPU.
    Packed(Arc<PackedDelta>),
}

/// A delta for products on the CPU.
#[derive(Debug)]
pub(super) struct PackedDelta {
    a: PackedWeight,
    /// The matrix B times the scale.
    b: PackedWeight,
}

impl PackedDelta {
    pub(super) fn new(lora: &LoraWeights) -> Result<Self> {
        Ok(Self {
            a: PackedWeight::new(&lora.a)?,
            b: PackedWeight::new(&(&lora.b * lora.scale)?)?,
        })
    }

    /// Adds `scale (x A') B'` to `y`, (rows * outputs), for `x` of (rows * inputs).
    pub(super) fn add(&self, rows: usize, x: &[f32], y: &mut [f32]) -> Result<()> {
        self.b.multiply_add(rows, &self.a.multiply(rows, x)?, y)
    }
}

/// Half-precision matrix products are fast if rows are multiples of 16 bytes, which are eight elements.
const RANK_MULTIPLE: usize = 8;

/// A weight and its delta, concatenated so that one product computes both: `[x, x A'] [W, scale B]'`, in the weight's
/// dtype. The pass over tensors computes so on a GPU; the scoring pass adds deltas in its kernels.
///
/// The product is summed in f32 and rounded once. If the delta were added to outputs that are already rounded, it would
/// vanish wherever it is smaller than half a unit in their last place.
#[derive(Debug, Clone)]
pub(super) struct WeightWithDelta {
    /// (outputs, inputs + rank)
    weight: Tensor,
    /// (rank, inputs), where the rank is padded with zeros to a multiple of [`RANK_MULTIPLE`].
    a: Tensor,
}

impl WeightWithDelta {
    pub(super) fn new(weight: &Tensor, lora: &LoraWeights) -> Result<Self> {
        let rank = lora.a.dim(0)?;
        let padding = rank.next_multiple_of(RANK_MULTIPLE) - rank;
        let a = lora.a.pad_with_zeros(0, 0, padding)?.to_dtype(weight.dtype())?;
        let b = (&lora.b * lora.scale)?.pad_with_zeros(1, 0, padding)?;
        Ok(Self {
            weight: Tensor::cat(&[weight, &b.to_dtype(weight.dtype())?], 1)?,
            a,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let low = x.matmul(&self.a.t()?)?;
        Tensor::cat(&[x, &low], 1)?.matmul(&self.weight.t()?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::super::linear::{FrozenWeight, Linear, LinearInput};
    use super::*;
    use crate::config::Quantize;
    use crate::model::kernels::tests::{assert_close, random};
    use crate::model::products::with_rows;

    fn lora(outputs: usize, inputs: usize, rank: usize, scale: f64) -> Result<LoraWeights> {
        Ok(LoraWeights {
            a: random((rank, inputs), 2)?,
            b: random((outputs, rank), 3)?,
            scale,
        })
    }

    /// The delta is a thousandth of the weight, so rounding their sum to bf16 would lose it.
    #[test]
    fn a_small_delta_of_a_bf16_weight_takes_effect() -> Result<()> {
        for (outputs, inputs, rank) in [(96, 64, 4), (64, 96, 8), (64, 64, 3)] {
            let bf16 = |x: Tensor| x.to_dtype(DType::BF16);
            let weight = bf16(random((outputs, inputs), 1)?)?;
            let lora = lora(outputs, inputs, rank, 1e-3)?;
            let x = bf16(random((500, inputs), 4)?)?;
            let wide = x.to_dtype(DType::F32)?;
            let delta = lora.forward(&wide)?;
            let expected = (wide.matmul(&weight.to_dtype(DType::F32)?.t()?)? + &delta)?;
            let found = WeightWithDelta::new(&weight, &lora)?.forward(&x)?;
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

    #[test]
    fn a_packed_delta_equals_that_of_tensors() -> Result<()> {
        for rank in [1, 4, 8, 64] {
            let lora = lora(96, 70, rank, 0.5)?;
            let x = random((37, 70), 4)?;
            let mut y = vec![1f32; 37 * 96];
            with_rows(&x, 70, |rows, x| PackedDelta::new(&lora)?.add(rows, x, &mut y))?;
            let y = Tensor::from_vec(y, (37, 96), x.device())?;
            assert_close(&y, &(lora.forward(&x)? + 1.0)?, 1e-4);
        }
        Ok(())
    }

    /// Quantisation concerns the frozen weight alone: what an adapter adds is computed in f32.
    #[test]
    fn a_delta_beside_an_8_bit_weight_is_exact() -> Result<()> {
        let (weight, lora) = (random((96, 64), 1)?, lora(96, 64, 8, 1e-3)?);
        let x = random((37, 64), 4)?;
        let layer = |lora: Option<&LoraWeights>| {
            let layer = Linear::new(FrozenWeight::new(weight.clone(), Quantize::Int8)?, lora)?;
            layer.forward(&LinearInput::new(&x))
        };
        let found = (layer(Some(&lora))? - layer(None)?)?;
        assert_close(&found, &lora.forward(&x)?, 2e-6);
        Ok(())
    }
}
