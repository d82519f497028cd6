//! The AdamW optimiser, gradient clipping, and the learning rate schedule.

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor, Var};

use crate::config::Projection;
use crate::model::training::{Gradients, Variables};

/// The parameters of AdamW (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019).
///
/// The defaults are PyTorch's, except that there is no weight decay, which LoRA's small matrices do not need.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Constant that is added to the square root of the bias-corrected second moment, to avoid a division by zero.
    pub eps: f64,
    /// Weight decay: at each step, a weight shrinks by this share of itself, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
        }
    }
}

/// The state of the optimiser: the moments of every A and B.
pub struct AdamW {
    config: AdamWConfig,
    steps: i32,
    moments: BTreeMap<(usize, Projection), [Moments; 2]>,
}

#[derive(Debug, Clone)]
struct Moments {
    first: Tensor,
    second: Tensor,
}

impl AdamW {
    /// Creates the state for these variables, with all moments zero.
    ///
    /// # Errors
    /// Returns an error if a tensor cannot be created.
    pub fn new(variables: &Variables, config: AdamWConfig) -> Result<Self> {
        let zero = |var: &Var| -> Result<Moments> {
            Ok(Moments {
                first: var.zeros_like()?,
                second: var.zeros_like()?,
            })
        };
        let moments = variables
            .iter()
            .map(|(&key, lora)| Ok((key, [zero(&lora.a)?, zero(&lora.b)?])));
        Ok(Self {
            config,
            steps: 0,
            moments: moments.collect::<Result<_>>()?,
        })
    }

    /// Updates the variables by one step at this learning rate.
    ///
    /// # Errors
    /// Returns an error if a variable has no gradient or the computation fails.
    pub fn step(&mut self, variables: &Variables, gradients: &Gradients, learning_rate: f64) -> Result<()> {
        self.steps += 1;
        for (key, lora) in variables {
            let (Some((a, b)), Some(moments)) = (gradients.get(key), self.moments.get_mut(key)) else {
                candle_core::bail!("layer {} {} has no gradient", key.0, key.1.name());
            };
            for (moments, (variable, gradient)) in moments.iter_mut().zip([(&lora.a, a), (&lora.b, b)]) {
                moments.step(&self.config, self.steps, variable, gradient, learning_rate)?;
            }
        }
        Ok(())
    }
}

impl Moments {
    fn step(&mut self, config: &AdamWConfig, steps: i32, var: &Var, gradient: &Tensor, rate: f64) -> Result<()> {
        let AdamWConfig {
            beta1,
            beta2,
            eps,
            weight_decay,
        } = *config;
        self.first = ((&self.first * beta1)? + (gradient * (1.0 - beta1))?)?;
        self.second = ((&self.second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
        let root = (self.second.sqrt()? / (1.0 - beta2.powi(steps)).sqrt())?;
        let update = ((&self.first / (root + eps)?)? * (rate / (1.0 - beta1.powi(steps))))?;
        let decayed = (var.as_tensor() * (1.0 - rate * weight_decay))?;
        var.set(&(decayed - update)?.detach())
    }
}

/// Scales all gradients by the same factor so that their joint norm is at most `max_norm`. Returns the norm before.
///
/// # Errors
/// Returns an error if the computation fails.
pub(crate) fn clip_gradients(gradients: &mut Gradients, max_norm: f64) -> Result<f64> {
    let mut square = 0f64;
    for (a, b) in gradients.values() {
        for gradient in [a, b] {
            square += gradient.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
        }
    }
    let norm = square.sqrt();
    if norm > max_norm {
        let scale = max_norm / norm;
        for (a, b) in gradients.values_mut() {
            (*a, *b) = ((&*a * scale)?, (&*b * scale)?);
        }
    }
    Ok(norm)
}

/// A learning rate schedule: a linear warm-up to the peak, then half a cosine period down to zero (Loshchilov & Hutter,
/// "SGDR", 2017).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LearningRateSchedule {
    /// The highest learning rate.
    pub(crate) peak: f64,
    /// Number of warm-up steps.
    pub(crate) warmup_steps: usize,
    /// Number of steps, including the warm-up.
    pub(crate) total_steps: usize,
}

impl LearningRateSchedule {
    /// Returns the learning rate of a step. Steps are numbered from 0.
    pub(crate) fn at(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / decay_steps as f64).min(1.0);
        self.peak * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn the_learning_rate_rises_then_falls_to_zero() {
        let schedule = LearningRateSchedule {
            peak: 1.0,
            warmup_steps: 4,
            total_steps: 12,
        };
        let rates: Vec<f64> = (0..=12).map(|step| schedule.at(step)).collect();
        assert_eq!(rates[..4], [0.25, 0.5, 0.75, 1.0]);
        assert!(rates[4..].windows(2).all(|pair| pair[0] > pair[1]), "{rates:?}");
        assert_eq!((rates[4], rates[12]), (1.0, 0.0));
        assert_eq!(
            LearningRateSchedule {
                warmup_steps: 0,
                ..schedule
            }
            .at(0),
            1.0
        );
        assert_eq!(schedule.at(99), 0.0);
    }

    #[test]
    fn clipping_preserves_the_direction() -> Result<()> {
        let tensor = |value: f32| Tensor::new(&[[value]], &Device::Cpu);
        let mut gradients = Gradients::from([((0, Projection::Q), (tensor(3.0)?, tensor(4.0)?))]);
        assert_eq!(clip_gradients(&mut gradients, 10.0)?, 5.0);
        assert_eq!(clip_gradients(&mut gradients, 1.0)?, 5.0);
        let (a, b) = &gradients[&(0, Projection::Q)];
        assert!((a.to_vec2::<f32>()?[0][0] - 0.6).abs() < 1e-6);
        assert!((b.to_vec2::<f32>()?[0][0] - 0.8).abs() < 1e-6);
        Ok(())
    }
}
