//! Measures the trainer's tokens per second and the duration of a training run with `rows` rows and four epochs.

use std::time::Instant;

use moderatord::model::forward::gemma::Gemma;
use moderatord::retrain::train::trainer::{FrameIds, TrainerConfig, TrainingProgress, TrainingRow, train};
use moderatord::scorer::Row;
use serde_json::{Value, json};

use crate::support::{Random, comment_lengths};
use crate::work::{LABELS, PREFIX, SUFFIX};

pub fn measure(gemma: Gemma, rows: usize) -> Value {
    let vocabulary = gemma.config().vocab_size as u64;
    let mut random = Random::new(11);
    let mut ids = |count: usize| -> Vec<u32> { (0..count).map(|_| (random.next() % vocabulary) as u32).collect() };
    let prefix = ids(PREFIX);
    let lengths = comment_lengths();
    let training: Vec<TrainingRow> = (0..rows)
        .map(|number| {
            let own = ids(lengths[number % lengths.len()] + SUFFIX);
            TrainingRow {
                row: Row {
                    tokens: [prefix.clone(), own].concat().into(),
                    shared: PREFIX,
                },
                hateful: (number % 2) as f32,
                weight: 1.0,
            }
        })
        .collect();
    let frame = FrameIds {
        prefix: &prefix,
        labels: LABELS,
        eos: 1,
    };
    // Nothing can be learned from random rows, so the patience is high enough to prevent early stopping, and the low
    // learning rate keeps the loss finite.
    let config = TrainerConfig {
        epochs: 4,
        patience: 1000,
        learning_rate: 1e-6,
        ..TrainerConfig::default()
    };
    let validation = &training[..rows.min(8)];
    let (start, mut steps) = (Instant::now(), 0);
    let trained = train(gemma, frame, &config, &training, validation, &mut |progress| {
        steps += usize::from(matches!(progress, TrainingProgress::Step { .. }));
    });
    let took = start.elapsed().as_secs_f64();
    match trained {
        Ok(trained) => json!({
            "rows": rows, "epochs": config.epochs, "steps": steps, "seconds": took,
            "own_tokens_per_s": trained.tokens as f64 / took,
        }),
        Err(error) => json!({ "rows": rows, "steps": steps, "failed": error.to_string() }),
    }
}
