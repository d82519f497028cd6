//! Products of 8-bit integers.
//!
//! Weights are quantised once for each output: `w = scale * q`, where the scale is the largest magnitude of the row
//! over 127. Inputs are quantised for each row when they are computed: `x = scale * (q - zero)`, where the 256 values
//! cover the row from its smallest element to its largest. Products are summed in 32-bit integers, which is exact.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;
use rten_gemm::{GemmExecutor, GemmInputA, GemmInputB, GemmUninitOptions, PackedAMatrix, PackedBMatrix};
use rten_tensor::NdTensorView;

use super::super::kernels::dispatch;
use super::{check_rows, filled, product_error, with_rows};

thread_local! {
    /// The kernel of this processor. It can be shared by threads, but not be moved between them.
    static EXECUTOR: GemmExecutor<u8, i8, i32> = GemmExecutor::new();
}

/// The largest magnitude of a quantised weight.
///
/// Without VNNI, AVX2 adds two products of an 8-bit input and a weight in 16 bits, which holds `2 * 255 * 64`.
fn largest_weight() -> f32 {
    if EXECUTOR.with(GemmExecutor::may_saturate) {
        64.0
    } else {
        127.0
    }
}

/// A matrix W of 8-bit integers, with a scale for each output, packed for products `x W'`.
pub(in crate::model) struct Int8Weight {
    packed: PackedBMatrix<i8>,
    /// The scale of each output.
    scales: Vec<f32>,
    /// The sum of the integers of each output.
    sums: Vec<i32>,
}

impl std::fmt::Debug for Int8Weight {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Int8Weight({} x {})", self.scales.len(), self.packed.rows())
    }
}

/// Rows of an input as 8-bit integers, packed for products, which can be multiplied by several weights.
pub(in crate::model) struct Int8Rows {
    packed: PackedAMatrix<u8>,
    /// The scale of each row, and the integer that stands for zero.
    parameters: Vec<(f32, u8)>,
}

impl std::fmt::Debug for Int8Rows {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "Int8Rows({} x {})",
            self.parameters.len(),
            self.packed.cols()
        )
    }
}

impl Int8Rows {
    /// Quantises the rows of `x`: (rows * width).
    ///
    /// # Errors
    /// Returns an error if the length does not fit.
    pub(in crate::model) fn new(rows: usize, width: usize, x: &[f32]) -> Result<Self> {
        check_rows(rows, width, x)?;
        let mut values = vec![0; x.len()];
        let mut parameters = vec![(0.0, 0); rows];
        dispatch(
            #[inline(always)]
            || {
                let rows = x.chunks_exact(width).zip(values.chunks_exact_mut(width));
                for ((x, out), parameters) in rows.zip(&mut parameters) {
                    *parameters = quantise_row(x, out);
                }
            },
        );
        let view = NdTensorView::from_data([rows, width], &values[..]);
        Ok(Self {
            packed: EXECUTOR.with(|executor| executor.prepack_a(view)),
            parameters,
        })
    }
}

/// Quantises a row and returns its scale and the integer that stands for zero. Elements that are not finite become
/// arbitrary integers, and the scale is then NaN.
#[inline(always)]
fn quantise_row(x: &[f32], out: &mut [u8]) -> (f32, u8) {
    // The range includes zero, so zero is exact.
    let (mut low, mut high, mut not_finite) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            // Comparisons skip NaN, so it is found by a product that is zero for all other finite values.
            not_finite[lane] = block[lane].mul_add(0.0, not_finite[lane]);
            low[lane] = if block[lane] < low[lane] {
                block[lane]
            } else {
                low[lane]
            };
            high[lane] = if block[lane] > high[lane] {
                block[lane]
            } else {
                high[lane]
            };
        }
    }
    let low = low.iter().chain(rest).copied().fold(0f32, f32::min);
    let high = high.iter().chain(rest).copied().fold(0f32, f32::max);
    let not_finite = rest
        .iter()
        .fold(not_finite.iter().sum::<f32>(), |sum, x| x.mul_add(0.0, sum));
    let scale = (high - low) / 255.0 + not_finite;
    if scale == 0.0 {
        out.fill(0);
        return (0.0, 0);
    }
    let inverse = 1.0 / scale;
    let zero = (-low * inverse).round();
    // Adding 2^23 rounds to the nearest integer and leaves it in the low bits of the mantissa. The sum is never
    // negative, because `low` becomes zero.
    const ROUND: f32 = 8_388_608.0;
    for (out, x) in out.iter_mut().zip(x) {
        let value = x.mul_add(inverse, zero).clamp(0.0, 255.0) + ROUND;
        *out = value.to_bits() as u8;
    }
    (scale, zero as u8)
}

