//! Resolves the device settings, or explains why they cannot be met, and manages the memory of a GPU.

#[cfg(feature = "cuda")]
pub(crate) mod gpu;
pub(crate) mod footprint;

use candle_core::{DType, Device, Result as CandleResult};
use tracing::warn;

use crate::config::{DeviceChoice, DtypeChoice, ModelConfig, Quantize};
use crate::fault::Fault;
use crate::model::files::checkpoint::Checkpoint;
use footprint::required_bytes;

/// An open device and the dtype that linear layers use on it.
#[derive(Debug, Clone)]
pub struct Placement {
    /// The CPU or an open GPU.
    pub device: Device,
    /// The dtype of linear layers: f32, or bf16 on a GPU.
    pub dtype: DType,
    /// The number of the GPU, or `None` for the CPU.
    ordinal: Option<usize>,
}

impl Placement {
    /// Returns the placement on the CPU in f32, which is always possible.
    pub fn cpu() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
            ordinal: None,
        }
    }

    /// Opens the device that the settings select. With `auto`, this is the first GPU; if there is none, it is the CPU,
    /// and a build with CUDA logs a warning.
    ///
    /// # Errors
    /// Returns an error if a GPU is required but cannot be used, or if the device does not support the dtype or the
    /// quantisation.
    pub fn from_settings(model: &ModelConfig) -> Result<Self, Fault> {
        let placement = match model.device {
            DeviceChoice::Cpu => Self::cpu(),
            DeviceChoice::Auto => first_gpu_or_cpu(),
            DeviceChoice::Cuda(ordinal) => open_gpu(ordinal)
                .map_err(|reason| Fault::setting("model.device", format!("`cuda:{ordinal}` {reason}")))?,
        };
        let is_cpu = placement.device.is_cpu();
        let dtype = match model.dtype {
            DtypeChoice::Auto if is_cpu => DType::F32,
            DtypeChoice::Auto | DtypeChoice::Bf16 => DType::BF16,
            DtypeChoice::F32 => DType::F32,
        };
        if is_cpu && dtype != DType::F32 {
            let text = "`bf16` is supported only on a GPU, expected `auto` or `f32` on the CPU";
            return Err(Fault::setting("model.dtype", text.to_owned()));
        }
        let placement = Self { dtype, ..placement };
        match placement.cannot_quantise(model.quantize) {
            None => Ok(placement),
            Some(text) => Err(Fault::setting("model.quantize", text)),
        }
    }

    /// Returns why weights cannot be quantised in this way here, or `None` if they can.
    fn cannot_quantise(&self, quantize: Quantize) -> Option<String> {
        match (&self.device, quantize) {
            (_, Quantize::None) | (Device::Cpu, Quantize::Int8) => None,
            (_, Quantize::Int8) => Some("`int8` is supported only on the CPU, expected `none` or `fp8` on a GPU".to_owned()),
            (Device::Cpu, Quantize::Fp8) => Some(
                "`fp8` is supported only on an NVIDIA GPU of compute capability 9.0, expected `none` or `int8` on the CPU"
                    .to_owned(),
            ),
            (_, Quantize::Fp8) if self.dtype != DType::BF16 => {
                Some(format!("`fp8` is supported only with `model.dtype` bf16, found {}", self.dtype_name()))
            }
            #[cfg(feature = "cuda")]
            (Device::Cuda(gpu), Quantize::Fp8) => {
                let name = self.name();
                match super::kernels::cuda::fp8::unsupported(gpu) {
                    Ok(reason) => reason.map(|reason| format!("`fp8` is not supported on {name}: {reason}")),
                    Err(error) => {
                        let error = message_without_backtrace(&error);
                        Some(format!("`fp8` cannot be used on {name}: {error}"))
                    }
                }
            }
            (_, Quantize::Fp8) => Some("`fp8` is supported only on an NVIDIA GPU".to_owned()),
        }
    }

    /// Opens the device that the settings select, as [`Placement::from_settings`] does, and checks that it has enough
    /// free memory for a checkpoint. If a GPU does not, `auto` falls back to the CPU with a warning.
    ///
    /// # Errors
    /// Returns an error in the cases of [`Placement::from_settings`], and if a GPU that the settings name has too
    /// little free memory.
    pub fn for_checkpoint(model: &ModelConfig, checkpoint: &Checkpoint) -> Result<Self, Fault> {
        let placement = Self::from_settings(model)?;
        let fault = |text: String| Fault::setting("model.device", format!("`{}` {text}", placement.name()));
        let free = placement.free_bytes().map_err(|error| {
            fault(format!(
                "cannot report its free memory: {}",
                message_without_backtrace(&error)
            ))
        })?;
        let adapter = model.adapter.as_ref();
        let adapter = adapter.and_then(|folder| std::fs::metadata(folder.join("adapter_model.safetensors")).ok());
        // A problem with the adapter's file is reported when it is read.
        // On a GPU, an adapter is held in f32 and, as the kernels read it, in bf16.
        let adapter = 3 * adapter.map_or(0, |file| file.len());
        let needed = required_bytes(checkpoint, placement.dtype, model.quantize) + adapter;
        match (check_free_memory(free, needed), model.device) {
            (Ok(()), _) => Ok(placement),
            (Err(reason), DeviceChoice::Auto) => {
                warn!(
                    device = placement.name(),
                    reason, "no GPU can be used: computing on the CPU"
                );
                Self::from_settings(&ModelConfig {
                    device: DeviceChoice::Cpu,
                    ..model.clone()
                })
            }
            (Err(reason), _) => Err(fault(reason)),
        }
    }

    /// Returns the device's name as it appears in decisions: `cpu` or `cuda:N`.
    pub fn name(&self) -> String {
        match self.ordinal {
            None => "cpu".to_owned(),
            Some(ordinal) => format!("cuda:{ordinal}"),
        }
    }

    /// Returns the setting that always selects this device, unlike `auto`.
    pub(crate) fn choice(&self) -> DeviceChoice {
        self.ordinal.map_or(DeviceChoice::Cpu, DeviceChoice::Cuda)
    }

    /// Returns the name of the dtype: `f32` or `bf16`.
    pub fn dtype_name(&self) -> &'static str {
        self.dtype.as_str()
    }

    /// Returns the bytes that can still be allocated on a GPU, or `None` on the CPU, whose memory is shared with the
    /// rest of the system.
    pub(crate) fn free_bytes(&self) -> CandleResult<Option<u64>> {
        match &self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda(gpu) => gpu::free_bytes(gpu).map(Some),
            _ => Ok(None),
        }
    }
}

