//! Rotary position embedding: the angles of the packed tokens.

use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Result, Tensor, bail};

use crate::model::config::{GemmaConfig, Rope};
use crate::model::kernels::Turn;

/// Cosines and sines by position, for each distinct rope of the model.
///
/// Computed in f32 as the reference does: `1 / theta^(2i/d)` rounded to f32, then position times
/// frequency in f32 (`transformers/modeling_rope_utils.py`).
#[derive(Debug)]
pub(crate) struct RopeTables {
    frequencies: Vec<(Rope, Vec<f32>)>,
    max_positions: usize,
    /// On a GPU, where tokens take their own: cosines and sines of the positions that were seen so far.
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    positions: usize,
    /// By rope, in the order of the frequencies.
    turns: Vec<(Tensor, Tensor)>,
}

/// Positions of the first table: prompts are shorter, checkpoints' limits far higher.
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
            tables: Mutex::default(),
        }
    }

    /// Angles at the given positions; `there` are the same positions on the GPU, whose kernels look them up by
    /// themselves.
    pub(crate) fn gather(&self, positions: &[usize], there: Option<&Tensor>) -> Result<Angles> {
        let max = self.max_positions;
        let highest = positions.iter().copied().max().unwrap_or(0);
        if highest >= max {
            bail!("position {highest} is beyond the checkpoint's {max} positions");
        }
        let turns = match there {
            Some(there) => self.tables(highest + 1, there.device())?,
            None => self.turns(positions)?,
        };
        let ropes = self.frequencies.iter().zip(turns).map(|((rope, _), (cos, sin))| {
            let positions = there.cloned();
            (*rope, Turn { cos, sin, positions })
        });
        Ok(Angles { ropes: ropes.collect() })
    }

    /// Tables of at least so many positions.
    fn tables(&self, positions: usize, device: &Device) -> Result<Vec<(Tensor, Tensor)>> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if tables.positions < positions {
            let positions = positions
                .next_power_of_two()
                .max(FIRST_POSITIONS)
                .min(self.max_positions);
            let all: Vec<usize> = (0..positions).collect();
            let turns = self.turns(&all)?.into_iter();
            let turns: Result<_> = turns
                .map(|(cos, sin)| Ok((cos.to_device(device)?, sin.to_device(device)?)))
                .collect();
            *tables = Tables {
                positions,
                turns: turns?,
            };
        }
        Ok(tables.turns.clone())
    }

    /// Cosines and sines by rope, on the CPU.
    fn turns(&self, positions: &[usize]) -> Result<Vec<(Tensor, Tensor)>> {
        let frequencies = self.frequencies.iter();
        frequencies
            .map(|(_, frequencies)| angles(positions, frequencies))
            .collect()
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
pub(crate) struct Angles {
    ropes: Vec<(Rope, Turn)>,
}

impl Angles {
    pub(crate) fn of(&self, rope: &Rope) -> &Turn {
        let index = self.ropes.iter().position(|(other, _)| other == rope);
        // The tables were built from the same layers that ask here.
        &self.ropes[index.unwrap_or_default()].1
    }
}
