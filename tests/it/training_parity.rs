//! Compares losses, gradients and trained adapters with recorded runs of PyTorch and PEFT, and gradients with finite
//! differences.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and prints the differences that it found"
)]

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use moderatord::config::{Loss, Projection, Quantize};
use moderatord::model::device::Placement;
use moderatord::model::files::checkpoint::Checkpoint;
use moderatord::model::files::lora::Adapter;
use moderatord::model::forward::gemma::Gemma;
use moderatord::model::forward::linear::LoraMode;
use moderatord::model::forward::load::LoadOptions;
use moderatord::model::training::{Example, Gradients, LoraVariables, Trainable, Variables};
use moderatord::retrain::train::optimizer::{AdamW, AdamWConfig};
use serde_json::Value;

use crate::common::fixture;

const FAMILIES: [&str; 3] = ["gemma", "gemma2", "gemma3"];
const POSITIVE: u32 = 368;
const NEGATIVE: u32 = 367;
const EOS: u32 = 1;

/// Returns PEFT's name of the matrix A or B of one linear layer.
fn name(key: (usize, Projection), matrix: char) -> String {
    format!(
        "base_model.model.model.layers.{}.{}.lora_{matrix}.weight",
        key.0,
        key.1.path()
    )
}

/// Loads the base model of a family with one of the adapters in its fixture folder.
fn trainable(family: &str, adapter: &str, prefix: &[u32]) -> Trainable {
    let checkpoint = Checkpoint::open(&fixture(family)).unwrap();
    let adapter = Adapter::load(&fixture(family).join(adapter), checkpoint.config(), "").unwrap();
    let mut variables = Variables::new();
    for layer in 0..checkpoint.config().num_layers() {
        for projection in Projection::ALL {
            if let Some(lora) = adapter.get(layer, projection) {
                let var = |tensor: &Tensor| Var::from_tensor(tensor).unwrap();
                let lora = LoraVariables {
                    a: var(&lora.a),
                    b: var(&lora.b),
                    scale: lora.scale,
                };
                variables.insert((layer, projection), lora);
            }
        }
    }
    let options = LoadOptions {
        lora: LoraMode::Unmerged,
        quantize: Quantize::None,
        placement: Placement::cpu(),
        for_training: true,
    };
    let model = Gemma::load(&checkpoint, None, options).unwrap();
    Trainable::new(model, variables, prefix, [NEGATIVE, POSITIVE], EOS)
}

/// The recorded training runs of a family: their examples, and the losses and gradient norms of each step.
struct Trace {
    examples: Vec<(Vec<u32>, f32)>,
    json: Value,
}

impl Trace {
    fn read(family: &str) -> Self {
        let text = std::fs::read_to_string(fixture(family).join("train/trace.json")).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        let example = |example: &Value| {
            let ids = example["prompt_ids"].as_array().unwrap();
            (
                ids.iter().map(|id| id.as_u64().unwrap() as u32).collect(),
                example["label"].as_f64().unwrap() as f32,
            )
        };
        let examples = json["examples"].as_array().unwrap().iter().map(example).collect();
        Self { examples, json }
    }

    /// Returns the first tokens of the first prompt. All prompts start with the same 20 tokens.
    fn prefix(&self, tokens: usize) -> Vec<u32> {
        self.examples[0].0[..tokens].to_vec()
    }

    /// Returns the two examples of a step.
    fn batch(&self, step: usize) -> Vec<Example<'_>> {
        let examples = [2 * step, 2 * step + 1].map(|index| &self.examples[index % self.examples.len()]);
        examples
            .map(|(tokens, hateful)| Example {
                tokens,
                hateful: *hateful,
                weight: 1.0,
            })
            .to_vec()
    }
}

fn norm(tensor: &Tensor) -> f64 {
    tensor
        .to_dtype(DType::F64)
        .unwrap()
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap()
        .to_scalar::<f64>()
        .unwrap()
        .sqrt()
}

fn largest_difference(found: &Tensor, expected: &Tensor) -> f64 {
    let difference = (found - expected).unwrap().abs().unwrap().flatten_all().unwrap();
    f64::from(difference.max(0).unwrap().to_scalar::<f32>().unwrap())
}

fn check_norms(gradients: &Gradients, expected: &Value, at: &str) {
    for (&key, (a, b)) in gradients {
        for (matrix, gradient) in [('A', a), ('B', b)] {
            let (found, expected) = (norm(gradient), expected[name(key, matrix)].as_f64().unwrap());
            // A norm this small consists of rounding errors, so its relative accuracy means nothing.
            let close = (found - expected).abs() <= 1e-4 * expected || expected.max(found) < 1e-9;
            assert!(close, "{at} {}: {found}, expected {expected}", name(key, matrix));
        }
    }
}

