//! Products in FP8 by cuBLAS: inputs and weights are e4m3 with a scale for each row, sums are f32, and outputs bf16.
//!
//! NVIDIA's documentation of cublasLt calls this outer vector scaling, `CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F`:
//! D(i, j) = scale_A(i) * scale_B(j) * (sum over k of A(i, k) B(k, j)). What we rely on:
//!
//! - It came with CUDA 12.9. The documentation lists compute capability 9.0 alone for it; PyTorch also multiplies rows
//!   with scales by cuBLAS only from 12.9 on and only on 9.0, and by CUTLASS elsewhere. So [`unsupported`] asks cuBLAS
//!   for a kernel on later GPUs instead of assuming one.
//! - Products in FP8 are computed only as A' B ("TN"), and only if rows of A and B have a multiple of 16 bytes and
//!   begin at a multiple of 16. Here A is the weight and B the inputs, which are both stored so, and D, by columns, is
//!   the output as it is stored by rows.
//! - The computation is `CUBLAS_COMPUTE_32F`, and D may be bf16, but then has no scale.
//!
//! cudarc's attributes and scale modes are enums with the values of the toolkit that the crate is built with. Those
//! before 12.9 lack ours, so this module passes them as the numbers of cublasLt.h. It builds with every toolkit, and
//! the version of the library decides when it runs.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublaslt::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use candle_core::{CudaDevice, Error, Result, bail};

use super::launch::Fp8Rows;
use crate::model::transfer::cuda_tensor::Address;

/// Lets the tensor cores add all products of a row in their own precision, which is less than that of f32: NVIDIA gives
/// 14 bits for Hopper. Without it, cuBLAS moves partial sums to f32 registers every few products, which costs time. It
/// is off because the sums of a Gemma's MLP have thousands of terms. PyTorch's default is off too.
const FAST_ACCUMULATION: i8 = 0;

/// The memory that cuBLAS may use for partial results. NVIDIA recommends this much for Hopper.
pub(in crate::model) const WORKSPACE_BYTES: usize = 32 << 20;

/// The rows of a product are padded to a multiple of this, so that passes of similar sizes share a plan, and because
/// the tensor cores compute no fewer.
const ROW_STEP: usize = 16;

/// Numbers of cublasLt.h: attributes (`cublasLtMatmulDescAttributes_t`), and values of those for the scale mode and the
/// transposition.
mod number {
    pub(super) const TRANSPOSE_A: u32 = 3;
    pub(super) const A_SCALE_POINTER: u32 = 17;
    pub(super) const B_SCALE_POINTER: u32 = 18;
    pub(super) const FAST_ACCUMULATION: u32 = 25;
    pub(super) const A_SCALE_MODE: u32 = 31;
    pub(super) const B_SCALE_MODE: u32 = 32;
    pub(super) const OUTER_VECTOR: i32 = 3;
    pub(super) const TRANSPOSED: i32 = 1;
}

#[expect(unsafe_code, reason = "a foreign function")]
unsafe extern "C" {
    /// The function of cublasLt.h, with the attribute as a number, which its C enum is.
    fn cublasLtMatmulDescSetAttribute(
        operation: sys::cublasLtMatmulDesc_t,
        attribute: u32,
        value: *const c_void,
        bytes: usize,
    ) -> sys::cublasStatus_t;
}

/// The oldest version of cuBLAS with a scale for each row, as `cublasLtGetVersion` counts: 12.9.0.
const OLDEST_CUBLAS: usize = 120_900;
/// The oldest compute capability with it.
const OLDEST_CAPABILITY: (i32, i32) = (9, 0);

/// Returns why a GPU cannot compute these products, or `None` if it can.
///
/// # Errors
/// Returns an error if the device fails.
pub(in crate::model) fn unsupported(device: &CudaDevice) -> Result<Option<String>> {
    let capability = device.cuda_stream().context().compute_capability().w()?;
    #[expect(unsafe_code, reason = "a foreign call")]
    // SAFETY: the function reads nothing.
    let version = unsafe { sys::cublasLtGetVersion() };
    if let Some(reason) = reason(capability, version) {
        return Ok(Some(reason));
    }
    let products = Fp8Products::new(device)?;
    // A plan alone computes nothing, so any address will do for its scales. A null pointer would mean that there are
    // none.
    let nowhere = Fp8Rows {
        codes: products.workspace_at,
        scales: products.workspace_at,
    };
    let plan = Plan::new(products.handle.0, [256, 256, 256], nowhere, nowhere);
    Ok(plan.err().map(|error| {
        let (major, minor) = capability;
        format!(
            "cuBLAS {} has no FP8 product with a scale for each row on compute capability {major}.{minor} ({error}), \
             expected 9.0",
            cublas_name(version)
        )
    }))
}

/// Returns why a GPU of this capability cannot compute these products with this version of cuBLAS, as far as the
/// numbers say.
fn reason(capability: (i32, i32), cublas: usize) -> Option<String> {
    let (major, minor) = capability;
    if capability < OLDEST_CAPABILITY {
        return Some(format!("the GPU has compute capability {major}.{minor}, expected 9.0"));
    }
    (cublas < OLDEST_CUBLAS).then(|| format!("the library is cuBLAS {}, expected 12.9 or later", cublas_name(cublas)))
}

