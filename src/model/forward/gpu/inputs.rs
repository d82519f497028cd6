//! The addresses of a pass's inputs.

use candle_core::{Result, Tensor, bail};

use crate::model::config::Rope;
use crate::model::forward::packing::PassInputs;
use crate::model::kernels::cuda::launch::SpanAddresses;
use crate::model::transfer::cuda_tensor::{Address, CudaTensor};

/// Where the kernels of a pass find its inputs.
#[derive(Debug, Clone)]
pub(super) struct Inputs {
    /// The ids of all tokens, and their positions: (tokens), u32.
    pub(super) tokens: Address,
    pub(super) positions: Address,
    pub(super) spans: SpanAddresses,
    pub(super) last: Option<LastInputs>,
    /// The tables of cosines and sines of each RoPE.
    ropes: Vec<(Rope, [Address; 2])>,
}

/// The inputs of the last layer, which runs for the last position of each row.
#[derive(Debug, Clone)]
pub(super) struct LastInputs {
    /// The indices of these positions among all tokens, and their positions: (rows), u32.
    pub(super) ends: Address,
    pub(super) positions: Address,
    pub(super) spans: SpanAddresses,
}

fn address(tensor: &Tensor) -> Result<Address> {
    CudaTensor::new("inputs of a pass", tensor)?.address()
}

impl Inputs {
    pub(super) fn of(inputs: &PassInputs) -> Result<Self> {
        let angles = inputs.angles.all();
        let Some(positions) = angles.first().and_then(|(_, angles)| angles.positions.as_ref()) else {
            bail!("a pass on a GPU needs the positions of its tokens")
        };
        let last = match (&inputs.last, &inputs.last_positions) {
            (Some((spans, ends)), Some(positions)) => Some(LastInputs {
                ends: address(ends)?,
                positions: address(positions)?,
                spans: SpanAddresses::of(spans)?,
            }),
            _ => None,
        };
        let ropes: Result<_> = angles
            .iter()
            .map(|(rope, angles)| Ok((*rope, [address(&angles.cos)?, address(&angles.sin)?])))
            .collect();
        Ok(Self {
            tokens: address(&inputs.tokens)?,
            positions: address(positions)?,
            spans: SpanAddresses::of(&inputs.spans)?,
            last,
            ropes: ropes?,
        })
    }

    /// Returns the inputs in a copy at `to` of the memory at `from` that holds them. The tables of angles stay.
    pub(super) fn moved(&self, from: Address, to: Address) -> Self {
        let moved = |address: Address| address.moved(from, to);
        let spans = |spans: &SpanAddresses| SpanAddresses {
            fields: moved(spans.fields),
            row_of_query: moved(spans.row_of_query),
            ..*spans
        };
        Self {
            tokens: moved(self.tokens),
            positions: moved(self.positions),
            spans: spans(&self.spans),
            last: self.last.as_ref().map(|last| LastInputs {
                ends: moved(last.ends),
                positions: moved(last.positions),
                spans: spans(&last.spans),
            }),
            ropes: self.ropes.clone(),
        }
    }

    /// Returns the addresses of the tables of cosines and sines, by RoPE.
    pub(super) fn tables(&self) -> Vec<[Address; 2]> {
        self.ropes.iter().map(|(_, tables)| *tables).collect()
    }

    /// Returns the cosines, the sines and the given positions, as `norm_rope` takes them.
    pub(super) fn angles(&self, rope: &Rope, positions: Address) -> Result<[Address; 3]> {
        match self.ropes.iter().find(|(other, _)| other == rope) {
            Some((_, [cos, sin])) => Ok([*cos, *sin, positions]),
            None => bail!("no angles were computed for {rope:?}"),
        }
    }
}