/// Number of independent smallest and largest values.
const LANES: usize = 32;

impl Int8Weight {
    /// Quantises and packs a weight: (outputs, inputs), f32, contiguous, on the CPU.
    ///
    /// # Errors
    /// Returns an error if the tensor is of another kind.
    pub(in crate::model) fn new(weight: &Tensor) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        with_rows(weight, inputs, |_, values| {
            let largest = largest_weight();
            let mut quantised = vec![0i8; values.len()];
            let (mut scales, mut sums) = (vec![0f32; outputs], vec![0i32; outputs]);
            let rows = values.par_chunks(inputs).zip(quantised.par_chunks_mut(inputs));
            rows.zip(&mut scales)
                .zip(&mut sums)
                .for_each(|(((row, out), scale), sum)| {
                    let magnitude = row.iter().fold(0f32, |largest, value| largest.max(value.abs()));
                    *scale = magnitude / largest;
                    let inverse = if magnitude == 0.0 { 0.0 } else { largest / magnitude };
                    for (out, value) in out.iter_mut().zip(row) {
                        *out = (value * inverse).round() as i8;
                        *sum += i32::from(*out);
                    }
                });
            let view = NdTensorView::from_data([outputs, inputs], &quantised[..]);
            Ok(Self {
                packed: EXECUTOR.with(|executor| executor.prepack_b(view.transposed())),
                scales,
                sums,
            })
        })
    }

    /// Returns the number of elements of a row of the product.
    pub(in crate::model) fn outputs(&self) -> usize {
        self.scales.len()
    }

    /// Returns `x W'`: (rows * outputs).
    ///
    /// # Errors
    /// Returns an error if the widths differ.
    pub(in crate::model) fn multiply(&self, x: &Int8Rows) -> Result<Vec<f32>> {
        let (inputs, outputs) = (self.packed.rows(), self.outputs());
        if x.packed.cols() != inputs {
            bail!("a linear layer has {inputs} inputs, but was given {}", x.packed.cols());
        }
        let sums = filled(x.parameters.len() * outputs, |out| {
            let (x, weight) = (GemmInputA::Packed(&x.packed), GemmInputB::Packed(&self.packed));
            // `rten-gemm` 0.27 confuses the zeros of rows in different tiles, so they are subtracted below.
            EXECUTOR
                .with(|executor| executor.gemm_uninit(out, x, weight, GemmUninitOptions::default()))
                .map_err(product_error)
        });
        let mut sums: Vec<i32> = sums?;
        dispatch(
            #[inline(always)]
            || {
                for (sums, (scale, zero)) in sums.chunks_exact_mut(outputs).zip(&x.parameters) {
                    self.scale_row(sums, *scale, i32::from(*zero));
                }
            },
        );
        Ok(bytemuck::cast_vec(sums))
    }

    /// Replaces the sums of a row by the bits of the product in f32.
    #[inline(always)]
    fn scale_row(&self, sums: &mut [i32], scale: f32, zero: i32) {
        let columns = self.scales.iter().zip(&self.sums);
        for (sum, (weight_scale, weight_sum)) in sums.iter_mut().zip(columns) {
            let product = (*sum - zero * weight_sum) as f32 * (scale * weight_scale);
            *sum = product.to_bits() as i32;
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::super::super::kernels::tests::random;
    use super::*;

    fn quantised(x: &Tensor) -> Result<Int8Rows> {
        let (_, width) = x.dims2()?;
        with_rows(x, width, |rows, x| Int8Rows::new(rows, width, x))
    }

    /// The error of a product is within what rounding each factor to its nearest integer can cause.
    #[test]
    fn products_are_within_the_error_of_rounding() -> Result<()> {
        for (rows, inputs, outputs) in [(1, 64, 48), (7, 33, 5), (41, 640, 256), (70, 300, 129)] {
            let (x, weight) = (random((rows, inputs), 1)?, random((outputs, inputs), 2)?);
            let exact = x.matmul(&weight.t()?)?.flatten_all()?.to_vec1::<f32>()?;
            let found = Int8Weight::new(&weight)?.multiply(&quantised(&x)?)?;
            let (x, weight) = (x.to_vec2::<f32>()?, weight.to_vec2::<f32>()?);
            let sum = |row: &[f32]| row.iter().map(|value| value.abs()).sum::<f32>();
            for (index, (found, exact)) in found.iter().zip(&exact).enumerate() {
                let (x, weight) = (&x[index / outputs], &weight[index % outputs]);
                let (low, high) = x.iter().fold((0f32, 0f32), |(low, high), &x| (low.min(x), high.max(x)));
                let step = (high - low) / 255.0;
                let weight_step = weight.iter().fold(0f32, |a, b| a.max(b.abs())) / largest_weight();
                // Half a step of each factor, the product of both, and half a step for the rounded zero.
                let bound = 0.5 * weight_step * sum(x) + step * sum(weight) + inputs as f32 * step * weight_step;
                assert!(
                    (found - exact).abs() <= bound,
                    "element {index}: {found}, expected {exact} within {bound}"
                );
            }
        }
        Ok(())
    }

    /// Factors that are integers already are not rounded, so the product is exact. Each row has another zero.
    #[test]
    fn integers_are_multiplied_exactly() -> Result<()> {
        for (rows, inputs, outputs) in [(1, 64, 48), (5, 70, 9), (70, 300, 129), (130, 1100, 65)] {
            let largest = largest_weight();
            let integers = |x: Tensor, range: &dyn Fn(usize) -> (f32, f32)| -> Result<Tensor> {
                let mut rows = x.to_vec2::<f32>()?;
                for (index, row) in rows.iter_mut().enumerate() {
                    let (low, high) = range(index);
                    for value in row.iter_mut() {
                        *value = (low + (*value + 1.0) / 2.0 * (high - low)).round();
                    }
                    (row[0], row[1]) = (low, high);
                }
                Tensor::new(rows, &candle_core::Device::Cpu)
            };
            let x = integers(random((rows, inputs), 1)?, &|row| {
                let low = -((row * 37 % 256) as f32);
                (low, low + 255.0)
            })?;
            let weight = integers(random((outputs, inputs), 2)?, &|_| (-largest, largest))?;
            let wide = |x: &Tensor| x.to_dtype(DType::F64);
            let exact = wide(&x)?.matmul(&wide(&weight)?.t()?)?;
            let exact = exact.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let found = Int8Weight::new(&weight)?.multiply(&quantised(&x)?)?;
            assert_eq!(found, exact, "{rows} x {inputs} x {outputs}");
        }
        Ok(())
    }

    #[test]
    fn rows_of_zeros_give_zero() -> Result<()> {
        let x = Tensor::zeros((2, 40), candle_core::DType::F32, &candle_core::Device::Cpu)?;
        let weight = Int8Weight::new(&random((3, 40), 1)?)?;
        assert_eq!(weight.multiply(&quantised(&x)?)?, [0.0; 6]);
        assert!(weight.multiply(&quantised(&random((1, 41), 1)?)?).is_err());
        Ok(())
    }

    /// A value that is not finite must not become an ordinary number.
    #[test]
    fn infinite_inputs_give_no_finite_product() -> Result<()> {
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let mut x = random((1, 64), 1)?.flatten_all()?.to_vec1::<f32>()?;
            x[40] = bad;
            let x = Tensor::from_vec(x, (1, 64), &candle_core::Device::Cpu)?;
            let product = Int8Weight::new(&random((3, 64), 1)?)?.multiply(&quantised(&x)?)?;
            assert!(product.iter().all(|value| !value.is_finite()), "{bad}: {product:?}");
        }
        Ok(())
    }
}
