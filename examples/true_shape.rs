//! Writes a checkpoint with the shape and layout of a published Gemma and random weights, then loads it, scores with it
//! and trains for one step, as the daemon does. Prints the peak memory after each of these.
//!
//!     cargo run --release --example true_shape -- SHAPE FOLDER [int8]
//!
//! SHAPE is one of gemma-2b, gemma-2-2b, gemma-3-270m, gemma-3-1b. The folder takes two bytes per parameter and is not
//! deleted. It gets the tokenizer of the bundled model. With int8, the weights are quantised for scoring, and training
//! is skipped because it needs f32.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "an example prints its results and panics on errors"
)]

#[path = "../benches/support/mod.rs"]
mod support;

use std::path::PathBuf;

use moderatord::classifier::Classifier;
use moderatord::config::{Config, ModelConfig, Quantize, Sources};
use moderatord::model::device::Placement;
use moderatord::model::files::checkpoint::Checkpoint;
use moderatord::model::forward::gemma::Gemma;
use moderatord::model::forward::linear::LoraMode;
use moderatord::model::forward::load::LoadOptions;
use moderatord::retrain::train::trainer::{FrameIds, TrainerConfig, TrainingProgress, TrainingRow, train};
use moderatord::scorer::Scorer;
use support::random_gemma;

const TEXTS: [(&str, f32); 4] = [
    ("you look very nice today", 0.0),
    ("See you at the garden on Sunday?", 0.0),
    ("Nobody of your kind belongs in this town.", 1.0),
    ("The soup needs more salt, otherwise lovely.", 0.0),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (Some(shape), Some(folder)) = (arguments.first(), arguments.get(1).map(PathBuf::from)) else {
        panic!(
            "expected SHAPE FOLDER, where SHAPE is one of {}",
            random_gemma::SHAPES.join(", ")
        );
    };
    let quantize = match arguments.get(2).map(String::as_str) {
        None => Quantize::None,
        Some("int8") => Quantize::Int8,
        Some(other) => panic!("third argument is `{other}`, expected int8 or nothing"),
    };
    let Some(json) = random_gemma::config(shape) else {
        panic!(
            "shape is `{shape}`, expected one of {}",
            random_gemma::SHAPES.join(", ")
        );
    };
    random_gemma::write(&folder, &json, 1).unwrap();
    report("written");

    let config = Config::load(&Sources::default()).unwrap();
    let model = ModelConfig {
        path: Some(folder),
        quantize,
        ..config.model
    };
    let mut classifier = Classifier::load(&model, &config.prompt).unwrap();
    println!("{}", classifier.description());
    report("loaded");

    let prompter = classifier.prompter();
    let row = |text: &str| prompter.encode(text).unwrap().rows.remove(0);
    let margins = classifier.score(&TEXTS.map(|(text, _)| row(text))).unwrap();
    println!("margins {margins:?}");
    report("scored");
    drop(classifier);
    if quantize != Quantize::None {
        return;
    }

    let checkpoint = Checkpoint::from_settings(&model).unwrap();
    let options = LoadOptions {
        lora: LoraMode::Unmerged,
        quantize,
        placement: Placement::cpu(),
        for_training: true,
    };
    let gemma = Gemma::load(&checkpoint, None, options).unwrap();
    let rows = TEXTS.map(|(text, hateful)| TrainingRow {
        row: row(text),
        hateful,
        weight: 1.0,
    });
    let ids = FrameIds {
        prefix: prompter.prefix(),
        labels: prompter.label_ids(),
        eos: prompter.eos_id().unwrap(),
    };
    let one_step = TrainerConfig {
        epochs: 1,
        batch_rows: TEXTS.len(),
        ..TrainerConfig::default()
    };
    let trained = train(gemma, ids, &one_step, &rows, &rows, &mut |progress| {
        if let TrainingProgress::Step {
            loss,
            gradient_norm,
            tokens,
            ..
        } = progress
        {
            println!("loss {loss:.4}, gradient norm {gradient_norm:.4}, {tokens} tokens");
        }
    });
    trained.unwrap();
    report("trained a step");
}

/// Prints the peak resident memory so far, which includes mapped files, and the current memory without them.
fn report(what: &str) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1e6
    };
    let (peak, anonymous) = (line("VmHWM:"), line("RssAnon:"));
    println!("{what}: peak {peak:.2} GB, now {anonymous:.2} GB without mapped files");
}