/// Waits for a GPU and gives the unused memory of this process back to the driver. After a failed allocation, this
/// leaves room for other processes and for libraries that do not allocate from the pool. Does nothing on the CPU.
pub(crate) fn release_unused_memory(device: &Device) -> CandleResult<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu) => gpu::release_unused_memory(gpu),
        _ => Ok(()),
    }
}

/// Sets how much GPU memory this process keeps when tensors are freed: what tensors use now, plus `bytes`. Memory
/// beyond that is returned to the driver whenever the device is synchronised.
#[cfg_attr(
    not(feature = "cuda"),
    expect(unused_variables, reason = "only memory of a GPU is managed")
)]
pub(crate) fn retain_freed_memory(device: &Device, bytes: u64) -> CandleResult<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu) => gpu::retain_freed_memory(gpu, bytes),
        _ => Ok(()),
    }
}

/// Leaks the handle of a GPU that has failed, because the handles of CUDA's libraries panic if they cannot be closed.
/// Call this before the last handle is dropped.
pub(crate) fn leak_if_failed(device: &Device) {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu) if device.synchronize().is_err() => std::mem::forget(gpu.clone()),
        _ => {}
    }
}

/// Returns an error that states both numbers if less than `needed` bytes are free.
fn check_free_memory(free: Option<u64>, needed: u64) -> Result<(), String> {
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    match free {
        Some(free) if free < needed => Err(format!(
            "has {:.2} GB of memory free, expected at least {:.2} GB for this model",
            gigabytes(free),
            gigabytes(needed)
        )),
        _ => Ok(()),
    }
}

#[cfg(not(feature = "cuda"))]
fn first_gpu_or_cpu() -> Placement {
    Placement::cpu()
}

#[cfg(feature = "cuda")]
fn first_gpu_or_cpu() -> Placement {
    open_gpu(0).unwrap_or_else(|reason| {
        warn!(reason, "no GPU can be used: computing on the CPU");
        Placement::cpu()
    })
}

#[cfg(not(feature = "cuda"))]
fn open_gpu(_ordinal: usize) -> Result<Placement, String> {
    Err("needs a build with CUDA, expected `auto` or `cpu`".to_owned())
}

/// Opens a GPU, and runs one of our kernels and some of candle's on it. This fails if the driver is too old or if the
/// kernels are not compiled for the GPU.
#[cfg(feature = "cuda")]
fn open_gpu(ordinal: usize) -> Result<Placement, String> {
    if let Some(reason) = gpu::driver_load_error() {
        return Err(format!("needs NVIDIA's driver, which cannot be loaded: {reason}"));
    }
    if let Some(reason) = gpu::driver_is_too_old() {
        return Err(reason);
    }
    let device =
        gpu::open(ordinal).map_err(|error| format!("cannot be opened: {}", message_without_backtrace(&error)))?;
    let probe = || {
        let x = candle_core::Tensor::ones((1, 32), DType::BF16, &device)?;
        super::kernels::geglu(&x, &x)?
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1::<f32>()
    };
    match probe() {
        Ok(values) if (values[0] - 0.841_19).abs() < 0.01 => {}
        Ok(values) => return Err(format!("computes a wrong result: {}, expected 0.84", values[0])),
        Err(error) => {
            return Err(format!(
                "cannot run our kernels, which need compute capability 8.0 or later and a driver that is new enough \
                 ({}): {}",
                gpu::versions(),
                message_without_backtrace(&error)
            ));
        }
    }
    Ok(Placement {
        device,
        dtype: DType::BF16,
        ordinal: Some(ordinal),
    })
}

/// Returns the first line of a candle error. A backtrace follows it if the environment enables backtraces.
pub(crate) fn message_without_backtrace(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_is_reported_in_numbers() {
        assert_eq!(check_free_memory(None, u64::MAX), Ok(()));
        assert_eq!(check_free_memory(Some(5), 5), Ok(()));
        assert_eq!(
            check_free_memory(Some(3_100_000_000), 5_250_000_000),
            Err("has 3.10 GB of memory free, expected at least 5.25 GB for this model".to_owned())
        );
    }
}