/// Returns a version of cublasLt as NVIDIA writes it: 130002 is 13.0.2.
fn cublas_name(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// A weight in FP8, (outputs, inputs), with a scale for each output.
#[derive(Debug)]
pub(in crate::model) struct Fp8Weight {
    #[expect(dead_code, reason = "keeps the memory")]
    memory: (CudaSlice<u8>, CudaSlice<f32>),
    at: Fp8Rows,
    outputs: usize,
    inputs: usize,
}

impl Fp8Weight {
    /// Quantises a bf16 weight that begins at `weight`: (outputs, inputs) without gaps.
    pub(in crate::model) fn new(device: &CudaDevice, weight: Address, outputs: usize, inputs: usize) -> Result<Self> {
        #[expect(unsafe_code, reason = "the kernel writes all of the memory before it is read")]
        // SAFETY: the kernel below writes every code and every scale.
        let (codes, scales) = unsafe { (device.alloc::<u8>(outputs * inputs)?, device.alloc::<f32>(outputs)?) };
        let at = Fp8Rows {
            codes: Address::of(&codes, device),
            scales: Address::of(&scales, device),
        };
        super::launch::Kernels::of(device)?.quantise_rows_fp8(weight, outputs, inputs, at)?;
        Ok(Self {
            memory: (codes, scales),
            at,
            outputs,
            inputs,
        })
    }
}

/// Computes products on the stream of one GPU. Kernels are chosen once for each size.
#[derive(Debug)]
pub(in crate::model) struct Fp8Products {
    stream: Arc<CudaStream>,
    workspace: CudaSlice<u8>,
    workspace_at: Address,
    /// By outputs, inputs and rows.
    plans: Mutex<HashMap<[usize; 3], Plan>>,
    handle: Handle,
}

impl Fp8Products {
    pub(in crate::model) fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        #[expect(unsafe_code, reason = "cuBLAS writes the memory before it reads it")]
        // SAFETY: only cuBLAS uses the workspace.
        let workspace = unsafe { device.alloc::<u8>(WORKSPACE_BYTES)? };
        Ok(Self {
            workspace_at: Address::of(&workspace, device),
            workspace,
            stream,
            plans: Mutex::default(),
            handle: Handle(result::create_handle().map_err(|error| failed(&error))?),
        })
    }

    /// Returns the number of rows that a product of `rows` rows reads and writes. What it reads beyond `rows` only
    /// affects what it writes there.
    pub(in crate::model) fn padded(rows: usize) -> usize {
        rows.next_multiple_of(ROW_STEP)
    }

    /// Computes `x W'` for `rows` rows, rounded to bf16: (rows, outputs). `x` and `out` have room for
    /// [`Fp8Products::padded`] rows.
    ///
    /// # Errors
    /// Returns an error if cuBLAS has no kernel for this size or fails.
    pub(in crate::model) fn multiply(
        &self,
        stream: &CudaStream,
        rows: usize,
        x: Fp8Rows,
        weight: &Fp8Weight,
        out: Address,
    ) -> Result<()> {
        let size = [weight.outputs, weight.inputs, Self::padded(rows)];
        self.stream.context().bind_to_thread().w()?;
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(size) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(Plan::new(self.handle.0, size, weight.at, x)?)
            }
        };
        plan.operation.set_scales(weight.at, x)?;
        let (one, zero) = (1f32, 0f32);
        let out: *mut c_void = out.pointer::<c_void>().cast_mut();
        #[expect(unsafe_code, reason = "a foreign call")]
        // SAFETY: the handle and the plan are open, the factors outlive the call, the caller's buffers hold matrices of
        // these sizes, and the stream runs one product after another, so that they can share the workspace.
        unsafe {
            result::matmul(
                self.handle.0,
                plan.operation.0,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                weight.at.codes.pointer(),
                plan.weight.0,
                x.codes.pointer(),
                plan.x.0,
                out,
                plan.out.0,
                out,
                plan.out.0,
                &raw const plan.algorithm,
                self.workspace_at.pointer::<c_void>().cast_mut(),
                self.workspace.num_bytes(),
                stream.cu_stream().cast(),
            )
        }
        .map_err(|error| failed(&error))
    }
}

