//! Compares training on a GPU with the CPU, and limits the calls of the driver. These tests need a GPU.

use std::path::PathBuf;
use std::sync::LazyLock;

use candle_core::{DType, Device, Result, Tensor, Var};

use super::cross_entropy::{LossTarget, row_targets};
use super::{Example, Gradients, LoraVariables, Trainable, Variables};
use crate::config::{Config, DeviceChoice, DtypeChoice, Loss, ModelConfig, Projection, Quantize, Sources};
use crate::model::device::Placement;
use crate::model::files::checkpoint::Checkpoint;
use crate::model::files::lora::Adapter;
use crate::model::forward::gemma::Gemma;
use crate::model::forward::linear::LoraMode;
use crate::model::forward::load::LoadOptions;
use crate::model::kernels::cuda::driver_calls::driver_calls;
use crate::model::kernels::cuda::loss;
use crate::model::kernels::tests::random;

fn folder(family: &str) -> PathBuf {
    crate::test_files::test_file("tests/fixtures").join(family)
}

/// Returns the GPU in a dtype. All tests share the device, because each new one compiles the kernels again.
fn gpu(dtype: DtypeChoice) -> Placement {
    static PLACEMENTS: LazyLock<[Placement; 2]> = LazyLock::new(|| {
        let config = Config::load(&Sources::default()).unwrap();
        let model = ModelConfig {
            device: DeviceChoice::Cuda(0),
            dtype: DtypeChoice::F32,
            ..config.model
        };
        let exact = Placement::from_settings(&model).expect("these tests need a GPU");
        let mut rounded = exact.clone();
        rounded.dtype = DType::BF16;
        [exact, rounded]
    });
    PLACEMENTS[usize::from(dtype == DtypeChoice::Bf16)].clone()
}

/// Loads a family with a trainable copy of one of the adapters in its folder.
fn trainable(family: &str, adapter: &str, placement: Placement) -> Trainable {
    let checkpoint = Checkpoint::open(&folder(family)).unwrap();
    let adapter = Adapter::load(&folder(family).join(adapter), checkpoint.config(), "").unwrap();
    let mut variables = Variables::new();
    for layer in 0..checkpoint.config().num_layers() {
        for projection in Projection::ALL {
            if let Some(lora) = adapter.get(layer, projection) {
                let var = |x: &Tensor| Var::from_tensor(&x.to_device(&placement.device).unwrap()).unwrap();
                let (a, b) = (var(&lora.a), var(&lora.b));
                variables.insert(
                    (layer, projection),
                    LoraVariables {
                        a,
                        b,
                        scale: lora.scale,
                    },
                );
            }
        }
    }
    let options = LoadOptions {
        lora: LoraMode::Unmerged,
        quantize: Quantize::None,
        placement,
        for_training: true,
    };
    let model = Gemma::load(&checkpoint, None, options).unwrap();
    let prefix: Vec<u32> = (100..120).collect();
    Trainable::new(model, variables, &prefix, [367, 368], 1)
}

/// Prompts of different lengths, of which one leaves the prefix early.
fn prompts() -> Vec<Vec<u32>> {
    let tokens = |len: u32, first: u32| (100..120).chain((0..len).map(|index| first + 7 * index)).collect();
    let mut prompts: Vec<Vec<u32>> = vec![tokens(31, 200), tokens(1, 300), tokens(12, 400)];
    prompts[2][13] = 5;
    prompts
}

fn step(trainable: &Trainable, loss: Loss) -> (f64, Gradients) {
    let prompts = prompts();
    let examples: Vec<Example<'_>> = prompts
        .iter()
        .enumerate()
        .map(|(index, tokens)| Example {
            tokens,
            hateful: index as f32 / 2.0,
            weight: 1.0,
        })
        .collect();
    trainable.loss_and_gradients(loss, &examples).unwrap()
}

/// Compares losses and every gradient. In f32 they differ by rounding errors, and in bf16 by the rounding of weights and
/// activations as well; the random weights of the fixtures make that worse than it is for trained ones.
#[test]
fn gradients_on_the_gpu_equal_those_of_the_cpu() -> Result<()> {
    for (dtype, allowed_loss, allowed) in [(DtypeChoice::F32, 1e-5, 1e-4), (DtypeChoice::Bf16, 2e-2, 1e-1)] {
        for family in ["gemma", "gemma2", "gemma3", "gemma3_linear8"] {
            let cpu = trainable(family, "lora_all_rslora", Placement::cpu());
            let gpu = trainable(family, "lora_all_rslora", gpu(dtype));
            for loss in [Loss::Label, Loss::Pair, Loss::Sequence] {
                let ((expected_loss, expected), (found_loss, found)) = (step(&cpu, loss), step(&gpu, loss));
                let name = format!("{family} {dtype:?} {loss:?}");
                assert!(
                    (found_loss - expected_loss).abs() <= allowed_loss * expected_loss.abs().max(1.0),
                    "{name}: loss {found_loss}, expected {expected_loss}"
                );
                assert_eq!(found.len(), expected.len());
                for (key, (a, b)) in &expected {
                    for (what, expected, found) in [("A", a, &found[key].0), ("B", b, &found[key].1)] {
                        let difference = (found.to_device(&Device::Cpu)? - expected)?;
                        let error = largest(&difference)? / largest(expected)?;
                        // Written so that NaN is an error.
                        assert!(error <= allowed, "{name} {key:?} {what}: {error} of the largest value");
                    }
                }
            }
        }
    }
    Ok(())
}

