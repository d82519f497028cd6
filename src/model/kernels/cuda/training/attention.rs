//! Launches the attention kernels of training, forward and backward.

use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaDevice, Result, bail};

use super::super::super::PackedAttention;
use super::super::super::training::QueriesKeysValues;
use super::{CudaBuffer, MAX_HEAD_DIM, OP, TrainingKernels, address_of, count, launch, same_len};

/// Number of warps in a block of the kernel for the gradients of keys and values, as in training.cu.
const KEY_WARPS: u32 = 8;

impl TrainingKernels {
    /// Computes [`PackedAttention::forward_rows`], and writes the logarithms of the sums of the exponentials of the
    /// scores: (queries * heads).
    pub(in crate::model) fn attention(
        &self,
        attention: &PackedAttention<'_>,
        inputs: &QueriesKeysValues<&CudaBuffer>,
        prefix: usize,
        log_sums: &mut CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        let rows = Rows::new(&self.device, attention, inputs, prefix)?;
        same_len([inputs.q, out])?;
        rows.check_pairs(log_sums)?;
        launch!(
            self,
            training_attention,
            (rows.queries, rows.shape.heads),
            32,
            inputs.q.address(),
            inputs.k.address(),
            inputs.v.address(),
            rows.spans,
            rows.span_of,
            out.address(),
            out.half(),
            log_sums.address(),
            rows.shape
        )
    }

    /// Computes the gradients of attention, given what [`TrainingKernels::attention`] wrote. `along`
    /// is space of the size of `log_sums`.
    pub(in crate::model) fn attention_backward(
        &self,
        attention: &PackedAttention<'_>,
        inputs: &QueriesKeysValues<&CudaBuffer>,
        prefix: usize,
        [output, log_sums, gradient]: [&CudaBuffer; 3],
        along: &mut CudaBuffer,
        out: QueriesKeysValues<&mut CudaBuffer>,
    ) -> Result<()> {
        let rows = Rows::new(&self.device, attention, inputs, prefix)?;
        same_len([inputs.q, output, gradient, out.q])?;
        same_len([inputs.k, out.k, out.v])?;
        rows.check_pairs(log_sums)?;
        rows.check_pairs(along)?;
        launch!(
            self,
            training_attention_queries,
            (rows.queries, rows.shape.heads),
            32,
            inputs.q.address(),
            inputs.k.address(),
            inputs.v.address(),
            output.address(),
            gradient.address(),
            log_sums.address(),
            rows.spans,
            rows.span_of,
            out.q.address(),
            along.address(),
            rows.shape
        )?;
        launch!(
            self,
            training_attention_keys,
            (rows.keys, rows.shape.kv_heads),
            KEY_WARPS * 32,
            inputs.q.address(),
            inputs.k.address(),
            inputs.v.address(),
            gradient.address(),
            log_sums.address(),
            along.address(),
            rows.spans,
            count(OP, attention.spans.len())?,
            count(OP, prefix)?,
            out.k.address(),
            out.v.address(),
            out.v.half(),
            rows.shape
        )
    }
}

/// The parameter of the attention kernels, with the same fields as in training.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct TrainingAttention {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    window: u32,
    scale: f32,
    softcap: f32,
}

#[expect(unsafe_code, reason = "cudarc passes only types with this trait to a kernel")]
// SAFETY: the fields are plain numbers in C's layout, as training.cu declares them.
unsafe impl candle_core::cuda_backend::cudarc::driver::DeviceRepr for TrainingAttention {}

/// The arguments of attention.
struct Rows {
    spans: u64,
    span_of: u64,
    queries: u32,
    keys: u32,
    shape: TrainingAttention,
}

impl Rows {
    fn new(
        device: &CudaDevice,
        attention: &PackedAttention<'_>,
        inputs: &QueriesKeysValues<&CudaBuffer>,
        prefix: usize,
    ) -> Result<Self> {
        let Some(spans) = &attention.spans.device else {
            bail!("{OP} on a GPU expects spans in GPU memory")
        };
        let (width, kv_width) = (
            attention.heads * attention.head_dim,
            attention.kv_heads * attention.head_dim,
        );
        let shape = |x: &CudaBuffer, width: usize| [x.len / width, width];
        let [q, k, v] = [
            shape(inputs.q, width),
            shape(inputs.k, kv_width),
            shape(inputs.v, kv_width),
        ];
        attention.check(&q, &k, &v, prefix)?;
        if attention.head_dim > MAX_HEAD_DIM || prefix > k[0] {
            bail!(
                "{OP} supports heads of at most {MAX_HEAD_DIM} elements, not {}",
                attention.head_dim
            );
        }
        Ok(Self {
            spans: address_of::<u32>(device, &spans.fields)?,
            span_of: address_of::<u32>(device, &spans.row_of_query)?,
            queries: count(OP, q[0])?,
            keys: count(OP, k[0])?,
            shape: TrainingAttention {
                heads: count(OP, attention.heads)?,
                kv_heads: count(OP, attention.kv_heads)?,
                head_dim: count(OP, attention.head_dim)?,
                window: count(OP, attention.window.unwrap_or(0))?,
                scale: attention.scale as f32,
                softcap: attention.softcap.unwrap_or(0.0) as f32,
            },
        })
    }

    /// Returns an error unless `x` has an element for each query and head.
    fn check_pairs(&self, x: &CudaBuffer) -> Result<()> {
        if x.len != self.queries as usize * self.shape.heads as usize {
            bail!("{OP} got {} sums for {} queries", x.len, self.queries);
        }
        Ok(())
    }
}
