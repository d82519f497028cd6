//! The AdamW optimiser, gradient clipping, and the learning rate schedule.

use std::collections::BTreeMap;

#[cfg(feature = "cuda")]
use candle_core::CudaDevice;
use candle_core::{DType, Result, Tensor, Var};

use crate::config::Projection;
#[cfg(feature = "cuda")]
use crate::model::training::{AdamWStep, OptimizerTensor, TensorTable};
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
        #[cfg(feature = "cuda")]
        if let Some(device) = gpu_of(gradients) {
            return self.step_on_gpu(&device, variables, gradients, learning_rate);
        }
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

    /// Updates all variables in one launch.
    #[cfg(feature = "cuda")]
    fn step_on_gpu(
        &self,
        device: &CudaDevice,
        variables: &Variables,
        gradients: &Gradients,
        learning_rate: f64,
    ) -> Result<()> {
        let mut tensors = Vec::with_capacity(2 * variables.len());
        for (key, lora) in variables {
            let (Some((a, b)), Some(moments)) = (gradients.get(key), self.moments.get(key)) else {
                candle_core::bail!("layer {} {} has no gradient", key.0, key.1.name());
            };
            for (Moments { first, second }, (variable, gradient)) in moments.iter().zip([(&lora.a, a), (&lora.b, b)]) {
                tensors.push(OptimizerTensor {
                    gradient,
                    state: Some([variable.as_tensor(), first, second]),
                });
            }
        }
        let AdamWConfig {
            beta1,
            beta2,
            eps,
            weight_decay,
        } = self.config;
        TensorTable::new(device, &tensors)?.adamw(&AdamWStep {
            beta1: beta1 as f32,
            share1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            share2: (1.0 - beta2) as f32,
            eps: eps as f32,
            rate: (learning_rate / (1.0 - beta1.powi(self.steps))) as f32,
            root_correction: (1.0 - beta2.powi(self.steps)).sqrt() as f32,
            decay: (1.0 - learning_rate * weight_decay) as f32,
        })
    }
}

/// Returns the GPU that holds the gradients, or `None` if they are on the CPU.
#[cfg(feature = "cuda")]
fn gpu_of(gradients: &Gradients) -> Option<CudaDevice> {
    match gradients.values().next()?.0.device() {
        candle_core::Device::Cuda(device) => Some(device.clone()),
        _ => None,
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
    #[cfg(feature = "cuda")]
    if let Some(device) = gpu_of(gradients) {
        let gradients = gradients.values().flat_map(|(a, b)| [a, b]);
        let tensors: Vec<_> = gradients
            .map(|gradient| OptimizerTensor { gradient, state: None })
            .collect();
        let table = TensorTable::new(&device, &tensors)?;
        let norm = table.square_sum()?.sqrt();
        if norm > max_norm {
            table.scale_gradients((max_norm / norm) as f32)?;
        }
        return Ok(norm);
    }
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

    /// Tests that need a GPU.
    #[cfg(feature = "cuda")]
    mod cuda {
        use rand::rngs::StdRng;
        use rand::{Rng, SeedableRng};

        use super::*;
        use crate::model::training::{LoraVariables, driver_calls};

        const LAYERS: usize = 5;

        /// Returns numbers that depend only on the shape and the seed.
        fn random(shape: (usize, usize), seed: u64) -> Result<Tensor> {
            let mut random = StdRng::seed_from_u64(seed);
            let values = (0..shape.0 * shape.1).map(|_| random.random_range(-1.0f32..1.0));
            Tensor::from_vec(values.collect(), shape, &Device::Cpu)
        }

        fn variables(device: &Device) -> Result<Variables> {
            let mut variables = Variables::new();
            for layer in 0..LAYERS {
                let var = |shape: (usize, usize), seed| Var::from_tensor(&random(shape, seed)?.to_device(device)?);
                let (a, b) = (var((8, 300), 1)?, var((7, 8), 2)?);
                variables.insert((layer, Projection::V), LoraVariables { a, b, scale: 1.0 });
            }
            Ok(variables)
        }

        fn gradients(device: &Device, step: u64) -> Result<Gradients> {
            let gradient = |shape: (usize, usize), seed| random(shape, seed)?.to_device(device);
            let layers = 0..LAYERS;
            layers
                .map(|layer| {
                    let seed = 100 * step + 2 * layer as u64;
                    Ok((
                        (layer, Projection::V),
                        (gradient((8, 300), seed)?, gradient((7, 8), seed + 1)?),
                    ))
                })
                .collect()
        }

        #[test]
        fn steps_on_the_gpu_equal_those_on_the_cpu() -> Result<()> {
            let config = AdamWConfig {
                weight_decay: 0.1,
                ..AdamWConfig::default()
            };
            let run = |device: &Device| -> Result<(Vec<f64>, Vec<Tensor>)> {
                let variables = variables(device)?;
                let mut optimizer = AdamW::new(&variables, config)?;
                let mut norms = Vec::new();
                // The last norm is below its limit.
                for (step, limit) in [1.0, 3.0, 1000.0].into_iter().enumerate() {
                    let mut gradients = gradients(device, step as u64)?;
                    norms.push(clip_gradients(&mut gradients, limit)?);
                    optimizer.step(&variables, &gradients, 0.01)?;
                }
                let tensors = variables.values().flat_map(|lora| [&lora.a, &lora.b]);
                let tensors = tensors.map(|var| var.as_tensor().to_device(&Device::Cpu));
                Ok((norms, tensors.collect::<Result<_>>()?))
            };
            let ((cpu_norms, cpu), (gpu_norms, gpu)) = (run(&Device::Cpu)?, run(&Device::new_cuda(0)?)?);
            for (cpu, gpu) in cpu_norms.iter().zip(gpu_norms) {
                assert!((cpu - gpu).abs() < 1e-9 * cpu, "{cpu}, {gpu}");
            }
            for (cpu, gpu) in cpu.iter().zip(gpu) {
                let difference = (cpu - gpu)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(difference < 2e-6, "{difference}");
            }
            Ok(())
        }

        #[test]
        #[ignore = "only the emulated driver counts its calls; tests/gpu/emulated/checks runs this test"]
        fn driver_calls_of_the_optimizer_do_not_depend_on_the_number_of_variables() -> Result<()> {
            let device = Device::new_cuda(0)?;
            let (variables, mut gradients) = (variables(&device)?, gradients(&device, 1)?);
            let mut optimizer = AdamW::new(&variables, AdamWConfig::default())?;
            let before = driver_calls();
            clip_gradients(&mut gradients, 1.0)?;
            optimizer.step(&variables, &gradients, 0.01)?;
            // Two tables, each allocated, copied and freed; the sums, allocated, copied and freed; three launches.
            assert_eq!(driver_calls() - before, 12);
            Ok(())
        }
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
