//! Launches the kernels of the loss, `loss.cu`, and the products with the unembedding.
//!
//! The products read the unembedding where it lies. Logits stay on the GPU, so that the number of calls does not depend
//! on the size of the vocabulary.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::result::gemm_strided_batched_ex;
use candle_core::cuda_backend::cudarc::cublas::sys::{
    cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t,
};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, PushKernelArg};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use half::bf16;

use super::launch::Kernels;
use super::training::{address_of, count, launch};
use crate::model::transfer::cuda_tensor::wrap;

const OP: &str = "the loss";

/// A null pointer, for a parameter that the kernel does not read.
const NULL: u64 = 0;

/// Number of threads in a block, and of logits in a chunk, as in loss.cu.
const THREADS: u32 = 256;
const CHUNK: usize = 4096;

/// Sizes of the structs of loss.cu, in bytes.
const CHUNK_BYTES: usize = 16;
const ROW_BYTES: usize = 12;

/// Bytes of each logit in memory: the logit itself, and first the product of a low part, then the gradient.
const LOGIT_BYTES: usize = 8;

/// The boundary that parts of an allocation begin at, which is cuBLAS's preferred one.
const ALIGNMENT: usize = 256;

/// The most parts of the vocabulary in the sum over it. There are few rows, so that one product would occupy only a
/// small part of a GPU.
const MOST_PARTS: usize = 16;

/// The parts of the vocabulary begin at a multiple of so many tokens, which keeps rows of bf16 aligned to 16 bytes.
const PART_TOKENS: usize = 8;

/// The most rows of a grid.
const MAX_ROWS: usize = 65_535;

/// What a hidden state should predict.
#[derive(Debug, Clone, Default)]
pub(in crate::model) struct RowTargets {
    /// The sum of the weights of its cross-entropies.
    pub(in crate::model) weight: f64,
    /// Token ids, and the sum of the weights of their logits in the loss.
    pub(in crate::model) tokens: BTreeMap<u32, f64>,
}

/// A loss that the GPU may still be computing.
#[derive(Debug)]
pub(in crate::model) struct PendingLoss {
    stream: Arc<CudaStream>,
    rows: CudaSlice<f64>,
}

impl PendingLoss {
    /// Waits for the loss.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub(in crate::model) fn wait(self) -> Result<f64> {
        Ok(self.stream.clone_dtoh(&self.rows).w()?.iter().sum())
    }
}

/// Returns whether [`cross_entropy`] supports an unembedding of this dtype.
///
/// Two parts in f16 would not be as precise as an f32, whose range is wider.
pub(in crate::model) fn supports(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16)
}

/// Returns the cross-entropy over the rows of an unembedding, (vocabulary, width) in f32 or bf16, and its gradient with
/// respect to `hidden`, (rows, width) in f32. There is one of `targets` for each row.
///
/// Rows are processed in groups of up to `max_logits` logits, each of which takes 8 bytes of memory.
///
/// # Errors
/// Returns an error if the shapes or dtypes do not fit, a token is outside the vocabulary, or the device fails.
pub(in crate::model) fn cross_entropy(
    unembedding: &Tensor,
    hidden: &Tensor,
    targets: &[RowTargets],
    softcap: Option<f64>,
    max_logits: usize,
) -> Result<(PendingLoss, Tensor)> {
    let (rows, width) = hidden.dims2()?;
    let vocabulary = unembedding.dim(0)?;
    if rows != targets.len() || rows == 0 || unembedding.dim(1)? != width || vocabulary == 0 {
        bail!("{OP} got {hidden:?} for {} targets and {unembedding:?}", targets.len());
    }
    let device = hidden.device().as_cuda_device()?;
    let stream = device.cuda_stream();
    let is_half = unembedding.dtype() == DType::BF16;
    let group = (max_logits / vocabulary).clamp(1, MAX_ROWS).min(rows);
    let loss = VocabularyLoss {
        device,
        kernels: Kernels::of(device)?,
        sizes: Sizes {
            width,
            vocabulary,
            is_half,
        },
        unembedding: match is_half {
            true => address_of::<bf16>(device, unembedding)?,
            false => address_of::<f32>(device, unembedding)?,
        },
        cap: softcap.map_or(0.0, |cap| cap as f32),
    };
    let hidden = address_of::<f32>(device, hidden)?;
    let words = device.clone_htod(&target_words(targets, vocabulary)?)?;
    let words = words.device_ptr(&stream).0;
    let tokens = words + (rows * ROW_BYTES) as u64;
    #[expect(unsafe_code, reason = "clearing the memory first takes time")]
    // SAFETY: the kernels and products write the elements before others read them: one loss and one row of the gradient
    // for each row, and the buffers of a group in the order of `Buffers`.
    let (losses, gradient, space) = unsafe {
        (
            device.alloc::<f64>(rows)?,
            device.alloc::<f32>(rows * width)?,
            device.alloc::<u8>(loss.sizes.layout(0, group).end as usize)?,
        )
    };
    let space_address = space.device_ptr(&stream).0;
    for start in (0..rows).step_by(group) {
        let count = group.min(rows - start);
        loss.group(
            count,
            &loss.sizes.layout(space_address, count),
            &GroupAddresses {
                hidden: hidden + (start * width * size_of::<f32>()) as u64,
                targets: words + (start * ROW_BYTES) as u64,
                tokens,
                losses: losses.device_ptr(&stream).0 + (start * size_of::<f64>()) as u64,
                gradient: gradient.device_ptr(&stream).0 + (start * width * size_of::<f32>()) as u64,
            },
        )?;
    }
    let gradient = wrap(gradient, device, (rows, width));
    Ok((PendingLoss { stream, rows: losses }, gradient))
}

