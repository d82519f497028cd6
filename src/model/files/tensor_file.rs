//! One safetensors file, memory-mapped or embedded in the binary. Its header is validated when the file is opened; its
//! tensors are read, checked and converted one at a time.
//!
//! The safetensors crate checks the sizes in the header against the size of the file before anything is allocated, so
//! memory use is limited by the size of the file.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use sha2::{Digest, Sha256};

use super::formats;
use crate::fault::Fault;
use crate::hash::hex;
use crate::model::transfer::upload::UploadError;

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
    Mapped {
        map: Mmap,
        file: File,
        /// Taken when the file was opened.
        stamp: Stamp,
    },
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
        let metadata_fault = |error| fault(format!("cannot read its metadata: {error}"));
        let is_file = file.metadata().map_err(metadata_fault)?.is_file();
        let stamp = Stamp::of(&file).map_err(metadata_fault)?;
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
        Self::read(path, Content::Mapped { map, file, stamp })
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

    /// Returns the dtype of a tensor of the given shape.
    ///
    /// # Errors
    /// Returns an error if the tensor is missing, has another shape or an unsupported dtype.
    pub(super) fn dtype(&self, name: &str, shape: &[usize]) -> Result<DType, Fault> {
        match self.find(name, shape)?.0.dtype {
            Dtype::F32 => Ok(DType::F32),
            Dtype::F16 => Ok(DType::F16),
            Dtype::BF16 => Ok(DType::BF16),
            other => Err(self.wrong_dtype(name, other)),
        }
    }

    /// Returns the bytes of a tensor of the given shape, which leave the memory of this process when the result is
    /// dropped.
    ///
    /// # Errors
    /// Returns an error if the tensor is missing or has another shape.
    pub(super) fn borrow(&self, name: &str, shape: &[usize]) -> Result<BorrowedTensor<'_>, Fault> {
        let (_, data) = self.find(name, shape)?;
        Ok(BorrowedTensor {
            data,
            _release: Release::new(&self.content, data),
        })
    }

    /// Returns a fault of this file for an error of [`WeightUpload::stack`](crate::model::transfer::upload::WeightUpload::stack).
    pub(super) fn upload_fault(&self, name: &str, error: UploadError) -> Fault {
        self.fault(match error {
            UploadError::NotFinite(_) => format!("tensor `{name}` holds NaN or infinity, expected finite numbers"),
            UploadError::Device(error) => format!("tensor `{name}`: {error}"),
        })
    }

    /// Returns a fault if the file has been written to since it was opened: then what was read at different times does
    /// not belong together. A file that was replaced or deleted is still read as it was.
    pub(super) fn changed(&self) -> Option<Fault> {
        let Content::Mapped { file, stamp, .. } = &self.content else {
            return None;
        };
        match Stamp::of(file) {
            Ok(now) if now == *stamp => None,
            Ok(_) => {
                Some(self.fault("was changed while it was read, expected files that are replaced by renaming".into()))
            }
            Err(error) => Some(self.fault(format!("cannot read its metadata: {error}"))),
        }
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

/// The size and the time of the last write of a file.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: SystemTime,
}

impl Stamp {
    fn of(file: &File) -> std::io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            bytes: metadata.len(),
            modified: metadata.modified()?,
        })
    }
}

/// The bytes of a tensor, in a file that is mapped into memory.
pub(super) struct BorrowedTensor<'a> {
    pub(super) data: &'a [u8],
    _release: Release<'a>,
}

impl Content {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped { map, .. } => map,
            Self::Embedded(bytes) => bytes,
        }
    }

    /// Takes a part of a mapped file out of this process's memory. It is read from the file again if it is needed.
    fn release(&self, start: usize, length: usize) {
        if let Self::Mapped { map, .. } = self {
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

        let stored = file.borrow("ones", &[2_000_000]).unwrap();
        let touched = stored.data.iter().map(|&byte| u64::from(byte)).sum::<u64>();
        assert!(touched > 0 && resident(&path) > 7_000_000, "{}", resident(&path));
        drop(stored);
        assert!(resident(&path) < 100_000, "{}", resident(&path));

        assert_eq!(file.content_hash(), content_hash(&std::fs::read(&path).unwrap()));
        assert!(resident(&path) < 100_000, "{}", resident(&path));
    }

    #[test]
    fn a_file_that_is_written_to_after_it_was_opened_is_a_fault() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), 100);
        let opened = TensorFile::open(&path).unwrap();
        assert_eq!(opened.changed(), None);
        // A file that takes its place is another file.
        let other = folder.path().join("other");
        std::fs::copy(&path, &other).unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(opened.changed(), None);

        let opened = TensorFile::open(&path).unwrap();
        let written = File::options().write(true).open(&path).unwrap();
        written
            .set_modified(SystemTime::now() + std::time::Duration::from_secs(1))
            .unwrap();
        let fault = opened.changed().unwrap().to_string();
        assert!(fault.contains("was changed while it was read"), "{fault}");
    }
}
