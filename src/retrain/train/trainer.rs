//! The training loop: forms batches, steps the optimiser, stops early, and returns the best adapter.
//!
//! Training is deterministic: with the same binary, CPU model, number of threads, data and seed, the adapters are equal
//! byte for byte. The loop reads no clock, and reports its progress to the caller.

use candle_core::{Result as CandleResult, Tensor, Var};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::optimizer::{AdamW, AdamWConfig, LearningRateSchedule, clip_gradients};
use crate::config::{Loss, Projection};
use crate::model::forward::gemma::{Gemma, PackedRow};
use crate::model::training::{Example, LoraVariables, Trainable, Variables};
use crate::scorer::Row;

/// The shape of an adapter, and how it is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainerConfig {
    /// The loss to minimise.
    pub loss: Loss,
    /// The projections that get a LoRA delta, in every layer.
    pub targets: Vec<Projection>,
    /// Rank of the deltas.
    pub rank: usize,
    /// Scaling parameter: the deltas are multiplied by `alpha / rank`.
    pub alpha: f64,
    /// Whether the deltas are multiplied by `alpha / sqrt(rank)` instead (Kalajdzievski, "rsLoRA", 2023).
    pub use_rslora: bool,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Share of all steps during which the learning rate rises.
    pub warmup: f64,
    /// The largest number of passes over the training part.
    pub epochs: usize,
    /// Number of rows in a batch.
    pub batch_rows: usize,
    /// The largest joint norm of the gradients. Larger gradients are scaled down to it.
    pub max_gradient_norm: f64,
    /// Number of epochs without a lower validation loss after which training stops.
    pub patience: usize,
    /// Seed of the initial weights and of the shuffling.
    pub seed: u64,
}

impl Default for TrainerConfig {
    /// Returns parameters that suit a few hundred rows: a small rank, on attention projections only, and a few epochs.
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

/// One row to train on, with the label of the text in its window.
#[derive(Debug, Clone)]
pub struct TrainingRow {
    /// The token ids of the prompt.
    pub row: Row,
    /// Probability that the text is hateful.
    pub hateful: f32,
    /// Weight of the row relative to the others.
    pub weight: f32,
}

/// The progress of a training run, reported after every step and every epoch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TrainingProgress {
    /// A step has been completed.
    Step {
        /// Number of the step, from 1.
        step: usize,
        /// Number of steps in the whole run, unless it stops early.
        total: usize,
        /// Loss on the batch.
        loss: f64,
        /// Norm of the gradients before clipping.
        gradient_norm: f64,
        /// Number of own tokens in the batch.
        tokens: usize,
    },
    /// An epoch has been completed.
    Epoch {
        /// Number of the epoch, from 1.
        epoch: usize,
        /// Mean of the loss over the batches of the epoch.
        training: f64,
        /// Log loss on the validation part.
        validation: f64,
        /// Whether this is the lowest validation loss so far.
        best: bool,
    },
}

/// Why training returned no adapter.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The training part or the validation part has no rows.
    #[error("the {part} part has no rows")]
    Empty {
        /// Name of the part: `training` or `validation`.
        part: &'static str,
    },
    /// The loss is not finite, or has risen far above its lowest value.
    #[error(
        "training diverged at step {step}: loss {loss} at learning rate {learning_rate}, last good loss {last_good}"
    )]
    Diverged {
        /// Number of the step, from 1.
        step: usize,
        /// Loss of the step.
        loss: f64,
        /// Learning rate of the step.
        learning_rate: f64,
        /// Running mean of the loss over the steps before.
        last_good: f64,
    },
    /// The computation failed.
    #[error("cannot train: {0}")]
    Failed(#[from] candle_core::Error),
}

/// The result of a training run.
pub struct TrainingOutcome {
    /// The base model with the adapter of the best epoch.
    pub trainable: Trainable,
    /// Number of epochs that were run.
    pub epochs: usize,
    /// Log loss of the best epoch on the validation part.
    pub validation: f64,
    /// Number of own tokens that were trained on, summed over all epochs.
    pub tokens: usize,
}

/// The token ids of a frame that the trainer needs.
#[derive(Debug, Clone, Copy)]
pub struct FrameIds<'a> {
    /// Token ids of the shared prefix.
    pub prefix: &'a [u32],
    /// Token ids of the hateful label and of the other label.
    pub labels: [u32; 2],
    /// Token id of `<eos>`.
    pub eos: u32,
}

/// The running mean of the loss, with a decay of 0.9 per step, and its lowest value so far.
struct RunningLoss {
    mean: Option<f64>,
    lowest: f64,
}