/// Returns the targets as loss.cu reads them: a weight, the index of the first token and the number of tokens for each
/// row, and then the ids and weights of all tokens.
fn target_words(targets: &[RowTargets], vocabulary: usize) -> Result<Vec<u32>> {
    let (mut words, mut tokens) = (Vec::with_capacity(3 * targets.len()), Vec::new());
    for target in targets {
        words.push((target.weight as f32).to_bits());
        words.push(count(OP, tokens.len() / 2)?);
        words.push(count(OP, target.tokens.len())?);
        for (&id, &weight) in &target.tokens {
            if id as usize >= vocabulary {
                bail!("target {id} is outside the {vocabulary} logits");
            }
            tokens.extend([id, (weight as f32).to_bits()]);
        }
    }
    words.append(&mut tokens);
    Ok(words)
}

/// The sizes that are the same for all groups.
struct Sizes {
    width: usize,
    vocabulary: usize,
    /// Whether the unembedding is bf16 instead of f32.
    is_half: bool,
}

/// The addresses of a group's buffers, in the order in which they are written.
struct Buffers {
    /// The parts of the hidden states in bf16: (2, rows, width). Unused if the unembedding is f32.
    hidden: u64,
    /// (rows, vocabulary). The products of the low parts follow.
    logits: u64,
    /// The chunks of each row.
    chunks: u64,
    /// What follows the logits: the gradient in f32, (rows, vocabulary), or its parts in bf16, (2, rows, vocabulary),
    /// which replace the products of the low parts.
    logit_gradient: u64,
    /// The products of the gradient with each part of the vocabulary: (parts, factors, width).
    products: u64,
    /// The end of all.
    end: u64,
}

impl Sizes {
    /// Returns the rows of a factor: two for each row, the high and the low part, if the unembedding is bf16.
    fn factors(&self, rows: usize) -> usize {
        rows * if self.is_half { 2 } else { 1 }
    }

    fn chunks(&self) -> usize {
        self.vocabulary.div_ceil(CHUNK)
    }

    /// Returns the number of equal parts of the vocabulary.
    fn parts(&self) -> usize {
        let mut parts = MOST_PARTS;
        while parts > 1 && !self.vocabulary.is_multiple_of(parts * PART_TOKENS) {
            parts /= 2;
        }
        parts
    }

    /// Returns the buffers of a group of rows, from an address on.
    fn layout(&self, start: u64, rows: usize) -> Buffers {
        let mut end = start;
        let mut next = |bytes: usize| {
            let address = end;
            end += bytes.next_multiple_of(ALIGNMENT) as u64;
            address
        };
        let hidden = next(2 * rows * self.width * size_of::<bf16>());
        let logits = next(rows * self.vocabulary * LOGIT_BYTES);
        let chunks = next(rows * self.chunks() * CHUNK_BYTES);
        let products = next(self.parts() * self.factors(rows) * self.width * size_of::<f32>());
        Buffers {
            hidden,
            logits,
            chunks,
            logit_gradient: logits + (rows * self.vocabulary * size_of::<f32>()) as u64,
            products,
            end,
        }
    }
}

/// The inputs and results of a group of rows.
struct GroupAddresses {
    hidden: u64,
    targets: u64,
    tokens: u64,
    losses: u64,
    gradient: u64,
}

/// Products of as many pairs of matrices as there are in a batch: (rows, inner) by (inner, columns).
struct Products {
    rows: usize,
    columns: usize,
    inner: usize,
    /// The address of the left factors, the length of their rows, and the distance between them, in elements.
    left: (u64, usize, usize),
    /// The same of the right factors, and whether they are stored as (columns, inner).
    right: (u64, usize, usize),
    is_right_transposed: bool,
    out: u64,
    batch: usize,
}

