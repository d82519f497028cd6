//! The training loop: batches, schedule, early stopping, and the adapter that comes out.
//!
//! Deterministic: the same binary, CPU model, number of threads, data and seed give the same adapter
//! byte for byte. Reads no clock; progress goes to the caller.

use candle_core::{Result as CandleResult, Tensor, Var};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::optimizer::{AdamW, AdamWConfig, Schedule, clip};
use crate::config::Loss;
use crate::config::Projection;
use crate::model::forward::gemma::{Gemma, PackedRow};
use crate::model::training::{Example, LoraVariables, Trainable, Variables};
use crate::scorer::Row;

/// How an adapter is shaped and trained.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainerConfig {
    /// What is fitted.
    pub loss: Loss,
    /// Linear layers that get a delta.
    pub targets: Vec<Projection>,
    /// Rank of the deltas.
    pub rank: usize,
    /// Scale: `alpha / rank`.
    pub alpha: f64,
    /// Scale by `alpha / sqrt(rank)` instead (Kalajdzievski, "rsLoRA", 2023).
    pub use_rslora: bool,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Share of all steps in which the learning rate rises.
    pub warmup: f64,
    /// Passes over the training part, at most.
    pub epochs: usize,
    /// Rows of a batch.
    pub batch_rows: usize,
    /// Gradients are scaled down to this common norm.
    pub max_gradient_norm: f64,
    /// Epochs without a better validation loss after which training stops.
    pub patience: usize,
    /// Shuffling and initial weights.
    pub seed: u64,
}

impl Default for TrainerConfig {
    /// For a few hundred rows: small rank on the attention, a few passes, stop when validation says.
    fn default() -> Self {
        Self {
            loss: Loss::Label,
            targets: vec![Projection::Q, Projection::V],
            rank: 8,
            alpha: 16.0,
            use_rslora: false,
            learning_rate: 5e-4,
            warmup: 0.1,
            epochs: 4,
            batch_rows: 8,
            max_gradient_norm: 1.0,
            patience: 2,
            seed: 1,
        }
    }
}

/// One row as the trainer takes it: a window's prompt, and its label.
#[derive(Debug, Clone)]
pub struct TrainingRow {
    /// The prompt.
    pub row: Row,
    /// Probability that it is hateful.
    pub hateful: f32,
    /// Weight beside the others.
    pub weight: f32,
}

/// What the caller is told, after every step and every epoch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Progress {
    /// A step was taken.
    Step {
        /// From one.
        step: usize,
        /// All steps, if training is not stopped early.
        total: usize,
        /// The batch's loss.
        loss: f64,
        /// Norm of the gradients before clipping.
        gradient_norm: f64,
        /// Own tokens of the batch.
        tokens: usize,
    },
    /// An epoch ended.
    Epoch {
        /// From one.
        epoch: usize,
        /// Mean training loss.
        training: f64,
        /// Log-loss on the validation part.
        validation: f64,
        /// It is the best so far.
        best: bool,
    },
}

/// Why there is no adapter.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Nothing to train on or to stop by.
    #[error("the {part} part has no rows")]
    Empty {
        /// Training or validation.
        part: &'static str,
    },
    /// The loss is not a number any more, or runs away.
    #[error(
        "training diverged at step {step}: loss {loss} at learning rate {learning_rate}, last good loss {last_good}"
    )]
    Diverged {
        /// From one.
        step: usize,
        /// The loss.
        loss: f64,
        /// The learning rate of the step.
        learning_rate: f64,
        /// Running mean of the loss before.
        last_good: f64,
    },
    /// The arithmetic failed.
    #[error("cannot train: {0}")]
    Failed(#[from] candle_core::Error),
}

/// A finished run.
pub struct Trained {
    /// The base with the best adapter live.
    pub trainable: Trainable,
    /// Epochs run.
    pub epochs: usize,
    /// Log-loss of the best epoch on the validation part.
    pub validation: f64,
    /// Own tokens that were trained on, all epochs together.
    pub tokens: usize,
}

/// The ids that the trainer needs of a frame.
#[derive(Debug, Clone, Copy)]
pub struct FrameIds<'a> {
    /// Token ids of the shared prefix.
    pub prefix: &'a [u32],
    /// Ids of the hateful label and the other.
    pub labels: [u32; 2],
    /// Id of `<eos>`.
    pub eos: u32,
}

/// A running loss this far above its best is running away: three times, and one nat.
fn diverged(running: f64, best: f64) -> bool {
    running > 3.0 * best + 1.0
}

