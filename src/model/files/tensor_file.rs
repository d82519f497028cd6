//! One safetensors file, memory-mapped or carried in the binary: its header is validated on opening, its tensors are read,
//! converted and checked one at a time.
//!
//! A file's numbers are never trusted before the safetensors crate has checked them against the
//! file's size, so memory is bounded by what the file really holds.

use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};

use crate::fault::Fault;

/// Elements that one task converts: large enough to hide the cost of a task, small enough to share.
const CONVERT_CHUNK: usize = 1 << 16;

/// A safetensors file.
///
/// One that is mapped must not be changed in place meanwhile; replace it by renaming, as every package manager
/// and our own registry do.
pub struct TensorFile {
    path: PathBuf,
    content: Content,
    metadata: Metadata,
    data_start: usize,
}

enum Content {
    Mapped(Mmap),
    Carried(&'static [u8]),
}

impl TensorFile {
    /// Maps `path` and validates its header.
    ///
    /// # Errors
    /// The file cannot be opened, is no regular file, or its header does not describe it.
    pub fn open(path: &Path) -> Result<Self, Fault> {
        let fault = |text: String| Fault::file(path, text);
        let file = File::open(path).map_err(|error| fault(format!("cannot open: {error}")))?;
        let is_file = file
            .metadata()
            .map_err(|error| fault(format!("cannot stat: {error}")))?
            .is_file();
        if !is_file {
            return Err(fault("is not a regular file".into()));
        }
        #[expect(
            unsafe_code,
            reason = "memory-mapping is what keeps a checkpoint from being held twice"
        )]
        // SAFETY: the map is read-only and lives as long as `self`; that nobody truncates the file
        // meanwhile is the documented contract of every consumer of memory-mapped weights.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| fault(format!("cannot map: {error}")))?;
        Self::read(path, Content::Mapped(map))
    }

    /// Validates the header of a file that the binary carries; `path` is only named.
    ///
    /// # Errors
    /// Its header does not describe it.
    pub fn carried(path: &Path, bytes: &'static [u8]) -> Result<Self, Fault> {
        Self::read(path, Content::Carried(bytes))
    }

    fn read(path: &Path, content: Content) -> Result<Self, Fault> {
        let bytes = content.bytes();
        let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| {
            let text = format!("not a whole safetensors file of {} bytes: {error}", bytes.len());
            Fault::file(path, text)
        })?;
        Ok(Self {
            path: path.to_owned(),
            content,
            metadata,
            data_start: 8 + header,
        })
    }

    /// The path it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of its tensors, in no particular order.
    pub fn names(&self) -> Vec<String> {
        self.metadata.tensors().into_keys().collect()
    }

    /// Shape of a tensor, if the file has it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|info| info.shape.as_slice())
    }

    /// Bytes of a tensor, if the file has it.
    pub fn tensor_bytes(&self, name: &str) -> Option<usize> {
        let (start, end) = self.metadata.info(name)?.data_offsets;
        Some(end - start)
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.content.bytes()
    }

    /// A tensor of the given shape, converted to f32.
    ///
    /// # Errors
    /// The tensor is missing, has another shape or dtype, or holds a value that is not finite.
    pub fn read_f32(&self, name: &str, shape: &[usize]) -> Result<Tensor, Fault> {
        let (info, data) = self.find(name, shape)?;
        let values = match info.dtype {
            Dtype::F32 => convert(data, f32::from_le_bytes),
            Dtype::F16 => convert(data, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Dtype::BF16 => convert(data, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            other => return Err(self.wrong_dtype(name, other)),
        };
        if let Some(index) = values.par_iter().position_first(|value| !value.is_finite()) {
            let value = values[index];
            return Err(self.fault(format!(
                "tensor `{name}` holds {value} at index {index}, expected finite numbers"
            )));
        }
        Tensor::from_vec(values, shape, &Device::Cpu).map_err(|error| self.fault(format!("tensor `{name}`: {error}")))
    }

    /// A tensor of the given shape in the file's own dtype, straight from the map to the device.
    ///
    /// # Errors
    /// As [`TensorFile::read_f32`].
    pub fn read_as_stored(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor, Fault> {
        let (info, data) = self.find(name, shape)?;
        let (dtype, width) = match info.dtype {
            Dtype::F32 => (DType::F32, 4),
            Dtype::F16 => (DType::F16, 2),
            Dtype::BF16 => (DType::BF16, 2),
            other => return Err(self.wrong_dtype(name, other)),
        };
        let finite = |bytes: &[u8]| match info.dtype {
            Dtype::F32 => bytes
                .chunks_exact(4)
                .all(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite()),
            // Finite means that the exponent bits are not all set.
            Dtype::F16 => bytes
                .chunks_exact(2)
                .all(|b| u16::from_le_bytes([b[0], b[1]]) & 0x7c00 != 0x7c00),
            _ => bytes
                .chunks_exact(2)
                .all(|b| u16::from_le_bytes([b[0], b[1]]) & 0x7f80 != 0x7f80),
        };
        if !data.par_chunks(CONVERT_CHUNK * width).all(finite) {
            return Err(self.fault(format!(
                "tensor `{name}` holds NaN or infinity, expected finite numbers"
            )));
        }
        Tensor::from_raw_buffer(data, dtype, shape, device)
            .map_err(|error| self.fault(format!("tensor `{name}`: {error}")))
    }

    /// The tensor's description and bytes, if it has the expected shape.
    fn find(&self, name: &str, shape: &[usize]) -> Result<(&TensorInfo, &[u8]), Fault> {
        let info = self
            .metadata
            .info(name)
            .ok_or_else(|| self.fault(format!("tensor `{name}` is missing, expected {shape:?}")))?;
        if info.shape != shape {
            return Err(self.fault(format!(
                "tensor `{name}` has shape {:?}, expected {shape:?}",
                info.shape
            )));
        }
        let (start, end) = info.data_offsets;
        Ok((info, &self.bytes()[self.data_start + start..self.data_start + end]))
    }

    fn wrong_dtype(&self, name: &str, found: Dtype) -> Fault {
        self.fault(format!(
            "tensor `{name}` has dtype {found:?}, expected F32, F16 or BF16"
        ))
    }

    fn fault(&self, text: String) -> Fault {
        Fault::file(&self.path, text)
    }
}

impl Content {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Carried(bytes) => bytes,
        }
    }
}

/// Little-endian elements of `N` bytes to f32, in parallel.
fn convert<const N: usize>(data: &[u8], to_f32: impl Fn([u8; N]) -> f32 + Sync) -> Vec<f32> {
    let mut values = vec![0f32; data.len() / N];
    values
        .par_chunks_mut(CONVERT_CHUNK)
        .zip(data.par_chunks(CONVERT_CHUNK * N))
        .for_each(|(values, data)| {
            for (value, bytes) in values.iter_mut().zip(data.as_chunks::<N>().0) {
                *value = to_f32(*bytes);
            }
        });
    values
}
