//! Compares whole models on a GPU with the CPU: the reference checkpoints in f32 and bf16, batch invariance, and
//! training. The tests need a GPU and the feature `cuda`; without a GPU they all fail.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "prints how much the results differ")]

#[path = "../common/mod.rs"]
mod common;

use common::labels::label;
use common::{fixture, model_config, prompt_config, reference_cases};
use moderatord::classifier::Classifier;
use moderatord::classifier::tolerance::{
    GPU_BATCH_BF16, GPU_BATCH_F32, GPU_BF16, GPU_F32, GPU_FP8, GPU_LOSS_BF16, GPU_LOSS_F32, GPU_LOSS_GROWTH,
    GPU_LOSS_STEPS,
};
use moderatord::config::{DeviceChoice, DtypeChoice, ModelConfig, Quantize};
use moderatord::model::device::Placement;
use moderatord::model::files::checkpoint::Checkpoint;
use moderatord::model::forward::gemma::Gemma;
use moderatord::model::forward::linear::LoraMode;
use moderatord::model::forward::load::LoadOptions;
use moderatord::prompt::Prompter;
use moderatord::retrain::train::trainer::{FrameIds, TrainerConfig, TrainingProgress, TrainingRow, train};
use moderatord::scorer::{Row, Scorer};

const FAMILIES: [&str; 4] = ["gemma", "gemma2", "gemma3", "gemma3_linear8"];
const ADAPTERS: [Option<&str>; 3] = [None, Some("lora_qv"), Some("lora_all_rslora")];

fn on_gpu(family: &str, dtype: DtypeChoice) -> ModelConfig {
    ModelConfig {
        device: DeviceChoice::Cuda(0),
        dtype,
        ..model_config(family)
    }
}

/// Encodes the reference texts of a family, or every n-th of them if `MODERATORD_TEST_STRIDE` is n: an emulated GPU is slow.
fn reference_rows(family: &str, prompter: &Prompter) -> Vec<Row> {
    let stride = std::env::var("MODERATORD_TEST_STRIDE").map_or(1, |stride| stride.parse().unwrap());
    let cases = reference_cases(family).into_iter().step_by(stride);
    cases
        .map(|case| prompter.encode(&case.text).unwrap().rows.remove(0))
        .collect()
}

fn probability(margin: f32) -> f64 {
    1.0 / (1.0 + (-f64::from(margin)).exp())
}

#[test]
fn references_match_in_f32() {
    assert_references_match(DtypeChoice::F32, "f32", GPU_F32);
}

#[test]
fn references_match_in_bf16() {
    assert_references_match(DtypeChoice::Bf16, "bf16", GPU_BF16);
}

/// Compares every family and adapter with the CPU. The test `parity` compares the CPU with the recorded values.
fn assert_references_match(dtype: DtypeChoice, name: &str, allowed: f64) {
    for (family, adapter) in FAMILIES
        .iter()
        .flat_map(|family| ADAPTERS.map(|adapter| (family, adapter)))
    {
        let adapter = adapter.map(|adapter| fixture(family).join(adapter));
        let cpu = ModelConfig {
            adapter: adapter.clone(),
            ..model_config(family)
        };
        let gpu = ModelConfig {
            adapter,
            ..on_gpu(family, dtype)
        };
        let mut cpu = Classifier::load(&cpu, &prompt_config()).unwrap();
        let mut gpu = Classifier::load(&gpu, &prompt_config()).unwrap();
        assert_eq!(
            (gpu.identity().device.as_str(), gpu.identity().dtype.as_str()),
            ("cuda:0", name)
        );
        let rows = reference_rows(family, &cpu.prompter());
        let (cpu, gpu) = (cpu.score(&rows).unwrap(), gpu.score(&rows).unwrap());
        let mut worst = 0f64;
        for (cpu, gpu) in cpu.iter().zip(&gpu) {
            worst = worst.max((probability(*cpu) - probability(*gpu)).abs());
        }
        println!("{family:<16}{name:<6}largest difference between probabilities {worst:.1e}");
        assert!(worst <= allowed, "{family} {name}: {worst}");
    }
}

/// Compares models whose MLP is in FP8 with the same models in bf16, without and with adapters, of which one has deltas
/// in the MLP.
#[test]
fn fp8_follows_bf16() {
    for (family, adapter) in FAMILIES
        .iter()
        .flat_map(|family| ADAPTERS.map(|adapter| (family, adapter)))
    {
        let margins = |quantize: Quantize| {
            let model = ModelConfig {
                adapter: adapter.map(|adapter| fixture(family).join(adapter)),
                quantize,
                ..on_gpu(family, DtypeChoice::Bf16)
            };
            let mut classifier = Classifier::load(&model, &prompt_config()).unwrap();
            let rows = reference_rows(family, &classifier.prompter());
            (
                classifier.identity().quantization.clone(),
                classifier.score(&rows).unwrap(),
            )
        };
        let ((_, bf16), (name, fp8)) = (margins(Quantize::None), margins(Quantize::Fp8));
        assert_eq!(name, "fp8");
        let differences = bf16.iter().zip(&fp8).map(|(bf16, fp8)| (bf16 - fp8).abs());
        let worst = differences.fold(
            0f32,
            |worst, difference| if difference <= worst { worst } else { difference },
        );
        println!(
            "{family:<16}{:<16}fp8 changes margins by at most {worst:.1e}",
            adapter.unwrap_or("no adapter")
        );
        // Without any difference, the setting would have had no effect.
        assert!(worst > 0.0 && worst <= GPU_FP8, "{family} {adapter:?}: {worst}");
    }
}

