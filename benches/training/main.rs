//! Compares a step of LoRA training on this machine's CPU with PyTorch and PEFT, in turns, and the memory of both.
//!
//! `cargo bench --bench training` (`-- --rounds N --python PATH`). The model is a Gemma 3 of the published 270M shape with
//! random weights; the batch has two rows of 64 tokens, of which 24 are the prompt that rows share; the loss is that of
//! the label alone, and the adapter is on the queries and values. Our side computes the shared tokens once. PEFT is left
//! out if Python lacks it (`benches/peers/peft_step.py`).

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints its results and panics if it cannot run"
)]

#[path = "../support/mod.rs"]
mod support;

use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use moderatord::config::{Loss, Projection, Quantize};
use moderatord::model::device::Placement;
use moderatord::model::files::checkpoint::Checkpoint;
use moderatord::model::forward::gemma::Gemma;
use moderatord::model::forward::linear::LoraMode;
use moderatord::model::forward::load::LoadOptions;
use moderatord::model::training::{Example, LoraVariables, Trainable, Variables};
use moderatord::ops::memory;
use support::arguments::{argument, number, number_argument, option, read_arguments};
use support::peer::Peer;
use support::{Random, cpu_time, median, random_gemma};

const PREFIX: usize = 24;
const ROW: usize = 64;
const RANK: usize = 8;
const LABELS: [u32; 2] = [1001, 1002];
const EOS: u32 = 1;

fn main() {
    read_arguments(
        "./dev bench training",
        "Compares a step of LoRA training on the CPU with PyTorch and PEFT",
        vec![
            number::<usize>("rounds", "N", "Number of rounds (default: 7)"),
            option(
                "python",
                "PATH",
                "Python that has torch, transformers and peft (default: python3)",
            ),
        ],
    );
    memory::keep_freed_memory();
    let rounds = number_argument("rounds").unwrap_or(7);
    let python = argument("python").unwrap_or_else(|| "python3".to_owned());
    let threads = rayon::current_num_threads();
    let folder = tempfile::tempdir().unwrap();
    let config = random_gemma::config("gemma-3-270m").unwrap();
    random_gemma::write(folder.path(), &config, 1).unwrap();
    let mut random = Random::new(7);
    let mut ids = |count: usize| -> Vec<u32> { (0..count).map(|_| (random.next() % 262_144) as u32).collect() };
    let prefix = ids(PREFIX);
    let rows = [ids(ROW - PREFIX), ids(ROW - PREFIX)].map(|own| [prefix.clone(), own].concat());
    let work = folder.path().join("work.json");
    let json = serde_json::json!({"rows": rows, "labels": LABELS, "rank": RANK});
    std::fs::write(&work, json.to_string()).unwrap();
    let mut peer = Peer::start(
        &python,
        "peft_step.py",
        folder.path(),
        &work,
        &["--threads", &threads.to_string()],
    );
    if let Err(reason) = &peer {
        println!("PEFT is not measured: {reason}");
    }

    let trainable = load(folder.path(), &prefix);
    let batch = [(&rows[0], 1.0), (&rows[1], 0.0)].map(|(tokens, hateful)| Example {
        tokens,
        hateful,
        weight: 1.0,
    });
    let step = || trainable.loss_and_gradients(Loss::Label, &batch).unwrap().0;
    step();
    let (mut ours, mut theirs) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
    let (mut loss, mut their_loss, mut their_peak) = (0.0, 0.0, 0.0);
    for _ in 0..rounds {
        let (wall, cpu) = (Instant::now(), cpu_time());
        loss = step();
        ours.0.push(wall.elapsed().as_secs_f64());
        ours.1.push((cpu_time() - cpu).as_secs_f64());
        if let Ok(peer) = &mut peer {
            let answer = peer.ask("step");
            let number = |key: &str| answer[key].as_f64().unwrap();
            theirs.0.push(number("wall"));
            theirs.1.push(number("cpu"));
            (their_loss, their_peak) = (number("loss"), number("peak"));
        }
    }
    println!("two rows of {ROW} tokens, {threads} threads, median of {rounds} steps, loss {loss:.4}");
    if peer.is_ok() {
        let ratio = |ours: Vec<f64>, theirs: Vec<f64>| median(ours) / median(theirs);
        println!("loss of PEFT: {their_loss:.4}");
        println!(
            "time of a step, relative to PEFT, by wall clock: {:.2}",
            ratio(ours.0, theirs.0)
        );
        println!(
            "time of a step, relative to PEFT, by CPU time: {:.2}",
            ratio(ours.1, theirs.1)
        );
        println!("peak memory, relative to PEFT: {:.2}", peak() / their_peak);
    }
}

/// Loads the base model, with an adapter whose B is zero, as at the start of a training.
fn load(folder: &std::path::Path, prefix: &[u32]) -> Trainable {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let options = LoadOptions {
        lora: LoraMode::Unmerged,
        quantize: Quantize::None,
        placement: Placement::cpu(),
        for_training: true,
    };
    let gemma = Gemma::load(&checkpoint, None, options).unwrap();
    let mut variables = Variables::new();
    for layer in 0..gemma.config().num_layers() {
        for projection in [Projection::Q, Projection::V] {
            let [outputs, inputs] = projection.shape(gemma.config());
            let a = Tensor::rand(-0.1f32, 0.1, (RANK, inputs), &Device::Cpu).unwrap();
            let b = Tensor::zeros((outputs, RANK), a.dtype(), &Device::Cpu).unwrap();
            let lora = LoraVariables {
                a: Var::from_tensor(&a).unwrap(),
                b: Var::from_tensor(&b).unwrap(),
                scale: 2.0,
            };
            variables.insert((layer, projection), lora);
        }
    }
    Trainable::new(gemma, variables, prefix, LABELS, EOS)
}

/// Returns the largest resident memory of this process so far, in bytes.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0
}
