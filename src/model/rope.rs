//! Rotary position embedding: the angles of the packed tokens.

use candle_core::{Device, Result, Tensor, bail};

use super::config::{GemmaConfig, Rope};
use super::kernels::Turn;

/// Cosines and sines by position, for each distinct rope of the model.
///
/// Computed in f32 as the reference does: `1 / theta^(2i/d)` rounded to f32, then position times
/// frequency in f32 (`transformers/modeling_rope_utils.py`).
#[derive(Debug)]
pub(super) struct RopeTables {
    frequencies: Vec<(Rope, Vec<f32>)>,
    /// On a GPU, where tokens take their own: every position's cosines and sines, in the same order.
    tables: Vec<(Tensor, Tensor)>,
}

impl RopeTables {
    pub(super) fn new(config: &GemmaConfig, device: &Device) -> Result<Self> {
        let mut frequencies: Vec<(Rope, Vec<f32>)> = Vec::new();
        for layer in &config.layers {
            if frequencies.iter().all(|(rope, _)| *rope != layer.rope) {
                frequencies.push((layer.rope, inverse_frequencies(&layer.rope, config.head_dim)));
            }
        }
        let mut tables = Vec::new();
        if !device.is_cpu() {
            let all: Vec<usize> = (0..config.max_position_embeddings).collect();
            for (_, frequencies) in &frequencies {
                let (cos, sin) = angles(&all, frequencies)?;
                tables.push((cos.to_device(device)?, sin.to_device(device)?));
            }
        }
        Ok(Self { frequencies, tables })
    }

    /// Angles at the given positions, each below `max`; `there` are the same positions on the GPU, whose kernels
    /// look them up by themselves.
    pub(super) fn gather(&self, positions: &[usize], there: Option<&Tensor>, max: usize) -> Result<Angles> {
        if let Some(position) = positions.iter().find(|&&position| position >= max) {
            bail!("position {position} is beyond the checkpoint's {max} positions");
        }
        let mut ropes = Vec::with_capacity(self.frequencies.len());
        for (index, (rope, frequencies)) in self.frequencies.iter().enumerate() {
            let (cos, sin) = match (there, self.tables.get(index)) {
                (Some(_), Some(table)) => table.clone(),
                _ => angles(positions, frequencies)?,
            };
            let positions = there.cloned();
            ropes.push((*rope, Turn { cos, sin, positions }));
        }
        Ok(Angles { ropes })
    }
}

/// Cosines and sines, (positions, head_dim / 2) each, on the CPU.
fn angles(positions: &[usize], frequencies: &[f32]) -> Result<(Tensor, Tensor)> {
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

/// How the packed tokens turn, by rope.
pub(super) struct Angles {
    ropes: Vec<(Rope, Turn)>,
}

impl Angles {
    pub(super) fn of(&self, rope: &Rope) -> &Turn {
        let index = self.ropes.iter().position(|(other, _)| other == rope);
        // The tables were built from the same layers that ask here.
        &self.ropes[index.unwrap_or_default()].1
    }
}
