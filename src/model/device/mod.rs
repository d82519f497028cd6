//! Where a model computes and in what: the settings made true, or refused by name.

#[cfg(feature = "cuda")]
pub(super) mod card;
pub(crate) mod footprint;

use candle_core::{DType, Device, Result as CandleResult};
use tracing::warn;

use crate::config::{DeviceChoice, DtypeChoice, ModelConfig, Quantize};
use crate::fault::Fault;
use crate::model::files::checkpoint::Checkpoint;
use footprint::bytes_needed;

/// A device that is there, and a dtype that it computes in.
#[derive(Debug, Clone)]
pub struct Placement {
    /// The device.
    pub device: Device,
    /// What linear layers compute in: f32, or bf16 on a GPU.
    pub dtype: DType,
    /// Its GPU's number; none is the CPU.
    ordinal: Option<usize>,
}

impl Placement {
    /// The CPU, in f32.
    pub fn cpu() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
            ordinal: None,
        }
    }

    /// What the settings ask for. `auto` takes the first GPU, or the CPU with a warning where a build for
    /// GPUs finds none; a device that is named must be there.
    ///
    /// # Errors
    /// No such device, or one that cannot do what is asked of it.
    pub fn of(model: &ModelConfig) -> Result<Self, Fault> {
        let placement = match model.device {
            DeviceChoice::Cpu => Self::cpu(),
            DeviceChoice::Auto => auto(),
            DeviceChoice::Cuda(ordinal) => {
                cuda(ordinal).map_err(|reason| Fault::setting("model.device", format!("`cuda:{ordinal}` {reason}")))?
            }
        };
        let is_cpu = placement.device.is_cpu();
        let dtype = match model.dtype {
            DtypeChoice::Auto if is_cpu => DType::F32,
            DtypeChoice::Auto | DtypeChoice::Bf16 => DType::BF16,
            DtypeChoice::F32 => DType::F32,
        };
        if is_cpu && dtype != DType::F32 {
            let text = "`bf16` is computed on GPUs only; expected `auto` or `f32` on the CPU";
            return Err(Fault::setting("model.dtype", text.to_owned()));
        }
        if !is_cpu && model.quantize != Quantize::None {
            let text = "weights are quantised on the CPU only; expected `none` on a GPU";
            return Err(Fault::setting("model.quantize", text.to_owned()));
        }
        Ok(Self { dtype, ..placement })
    }

    /// As [`Placement::of`], for a checkpoint that must fit in what memory is free there. Where it does not, `auto`
    /// takes the CPU with a warning.
    ///
    /// # Errors
    /// As [`Placement::of`]; too little memory on a device that is named.
    pub fn for_checkpoint(model: &ModelConfig, checkpoint: &Checkpoint) -> Result<Self, Fault> {
        let placement = Self::of(model)?;
        let fault = |text: String| Fault::setting("model.device", format!("`{}` {text}", placement.name()));
        let free = placement
            .free_bytes()
            .map_err(|error| fault(format!("does not tell its free memory: {}", first_line(&error))))?;
        let adapter = model.adapter.as_ref();
        let adapter = adapter.and_then(|folder| std::fs::metadata(folder.join("adapter_model.safetensors")).ok());
        // What is wrong with its file is told when it is read.
        let needed = bytes_needed(checkpoint, placement.dtype) + adapter.map_or(0, |file| file.len());
        match (room(free, needed), model.device) {
            (Ok(()), _) => Ok(placement),
            (Err(reason), DeviceChoice::Auto) => {
                warn!(
                    device = placement.name(),
                    reason, "no GPU can be used: computing on the CPU"
                );
                Self::of(&ModelConfig {
                    device: DeviceChoice::Cpu,
                    ..model.clone()
                })
            }
            (Err(reason), _) => Err(fault(reason)),
        }
    }

    /// `cpu` or `cuda:N`, as decisions name it.
    pub fn name(&self) -> String {
        match self.ordinal {
            None => "cpu".to_owned(),
            Some(ordinal) => format!("cuda:{ordinal}"),
        }
    }

    /// The setting that asks for this very place.
    pub fn choice(&self) -> DeviceChoice {
        self.ordinal.map_or(DeviceChoice::Cpu, DeviceChoice::Cuda)
    }

    /// `f32` or `bf16`.
    pub fn dtype_name(&self) -> &'static str {
        self.dtype.as_str()
    }

    /// Bytes that are free on a GPU; nothing for the CPU, whose memory is the system's to share out.
    ///
    /// # Errors
    /// The driver's.
    pub fn free_bytes(&self) -> CandleResult<Option<u64>> {
        free_bytes(&self.device)
    }
}