/// Scores the same rows in small and in large batches. The batch may change margins less than rounding to bf16 does.
#[test]
fn a_margin_hardly_depends_on_the_batch() {
    for family in ["gemma", "gemma2", "gemma3"] {
        let mut exact = Classifier::load(&model_config(family), &prompt_config()).unwrap();
        let prompter = exact.prompter();
        let rows: Vec<Row> = (0..10_000)
            .map(|number| {
                let event: serde_json::Value = serde_json::from_str(&label(number).1).unwrap();
                prompter.encode(event["text"].as_str().unwrap()).unwrap().rows.remove(0)
            })
            .collect();
        let expected = exact.score(&rows).unwrap();
        for (dtype, name) in [(DtypeChoice::F32, "f32"), (DtypeChoice::Bf16, "bf16")] {
            let mut gpu = Classifier::load(&on_gpu(family, dtype), &prompt_config()).unwrap();
            let mut packed =
                |size: usize| -> Vec<f32> { rows.chunks(size).flat_map(|chunk| gpu.score(chunk).unwrap()).collect() };
            let (few, many) = (packed(7), packed(500));
            let mut moved: Vec<f32> = few.iter().zip(&many).map(|(few, many)| (few - many).abs()).collect();
            moved.sort_by(f32::total_cmp);
            let (p99, most) = (moved[moved.len() * 99 / 100], moved[moved.len() - 1]);
            let errors = expected.iter().zip(&many).map(|(exact, gpu)| (exact - gpu).abs());
            let error = errors.fold(0f32, f32::max);
            println!("{family:<10}{name:<6}change p99 {p99:.1e}, max {most:.1e}; error against f32 {error:.1e}");
            let allowed = if dtype == DtypeChoice::F32 {
                [GPU_BATCH_F32; 2]
            } else {
                GPU_BATCH_BF16.map(|share| share * error)
            };
            assert!(
                p99 <= allowed[0] && most <= allowed[1],
                "{family} {name}: p99 {p99}, max {most}, allowed {allowed:?}"
            );
        }
    }
}

#[test]
fn training_on_the_gpu_follows_the_cpu() {
    let losses = |model: &ModelConfig| -> Vec<f64> {
        let classifier = Classifier::load(model, &prompt_config()).unwrap();
        let prompter = classifier.prompter();
        let options = LoadOptions {
            lora: LoraMode::Unmerged,
            quantize: model.quantize,
            placement: Placement::from_settings(model).unwrap(),
            for_training: true,
        };
        let gemma = Gemma::load(&Checkpoint::from_settings(model).unwrap(), None, options).unwrap();
        let rows: Vec<TrainingRow> = (0..24)
            .map(|number| {
                let event: serde_json::Value = serde_json::from_str(&label(number).1).unwrap();
                TrainingRow {
                    row: prompter.encode(event["text"].as_str().unwrap()).unwrap().rows.remove(0),
                    hateful: f32::from(u8::from(event["label"] == "hateful")),
                    weight: 1.0,
                }
            })
            .collect();
        let ids = FrameIds {
            prefix: prompter.prefix(),
            labels: prompter.label_ids(),
            eos: prompter.eos_id().unwrap(),
        };
        let mut losses = Vec::new();
        let config = TrainerConfig {
            patience: 1000,
            ..TrainerConfig::default()
        };
        train(gemma, ids, &config, &rows, &rows, &mut |progress| {
            if let TrainingProgress::Step { loss, .. } = progress {
                losses.push(loss);
            }
        })
        .unwrap();
        losses
    };
    for family in ["gemma", "gemma2", "gemma3"] {
        let cpu = losses(&model_config(family));
        for (dtype, allowed) in [(DtypeChoice::F32, GPU_LOSS_F32), (DtypeChoice::Bf16, GPU_LOSS_BF16)] {
            let gpu = losses(&on_gpu(family, dtype));
            assert_eq!(cpu.len(), gpu.len());
            for (step, (cpu, gpu)) in cpu.iter().zip(&gpu).enumerate() {
                let factor = if step < GPU_LOSS_STEPS { 1.0 } else { GPU_LOSS_GROWTH };
                let allowed = factor * allowed;
                assert!(
                    (cpu - gpu).abs() <= allowed * cpu.max(1.0),
                    "{family} {dtype:?} step {step}: {gpu} on the GPU, {cpu} on the CPU"
                );
            }
        }
    }
}
