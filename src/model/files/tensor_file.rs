//! One safetensors file, memory-mapped or embedded in the binary. Its header is validated when the file is opened; its
//! tensors are read, checked and converted one at a time.
//!
//! The safetensors crate checks the sizes in the header against the size of the file before anything is allocated, so
//! memory use is limited by the size of the file.

use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use sha2::{Digest, Sha256};

use super::formats;
use crate::fault::Fault;
use crate::hash::hex;

/// The number of elements that one task converts. It is large enough to hide the cost of a task, and small enough to
/// keep all cores busy.
const CONVERT_CHUNK: usize = 1 << 16;

/// How much of a file is hashed before its pages are released.
const HASHED_PIECE: usize = 16 << 20;

/// An open safetensors file with a valid header.
///
/// A mapped file must not be changed in place while it is open. Replace it by renaming, as package managers and our
/// registry do.
pub(crate) struct TensorFile {
    path: PathBuf,
    content: Content,
    metadata: Metadata,
    data_start: usize,
}

enum Content {
    Mapped(Mmap),
    Embedded(&'static [u8]),
}

impl TensorFile {
    /// Maps `path` and validates its header.
    ///
    /// # Errors
    /// Returns an error if the file cannot be opened, is not a regular file, or has a header that does not match its
    /// content.
    pub(crate) fn open(path: &Path) -> Result<Self, Fault> {
        let fault = |text: String| Fault::file(path, text);
        let file = File::open(path).map_err(|error| fault(format!("cannot open: {error}")))?;
        let is_file = file
            .metadata()
            .map_err(|error| fault(format!("cannot read its metadata: {error}")))?
            .is_file();
        if !is_file {
            return Err(fault("is not a regular file".into()));
        }
        #[expect(
            unsafe_code,
            reason = "reading the file instead of mapping it would hold the checkpoint twice"
        )]
        // SAFETY: the map is read-only and lives as long as `self`. The documentation of this type requires that the
        // file is not changed in the meantime.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| fault(format!("cannot map into memory: {error}")))?;
        Self::read(path, Content::Mapped(map))
    }

    /// Validates the header of a file that is embedded in the binary. The path appears only in errors.
    ///
    /// # Errors
    /// Returns an error if the header does not match the content.
    pub(super) fn embedded(path: &Path, bytes: &'static [u8]) -> Result<Self, Fault> {
        Self::read(path, Content::Embedded(bytes))
    }

    fn read(path: &Path, content: Content) -> Result<Self, Fault> {
        let bytes = content.bytes();
        let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| {
            let text = format!("not a complete safetensors file ({} bytes): {error}", bytes.len());
            formats::not_safetensors(path, bytes).unwrap_or_else(|| Fault::file(path, text))
        })?;
        Ok(Self {
            path: path.to_owned(),
            content,
            metadata,
            data_start: 8 + header,
        })
    }

    /// Returns the path from which the file was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the names of the file's tensors, in no particular order.
    pub(crate) fn names(&self) -> Vec<String> {
        self.metadata.tensors().into_keys().collect()
    }

    /// Returns the shape of a tensor, or `None` if the file does not contain it.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|info| info.shape.as_slice())
    }

    /// Returns the size of a tensor in bytes, or `None` if the file does not contain it.
    pub(crate) fn tensor_bytes(&self, name: &str) -> Option<usize> {
        let (start, end) = self.metadata.info(name)?.data_offsets;
        Some(end - start)
    }

    /// Returns the dtype, the shape and the bytes of a tensor, or `None` if the file does not contain it.
    pub(super) fn content_of(&self, name: &str) -> Option<(Dtype, &[usize], &[u8])> {
        let info = self.metadata.info(name)?;
        let (start, end) = info.data_offsets;
        let bytes = &self.bytes()[self.data_start + start..self.data_start + end];
        Some((info.dtype, &info.shape, bytes))
    }

    /// Returns the content of the whole file.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.content.bytes()
    }

    /// Returns the content hash of the file.
    pub(super) fn content_hash(&self) -> String {
        let mut hasher = Sha256::new();
        for (index, piece) in self.bytes().chunks(HASHED_PIECE).enumerate() {
            hasher.update(piece);
            self.content.release(index * HASHED_PIECE, piece.len());
        }
        format!("sha256:{}", hex(&hasher.finalize()))
    }

    /// Reads a tensor of the given shape on the CPU and converts it to f32.
    ///
    /// # Errors
    /// Returns an error if the tensor is missing, has another shape or an unsupported dtype, or contains a value that
    /// is not finite.
    pub(crate) fn read_f32(&self, name: &str, shape: &[usize]) -> Result<Tensor, Fault> {
        let (info, data) = self.find(name, shape)?;
        let _release = Release::new(&self.content, data);
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

    /// Copies a tensor of the given shape from the file to the device without changing its dtype.
    ///
    /// # Errors
    /// Returns an error in the cases of [`TensorFile::read_f32`], and if the device has too little memory.
    pub(crate) fn read_as_stored(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor, Fault> {
        let (info, data) = self.find(name, shape)?;
        let _release = Release::new(&self.content, data);
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
            // A number is finite unless all of its exponent bits are set.
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

    /// Returns the header's entry for a tensor of the expected shape, and the tensor's bytes.
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
            Self::Embedded(bytes) => bytes,
        }
    }

    /// Takes a part of a mapped file out of this process's memory. It is read from the file again if it is needed.
    fn release(&self, start: usize, length: usize) {
        if let Self::Mapped(map) = self {
            #[expect(unsafe_code, reason = "a checkpoint would count twice, mapped and converted")]
            // SAFETY: the map is read-only, so it has no changes that could be lost.
            let released = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, length) };
            // This is an advice: a system that refuses it keeps the pages until it needs the memory.
            let _ = released;
        }
    }
}

