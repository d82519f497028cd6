//! The positions of packed rows in their tensors, on the host and in the form that the GPU kernels read.

use candle_core::{Device, Result, Tensor, bail};

use crate::model::transfer::{DeviceBuffer, UploadBuffer, UploadRange};

/// The position of one row in the packed tensors. All fields count tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Index of the row's first query in the packed queries.
    pub query_start: usize,
    /// Number of queries. They are the last of the row's own tokens: all of them, or only those whose output is needed.
    pub queries: usize,
    /// Index of the row's first own key in the packed keys.
    pub key_start: usize,
    /// Number of own keys, one for each own token.
    pub keys: usize,
    /// Number of leading keys of the shared prefix that the row attends to, in addition to its own.
    pub shared: usize,
}

/// The rows of a pass, in order and without gaps between their queries, available on the device that computes.
#[derive(Debug, Clone)]
pub struct Spans {
    list: Vec<Span>,
    /// The same spans in GPU memory, if the pass runs on a GPU.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only kernels read it"))]
    pub(super) device: Option<DeviceSpans>,
}

/// Spans in the form that the GPU kernels read.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only kernels read it"))]
pub(super) struct DeviceSpans {
    /// The fields of each [`Span`], in the order of their declaration: (rows * 5), u32.
    pub(super) fields: Tensor,
    /// The index of the row that each query belongs to: (queries), u32.
    pub(super) row_of_query: Tensor,
}

impl Spans {
    /// Copies the spans to `device` if that is a GPU.
    ///
    /// # Errors
    /// Returns an error if a number does not fit in 32 bits or the copy fails.
    pub fn new(list: Vec<Span>, device: &Device) -> Result<Self> {
        if device.is_cpu() {
            return Ok(Self { list, device: None });
        }
        let mut upload = UploadBuffer::default();
        let packed = PackedSpans::new(list, device, &mut upload)?;
        packed.on_device(&DeviceBuffer::new(upload, device)?)
    }
}

impl std::ops::Deref for Spans {
    type Target = [Span];

    fn deref(&self) -> &[Span] {
        &self.list
    }
}

/// Spans that are sent to the device in one copy with the other numbers of the pass.
pub(in crate::model) struct PackedSpans {
    list: Vec<Span>,
    /// The fields of [`DeviceSpans`] in their order, or nothing if the pass runs on the CPU.
    ranges: Option<[UploadRange; 2]>,
}

impl PackedSpans {
    /// Adds the numbers that a GPU needs to `upload`; see [`Spans::new`].
    pub(in crate::model) fn new(list: Vec<Span>, device: &Device, upload: &mut UploadBuffer) -> Result<Self> {
        if device.is_cpu() {
            return Ok(Self { list, ranges: None });
        }
        let (mut fields, mut row_of_query) = (Vec::new(), Vec::new());
        for (index, span) in list.iter().enumerate() {
            let index = to_u32(index)?;
            for field in [span.query_start, span.queries, span.key_start, span.keys, span.shared] {
                fields.push(to_u32(field)?);
            }
            row_of_query.extend(std::iter::repeat_n(index, span.queries));
        }
        let ranges = [fields, row_of_query].map(|numbers| upload.push(numbers));
        Ok(Self {
            list,
            ranges: Some(ranges),
        })
    }

    /// Returns the spans as the device reads them, given the buffer that holds the upload.
    pub(in crate::model) fn on_device(self, buffer: &DeviceBuffer) -> Result<Spans> {
        let device = match &self.ranges {
            None => None,
            Some([fields, row_of_query]) => Some(DeviceSpans {
                fields: buffer.get(fields)?,
                row_of_query: buffer.get(row_of_query)?,
            }),
        };
        Ok(Spans {
            list: self.list,
            device,
        })
    }
}

fn to_u32(value: usize) -> Result<u32> {
    match u32::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => bail!("attention got {value} elements, expected fewer than 2^32"),
    }
}
