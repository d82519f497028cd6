//! Products of a few hidden states with the whole unembedding, on the CPU.
//!
//! With few hidden states, reading the table takes longer than the arithmetic. A general product would first write a copy
//! of it in f32. Here, a few rows at a time are converted in the cache.

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::model::kernels::{dispatch, dot};

/// The most hidden states for which these products are faster than general ones.
pub(super) const FEW: usize = 16;

/// Number of rows of the table that one parallel task multiplies. It determines the order of additions, so that a result
/// does not depend on the number of threads.
const ROWS_PER_TASK: usize = 1024;

/// Returns the product of each hidden state, (positions, width), with each row of `table`, (rows, width):
/// (positions, rows).
pub(super) fn logits(hidden: &[f32], table: &Tensor) -> Result<Vec<f32>> {
    let (rows, width) = table.dims2()?;
    let positions = hidden.len() / width;
    let parts = map_tasks(
        table,
        #[inline(always)]
        |_, rows| {
            let mut part = Vec::with_capacity(rows.count * positions);
            rows.for_each(
                #[inline(always)]
                |row| {
                    for hidden in hidden.chunks_exact(width) {
                        part.push(dot(hidden, row));
                    }
                },
            );
            part
        },
    )?;
    let mut logits = vec![0f32; positions * rows];
    logits
        .par_chunks_exact_mut(rows)
        .enumerate()
        .for_each(|(position, logits)| {
            let products = parts
                .iter()
                .flat_map(|part| part.iter().skip(position).step_by(positions));
            logits
                .iter_mut()
                .zip(products)
                .for_each(|(logit, product)| *logit = *product);
        });
    Ok(logits)
}

/// Returns the sum of the rows of `table`, (rows, width), times the factors of each position, (positions, rows):
/// (positions, width).
pub(super) fn weighted_rows(factors: &[f32], table: &Tensor) -> Result<Vec<f32>> {
    let (rows, width) = table.dims2()?;
    let positions = factors.len() / rows;
    let parts = map_tasks(
        table,
        #[inline(always)]
        |first, table_rows| {
            let mut sums = vec![0f32; positions * width];
            let mut index = first;
            table_rows.for_each(
                #[inline(always)]
                |row| {
                    for (position, sum) in sums.chunks_exact_mut(width).enumerate() {
                        let factor = factors[position * rows + index];
                        for (sum, value) in sum.iter_mut().zip(row) {
                            *sum = factor.mul_add(*value, *sum);
                        }
                    }
                    index += 1;
                },
            );
            sums
        },
    )?;
    let mut total = vec![0f32; positions * width];
    for part in parts {
        total.iter_mut().zip(part).for_each(|(total, part)| *total += part);
    }
    Ok(total)
}

/// Some rows of a table.
struct TableRows<'a> {
    elements: Elements<'a>,
    count: usize,
    width: usize,
}

#[derive(Clone, Copy)]
enum Elements<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl TableRows<'_> {
    /// Calls `work` with each row in f32.
    #[inline(always)]
    fn for_each(&self, mut work: impl FnMut(&[f32])) {
        let width = self.width;
        let mut wide = vec![0f32; width];
        match self.elements {
            Elements::F32(elements) => {
                for row in elements.chunks_exact(width) {
                    work(row);
                }
            }
            Elements::F16(elements) => {
                for row in elements.chunks_exact(width) {
                    row.convert_to_f32_slice(&mut wide);
                    work(&wide);
                }
            }
            Elements::Bf16(elements) => {
                for row in elements.chunks_exact(width) {
                    for (wide, narrow) in wide.iter_mut().zip(row) {
                        *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
                    }
                    work(&wide);
                }
            }
        }
    }
}

/// Calls `work` with the index of the first row and the rows of each task, and returns the results in order.
fn map_tasks<T: Send>(table: &Tensor, work: impl Fn(usize, &TableRows<'_>) -> T + Sync) -> Result<Vec<T>> {
    let (rows, width) = table.dims2()?;
    let (storage, layout) = table.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("the unembedding is not contiguous")
    };
    let elements = match &*storage {
        Storage::Cpu(CpuStorage::F32(elements)) => Elements::F32(&elements[start..end]),
        Storage::Cpu(CpuStorage::F16(elements)) => Elements::F16(&elements[start..end]),
        Storage::Cpu(CpuStorage::BF16(elements)) => Elements::Bf16(&elements[start..end]),
        _ => bail!("the unembedding is {:?} on {:?}", table.dtype(), table.device()),
    };
    let task = |index: usize| {
        let first = index * ROWS_PER_TASK;
        let count = ROWS_PER_TASK.min(rows - first);
        let range = first * width..(first + count) * width;
        let elements = match elements {
            Elements::F32(elements) => Elements::F32(&elements[range]),
            Elements::F16(elements) => Elements::F16(&elements[range]),
            Elements::Bf16(elements) => Elements::Bf16(&elements[range]),
        };
        let rows = TableRows { elements, count, width };
        dispatch(
            #[inline(always)]
            || work(first, &rows),
        )
    };
    Ok((0..rows.div_ceil(ROWS_PER_TASK)).into_par_iter().map(task).collect())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::model::kernels::tests::{assert_close, random};

    #[test]
    fn products_equal_those_of_candle() -> Result<()> {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let table = random((2 * ROWS_PER_TASK + 37, 48), 1)?.to_dtype(dtype)?;
            let (wide, rows) = (table.to_dtype(DType::F32)?, table.dim(0)?);
            for positions in [1, 3] {
                let hidden = random((positions, 48), 2)?;
                let values = hidden.flatten_all()?.to_vec1::<f32>()?;
                let found = Tensor::from_vec(logits(&values, &table)?, (positions, rows), &Device::Cpu)?;
                assert_close(&found, &hidden.matmul(&wide.t()?)?, 1e-5);
                let factors = random((positions, rows), 3)?;
                let values = factors.flatten_all()?.to_vec1::<f32>()?;
                let found = Tensor::from_vec(weighted_rows(&values, &table)?, (positions, 48), &Device::Cpu)?;
                assert_close(&found, &factors.matmul(&wide)?, 1e-4);
            }
        }
        Ok(())
    }
}
