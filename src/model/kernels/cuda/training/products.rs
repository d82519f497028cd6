//! Products of a layer in training: with frozen weights, and with the matrices of deltas.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::result::gemm_strided_batched_ex;
use candle_core::cuda_backend::cudarc::cublas::sys::{
    cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t,
};
use candle_core::{Result, Tensor, bail};
use half::bf16;

use super::{CudaBuffer, OP, TrainingKernels, address_of, rows_of};

/// A factor of a product: its address, and the row length of the matrix that lies there.
#[derive(Clone, Copy)]
struct Operand {
    address: u64,
    row: usize,
    is_transposed: bool,
}

impl Operand {
    fn new(address: u64, row: usize) -> Self {
        Self {
            address,
            row,
            is_transposed: false,
        }
    }

    fn transposed(self) -> Self {
        Self {
            is_transposed: !self.is_transposed,
            ..self
        }
    }

    fn operation(self) -> cublasOperation_t {
        match self.is_transposed {
            true => cublasOperation_t::CUBLAS_OP_T,
            false => cublasOperation_t::CUBLAS_OP_N,
        }
    }
}

/// A product `alpha a b + beta c`, for `c` of (rows, columns), row by row.
struct Product {
    rows: usize,
    columns: usize,
    inner: usize,
    /// Whether the factors are bf16 instead of f32. The result is f32.
    is_half: bool,
    alpha: f32,
    beta: f32,
}