/// Trains as the recorded run did, and compares the losses, the first gradients and the final adapter.
fn reproduce(family: &str, run: &str, loss: Loss) {
    let trace = Trace::read(family);
    let expected = &trace.json["runs"][run];
    let losses: Vec<f64> = expected["loss"]
        .as_array()
        .unwrap()
        .iter()
        .map(|loss| loss.as_f64().unwrap())
        .collect();
    let trainable = trainable(family, "train/adapter_init", &trace.prefix(20));
    let mut optimizer = AdamW::new(trainable.variables(), AdamWConfig::default()).unwrap();
    let mut worst = 0f64;
    for (step, expected_loss) in losses.iter().enumerate() {
        let (found, gradients) = trainable.loss_and_gradients(loss, &trace.batch(step)).unwrap();
        let difference = (found - expected_loss).abs();
        worst = worst.max(difference);
        let limit = if step == 0 { 5e-6 } else { 2e-5 };
        assert!(
            difference <= limit,
            "{family} {run} step {step}: {found}, expected {expected_loss}"
        );
        if step < 2 {
            let norms = &expected[&format!("grad_norm_step{}", step + 1)];
            check_norms(&gradients, norms, &format!("{family} {run} step {step}"));
        }
        if step == 0 {
            let file = fixture(family).join(format!("train/grad_step1_{run}.safetensors"));
            let recorded = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
            for (&key, (_, b)) in &gradients {
                let recorded = &recorded[&name(key, 'B')];
                assert!(
                    largest_difference(b, recorded) <= 1e-4 * norm(recorded),
                    "{family} {run} {}",
                    name(key, 'B')
                );
            }
        }
        optimizer.step(trainable.variables(), &gradients, 5e-4).unwrap();
    }
    let file = fixture(family).join(format!("train/adapter_final_{run}/adapter_model.safetensors"));
    let recorded: HashMap<String, Tensor> = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let mut weight = 0f64;
    for (&key, lora) in trainable.variables() {
        for (matrix, var) in [('A', &lora.a), ('B', &lora.b)] {
            weight = weight.max(largest_difference(var.as_tensor(), &recorded[&name(key, matrix)]));
        }
    }
    println!("{family:<8}{run:<8}the losses differ by at most {worst:.1e}, the final adapter by {weight:.1e}");
    assert!(weight <= 3e-5, "{family} {run}: the final adapter differs by {weight}");
}

#[test]
fn label_runs_are_reproduced() {
    FAMILIES
        .into_iter()
        .for_each(|family| reproduce(family, "label", Loss::Label));
}

#[test]
fn sequence_runs_are_reproduced() {
    FAMILIES
        .into_iter()
        .for_each(|family| reproduce(family, "full", Loss::Sequence));
}

#[test]
fn the_pair_run_is_reproduced() {
    reproduce("gemma", "pair", Loss::Pair);
}

/// If B is not zero, every A and B of all seven projections has a gradient, and a step in its opposite direction
/// lowers the loss. The test is necessary because candle drops gradients silently.
#[test]
fn every_adapter_tensor_has_a_gradient_that_lowers_the_loss() {
    for family in FAMILIES {
        for loss in [Loss::Label, Loss::Pair, Loss::Sequence] {
            let trace = Trace::read(family);
            let trainable = trainable(family, "lora_all_rslora", &trace.prefix(20));
            let batch = trace.batch(0);
            let (before, gradients) = trainable.loss_and_gradients(loss, &batch).unwrap();
            assert_eq!(gradients.len(), trainable.variables().len());
            for (&key, (a, b)) in &gradients {
                for (matrix, gradient) in [('A', a), ('B', b)] {
                    // In the last layer too, a loss at the last positions reaches all projections.
                    assert!(norm(gradient) > 1e-7, "{family} {loss:?} {}", name(key, matrix));
                }
            }
            for (key, (a, b)) in &gradients {
                let lora = &trainable.variables()[key];
                for (var, gradient) in [(&lora.a, a), (&lora.b, b)] {
                    var.set(&(var.as_tensor() - (gradient * 1e-3).unwrap()).unwrap().detach())
                        .unwrap();
                }
            }
            let (after, _) = trainable.loss_and_gradients(loss, &batch).unwrap();
            assert!(
                after < before,
                "{family} {loss:?}: the loss went from {before} to {after}"
            );
        }
    }
}

/// Compares gradients with central differences of the loss, for one element of each projection's B in one layer.
#[test]
fn gradients_equal_finite_differences_of_the_loss() {
    let trace = Trace::read("gemma3");
    let trainable = trainable("gemma3", "lora_all_rslora", &trace.prefix(20));
    let batch = trace.batch(3);
    let (_, gradients) = trainable.loss_and_gradients(Loss::Pair, &batch).unwrap();
    let loss = || trainable.loss_and_gradients(Loss::Pair, &batch).unwrap().0;
    for (key, (_, b)) in gradients.iter().filter(|((layer, _), _)| *layer == 1) {
        let var = &trainable.variables()[key].b;
        let values = var.as_tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let index = values.len() / 3;
        let at = |value: f32| {
            let mut values = values.clone();
            values[index] = value;
            var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap())
                .unwrap();
            loss()
        };
        let step = 1e-2;
        let slope = (at(values[index] + step) - at(values[index] - step)) / (2.0 * f64::from(step));
        at(values[index]);
        let gradient = f64::from(b.flatten_all().unwrap().to_vec1::<f32>().unwrap()[index]);
        assert!(
            (slope - gradient).abs() <= 2e-2 * gradient.abs().max(1e-3),
            "{key:?}: gradient {gradient}, finite difference {slope}"
        );
    }
}

/// The length of the shared prefix changes only the amount of work.
#[test]
fn the_length_of_the_shared_prefix_does_not_change_gradients() {
    for family in FAMILIES {
        let trace = Trace::read(family);
        for loss in [Loss::Label, Loss::Sequence] {
            let run = |tokens| {
                let trainable = trainable(family, "lora_all_rslora", &trace.prefix(tokens));
                trainable.loss_and_gradients(loss, &trace.batch(1)).unwrap()
            };
            let ((one, few), (other, many)) = (run(1), run(22));
            assert!((one - other).abs() < 5e-6, "{family} {loss:?}: {one}, {other}");
            for (key, (a, b)) in &few {
                for (few, many) in [(a, &many[key].0), (b, &many[key].1)] {
                    assert!(
                        largest_difference(few, many) <= 1e-4 * norm(few).max(1e-6),
                        "{family} {loss:?} {key:?}"
                    );
                }
            }
        }
    }
}