impl RunningLoss {
    /// Adds the loss of a step. If training has diverged, returns the mean before that step as an error.
    fn add(&mut self, loss: f64) -> Result<(), f64> {
        let mean = self.mean.map_or(loss, |mean| 0.9 * mean + 0.1 * loss);
        if !loss.is_finite() || has_diverged(mean, self.lowest) {
            return Err(self.mean.unwrap_or(loss));
        }
        self.mean = Some(mean);
        self.lowest = self.lowest.min(mean);
        Ok(())
    }
}

/// Returns whether the running mean of the loss exceeds three times its lowest value by more than one nat, which noise
/// does not explain.
fn has_diverged(running: f64, lowest: f64) -> bool {
    running > 3.0 * lowest + 1.0
}

/// Trains a new adapter on a base model that was loaded without one.
///
/// # Errors
/// Returns an error if a part has no rows, the loss diverges, or the computation fails.
pub fn train(
    model: Gemma,
    ids: FrameIds<'_>,
    config: &TrainerConfig,
    training: &[TrainingRow],
    validation: &[TrainingRow],
    progress: &mut dyn FnMut(TrainingProgress),
) -> Result<TrainingOutcome, TrainError> {
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
    let schedule = LearningRateSchedule {
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
    let mut running = RunningLoss {
        mean: None,
        lowest: f64::INFINITY,
    };
    for epoch in 1..=config.epochs {
        let mut sum = 0.0;
        for batch in batches(training, config.batch_rows, &mut random) {
            let examples: Vec<Example<'_>> = batch.iter().map(|row| row.example()).collect();
            let learning_rate = schedule.at(step);
            step += 1;
            let (loss, mut gradients) = trainable.loss_and_gradients(config.loss, &examples)?;
            running.add(loss).map_err(|last_good| TrainError::Diverged {
                step,
                loss,
                learning_rate,
                last_good,
            })?;
            let gradient_norm = clip_gradients(&mut gradients, config.max_gradient_norm)?;
            optimizer.step(trainable.variables(), &gradients, learning_rate)?;
            let batch_tokens = batch.iter().map(|row| row.row.own_tokens()).sum();
            tokens += batch_tokens;
            sum += loss;
            progress(TrainingProgress::Step {
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
                weights: copy_weights(trainable.variables())?,
                epoch,
            };
        }
        progress(TrainingProgress::Epoch {
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
    Ok(TrainingOutcome {
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

/// The epoch with the lowest validation loss so far.
struct BestEpoch {
    validation: f64,
    /// The matrices A and B of each linear layer.
    weights: Vec<(Tensor, Tensor)>,
    epoch: usize,
}

fn copy_weights(variables: &Variables) -> CandleResult<Vec<(Tensor, Tensor)>> {
    variables
        .values()
        .map(|lora| Ok((lora.a.as_tensor().copy()?, lora.b.as_tensor().copy()?)))
        .collect()
}

/// Returns the initial weights, as in PEFT: A is uniform in `+-1/sqrt(inputs)` (`kaiming_uniform_` with `a = sqrt(5)`),
/// and B is zero.
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

/// Returns the batches of one epoch. The rows are shuffled, sorted by length within groups of sixteen batches so that
/// the rows of a batch have similar lengths, and divided into batches, which are then shuffled.
fn batches<'a>(rows: &'a [TrainingRow], batch_rows: usize, random: &mut StdRng) -> Vec<Vec<&'a TrainingRow>> {
    let mut order: Vec<&TrainingRow> = rows.iter().collect();
    order.shuffle(random);
    for group in order.chunks_mut(16 * batch_rows) {
        group.sort_by_key(|row| row.row.tokens.len());
    }
    let mut batches: Vec<Vec<&TrainingRow>> = order.chunks(batch_rows).map(<[_]>::to_vec).collect();
    batches.shuffle(random);
    batches
}

/// Returns the margins of rows under the adapter in training, computed exactly as in serving.
///
/// # Errors
/// Returns an error if the computation fails.
pub fn margins(trainable: &Trainable, ids: FrameIds<'_>, rows: &[TrainingRow]) -> CandleResult<Vec<f64>> {
    let model = trainable.model();
    let prefix = model.cache_prefix(ids.prefix)?;
    let labels = model.unembedding_rows(&ids.labels)?;
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

/// Returns the weighted mean of the cross-entropy over the two labels: `y log(1 + e^-m) + (1 - y) log(1 + e^m)`, where
/// `m` is the margin and `y` the probability that the text is hateful.
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
    fn a_noisy_loss_does_not_count_as_divergence() {
        for (running, lowest, expected) in [
            (7.2, 7.0, false),
            (1.0, 0.05, false),
            (1.2, 0.05, true),
            (25.0, 7.0, true),
        ] {
            assert_eq!(has_diverged(running, lowest), expected, "{running} after {lowest}");
        }
    }

    #[test]
    fn an_epoch_contains_each_row_once_in_batches_of_similar_length() {
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