/// A GPU is idle while the host makes calls, so a step may make at most 150 for each layer, everything outside of the
/// layers included.
#[test]
#[ignore = "only the emulated driver counts its calls; tests/gpu/emulated/checks runs this test"]
#[allow(clippy::print_stdout, reason = "prints the number of calls")]
fn driver_calls_of_a_training_step_are_limited() {
    for dtype in [DtypeChoice::F32, DtypeChoice::Bf16] {
        for adapter in ["lora_qv", "lora_all_rslora"] {
            for family in ["gemma", "gemma2", "gemma3"] {
                let trainable = trainable(family, adapter, gpu(dtype));
                let layers = trainable.model.layers.len() as u64;
                // The first step fills tables that later ones use.
                step(&trainable, Loss::Label);
                let before = driver_calls();
                drop(step(&trainable, Loss::Label));
                let calls = driver_calls() - before;
                println!(
                    "{family:<8}{adapter:<16}{dtype:?}: {calls} calls, {} a layer",
                    calls.div_ceil(layers)
                );
                assert!(calls <= 150 * layers, "{family} {adapter} {dtype:?}: {calls} calls");
            }
        }
    }
}

/// Some positions have no target, and others several, of which some are the same token.
fn loss_targets() -> Vec<LossTarget> {
    let target = |position, weight, distribution: &[(u32, f32)]| LossTarget {
        position,
        weight,
        distribution: distribution.to_vec(),
    };
    vec![
        target(0, 0.3, &[(367, 0.75), (368, 0.25)]),
        target(2, 0.125, &[(0, 1.0)]),
        target(2, 0.25, &[(1023, 1.0)]),
        target(2, 0.5, &[(0, 1.0)]),
        target(6, 2.0, &[(5, 1.0)]),
    ]
}

/// Returns the largest absolute value.
fn largest(x: &Tensor) -> Result<f32> {
    x.abs()?.max_all()?.to_scalar::<f32>()
}

/// The tables are f32 without a soft-cap, bf16 with one, and bf16 without one.
#[test]
fn vocabulary_loss_on_the_gpu_equals_that_of_the_cpu() -> Result<()> {
    let (positions, targets) = (7, loss_targets());
    for (family, dtype, softcap) in [
        ("gemma", DType::F32, None),
        ("gemma2", DType::BF16, Some(5.0)),
        ("gemma3", DType::BF16, None),
    ] {
        let cpu = trainable(family, "lora_all_rslora", Placement::cpu()).model;
        let gpu = trainable(family, "lora_all_rslora", gpu(DtypeChoice::F32)).model;
        assert_eq!(
            (gpu.unembedding().dtype(), gpu.config.final_logit_softcapping),
            (dtype, softcap)
        );
        let hidden = (random((positions, cpu.config.hidden_size), 1)? * 4.0)?;
        let (expected_loss, expected) = cpu.vocabulary_cross_entropy(&hidden, &targets)?;
        let expected_loss = expected_loss.wait()?;
        let hidden = hidden.to_device(&gpu.device)?;
        let rows = row_targets(&targets, positions);
        // All positions at once, and in groups of two.
        for group in [positions, 2] {
            let max_logits = group * gpu.config.vocab_size;
            let (found_loss, found) = loss::cross_entropy(gpu.unembedding(), &hidden, &rows, softcap, max_logits)?;
            let (found_loss, found) = (found_loss.wait()?, found.to_device(&Device::Cpu)?);
            let loss_error = (found_loss - expected_loss).abs() / expected_loss;
            let error = largest(&(found - &expected)?)? / largest(&expected)?;
            assert!(
                loss_error <= 1e-5,
                "{family}, {group}: loss {found_loss}, expected {expected_loss}"
            );
            assert!(error <= 2e-5, "{family}, {group}: {error} of the largest value");
        }
    }
    Ok(())
}

#[test]
fn vocabulary_loss_on_the_gpu_refuses_targets_outside() -> Result<()> {
    let model = trainable("gemma3", "lora_all_rslora", gpu(DtypeChoice::Bf16)).model;
    let hidden = random((2, model.config.hidden_size), 1)?.to_device(&model.device)?;
    for (position, id, expected) in [
        (0, 1024, "target 1024 is outside the 1024 logits"),
        (2, 5, "a target is at position 2, expected less than 2"),
    ] {
        let target = LossTarget {
            position,
            distribution: vec![(id, 1.0)],
            weight: 1.0,
        };
        let error = model.vocabulary_cross_entropy(&hidden, &[target]).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    Ok(())
}

/// The loss may make at most 16 calls, of which at most 6 are for each group of positions.
#[test]
#[ignore = "only the emulated driver counts its calls; tests/gpu/emulated/checks runs this test"]
fn driver_calls_of_the_loss_do_not_depend_on_the_vocabulary() -> Result<()> {
    let (positions, device) = (8, gpu(DtypeChoice::F32).device);
    let hidden = random((positions, 64), 1)?.to_device(&device)?;
    let targets = row_targets(&loss_targets(), positions);
    for dtype in [DType::F32, DType::BF16] {
        for vocabulary in [1024, 40_000] {
            let table = random((vocabulary, 64), 2)?.to_dtype(dtype)?.to_device(&device)?;
            for groups in [1, 2] {
                let max_logits = vocabulary * positions / groups;
                // The first use loads the kernels.
                loss::cross_entropy(&table, &hidden, &targets, Some(5.0), max_logits)?
                    .0
                    .wait()?;
                let before = driver_calls();
                let (loss, gradient) = loss::cross_entropy(&table, &hidden, &targets, Some(5.0), max_logits)?;
                loss.wait()?;
                drop(gradient);
                let calls = driver_calls() - before;
                assert!(calls <= 10 + 6 * groups as u64, "{vocabulary} {dtype:?}: {calls} calls");
            }
        }
    }
    Ok(())
}
