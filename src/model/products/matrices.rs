//! Products of two matrices in f32, neither of which is a frozen weight.

use candle_core::{Result, bail};
use rten_gemm::{GemmInputA, GemmInputB, GemmOptions};
use rten_tensor::{Layout, Matrix, NdTensorView};

use super::packed::EXECUTOR;
use super::product_error;

/// A factor of a product.
#[derive(Clone, Copy)]
pub(in crate::model) struct Factor<'a>(Matrix<'a, f32>);

impl<'a> Factor<'a> {
    /// Returns a matrix whose rows are end to end.
    ///
    /// # Panics
    /// Panics if the number of elements is not `rows * columns`.
    pub(in crate::model) fn new(rows: usize, columns: usize, elements: &'a [f32]) -> Self {
        Self(NdTensorView::from_data([rows, columns], elements))
    }

    /// Returns the transposed matrix, of which nothing is copied.
    pub(in crate::model) fn transposed(self) -> Self {
        Self(self.0.transposed())
    }
}

/// Writes `alpha a b + beta out` to `out`. If `beta` is zero, the elements of `out` need not be finite.
///
/// # Errors
/// Returns an error if the shapes do not fit each other.
pub(in crate::model) fn multiply_matrices(
    alpha: f32,
    a: Factor<'_>,
    b: Factor<'_>,
    beta: f32,
    out: &mut [f32],
) -> Result<()> {
    let (rows, columns) = (a.0.shape()[0], b.0.shape()[1]);
    if out.len() != rows * columns {
        bail!("a product of {rows} x {columns} elements got {} to write", out.len());
    }
    let options = GemmOptions {
        alpha,
        beta,
        ..GemmOptions::default()
    };
    EXECUTOR
        .with(|executor| executor.gemm(out, GemmInputA::Unpacked(a.0), GemmInputB::Unpacked(b.0), options))
        .map_err(product_error)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::super::super::kernels::tests::{assert_close, random};
    use super::*;

    #[test]
    fn products_equal_those_of_candle() -> Result<()> {
        for (rows, inner, columns) in [(1, 64, 48), (7, 33, 5), (70, 300, 129)] {
            let (a, b) = (random((rows, inner), 1)?, random((inner, columns), 2)?);
            let (flipped_a, flipped_b) = (a.t()?.contiguous()?, b.t()?.contiguous()?);
            let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
            let [a_values, b_values] = [values(&a)?, values(&b)?];
            let [flipped_a, flipped_b] = [values(&flipped_a)?, values(&flipped_b)?];
            let before = random((rows, columns), 3)?;
            for (left, right) in [
                (
                    Factor::new(rows, inner, &a_values),
                    Factor::new(inner, columns, &b_values),
                ),
                (
                    Factor::new(inner, rows, &flipped_a).transposed(),
                    Factor::new(columns, inner, &flipped_b).transposed(),
                ),
            ] {
                let mut out = values(&before)?;
                multiply_matrices(0.5, left, right, 1.0, &mut out)?;
                let found = Tensor::from_vec(out, (rows, columns), &Device::Cpu)?;
                assert_close(&found, &((a.matmul(&b)? * 0.5)? + &before)?, 1e-4);
                let mut out = vec![f32::NAN; rows * columns];
                multiply_matrices(1.0, left, right, 0.0, &mut out)?;
                let found = Tensor::from_vec(out, (rows, columns), &Device::Cpu)?;
                assert_close(&found, &a.matmul(&b)?, 1e-4);
                assert!(multiply_matrices(1.0, left, right, 0.0, &mut [0.0]).is_err() || rows * columns == 1);
            }
        }
        Ok(())
    }
}