struct VocabularyLoss<'a> {
    device: &'a CudaDevice,
    kernels: Arc<Kernels>,
    sizes: Sizes,
    unembedding: u64,
    /// The soft-cap of the logits, or zero.
    cap: f32,
}

impl VocabularyLoss<'_> {
    /// Queues the loss and the gradient of a group of rows.
    fn group(&self, rows: usize, buffers: &Buffers, group: &GroupAddresses) -> Result<()> {
        let Sizes {
            width,
            vocabulary,
            is_half,
        } = self.sizes;
        let functions = &self.kernels.functions;
        let stream = self.device.cuda_stream();
        let elements = (rows * width) as u64;
        let blocks = (count(OP, (rows * width).div_ceil(THREADS as usize))?, 1);
        let factors = self.sizes.factors(rows);
        if is_half {
            let mut builder = stream.launch_builder(&functions.loss_split);
            builder.arg(&group.hidden).arg(&buffers.hidden).arg(&elements);
            launch(builder, blocks, THREADS)?;
        }
        self.multiply(&Products {
            rows: factors,
            columns: vocabulary,
            inner: width,
            left: (if is_half { buffers.hidden } else { group.hidden }, width, 0),
            right: (self.unembedding, width, 0),
            is_right_transposed: true,
            out: buffers.logits,
            batch: 1,
        })?;

        let grid = (count(OP, self.sizes.chunks())?, count(OP, rows)?);
        let tokens = count(OP, vocabulary)?;
        let low = if is_half { buffers.logit_gradient } else { NULL };
        let mut builder = stream.launch_builder(&functions.loss_cap);
        builder.arg(&buffers.logits).arg(&low).arg(&buffers.chunks);
        builder.arg(&tokens).arg(&self.cap);
        launch(builder, grid, THREADS)?;
        let mut builder = stream.launch_builder(match is_half {
            true => &functions.loss_gradient_bf16,
            false => &functions.loss_gradient_f32,
        });
        builder.arg(&buffers.logits).arg(&buffers.chunks).arg(&group.targets);
        builder
            .arg(&group.tokens)
            .arg(&buffers.logit_gradient)
            .arg(&group.losses);
        builder.arg(&tokens).arg(&self.cap);
        launch(builder, grid, THREADS)?;

        let parts = self.sizes.parts();
        let inner = vocabulary / parts;
        self.multiply(&Products {
            rows: factors,
            columns: width,
            inner,
            left: (buffers.logit_gradient, vocabulary, inner),
            right: (self.unembedding, width, inner * width),
            is_right_transposed: false,
            out: buffers.products,
            batch: parts,
        })?;
        let terms = count(OP, parts * factors / rows)?;
        let mut builder = stream.launch_builder(&functions.loss_add);
        builder.arg(&buffers.products).arg(&group.gradient);
        builder.arg(&elements).arg(&terms);
        launch(builder, blocks, THREADS)
    }

    /// Queues products of factors in the dtype of the unembedding, whose results are f32 and follow each other.
    fn multiply(&self, products: &Products) -> Result<()> {
        let size = |value: usize| match i32::try_from(value) {
            Ok(value) => Ok(value),
            Err(_) => bail!("{OP} got a matrix with {value} rows or columns, expected fewer than 2^31"),
        };
        let dtype = match self.sizes.is_half {
            true => cudaDataType_t::CUDA_R_16BF,
            false => cudaDataType_t::CUDA_R_32F,
        };
        let right_operation = match products.is_right_transposed {
            true => cublasOperation_t::CUBLAS_OP_T,
            false => cublasOperation_t::CUBLAS_OP_N,
        };
        let (alpha, beta) = (1f32, 0f32);
        let (left, left_row, left_stride) = products.left;
        let (right, right_row, right_stride) = products.right;
        let blas = self.device.cublas_handle();
        #[expect(unsafe_code, reason = "the compiler cannot check the arguments of a product")]
        // SAFETY: the caller gives the sizes of the matrices at these addresses. cuBLAS expects columns where we have
        // rows, and thus computes the transposed product from its factors in the opposite order.
        unsafe {
            gemm_strided_batched_ex(
                *blas.handle(),
                right_operation,
                cublasOperation_t::CUBLAS_OP_N,
                size(products.columns)?,
                size(products.rows)?,
                size(products.inner)?,
                (&raw const alpha).cast(),
                right as *const _,
                dtype,
                size(right_row)?,
                i64::from(size(right_stride)?),
                left as *const _,
                dtype,
                size(left_row)?,
                i64::from(size(left_stride)?),
                (&raw const beta).cast(),
                products.out as *mut _,
                cudaDataType_t::CUDA_R_32F,
                size(products.columns)?,
                i64::from(size(products.rows * products.columns)?),
                size(products.batch)?,
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        }
        .w()
    }
}