/// Trains a new adapter on a base that was loaded without one.
///
/// # Errors
/// [`TrainError`]; the base is then to be loaded again.
pub fn train(
    model: Gemma,
    ids: FrameIds<'_>,
    config: &TrainerConfig,
    training: &[TrainingRow],
    validation: &[TrainingRow],
    progress: &mut dyn FnMut(Progress),
) -> Result<Trained, TrainError> {
    for (part, rows) in [("training", training), ("validation", validation)] {
        if rows.is_empty() {
            return Err(TrainError::Empty { part });
        }
    }
    let mut random = StdRng::seed_from_u64(config.seed);
    let variables = new_variables(&model, config, &mut random)?;
    let trainable = Trainable::new(model, variables, ids.prefix, ids.labels, ids.eos);
    let mut optimizer = AdamW::new(trainable.variables(), AdamWConfig::default())?;
    let steps_per_epoch = training.len().div_ceil(config.batch_rows);
    let total_steps = steps_per_epoch * config.epochs;
    let warmup_steps = (total_steps as f64 * config.warmup).ceil() as usize;
    let schedule = Schedule {
        peak: config.learning_rate,
        warmup_steps,
        total_steps,
    };
    let mut best = BestEpoch {
        validation: f64::INFINITY,
        weights: Vec::new(),
        epoch: 0,
    };
    let (mut step, mut tokens, mut epochs) = (0, 0, 0);
    let mut running: Option<f64> = None;
    let mut lowest = f64::INFINITY;
    for epoch in 1..=config.epochs {
        let mut sum = 0.0;
        for batch in batches(training, config.batch_rows, &mut random) {
            let examples: Vec<Example<'_>> = batch.iter().map(|row| row.example()).collect();
            let learning_rate = schedule.at(step);
            step += 1;
            let (loss, mut gradients) = trainable.loss_and_gradients(config.loss, &examples)?;
            let mean = running.map_or(loss, |running| 0.9 * running + 0.1 * loss);
            if !loss.is_finite() || diverged(mean, lowest) {
                let last_good = running.unwrap_or(loss);
                return Err(TrainError::Diverged {
                    step,
                    loss,
                    learning_rate,
                    last_good,
                });
            }
            running = Some(mean);
            lowest = lowest.min(mean);
            let gradient_norm = clip(&mut gradients, config.max_gradient_norm)?;
            optimizer.step(trainable.variables(), &gradients, learning_rate)?;
            let batch_tokens = batch.iter().map(|row| row.row.cost()).sum();
            tokens += batch_tokens;
            sum += loss;
            progress(Progress::Step {
                step,
                total: total_steps,
                loss,
                gradient_norm,
                tokens: batch_tokens,
            });
        }
        epochs = epoch;
        let validation = log_loss(&trainable, ids, validation)?;
        let is_best = validation < best.validation;
        if is_best {
            best = BestEpoch {
                validation,
                weights: copy(trainable.variables())?,
                epoch,
            };
        }
        progress(Progress::Epoch {
            epoch,
            training: sum / steps_per_epoch as f64,
            validation,
            best: is_best,
        });
        if epoch - best.epoch >= config.patience {
            break;
        }
    }
    for (lora, (a, b)) in trainable.variables().values().zip(&best.weights) {
        lora.a.set(a)?;
        lora.b.set(b)?;
    }
    Ok(Trained {
        trainable,
        epochs,
        validation: best.validation,
        tokens,
    })
}

impl TrainingRow {
    fn example(&self) -> Example<'_> {
        Example {
            tokens: &self.row.tokens,
            hateful: self.hateful,
            weight: self.weight,
        }
    }
}

struct BestEpoch {
    validation: f64,
    weights: Vec<(Tensor, Tensor)>,
    epoch: usize,
}

fn copy(variables: &Variables) -> CandleResult<Vec<(Tensor, Tensor)>> {
    variables
        .values()
        .map(|lora| Ok((lora.a.as_tensor().copy()?, lora.b.as_tensor().copy()?)))
        .collect()
}

/// A uniform in `+-1/sqrt(inputs)` and B zero: PEFT's start (`kaiming_uniform_` with `a = sqrt(5)`).
fn new_variables(model: &Gemma, config: &TrainerConfig, random: &mut StdRng) -> CandleResult<Variables> {
    let (base, device) = (model.config(), model.device());
    let mut variables = Variables::new();
    let rank = config.rank as f64;
    let scale = if config.use_rslora {
        config.alpha / rank.sqrt()
    } else {
        config.alpha / rank
    };
    let mut targets = config.targets.clone();
    targets.sort_unstable();
    targets.dedup();
    for layer in 0..base.num_layers() {
        for &projection in &targets {
            let [outputs, inputs] = projection.shape(base);
            let limit = (inputs as f32).powf(-0.5);
            let a: Vec<f32> = (0..config.rank * inputs)
                .map(|_| random.random_range(-limit..limit))
                .collect();
            let a = Var::from_tensor(&Tensor::from_vec(a, (config.rank, inputs), device)?)?;
            let b = Var::zeros((outputs, config.rank), candle_core::DType::F32, device)?;
            variables.insert((layer, projection), LoraVariables { a, b, scale });
        }
    }
    Ok(variables)
}

