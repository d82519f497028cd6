//! Measures the trainer's tokens per second without its first step, which also prepares the device, and estimates the
//! duration of a training run.

use std::time::Instant;

use moderatord::model::forward::gemma::Gemma;
use moderatord::retrain::train::trainer::{FrameIds, TrainerConfig, TrainingProgress, TrainingRow, train};
use moderatord::scorer::Row;
use serde_json::{Value, json};

use crate::support::{Random, comment_lengths};
use crate::work::{LABELS, PREFIX, SUFFIX};

/// The size of the training run whose duration is estimated.
const ROWS: usize = 800;
const EPOCHS: usize = 4;

/// One step of training.
struct Step {
    seconds: f64,
    own_tokens: usize,
}

/// Trains for about so many seconds, as two steps predict it. The estimate does not include the validation passes after
/// each epoch.
pub fn measure(gemma: Gemma, seconds: f64) -> Value {
    let rows = rows(&gemma);
    let batch = TrainerConfig::default().batch_rows;
    let steps = match steps(gemma.clone(), &rows[..2 * batch]) {
        Ok(probe) => {
            let count = (seconds / probe[1].seconds) as usize;
            steps(gemma, &rows[..batch * count.clamp(4, ROWS / batch)])
        }
        Err(error) => Err(error),
    };
    let steps = match steps {
        Ok(steps) => steps,
        Err(error) => return json!({ "failed": error }),
    };
    let (first, steady) = (&steps[0], &steps[1..]);
    let took: f64 = steady.iter().map(|step| step.seconds).sum();
    let tokens: usize = steady.iter().map(|step| step.own_tokens).sum();
    let rate = tokens as f64 / took;
    let all: usize = rows.iter().map(|row| row.row.own_tokens()).sum();
    json!({
        "rows_per_step": batch,
        "steps": steady.len(),
        "first_step_s": first.seconds,
        "step_ms": took / steady.len() as f64 * 1e3,
        "own_tokens_per_s": rate,
        format!("seconds_for_{ROWS}_rows_and_{EPOCHS}_epochs"): (all * EPOCHS) as f64 / rate,
    })
}

/// Returns rows of random tokens with realistic lengths.
fn rows(gemma: &Gemma) -> Vec<TrainingRow> {
    let vocabulary = gemma.config().vocab_size as u64;
    let mut random = Random::new(11);
    let mut ids = |count: usize| -> Vec<u32> { (0..count).map(|_| (random.next() % vocabulary) as u32).collect() };
    let prefix = ids(PREFIX);
    let lengths = comment_lengths();
    let row = |number: usize| TrainingRow {
        row: Row {
            tokens: [prefix.clone(), ids(lengths[number % lengths.len()] + SUFFIX)]
                .concat()
                .into(),
            shared: PREFIX,
        },
        hateful: (number % 2) as f32,
        weight: 1.0,
    };
    (0..ROWS).map(row).collect()
}

/// Trains one epoch and returns its steps.
fn steps(gemma: Gemma, rows: &[TrainingRow]) -> Result<Vec<Step>, String> {
    let frame = FrameIds {
        prefix: &rows[0].row.tokens[..PREFIX],
        labels: LABELS,
        eos: 1,
    };
    // Nothing can be learned from random rows; the low learning rate keeps the loss finite.
    let config = TrainerConfig {
        epochs: 1,
        learning_rate: 1e-6,
        ..TrainerConfig::default()
    };
    let (mut steps, mut start) = (Vec::new(), Instant::now());
    let trained = train(gemma, frame, &config, rows, &rows[..1], &mut |progress| {
        if let TrainingProgress::Step { tokens, .. } = progress {
            steps.push(Step {
                seconds: start.elapsed().as_secs_f64(),
                own_tokens: tokens,
            });
            start = Instant::now();
        }
    });
    trained.map(|_| steps).map_err(|error| error.to_string())
}
