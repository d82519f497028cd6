//! Rotary position embedding: the angles of the packed tokens.

use candle_core::{Device, Result, Tensor, bail};

use super::config::{GemmaConfig, Rope};

/// Cosines and sines by position, for each distinct rope of the model.
///
/// Computed in f32 as the reference does: `1 / theta^(2i/d)` rounded to f32, then position times
/// frequency in f32 (`transformers/modeling_rope_utils.py`).
#[derive(Debug)]
pub(super) struct RopeTables {
    frequencies: Vec<(Rope, Vec<f32>)>,
}

impl RopeTables {
    pub(super) fn new(config: &GemmaConfig) -> Self {
        let mut frequencies: Vec<(Rope, Vec<f32>)> = Vec::new();
        for layer in &config.layers {
            if frequencies.iter().all(|(rope, _)| *rope != layer.rope) {
                frequencies.push((layer.rope, inverse_frequencies(&layer.rope, config.head_dim)));
            }
        }
        Self { frequencies }
    }

    /// Angles at the given positions, (tokens, head_dim / 2) each.
    pub(super) fn gather(&self, positions: &[usize], max: usize) -> Result<Angles> {
        if let Some(position) = positions.iter().find(|&&position| position >= max) {
            bail!("position {position} is beyond the checkpoint's {max} positions");
        }
        let mut ropes = Vec::with_capacity(self.frequencies.len());
        for (rope, frequencies) in &self.frequencies {
            let shape = (positions.len(), frequencies.len());
            let angles = positions
                .iter()
                .flat_map(|&position| frequencies.iter().map(move |frequency| position as f32 * frequency));
            let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(f32::sin_cos).unzip();
            let tensor = |values| Tensor::from_vec(values, shape, &Device::Cpu);
            ropes.push((*rope, (tensor(cos)?, tensor(sin)?)));
        }
        Ok(Angles { ropes })
    }
}

fn inverse_frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    (0..head_dim)
        .step_by(2)
        .map(|i| 1.0 / (rope.theta as f32).powf(i as f32 / head_dim as f32) / rope.factor as f32)
        .collect()
}

/// (cos, sin) of the packed tokens, by rope.
pub(super) struct Angles {
    ropes: Vec<(Rope, (Tensor, Tensor))>,
}

impl Angles {
    pub(super) fn of(&self, rope: &Rope) -> &(Tensor, Tensor) {
        let index = self.ropes.iter().position(|(other, _)| other == rope);
        // The tables were built from the same layers that ask here.
        &self.ropes[index.unwrap_or_default()].1
    }
}
