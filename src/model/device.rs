//! Where a model computes and in what: the settings made true, or refused by name.

use candle_core::{DType, Device};

use super::problem::Problem;
use crate::config::{DeviceChoice, DtypeChoice, ModelConfig, Quantize};

/// A device that is there, and a dtype that it computes in.
#[derive(Debug, Clone)]
pub struct Place {
    /// The device.
    pub device: Device,
    /// What linear layers compute in: f32, or bf16 on a GPU.
    pub dtype: DType,
    /// `cpu` or `cuda:N`, as decisions name it.
    pub name: String,
}

impl Place {
    /// The CPU, in f32.
    pub fn cpu() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
            name: "cpu".to_owned(),
        }
    }

    /// What the settings ask for. `auto` takes the first GPU, or the CPU with a warning where a build for
    /// GPUs finds none; a device that is named must be there.
    ///
    /// # Errors
    /// No such device, or one that cannot do what is asked of it.
    pub fn of(model: &ModelConfig) -> Result<Self, Problem> {
        let place = match model.device {
            DeviceChoice::Cpu => Self::cpu(),
            DeviceChoice::Auto => auto(),
            DeviceChoice::Cuda(ordinal) => cuda(ordinal)
                .map_err(|reason| Problem::setting("model.device", format!("`cuda:{ordinal}` {reason}")))?,
        };
        let is_cpu = place.device.is_cpu();
        let dtype = match model.dtype {
            DtypeChoice::Auto if is_cpu => DType::F32,
            DtypeChoice::Auto | DtypeChoice::Bf16 => DType::BF16,
            DtypeChoice::F32 => DType::F32,
        };
        if is_cpu && dtype != DType::F32 {
            let text = "`bf16` is computed on GPUs only; expected `auto` or `f32` on the CPU";
            return Err(Problem::setting("model.dtype", text.to_owned()));
        }
        if !is_cpu && model.quantize != Quantize::None {
            let text = "weights are quantised on the CPU only; expected `none` on a GPU";
            return Err(Problem::setting("model.quantize", text.to_owned()));
        }
        Ok(Self { dtype, ..place })
    }

    /// `f32` or `bf16`.
    pub fn dtype_name(&self) -> &'static str {
        self.dtype.as_str()
    }
}

#[cfg(not(feature = "cuda"))]
fn auto() -> Place {
    Place::cpu()
}

#[cfg(feature = "cuda")]
fn auto() -> Place {
    cuda(0).unwrap_or_else(|reason| {
        tracing::warn!(reason, "no GPU can be used: computing on the CPU");
        Place::cpu()
    })
}

#[cfg(not(feature = "cuda"))]
fn cuda(_ordinal: usize) -> Result<Place, String> {
    Err("needs a build with CUDA, which this is not; expected `auto` or `cpu`".to_owned())
}

/// Opens the card and runs one of our kernels on it, which is where a driver that is too old, and a card that
/// the kernels are not compiled for, show.
#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> Result<Place, String> {
    let device = Device::new_cuda(ordinal).map_err(|error| format!("cannot be opened: {}", first_line(&error)))?;
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
    Ok(Place {
        device,
        dtype: DType::BF16,
        name: format!("cuda:{ordinal}"),
    })
}

/// candle's errors carry a backtrace where the environment asks for one.
#[cfg(feature = "cuda")]
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
