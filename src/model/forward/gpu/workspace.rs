//! The buffers of passes, in one allocation that grows to the largest pass.

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Result};

use super::Sizes;
use super::graphs::MOST_INPUTS;
use crate::model::kernels::cuda::launch::Fp8Rows;
use crate::model::transfer::cuda_tensor::Address;

/// Every buffer begins at a multiple of this, as the widest loads and cuBLAS's fastest kernels require.
const ALIGNMENT: usize = 256;
/// The capacity grows in steps of this many tokens or rows, so that batches of similar sizes need one allocation. A
/// multiple of it has room for the rows to which a product in FP8 is padded.
const STEP: usize = 512;

/// One allocation for the buffers of any pass up to a capacity.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    memory: Option<CudaSlice<u8>>,
    tokens: usize,
    outputs: usize,
    low: usize,
}

/// The addresses of all buffers. Widths are in elements; `tokens` are all tokens of a pass and `outputs` its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Buffers {
    /// (tokens, hidden), f32
    pub(super) residual: Address,
    /// (tokens, hidden), bf16
    pub(super) normed: Address,
    /// (tokens, queries + 2 keys), bf16
    pub(super) qkv: Address,
    /// (tokens, keys), f32
    pub(super) values: Address,
    /// (tokens, queries), bf16
    pub(super) attention: Address,
    /// (tokens, hidden), bf16: the output of the attention or the MLP
    pub(super) y: Address,
    /// (tokens, 2 inner), bf16
    pub(super) gate_up: Address,
    /// (tokens, inner), bf16
    pub(super) hidden: Address,
    /// (tokens, low-rank activations), bf16
    pub(super) low: Address,
    /// (tokens, the wider of hidden and inner): the input of a product in FP8
    pub(super) fp8: Fp8Rows,
    /// (outputs, hidden), f32
    pub(super) last_residual: Address,
    /// (outputs, hidden), bf16
    pub(super) last_normed: Address,
    /// (outputs, queries), bf16
    pub(super) last_queries: Address,
    /// The inputs of a graph: u32
    pub(super) inputs: Address,
    /// The hidden states of a graph: (outputs, hidden), bf16
    pub(super) result: Address,
}

impl Workspace {
    /// Returns the bytes that the workspace holds.
    pub(super) fn bytes(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.num_bytes() as u64)
    }

    /// Frees the memory if it is for passes of more than `max_tokens` tokens.
    pub(super) fn limit(&mut self, max_tokens: usize) {
        if self.tokens > max_tokens.next_multiple_of(STEP) {
            *self = Self::default();
        }
    }

    /// Returns buffers for a pass, and allocates larger ones first if these are too small.
    pub(super) fn buffers(
        &mut self,
        device: &CudaDevice,
        sizes: &Sizes,
        low: usize,
        tokens: usize,
        outputs: usize,
    ) -> Result<Buffers> {
        if self.memory.is_none() || self.tokens < tokens || self.outputs < outputs || self.low < low {
            // The old buffers make room for the new ones. If these do not fit, smaller passes allocate their own.
            let grown = |old: usize, new: usize| old.max(new.next_multiple_of(STEP));
            let wanted = Self {
                memory: None,
                tokens: grown(self.tokens, tokens),
                outputs: grown(self.outputs, outputs),
                low: self.low.max(low),
            };
            *self = Self::default();
            let (_, bytes) = layout(sizes, &wanted, Address::NULL);
            #[expect(unsafe_code, reason = "kernels write each buffer before they read it")]
            // SAFETY: every kernel and product of a pass writes its output before a later one reads it.
            let memory = unsafe { device.alloc::<u8>(bytes)? };
            *self = Self {
                memory: Some(memory),
                ..wanted
            };
        }
        let start = match &self.memory {
            Some(memory) => Address::of(memory, device),
            None => Address::NULL,
        };
        Ok(layout(sizes, self, start).0)
    }
}

/// Lays the buffers end to end and returns them with their size in bytes.
fn layout(sizes: &Sizes, capacity: &Workspace, start: Address) -> (Buffers, usize) {
    let mut end = 0;
    let mut next = |rows: usize, width: usize, bytes: usize| {
        let at = start.bytes(end);
        end += (rows * width * bytes).next_multiple_of(ALIGNMENT);
        at
    };
    let (tokens, outputs) = (capacity.tokens, capacity.outputs);
    let fp8_tokens = if sizes.is_fp8 { tokens } else { 0 };
    let buffers = Buffers {
        residual: next(tokens, sizes.hidden, 4),
        normed: next(tokens, sizes.hidden, 2),
        qkv: next(tokens, sizes.qkv(), 2),
        values: next(if capacity.low > 0 { tokens } else { 0 }, sizes.keys, 4),
        attention: next(tokens, sizes.queries, 2),
        y: next(tokens, sizes.hidden, 2),
        gate_up: next(tokens, 2 * sizes.inner, 2),
        hidden: next(tokens, sizes.inner, 2),
        low: next(tokens, capacity.low, 2),
        fp8: Fp8Rows {
            codes: next(fp8_tokens, sizes.hidden.max(sizes.inner), 1),
            scales: next(fp8_tokens, 1, 4),
        },
        last_residual: next(outputs, sizes.hidden, 4),
        last_normed: next(outputs, sizes.hidden, 2),
        last_queries: next(outputs, sizes.queries, 2),
        inputs: next(1, MOST_INPUTS, 4),
        result: next(outputs, sizes.hidden, 2),
    };
    (buffers, end)
}
