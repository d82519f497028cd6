//! Products in f32.

use candle_core::{Result, Tensor};
use rten_gemm::{GemmExecutor, GemmInputA, GemmInputB, GemmOptions, GemmUninitOptions, PackedBMatrix};
use rten_tensor::NdTensorView;

use super::{check_rows, filled, product_error, with_rows};

thread_local! {
    /// The kernel of this processor. It can be shared by threads, but not be moved between them.
    pub(super) static EXECUTOR: GemmExecutor<f32, f32, f32> = GemmExecutor::new();
}

/// A matrix W in f32, packed for products `x W'`.
pub(in crate::model) struct PackedWeight {
    packed: PackedBMatrix<f32>,
}

impl std::fmt::Debug for PackedWeight {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "PackedWeight({} x {})", self.outputs(), self.inputs())
    }
}

impl PackedWeight {
    /// Packs a weight: (outputs, inputs), f32, contiguous, on the CPU.
    ///
    /// # Errors
    /// Returns an error if the tensor is of another kind.
    pub(in crate::model) fn new(weight: &Tensor) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        with_rows(weight, inputs, |_, values| {
            let view = NdTensorView::from_data([outputs, inputs], values);
            Ok(Self {
                packed: EXECUTOR.with(|executor| executor.prepack_b(view.transposed())),
            })
        })
    }

    /// Returns the number of elements of a row of `x`.
    pub(in crate::model) fn inputs(&self) -> usize {
        self.packed.rows()
    }

    /// Returns the number of elements of a row of the product.
    pub(in crate::model) fn outputs(&self) -> usize {
        self.packed.cols()
    }

    /// Returns `x W'`, (rows * outputs), for `x` of (rows * inputs).
    ///
    /// # Errors
    /// Returns an error if the length does not fit.
    pub(in crate::model) fn multiply(&self, rows: usize, x: &[f32]) -> Result<Vec<f32>> {
        check_rows(rows, self.inputs(), x)?;
        let x = NdTensorView::from_data([rows, self.inputs()], x);
        filled(rows * self.outputs(), |out| {
            let (x, weight) = (GemmInputA::Unpacked(x), GemmInputB::Packed(&self.packed));
            EXECUTOR
                .with(|executor| executor.gemm_uninit(out, x, weight, GemmUninitOptions::default()))
                .map_err(product_error)
        })
    }

    /// Adds `x W'` to `y`, (rows * outputs), for `x` of (rows * inputs).
    ///
    /// # Errors
    /// Returns an error if a length does not fit.
    pub(in crate::model) fn multiply_add(&self, rows: usize, x: &[f32], y: &mut [f32]) -> Result<()> {
        check_rows(rows, self.inputs(), x)?;
        let x = NdTensorView::from_data([rows, self.inputs()], x);
        let options = GemmOptions {
            beta: 1.0,
            ..GemmOptions::default()
        };
        let (x, weight) = (GemmInputA::Unpacked(x), GemmInputB::Packed(&self.packed));
        EXECUTOR
            .with(|executor| executor.gemm(y, x, weight, options))
            .map_err(product_error)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::kernels::tests::{assert_close, random};
    use super::*;

    #[test]
    fn products_equal_those_of_candle() -> Result<()> {
        for (rows, inputs, outputs) in [(1, 64, 48), (7, 33, 5), (41, 640, 256), (70, 300, 129)] {
            let (x, weight) = (random((rows, inputs), 1)?, random((outputs, inputs), 2)?);
            let y = random((rows, outputs), 3)?;
            let expected = x.matmul(&weight.t()?)?;
            let packed = PackedWeight::new(&weight)?;
            assert_eq!((packed.inputs(), packed.outputs()), (inputs, outputs));
            with_rows(&x, inputs, |_, x| {
                let tensor = |values: Vec<f32>| Tensor::from_vec(values, (rows, outputs), &candle_core::Device::Cpu);
                assert_close(&tensor(packed.multiply(rows, x)?)?, &expected, 1e-4);
                let mut sum = y.flatten_all()?.to_vec1::<f32>()?;
                packed.multiply_add(rows, x, &mut sum)?;
                assert_close(&tensor(sum)?, &(&expected + &y)?, 1e-4);
                assert!(packed.multiply(rows + 1, x).is_err());
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The bits of a row are the same alone and among others.
    #[test]
    fn a_row_does_not_depend_on_the_others() -> Result<()> {
        let (x, weight) = (random((70, 640), 1)?, PackedWeight::new(&random((130, 640), 2)?)?);
        let all = with_rows(&x, 640, |rows, x| weight.multiply(rows, x))?;
        for (row, expected) in all.chunks_exact(130).enumerate() {
            let alone = with_rows(&x.narrow(0, row, 1)?, 640, |rows, x| weight.multiply(rows, x))?;
            assert_eq!(alone, expected, "row {row}");
        }
        Ok(())
    }
}
