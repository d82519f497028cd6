//! Matrix products on the CPU, over weights that are packed once for the processor's widest instructions.
//!
//! The products are those of `rten-gemm`, which chooses its kernels at run time: AVX-512 (with VNNI for 8-bit
//! integers), AVX2, NEON or portable code. A packed weight needs no other copy. Each element of a
//! result is summed in an order that depends only on the number of inputs, so a row does not depend on the other rows.

mod dense;
mod int8;
mod matrices;
mod packed;

use std::mem::MaybeUninit;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

pub(super) use dense::DenseWeight;
pub(super) use int8::{Int8Rows, Int8Weight};
pub(super) use matrices::{Factor, multiply_matrices};
pub(super) use packed::PackedWeight;

use super::kernels::cpu_elements;

/// Calls `work` with the number of rows and the elements of a contiguous f32 tensor (rows, width) on the CPU.
pub(super) fn with_rows<T>(x: &Tensor, width: usize, work: impl FnOnce(usize, &[f32]) -> Result<T>) -> Result<T> {
    let (rows, found) = x.dims2()?;
    if found != width {
        bail!("a linear layer has {width} inputs, but was given {found}");
    }
    let (storage, layout) = x.storage_and_layout();
    work(rows, cpu_elements("linear", &storage, layout)?)
}

/// Returns a vector of `rows * width` elements, made of chunks of rows that `work` computes in parallel. It gets the
/// number of a chunk, and returns its elements.
pub(super) fn in_chunks(
    rows: usize,
    width: usize,
    rows_per_chunk: usize,
    work: impl Fn(usize) -> Result<Vec<f32>> + Sync,
) -> Result<Vec<f32>> {
    filled(rows * width, |out| {
        out.par_chunks_mut((rows_per_chunk * width).max(1))
            .enumerate()
            .try_for_each(|(index, out)| {
                let values = work(index)?;
                if values.len() != out.len() {
                    bail!("a chunk has {} elements, expected {}", values.len(), out.len());
                }
                out.write_copy_of_slice(&values);
                Ok(())
            })?;
        #[expect(unsafe_code, reason = "clearing the memory first takes time")]
        // SAFETY: the chunks cover the memory, and each of them was written as a whole.
        Ok(unsafe { out.assume_init_mut() })
    })
}

/// Returns an error unless `x` has as many elements as these rows.
fn check_rows(rows: usize, width: usize, x: &[f32]) -> Result<()> {
    if x.len() != rows * width {
        bail!(
            "a product of {rows} rows got {} elements, expected {}",
            x.len(),
            rows * width
        );
    }
    Ok(())
}

/// Returns a vector of `len` elements, all of which `fill` writes.
///
/// `fill` returns the elements that it has initialised, which must be all of them.
fn filled<T>(len: usize, fill: impl for<'a> FnOnce(&'a mut [MaybeUninit<T>]) -> Result<&'a mut [T]>) -> Result<Vec<T>> {
    let mut values = Vec::with_capacity(len);
    let space = &mut values.spare_capacity_mut()[..len];
    let start = space.as_ptr().cast::<T>();
    let initialised = fill(space)?;
    if initialised.len() != len || initialised.as_ptr() != start {
        bail!("a product filled {} of {len} elements", initialised.len());
    }
    #[expect(
        unsafe_code,
        reason = "clearing the memory first takes as long as a part of the product"
    )]
    // SAFETY: `initialised` is a reference to initialised elements, and it covers exactly this memory.
    unsafe {
        values.set_len(len);
    }
    Ok(values)
}

/// Returns the error of a product as one of this module.
fn product_error(error: rten_gemm::GemmError) -> candle_core::Error {
    candle_core::Error::Msg(format!("a matrix product failed: {error}"))
}
