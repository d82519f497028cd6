//! Rotary position embedding: the angles by which packed tokens are rotated.

use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Result, Tensor, bail};

use crate::model::config::{GemmaConfig, Rope};
use crate::model::kernels::RopeAngles;

/// The frequencies of each distinct RoPE of a model, and on a GPU the angles of all positions used so far.
///
/// Angles are computed in f32 as in transformers (`modeling_rope_utils.py`): `1 / theta^(2i/d)` is rounded to f32 and
/// then multiplied by the position in f32.
#[derive(Debug)]
pub(crate) struct RopeTables {
    frequencies: Vec<(Rope, Vec<f32>)>,
    max_positions: usize,
    /// Empty on the CPU, where angles are computed for each pass.
    device_tables: Mutex<DeviceTables>,
}

/// Angles of all positions below a limit, in GPU memory.
#[derive(Debug, Default)]
struct DeviceTables {
    positions: usize,
    /// Cosines and sines, (positions, head_dim / 2) each, in the order of `RopeTables::frequencies`.
    angles: Vec<(Tensor, Tensor)>,
}

/// The number of positions of the first table. Prompts are shorter, and the limits of checkpoints are far higher.
const FIRST_POSITIONS: usize = 1024;

impl RopeTables {
    pub(crate) fn new(config: &GemmaConfig) -> Self {
        let mut frequencies: Vec<(Rope, Vec<f32>)> = Vec::new();
        for layer in &config.layers {
            if frequencies.iter().all(|(rope, _)| *rope != layer.rope) {
                frequencies.push((layer.rope, inverse_frequencies(&layer.rope, config.head_dim)));
            }
        }
        Self {
            frequencies,
            max_positions: config.max_position_embeddings,
            device_tables: Mutex::default(),
        }
    }

    /// Returns the angles at the given positions. On a GPU, `on_device` contains the same positions, because the
    /// kernels look up the angles.
    pub(crate) fn angles(&self, positions: &[usize], on_device: Option<&Tensor>) -> Result<PassAngles> {
        let max = self.max_positions;
        let highest = positions.iter().copied().max().unwrap_or(0);
        if highest >= max {
            bail!("position {highest} is beyond the checkpoint's {max} positions");
        }
        let angles = match on_device {
            Some(on_device) => self.device_tables(highest + 1, on_device.device())?,
            None => self.compute(positions)?,
        };
        let ropes = self.frequencies.iter().zip(angles).map(|((rope, _), (cos, sin))| {
            let positions = on_device.cloned();
            (*rope, RopeAngles { cos, sin, positions })
        });
        Ok(PassAngles { ropes: ropes.collect() })
    }

    /// Returns tables of at least the given number of positions, and extends them first if they are too short.
    fn device_tables(&self, positions: usize, device: &Device) -> Result<Vec<(Tensor, Tensor)>> {
        let mut tables = self.device_tables.lock().unwrap_or_else(PoisonError::into_inner);
        if tables.positions < positions {
            let positions = positions
                .next_power_of_two()
                .max(FIRST_POSITIONS)
                .min(self.max_positions);
            let all: Vec<usize> = (0..positions).collect();
            let angles = self.compute(&all)?.into_iter();
            let angles: Result<_> = angles
                .map(|(cos, sin)| Ok((cos.to_device(device)?, sin.to_device(device)?)))
                .collect();
            *tables = DeviceTables {
                positions,
                angles: angles?,
            };
        }
        Ok(tables.angles.clone())
    }

    /// Computes cosines and sines for each RoPE, on the CPU.
    fn compute(&self, positions: &[usize]) -> Result<Vec<(Tensor, Tensor)>> {
        let frequencies = self.frequencies.iter();
        frequencies
            .map(|(_, frequencies)| cos_sin(positions, frequencies))
            .collect()
    }
}

/// Computes cosines and sines, (positions, head_dim / 2) each, on the CPU.
fn cos_sin(positions: &[usize], frequencies: &[f32]) -> Result<(Tensor, Tensor)> {
    let shape = (positions.len(), frequencies.len());
    let angles = positions
        .iter()
        .flat_map(|&position| frequencies.iter().map(move |frequency| position as f32 * frequency));
    let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(f32::sin_cos).unzip();
    let tensor = |values| Tensor::from_vec(values, shape, &Device::Cpu);
    Ok((tensor(cos)?, tensor(sin)?))
}

fn inverse_frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    (0..head_dim)
        .step_by(2)
        .map(|i| 1.0 / (rope.theta as f32).powf(i as f32 / head_dim as f32) / rope.factor as f32)
        .collect()
}

/// The angles of one pass for each RoPE of the model.
pub(crate) struct PassAngles {
    ropes: Vec<(Rope, RopeAngles)>,
}

impl PassAngles {
    /// Returns the angles of every RoPE.
    #[cfg(feature = "cuda")]
    pub(crate) fn all(&self) -> &[(Rope, RopeAngles)] {
        &self.ropes
    }

    /// Returns the angles for layers with this RoPE, which must be one of the model's.
    pub(crate) fn of(&self, rope: &Rope) -> &RopeAngles {
        let index = self.ropes.iter().position(|(other, _)| other == rope);
        // `RopeTables::new` has an entry for the RoPE of every layer.
        &self.ropes[index.unwrap_or_default()].1
    }
}
