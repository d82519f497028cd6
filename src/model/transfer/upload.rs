//! Copies weights from files to a device, and checks that they are finite.

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::staging::StagingBuffers;

/// The number of bytes that one task checks and copies. It is large enough to hide the cost of a task, small enough to
/// keep all cores busy and to stay in a core's cache, and a multiple of the size of every dtype.
pub(super) const TASK_BYTES: usize = 1 << 18;

/// Why weights were not copied.
#[derive(Debug)]
pub(in crate::model) enum UploadError {
    /// The part with this index contains NaN or infinity.
    NotFinite(usize),
    /// The device failed or has too little memory, or the parts do not fill the shape.
    Device(candle_core::Error),
}

impl From<candle_core::Error> for UploadError {
    fn from(error: candle_core::Error) -> Self {
        Self::Device(error)
    }
}

/// Copies weights to one device. On a GPU, the copies pass through a few page-locked buffers, which are freed with this
/// value, and are not waited for: work that is queued later runs after them.
#[derive(Debug)]
pub(in crate::model) struct WeightUpload {
    device: Device,
    #[cfg(feature = "cuda")]
    staging: StagingBuffers,
}

impl WeightUpload {
    pub(in crate::model) fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            #[cfg(feature = "cuda")]
            staging: StagingBuffers::default(),
        }
    }

    /// Returns a tensor with the bytes of all parts one after the other: with the rows of several matrices, for
    /// instance. The bytes are little-endian numbers of the dtype f32, f16 or bf16, and all of them have been read when
    /// this returns.
    ///
    /// # Errors
    /// Returns an error if a part contains a number that is not finite, if the parts do not have as many bytes as the
    /// shape, or if the device fails.
    pub(in crate::model) fn stack(
        &self,
        parts: &[&[u8]],
        dtype: DType,
        shape: &[usize],
    ) -> Result<Tensor, UploadError> {
        let (expected, found) = (
            shape.iter().product::<usize>(),
            parts.iter().map(|part| part.len()).sum::<usize>(),
        );
        if found != expected * dtype.size_in_bytes() {
            let text = format!("{found} bytes of {dtype:?} do not fill {shape:?}");
            return Err(UploadError::Device(candle_core::Error::Msg(text)));
        }
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &self.device {
            return self.staging.stack(parts, dtype, shape, device);
        }
        let is_part_finite = |part: &[u8]| part.par_chunks(TASK_BYTES).all(|bytes| is_finite(dtype, bytes));
        if let Some(index) = parts.iter().position(|part| !is_part_finite(part)) {
            return Err(UploadError::NotFinite(index));
        }
        let stacked: CandleResult<Tensor> = match parts {
            [whole] => Tensor::from_raw_buffer(whole, dtype, shape, &self.device),
            parts => Tensor::from_raw_buffer(&parts.concat(), dtype, shape, &self.device),
        };
        Ok(stacked?)
    }
}

/// Returns whether all little-endian numbers are finite. A number is, unless all of its exponent bits are set.
pub(super) fn is_finite(dtype: DType, bytes: &[u8]) -> bool {
    let all_16 = |exponent: u16| {
        let (numbers, _) = bytes.as_chunks::<2>();
        numbers
            .iter()
            .all(|bytes| u16::from_le_bytes(*bytes) & exponent != exponent)
    };
    match dtype {
        DType::F16 => all_16(0x7c00),
        DType::BF16 => all_16(0x7f80),
        _ => {
            let (numbers, _) = bytes.as_chunks::<4>();
            numbers.iter().all(|bytes| f32::from_le_bytes(*bytes).is_finite())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The CPU, and a GPU if the tests are built for one.
    fn devices() -> Vec<Device> {
        let mut devices = vec![Device::Cpu];
        if cfg!(feature = "cuda") {
            devices.extend(Device::new_cuda(0).ok());
        }
        devices
    }

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn parts_follow_each_other() {
        // The second part needs more tasks than there are buffers on a GPU, and does not fill the last.
        let long: Vec<f32> = (0..350_002).map(|value| value as f32).collect();
        let (first, second) = (bytes(&[-1.0, -2.0]), bytes(&long));
        for device in devices() {
            let upload = WeightUpload::new(&device);
            let shape = [175_002, 2];
            let stacked = upload.stack(&[&first, &second], DType::F32, &shape).unwrap();
            assert_eq!(stacked.dims(), shape);
            let found = stacked.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(found[..2], [-1.0, -2.0]);
            assert_eq!(found[2..], long);
        }
    }

    #[test]
    fn the_part_that_is_not_finite_is_named() {
        let (finite, infinite) = (bytes(&[1.0, f32::MAX]), bytes(&[1.0, f32::INFINITY]));
        for device in devices() {
            let upload = WeightUpload::new(&device);
            let refused = upload.stack(&[&finite, &infinite], DType::F32, &[4]);
            assert!(matches!(refused, Err(UploadError::NotFinite(1))), "{refused:?}");
            let short = upload.stack(&[&finite], DType::F32, &[3]);
            assert!(matches!(short, Err(UploadError::Device(_))), "{short:?}");
        }
    }

    #[test]
    fn numbers_with_all_exponent_bits_are_not_finite() {
        let f16 = |number: u16| is_finite(DType::F16, &number.to_le_bytes());
        let bf16 = |number: u16| is_finite(DType::BF16, &number.to_le_bytes());
        assert!(f16(0x7bff) && f16(0xfbff) && !f16(0x7c00) && !f16(0xfc00) && !f16(0x7e00));
        assert!(bf16(0x7f7f) && bf16(0xff7f) && !bf16(0x7f80) && !bf16(0xff80) && !bf16(0x7fc0));
    }
}