/// One epoch's batches: shuffled, then neighbours of like length put together within stretches of
/// sixteen batches, then the batches shuffled.
fn batches<'a>(rows: &'a [TrainingRow], batch_rows: usize, random: &mut StdRng) -> Vec<Vec<&'a TrainingRow>> {
    let mut order: Vec<&TrainingRow> = rows.iter().collect();
    order.shuffle(random);
    for stretch in order.chunks_mut(16 * batch_rows) {
        stretch.sort_by_key(|row| row.row.tokens.len());
    }
    let mut batches: Vec<Vec<&TrainingRow>> = order.chunks(batch_rows).map(<[_]>::to_vec).collect();
    batches.shuffle(random);
    batches
}

/// Margins of rows under the live adapter, as they will be served.
///
/// # Errors
/// candle's.
pub fn margins(trainable: &Trainable, ids: FrameIds<'_>, rows: &[TrainingRow]) -> CandleResult<Vec<f64>> {
    let model = trainable.model();
    let prefix = model.cache_prefix(ids.prefix)?;
    let labels = model.unembedding_of(&ids.labels)?;
    let mut margins = Vec::with_capacity(rows.len());
    for pass in rows.chunks(16) {
        let pass: Vec<PackedRow<'_>> = pass
            .iter()
            .map(|row| PackedRow {
                own: &row.row.tokens[row.row.shared..],
                shared: row.row.shared,
            })
            .collect();
        let logits = model.begin(&pass, Some(&prefix), &labels)?.wait()?;
        let pairs = logits.as_chunks::<2>().0.iter();
        margins.extend(pairs.map(|[hateful, other]| f64::from(*hateful) - f64::from(*other)));
    }
    Ok(margins)
}

/// Weighted mean of the cross-entropy over the two labels: `y log(1 + e^-m) + (1 - y) log(1 + e^m)`.
fn log_loss(trainable: &Trainable, ids: FrameIds<'_>, rows: &[TrainingRow]) -> CandleResult<f64> {
    let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
    let (mut sum, mut weights) = (0.0, 0.0);
    for (margin, row) in margins(trainable, ids, rows)?.into_iter().zip(rows) {
        let (y, weight) = (f64::from(row.hateful), f64::from(row.weight));
        sum += weight * (y * softplus(-margin) + (1.0 - y) * softplus(margin));
        weights += weight;
    }
    Ok(sum / weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_not_divergence() {
        for (running, best, expected) in [
            (7.2, 7.0, false),
            (1.0, 0.05, false),
            (1.2, 0.05, true),
            (25.0, 7.0, true),
        ] {
            assert_eq!(diverged(running, best), expected, "{running} after {best}");
        }
    }

    #[test]
    fn an_epoch_has_every_row_once_and_batches_of_like_length() {
        let row = |length: usize| TrainingRow {
            row: Row {
                tokens: vec![0; length].into(),
                shared: 0,
            },
            hateful: 0.0,
            weight: 1.0,
        };
        let rows: Vec<TrainingRow> = (0..100).map(|index| row(1 + index * 37 % 100)).collect();
        let mut random = StdRng::seed_from_u64(3);
        let first = batches(&rows, 8, &mut random);
        let mut lengths: Vec<usize> = first.iter().flatten().map(|row| row.row.tokens.len()).collect();
        let spread = |batch: &Vec<&TrainingRow>| {
            let lengths = batch.iter().map(|row| row.row.tokens.len());
            lengths.clone().max().unwrap_or(0) - lengths.min().unwrap_or(0)
        };
        assert!(first.iter().all(|batch| spread(batch) < 20));
        lengths.sort_unstable();
        assert_eq!(lengths, (1..=100).collect::<Vec<_>>());
        let order = |batches: &[Vec<&TrainingRow>]| {
            batches
                .iter()
                .flatten()
                .map(|row| row.row.tokens.len())
                .collect::<Vec<_>>()
        };
        assert_ne!(order(&first), order(&batches(&rows, 8, &mut random)));
    }
}