/// Releases the bytes of a tensor when it has been read.
struct Release<'a> {
    content: &'a Content,
    start: usize,
    length: usize,
}

impl<'a> Release<'a> {
    /// `data` is a part of the content.
    fn new(content: &'a Content, data: &[u8]) -> Self {
        Self {
            content,
            start: data.as_ptr().addr() - content.bytes().as_ptr().addr(),
            length: data.len(),
        }
    }
}

impl Drop for Release<'_> {
    fn drop(&mut self) {
        self.content.release(self.start, self.length);
    }
}

/// Converts little-endian elements of `N` bytes to f32, in parallel.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::content_hash;

    /// Writes a file with one tensor of ones and returns its path.
    fn file(folder: &Path, elements: usize) -> PathBuf {
        let path = folder.join("model.safetensors");
        let bytes = bytemuck::cast_slice::<f32, u8>(&vec![1f32; elements]).to_vec();
        let view = safetensors::tensor::TensorView::new(Dtype::F32, vec![elements], &bytes).unwrap();
        safetensors::serialize_to_file([("ones", view)], None, &path).unwrap();
        path
    }

    /// Returns how many bytes of the mapped file are in the memory of this process.
    fn resident(path: &Path) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let name = path.to_str().unwrap();
        let mapping = maps.split(name).nth(1).expect("the file is mapped");
        let line = mapping.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
    }

    /// A checkpoint that is read and converted does not count twice.
    #[test]
    fn what_has_been_read_leaves_the_memory() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), 2_000_000);
        let file = TensorFile::open(&path).unwrap();
        let touched = file.bytes().iter().map(|&byte| u64::from(byte)).sum::<u64>();
        assert!(touched > 0 && resident(&path) > 7_000_000, "{}", resident(&path));
        let read = file.read_f32("ones", &[2_000_000]).unwrap();
        assert_eq!(read.sum_all().unwrap().to_scalar::<f32>().unwrap(), 2_000_000.0);
        assert!(resident(&path) < 100_000, "{}", resident(&path));

        let stored = file.read_as_stored("ones", &[2_000_000], &Device::Cpu).unwrap();
        assert_eq!(stored.dims(), [2_000_000]);
        assert!(resident(&path) < 100_000, "{}", resident(&path));

        assert_eq!(file.content_hash(), content_hash(&std::fs::read(&path).unwrap()));
        assert!(resident(&path) < 100_000, "{}", resident(&path));
    }
}
