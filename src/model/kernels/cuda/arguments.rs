//! What the kernels are launched with.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Result, bail};

use crate::model::kernels::Spans;
use crate::model::transfer::cuda_tensor::{Address, CudaTensor};

/// A delta that a kernel adds, with the fields of `Delta` in delta.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(in crate::model) struct Delta {
    low: Address,
    b: Address,
    low_stride: u32,
    rank: u32,
}

#[expect(unsafe_code, reason = "cudarc passes only types with this trait to a kernel")]
// SAFETY: the fields are addresses and plain numbers in C's layout, as delta.cuh declares them.
unsafe impl DeviceRepr for Delta {}

impl Delta {
    /// No delta.
    pub(in crate::model) const NONE: Self = Self {
        low: Address::NULL,
        b: Address::NULL,
        low_stride: 0,
        rank: 0,
    };

    /// Returns a delta from its low-rank activations, of which each token has `stride`, and `scale * B` in the order of
    /// fragments.
    pub(in crate::model) fn new(low: Address, b: Address, stride: usize, rank: usize) -> Self {
        Self {
            low,
            b,
            low_stride: stride as u32,
            rank: rank as u32,
        }
    }
}

/// See `embed_norm` in embed.cu. The result of the norm is bf16.
pub(in crate::model) struct EmbedNorm {
    pub(in crate::model) table: Address,
    pub(in crate::model) table_dtype: DType,
    pub(in crate::model) tokens: Address,
    pub(in crate::model) scale: f32,
    pub(in crate::model) weight: Address,
    pub(in crate::model) residual: Address,
    pub(in crate::model) normed: Address,
    pub(in crate::model) rows: usize,
    pub(in crate::model) width: usize,
    pub(in crate::model) eps: f32,
}

/// See `gather_rows` in embed.cu. The normed rows are bf16.
pub(in crate::model) struct GatherRows {
    pub(in crate::model) residual: Address,
    pub(in crate::model) normed: Address,
    pub(in crate::model) indices: Address,
    pub(in crate::model) out_residual: Address,
    pub(in crate::model) out_normed: Address,
    pub(in crate::model) rows: usize,
    pub(in crate::model) width: usize,
}

/// See low_rank.cu.
pub(in crate::model) struct LowRank {
    pub(in crate::model) x: Address,
    pub(in crate::model) stride: usize,
    pub(in crate::model) a: Address,
    pub(in crate::model) out: Address,
    pub(in crate::model) rows: usize,
    /// The columns of `x` and `a`.
    pub(in crate::model) width: usize,
    /// The rows of `a`.
    pub(in crate::model) ranks: usize,
}

/// See `add_rms_norm` in norm.cu.
#[derive(Clone, Copy)]
pub(in crate::model) struct AddRmsNorm {
    pub(in crate::model) residual: Address,
    pub(in crate::model) y: Address,
    pub(in crate::model) deltas: Option<[Delta; 1]>,
    pub(in crate::model) post: Option<Address>,
    pub(in crate::model) next: Address,
    pub(in crate::model) sum: Address,
    pub(in crate::model) normed: Address,
    pub(in crate::model) rows: usize,
    pub(in crate::model) width: usize,
    pub(in crate::model) eps: f32,
}

/// See geglu.cu.
pub(in crate::model) struct Geglu {
    pub(in crate::model) gate: Address,
    pub(in crate::model) up: Address,
    pub(in crate::model) stride: usize,
    /// The deltas of gate and up.
    pub(in crate::model) deltas: Option<[Delta; 2]>,
    pub(in crate::model) out: Address,
    pub(in crate::model) rows: usize,
    pub(in crate::model) width: usize,
}

/// See `norm_rope` in norm_rope.cu. The result replaces `x`.
pub(in crate::model) struct NormRope {
    pub(in crate::model) x: Address,
    pub(in crate::model) out: Address,
    pub(in crate::model) stride: usize,
    pub(in crate::model) heads: usize,
    pub(in crate::model) kv_heads: usize,
    pub(in crate::model) head_dim: usize,
    pub(in crate::model) rows: usize,
    /// Cosines, sines and the position of each row.
    pub(in crate::model) angles: [Address; 3],
    /// The norms of queries and keys.
    pub(in crate::model) norms: Option<[Address; 2]>,
    pub(in crate::model) eps: f32,
    /// The deltas of queries, keys and values.
    pub(in crate::model) deltas: Option<[Delta; 3]>,
    pub(in crate::model) values: Option<Values>,
}

/// Values in f32, (rows, kv_heads * head_dim), to which a delta is added.
#[derive(Clone, Copy)]
pub(in crate::model) struct Values {
    pub(in crate::model) at: Address,
    /// The column of `out` at which they are written.
    pub(in crate::model) offset: usize,
}

/// The rows of a pass in GPU memory.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) struct SpanAddresses {
    /// The fields of each row.
    pub(in crate::model) fields: Address,
    /// The row of each query.
    pub(in crate::model) row_of_query: Address,
    pub(in crate::model) queries: usize,
}

impl SpanAddresses {
    /// Returns the addresses of rows that have been copied to the GPU.
    pub(in crate::model) fn of(spans: &Spans) -> Result<Self> {
        const OP: &str = "packed-attention";
        let Some(device) = &spans.device else {
            bail!("{OP} on a GPU expects spans in GPU memory")
        };
        Ok(Self {
            fields: CudaTensor::new(OP, &device.fields)?.address()?,
            row_of_query: CudaTensor::new(OP, &device.row_of_query)?.address()?,
            queries: device.row_of_query.dim(0)?,
        })
    }
}

/// See attention.cu.
pub(in crate::model) struct Attention {
    pub(in crate::model) q: Address,
    pub(in crate::model) k: Address,
    pub(in crate::model) v: Address,
    /// The keys and values of the prefix.
    pub(in crate::model) prefix: [Address; 2],
    pub(in crate::model) spans: SpanAddresses,
    pub(in crate::model) out: Address,
    pub(in crate::model) heads: usize,
    pub(in crate::model) kv_heads: usize,
    pub(in crate::model) head_dim: usize,
    pub(in crate::model) q_stride: usize,
    pub(in crate::model) kv_stride: usize,
    pub(in crate::model) prefix_stride: usize,
    pub(in crate::model) window: Option<usize>,
    pub(in crate::model) scale: f64,
    pub(in crate::model) softcap: Option<f64>,
}