/// What cuBLAS needs to know about products of one size.
#[derive(Debug)]
struct Plan {
    operation: Operation,
    weight: Layout,
    x: Layout,
    out: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

#[expect(unsafe_code, reason = "the fields are pointers to memory of cuBLAS")]
// SAFETY: descriptions belong to no thread, and a plan is used only under the lock of its map.
unsafe impl Send for Plan {}

impl Plan {
    /// Describes products of (outputs, inputs, rows), and asks for the fastest kernel that needs no more than our
    /// workspace. The addresses are those of a first product, because the choice may depend on whether they are set.
    fn new(handle: sys::cublasLtHandle_t, size: [usize; 3], weight: Fp8Rows, x: Fp8Rows) -> Result<Self> {
        let [outputs, inputs, rows] = size;
        let operation = Operation::new()?;
        operation.set_scales(weight, x)?;
        let e4m3 = sys::cudaDataType::CUDA_R_8F_E4M3;
        let plan = (
            Layout::new(e4m3, inputs, outputs)?,
            Layout::new(e4m3, inputs, rows)?,
            Layout::new(sys::cudaDataType::CUDA_R_16BF, outputs, rows)?,
            Preference::new()?,
        );
        let (weight, x, out, preference) = plan;
        #[expect(unsafe_code, reason = "a foreign call")]
        // SAFETY: the handle and all descriptions are open.
        let found = unsafe {
            result::get_matmul_algo_heuristic(handle, operation.0, weight.0, x.0, out.0, out.0, preference.0)
        };
        match found {
            Ok(found) => Ok(Self {
                operation,
                weight,
                x,
                out,
                algorithm: found.algo,
            }),
            Err(error) => {
                bail!("cuBLAS has no FP8 kernel for {outputs} outputs, {inputs} inputs and {rows} rows: {error}")
            }
        }
    }
}

fn failed(error: &result::CublasError) -> Error {
    Error::Msg(format!("a product in FP8 failed: {error}")).bt()
}

/// Declares an owner of something that cuBLAS has created.
macro_rules! owner {
    ($name:ident, $inner:ty, $destroy:path) => {
        #[derive(Debug)]
        struct $name($inner);

        impl Drop for $name {
            fn drop(&mut self) {
                #[expect(unsafe_code, reason = "a foreign call")]
                // SAFETY: it was created, and nothing uses it after its owner. A failure leaks it.
                let _ = unsafe { $destroy(self.0) };
            }
        }
    };
}

owner!(Handle, sys::cublasLtHandle_t, result::destroy_handle);
owner!(Operation, sys::cublasLtMatmulDesc_t, result::destroy_matmul_desc);
owner!(Layout, sys::cublasLtMatrixLayout_t, result::destroy_matrix_layout);
owner!(Preference, sys::cublasLtMatmulPreference_t, result::destroy_matmul_pref);

#[expect(unsafe_code, reason = "the field is a pointer to memory of cuBLAS")]
// SAFETY: a handle of cublasLt may be used from several threads at once, and belongs to none.
unsafe impl Send for Handle {}
#[expect(unsafe_code, reason = "the field is a pointer to memory of cuBLAS")]
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Operation {
    fn new() -> Result<Self> {
        let (compute, scale) = (
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType::CUDA_R_32F,
        );
        let operation = Self(result::create_matmul_desc(compute, scale).map_err(|error| failed(&error))?);
        operation.set(number::TRANSPOSE_A, &number::TRANSPOSED)?;
        operation.set(number::FAST_ACCUMULATION, &FAST_ACCUMULATION)?;
        operation.set(number::A_SCALE_MODE, &number::OUTER_VECTOR)?;
        operation.set(number::B_SCALE_MODE, &number::OUTER_VECTOR)?;
        Ok(operation)
    }

    fn set_scales(&self, weight: Fp8Rows, x: Fp8Rows) -> Result<()> {
        self.set(number::A_SCALE_POINTER, &weight.scales)?;
        self.set(number::B_SCALE_POINTER, &x.scales)
    }

    fn set<T>(&self, attribute: u32, value: &T) -> Result<()> {
        #[expect(unsafe_code, reason = "a foreign call")]
        // SAFETY: the description is open, and cuBLAS reads as many bytes as the attribute has, or returns an error.
        unsafe { cublasLtMatmulDescSetAttribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>()) }
            .result()
            .map_err(|error| failed(&error))
    }
}

impl Layout {
    /// Describes a matrix by columns without gaps.
    fn new(dtype: sys::cudaDataType, rows: usize, columns: usize) -> Result<Self> {
        result::create_matrix_layout(dtype, rows as u64, columns as u64, rows as i64)
            .map(Self)
            .map_err(|error| failed(&error))
    }
}

impl Preference {
    fn new() -> Result<Self> {
        let preference = Self(result::create_matmul_pref().map_err(|error| failed(&error))?);
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes = WORKSPACE_BYTES as u64;
        #[expect(unsafe_code, reason = "a foreign call")]
        // SAFETY: the preference is open, and the attribute is a number of this size.
        unsafe {
            result::set_matmul_pref_attribute(preference.0, attribute, (&raw const bytes).cast(), size_of::<u64>())
        }
        .map_err(|error| failed(&error))?;
        Ok(preference)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_multiply_in_fp8_is_named_with_what_is_expected() {
        assert_eq!(reason((9, 0), 120_900), None);
        assert_eq!(reason((12, 0), 130_002), None);
        let old_gpu = reason((8, 9), 130_002).unwrap();
        assert_eq!(old_gpu, "the GPU has compute capability 8.9, expected 9.0");
        let old_library = reason((9, 0), 120_405).unwrap();
        assert_eq!(old_library, "the library is cuBLAS 12.4.5, expected 12.9 or later");
    }
}