impl TrainingKernels {
    /// Queues a product and writes its result at address `c`. `a` is (rows, inner) and `b` (inner, columns).
    fn multiply(&self, product: &Product, a: Operand, b: Operand, c: u64) -> Result<()> {
        let size = |value: usize| match i32::try_from(value) {
            Ok(value) => Ok(value),
            Err(_) => bail!("{OP} got a matrix with {value} rows or columns, expected fewer than 2^31"),
        };
        let dtype = match product.is_half {
            true => cudaDataType_t::CUDA_R_16BF,
            false => cudaDataType_t::CUDA_R_32F,
        };
        let blas = self.device.cublas_handle();
        #[expect(unsafe_code, reason = "the compiler cannot check the arguments of a product")]
        // SAFETY: the callers give the sizes of the matrices at these addresses. cuBLAS expects columns where we have
        // rows, and thus computes the transposed product from its factors in the opposite order.
        unsafe {
            gemm_strided_batched_ex(
                *blas.handle(),
                b.operation(),
                a.operation(),
                size(product.columns)?,
                size(product.rows)?,
                size(product.inner)?,
                (&raw const product.alpha).cast(),
                b.address as *const _,
                dtype,
                size(b.row)?,
                0,
                a.address as *const _,
                dtype,
                size(a.row)?,
                0,
                (&raw const product.beta).cast(),
                c as *mut _,
                cudaDataType_t::CUDA_R_32F,
                size(product.columns)?,
                0,
                1,
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        }
        .w()
    }

    /// Returns the address of a frozen weight in the dtype of the weights.
    fn weight(&self, weight: &Tensor) -> Result<u64> {
        match self.is_half {
            true => address_of::<bf16>(&self.device, weight),
            false => address_of::<f32>(&self.device, weight),
        }
    }

    /// Returns the address of a factor in the dtype of the weights.
    fn factor(&self, x: &CudaBuffer) -> Result<u64> {
        match (&x.half, self.is_half) {
            (Some(half), true) => Ok(half.address),
            (_, false) => Ok(x.address()),
            (None, true) => bail!("{OP} got a factor without elements in bf16"),
        }
    }

    /// Writes `y = x W'` for a weight of (outputs, inputs).
    pub(in crate::model) fn frozen(&self, weight: &Tensor, x: &CudaBuffer, y: &mut CudaBuffer) -> Result<()> {
        let (outputs, inputs) = weight.dims2()?;
        let rows = rows_of(x, inputs, y, outputs)?;
        let product = Product {
            rows,
            columns: outputs,
            inner: inputs,
            is_half: self.is_half,
            alpha: 1.0,
            beta: 0.0,
        };
        let weight = Operand::new(self.weight(weight)?, inputs).transposed();
        self.multiply(&product, Operand::new(self.factor(x)?, inputs), weight, y.address())
    }

    /// Writes `dx = dy W + beta dx`.
    pub(in crate::model) fn frozen_backward(
        &self,
        weight: &Tensor,
        gradient: &CudaBuffer,
        beta: f32,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        let (outputs, inputs) = weight.dims2()?;
        let rows = rows_of(gradient, outputs, out, inputs)?;
        let product = Product {
            rows,
            columns: inputs,
            inner: outputs,
            is_half: self.is_half,
            alpha: 1.0,
            beta,
        };
        let weight = Operand::new(self.weight(weight)?, inputs);
        let gradient = Operand::new(self.factor(gradient)?, outputs);
        self.multiply(&product, gradient, weight, out.address())
    }

    /// Writes `low = x A'`, and adds `scale low B'` to `y`.
    pub(in crate::model) fn delta(
        &self,
        delta: &Delta<'_>,
        x: &CudaBuffer,
        low: &mut CudaBuffer,
        y: &mut CudaBuffer,
    ) -> Result<()> {
        let sizes = delta.sizes(x, y, low)?;
        let a = Operand::new(address_of::<f32>(&self.device, delta.a)?, sizes.inputs);
        let b = Operand::new(address_of::<f32>(&self.device, delta.b)?, sizes.rank);
        let input = Operand::new(x.address(), sizes.inputs);
        let product = sizes.product([sizes.rows, sizes.rank, sizes.inputs], 1.0, 0.0);
        self.multiply(&product, input, a.transposed(), low.address())?;
        let product = sizes.product([sizes.rows, sizes.outputs, sizes.rank], delta.scale, 1.0);
        let low = Operand::new(low.address(), sizes.rank);
        self.multiply(&product, low, b.transposed(), y.address())
    }

    /// Writes `d_low = scale dy B`, adds `d_low A` to `out` if there is one, and returns the gradients of A, `d_low' x`,
    /// and B, `scale dy' low`.
    pub(in crate::model) fn delta_backward(
        &self,
        delta: &Delta<'_>,
        [x, low, gradient]: [&CudaBuffer; 3],
        d_low: &mut CudaBuffer,
        out: Option<&mut CudaBuffer>,
    ) -> Result<(Tensor, Tensor)> {
        let sizes = delta.sizes(x, gradient, low)?;
        let Sizes {
            rows,
            rank,
            inputs,
            outputs,
        } = sizes;
        let a = Operand::new(address_of::<f32>(&self.device, delta.a)?, inputs);
        let b = Operand::new(address_of::<f32>(&self.device, delta.b)?, rank);
        let gradient = Operand::new(gradient.address(), outputs);
        self.multiply(
            &sizes.product([rows, rank, outputs], delta.scale, 0.0),
            gradient,
            b,
            d_low.address(),
        )?;
        let d_low = Operand::new(d_low.address(), rank);
        if let Some(out) = out {
            self.multiply(&sizes.product([rows, inputs, rank], 1.0, 1.0), d_low, a, out.address())?;
        }
        let (d_a, address) = self.tensor(rank, inputs)?;
        let x = Operand::new(x.address(), inputs);
        self.multiply(
            &sizes.product([rank, inputs, rows], 1.0, 0.0),
            d_low.transposed(),
            x,
            address,
        )?;
        let (d_b, address) = self.tensor(outputs, rank)?;
        let low = Operand::new(low.address(), rank);
        self.multiply(
            &sizes.product([outputs, rank, rows], delta.scale, 0.0),
            gradient.transposed(),
            low,
            address,
        )?;
        Ok((d_a, d_b))
    }
}

/// A delta in training: A is (rank, inputs) and B (outputs, rank).
pub(in crate::model) struct Delta<'a> {
    pub(in crate::model) a: &'a Tensor,
    pub(in crate::model) b: &'a Tensor,
    pub(in crate::model) scale: f32,
}

/// The sizes of the products of a delta.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    rank: usize,
    inputs: usize,
    outputs: usize,
}

impl Delta<'_> {
    fn sizes(&self, x: &CudaBuffer, y: &CudaBuffer, low: &CudaBuffer) -> Result<Sizes> {
        let ((rank, inputs), (outputs, b_rank)) = (self.a.dims2()?, self.b.dims2()?);
        let rows = rows_of(x, inputs, y, outputs)?;
        if rank != b_rank || low.len < rows * rank {
            bail!(
                "{OP} got a delta of ranks {rank} and {b_rank} and space for {} elements",
                low.len
            );
        }
        Ok(Sizes {
            rows,
            rank,
            inputs,
            outputs,
        })
    }
}

impl Sizes {
    /// Returns a product in f32 with these numbers of rows, columns and summands.
    fn product(&self, [rows, columns, inner]: [usize; 3], alpha: f32, beta: f32) -> Product {
        Product {
            rows,
            columns,
            inner,
            is_half: false,
            alpha,
            beta,
        }
    }
}
