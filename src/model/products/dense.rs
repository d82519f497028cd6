//! Products in f32 over a weight that is not packed, in both directions.

use candle_core::{Result, Tensor};
use rten_gemm::{GemmInputA, GemmInputB, GemmUninitOptions};
use rten_tensor::{Layout, Matrix, NdTensorView};

use super::packed::EXECUTOR;
use super::{Factor, check_rows, filled, multiply_matrices, product_error, with_rows};

/// A matrix W in f32 for products with W' and with W, as training needs them.
///
/// Packing it for both directions would take twice the memory. It is stored transposed, because `x W'` is then packed
/// almost as fast as it is read, and training computes that product twice as often as the other.
#[derive(Debug)]
pub(in crate::model) struct DenseWeight {
    /// W': (inputs, outputs)
    transposed: Tensor,
}

impl DenseWeight {
    /// Stores a weight: (outputs, inputs), f32, on the CPU.
    ///
    /// # Errors
    /// Returns an error if the tensor is of another kind.
    pub(in crate::model) fn new(weight: &Tensor) -> Result<Self> {
        Ok(Self {
            transposed: weight.t()?.contiguous()?,
        })
    }

    /// Returns the number of rows of W.
    pub(in crate::model) fn outputs(&self) -> usize {
        self.transposed.dims()[1]
    }

    /// Returns the number of columns of W.
    pub(in crate::model) fn inputs(&self) -> usize {
        self.transposed.dims()[0]
    }

    /// Returns `x W'`, (rows * outputs), for `x` of (rows * inputs).
    ///
    /// # Errors
    /// Returns an error if the length does not fit.
    pub(in crate::model) fn multiply(&self, rows: usize, x: &[f32]) -> Result<Vec<f32>> {
        with_rows(&self.transposed, self.outputs(), |inputs, values| {
            let weight = NdTensorView::from_data([inputs, self.outputs()], values);
            product(rows, x, weight)
        })
    }

    /// Writes `x W'` to `y`, (rows * outputs), for `x` of (rows * inputs).
    ///
    /// # Errors
    /// Returns an error if a length does not fit.
    pub(in crate::model) fn multiply_into(&self, rows: usize, x: &[f32], y: &mut [f32]) -> Result<()> {
        check_rows(rows, self.inputs(), x)?;
        with_rows(&self.transposed, self.outputs(), |inputs, weight| {
            let weight = Factor::new(inputs, self.outputs(), weight);
            multiply_matrices(1.0, Factor::new(rows, inputs, x), weight, 0.0, y)
        })
    }

    /// Writes `y W + beta x` to `x`, (rows * inputs), for `y` of (rows * outputs).
    ///
    /// # Errors
    /// Returns an error if a length does not fit.
    pub(in crate::model) fn multiply_back_into(&self, rows: usize, y: &[f32], beta: f32, x: &mut [f32]) -> Result<()> {
        check_rows(rows, self.outputs(), y)?;
        with_rows(&self.transposed, self.outputs(), |inputs, weight| {
            let weight = Factor::new(inputs, self.outputs(), weight).transposed();
            multiply_matrices(1.0, Factor::new(rows, self.outputs(), y), weight, beta, x)
        })
    }

    /// Returns `y W`, (rows * inputs), for `y` of (rows * outputs).
    ///
    /// # Errors
    /// Returns an error if the length does not fit.
    #[cfg(test)]
    pub(in crate::model) fn multiply_back(&self, rows: usize, y: &[f32]) -> Result<Vec<f32>> {
        with_rows(&self.transposed, self.outputs(), |inputs, values| {
            let weight = NdTensorView::from_data([inputs, self.outputs()], values);
            product(rows, y, weight.transposed())
        })
    }
}

/// Returns the product of `x`, (rows * inputs), and a matrix (inputs, outputs).
fn product(rows: usize, x: &[f32], weight: Matrix<'_, f32>) -> Result<Vec<f32>> {
    let [inputs, outputs] = weight.shape();
    check_rows(rows, inputs, x)?;
    let x = NdTensorView::from_data([rows, inputs], x);
    filled(rows * outputs, |out| {
        let (x, weight) = (GemmInputA::Unpacked(x), GemmInputB::Unpacked(weight));
        EXECUTOR
            .with(|executor| executor.gemm_uninit(out, x, weight, GemmUninitOptions::default()))
            .map_err(product_error)
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::super::kernels::tests::{assert_close, random};
    use super::*;

    #[test]
    fn both_directions_equal_those_of_candle() -> Result<()> {
        for (rows, inputs, outputs) in [(1, 64, 48), (7, 33, 5), (41, 640, 256)] {
            let weight = random((outputs, inputs), 1)?;
            let dense = DenseWeight::new(&weight)?;
            assert_eq!((dense.outputs(), dense.inputs()), (outputs, inputs));
            let (x, y) = (random((rows, inputs), 2)?, random((rows, outputs), 3)?);
            let tensor = |values: Vec<f32>, width| Tensor::from_vec(values, (rows, width), &Device::Cpu);
            let found = with_rows(&x, inputs, |rows, x| dense.multiply(rows, x))?;
            assert_close(&tensor(found, outputs)?, &x.matmul(&weight.t()?)?, 1e-4);
            let found = with_rows(&y, outputs, |rows, y| dense.multiply_back(rows, y))?;
            assert_close(&tensor(found, inputs)?, &y.matmul(&weight)?, 1e-4);
            let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
            let mut into = vec![f32::NAN; rows * outputs];
            dense.multiply_into(rows, &values(&x)?, &mut into)?;
            assert_close(&tensor(into, outputs)?, &x.matmul(&weight.t()?)?, 1e-4);
            let mut into = values(&x)?;
            dense.multiply_back_into(rows, &values(&y)?, 1.0, &mut into)?;
            assert_close(&tensor(into, inputs)?, &(y.matmul(&weight)? + &x)?, 1e-4);
            assert!(dense.multiply(rows + 1, &[0.0]).is_err());
        }
        Ok(())
    }
}