/// As [`Placement::free_bytes`].
pub(crate) fn free_bytes(device: &Device) -> CandleResult<Option<u64>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => card::free_bytes(device).map(Some),
        _ => Ok(None),
    }
}

/// Waits for a GPU and gives back what memory is kept there for the next batch; nothing on the CPU.
///
/// # Errors
/// What failed on the device.
pub(crate) fn release(device: &Device) -> CandleResult<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => card::release(device),
        _ => Ok(()),
    }
}

/// Keeps so much memory of a GPU ready beside what tensors hold now; more goes back when the device is waited for.
///
/// # Errors
/// The driver's.
#[cfg_attr(
    not(feature = "cuda"),
    expect(unused_variables, reason = "the CPU's memory is the system's")
)]
pub(crate) fn keep_memory(device: &Device, bytes: u64) -> CandleResult<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => card::keep_memory(device, bytes),
        _ => Ok(()),
    }
}

/// Called before the last use of a device goes: the libraries' handles panic when a device that has failed cannot
/// close them, so such a device stays open until the process ends.
pub(crate) fn keep_open_if_failed(device: &Device) {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(card) if device.synchronize().is_err() => std::mem::forget(card.clone()),
        _ => {}
    }
}

fn room(free: Option<u64>, needed: u64) -> Result<(), String> {
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
fn auto() -> Placement {
    Placement::cpu()
}

#[cfg(feature = "cuda")]
fn auto() -> Placement {
    cuda(0).unwrap_or_else(|reason| {
        warn!(reason, "no GPU can be used: computing on the CPU");
        Placement::cpu()
    })
}

#[cfg(not(feature = "cuda"))]
fn cuda(_ordinal: usize) -> Result<Placement, String> {
    Err("needs a build with CUDA, which this is not; expected `auto` or `cpu`".to_owned())
}

/// Opens the card and runs one of our kernels on it, which is where a driver that is too old, and a card that
/// the kernels are not compiled for, show.
#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> Result<Placement, String> {
    if let Some(reason) = card::missing_driver() {
        return Err(format!("needs NVIDIA's driver, and there is none: {reason}"));
    }
    let device = card::open(ordinal).map_err(|error| format!("cannot be opened: {}", first_line(&error)))?;
    let probe = || {
        let x = candle_core::Tensor::ones((1, 32), DType::BF16, &device)?;
        super::kernels::geglu(&x, &x)?
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1::<f32>()
    };
    match probe() {
        Ok(values) if (values[0] - 0.841_19).abs() < 0.01 => {}
        Ok(values) => return Err(format!("computes {} where 0.84 is right", values[0])),
        Err(error) => {
            return Err(format!(
                "cannot run our kernels (compute capability 8.0 or later and a driver for CUDA 13 are needed): {}",
                first_line(&error)
            ));
        }
    }
    Ok(Placement {
        device,
        dtype: DType::BF16,
        ordinal: Some(ordinal),
    })
}

/// candle's errors carry a backtrace where the environment asks for one.
pub(crate) fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_is_told_in_numbers() {
        assert_eq!(room(None, u64::MAX), Ok(()));
        assert_eq!(room(Some(5), 5), Ok(()));
        assert_eq!(
            room(Some(3_100_000_000), 5_250_000_000),
            Err("has 3.10 GB of memory free, expected at least 5.25 GB for this model".to_owned())
        );
    }
}
