//! Where packed rows stand, on the host and as a GPU's kernels read it.

use candle_core::{Device, Result, Tensor, bail};

use crate::model::transfer::{List, Lists, Sent};

/// (query, head) pairs that a block of the bf16 attention kernel takes, as in attention.cu.
const TILE_PAIRS: usize = 48;

/// Where one row stands in the packed tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First of its queries.
    pub query_start: usize,
    /// Queries: the last tokens of the row; all of them, or only those whose output is needed.
    pub queries: usize,
    /// First of its own keys.
    pub key_start: usize,
    /// Its own keys.
    pub keys: usize,
    /// Keys of the prefix that it sees before its own.
    pub shared: usize,
}

/// The rows of a pass, in order and without gaps between their queries.
#[derive(Debug, Clone)]
pub struct Spans {
    list: Vec<Span>,
    /// The same on the GPU, where the tensors are there.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "read by kernels alone"))]
    pub(super) device: Option<DeviceSpans>,
}

/// Rows as kernels read them.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "read by kernels alone"))]
pub(super) struct DeviceSpans {
    /// (rows * 5) of u32: [`Span`]'s fields.
    pub(super) fields: Tensor,
    /// (queries) of u32: each query's row.
    pub(super) span_of: Tensor,
    /// (tiles * 2) of u32: each block's row and the first of its (query, head) pairs.
    pub(super) tiles: Tensor,
}

impl Spans {
    /// Brings rows to where the tensors are; `group` is the query heads of one key and value head.
    ///
    /// # Errors
    /// candle's; more than a GPU's kernels can count.
    pub fn new(list: Vec<Span>, group: usize, device: &Device) -> Result<Self> {
        if device.is_cpu() {
            return Ok(Self { list, device: None });
        }
        let mut lists = Lists::default();
        let packed = PackedSpans::new(list, group, device, &mut lists)?;
        packed.arrived(&Sent::new(lists, device)?)
    }
}

impl std::ops::Deref for Spans {
    type Target = [Span];

    fn deref(&self) -> &[Span] {
        &self.list
    }
}

/// Rows before they are sent, with other lists of the pass, to where the tensors are.
pub(in crate::model) struct PackedSpans {
    list: Vec<Span>,
    /// Fields, rows of queries, tiles; where there is anything to send.
    lists: Option<[List; 3]>,
}

impl PackedSpans {
    /// Adds to `lists` what a GPU needs; see [`Spans::new`].
    pub(in crate::model) fn new(list: Vec<Span>, group: usize, device: &Device, lists: &mut Lists) -> Result<Self> {
        if device.is_cpu() {
            return Ok(Self { list, lists: None });
        }
        let (mut fields, mut span_of, mut tiles) = (Vec::new(), Vec::new(), Vec::new());
        for (index, span) in list.iter().enumerate() {
            let index = number(index)?;
            for field in [span.query_start, span.queries, span.key_start, span.keys, span.shared] {
                fields.push(number(field)?);
            }
            span_of.extend(std::iter::repeat_n(index, span.queries));
            for first in (0..span.queries * group).step_by(TILE_PAIRS) {
                tiles.extend([index, number(first)?]);
            }
        }
        let lists = [fields, span_of, tiles].map(|numbers| lists.push(numbers));
        Ok(Self {
            list,
            lists: Some(lists),
        })
    }

    /// With what was sent.
    pub(in crate::model) fn arrived(self, sent: &Sent) -> Result<Spans> {
        let device = match &self.lists {
            None => None,
            Some([fields, span_of, tiles]) => Some(DeviceSpans {
                fields: sent.get(fields)?,
                span_of: sent.get(span_of)?,
                tiles: sent.get(tiles)?,
            }),
        };
        Ok(Spans {
            list: self.list,
            device,
        })
    }
}

fn number(value: usize) -> Result<u32> {
    match u32::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => bail!("attention is given {value} elements, expected less than 2^32"),
    }
}
