//! Tests how the score stage handles too little memory in any layer of the model, and a device that fails for good.

#[cfg(feature = "cuda")]
use candle_core::Device;

use super::search::FailureSearch;
use crate::classifier::Classifier;
use crate::config::{Config, DeviceChoice, DtypeChoice, ModelConfig, Sources};
use crate::model::forward::memory_limit::MemoryLimit;
use crate::scorer::{Row, Scorer, score_checked};

fn classifier(family: &str, device: DeviceChoice, dtype: DtypeChoice) -> Classifier {
    let config = Config::load(&Sources::default()).unwrap();
    let fixtures = crate::test_files::test_file("tests/fixtures");
    let model = ModelConfig {
        path: Some(fixtures.join(family)),
        adapter: Some(fixtures.join(family).join("lora_qv")),
        device,
        dtype,
        ..config.model
    };
    Classifier::load(&model, &config.prompt).unwrap()
}

fn rows(classifier: &Classifier) -> Vec<Row> {
    let prompter = classifier.prompter();
    let text = |number: usize| "a word and another ".repeat(1 + number % 4);
    (0..16)
        .flat_map(|number| prompter.encode(&text(number)).unwrap().rows)
        .collect()
}

/// Returns the bytes that tensors hold on a GPU, or `None` on the CPU.
fn used_bytes(classifier: &Classifier) -> Option<u64> {
    match classifier.model().device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(card) => Some(crate::model::device::gpu::used_bytes(card).unwrap().0),
        _ => None,
    }
}

/// Checks every layer in turn with too little memory for the whole batch: the batch is scored in halves, no row is
/// lost, and on a GPU the memory of the failed calls is freed.
fn check_every_layer(device: DeviceChoice, dtype: DtypeChoice, tolerance: f32) {
    for family in ["gemma", "gemma2", "gemma3"] {
        let mut classifier = classifier(family, device, dtype);
        let rows = rows(&classifier);
        let canary = rows[..1].to_vec();
        let expected = score_checked(&mut classifier, &rows).unwrap();
        let room = 4 * rows.iter().map(Row::own_tokens).max().unwrap();
        for layer in 0..classifier.model().config().num_layers() {
            let before = used_bytes(&classifier);
            let limit = MemoryLimit::in_layer(layer, room);
            let first_attempt = match classifier.begin(&rows) {
                Ok(_) => panic!("{family} layer {layer}: expected too little memory"),
                Err(error) => Err(error),
            };
            let mut search = FailureSearch {
                scorer: &mut classifier,
                canary: &canary,
                failures: 0,
            };
            let found = search.resolve(&rows, first_attempt).unwrap();
            assert!(search.failures > 1, "{family} layer {layer}: {}", search.failures);
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.into_iter().zip(&expected) {
                assert!((found.unwrap() - expected).abs() <= tolerance, "{family} layer {layer}");
            }
            drop(limit);
            assert_eq!(used_bytes(&classifier), before, "{family} layer {layer}: bytes in use");
        }
    }
}

#[test]
fn too_little_memory_in_a_layer_loses_no_row_on_the_cpu() {
    check_every_layer(DeviceChoice::Cpu, DtypeChoice::F32, 1e-5);
}

/// Tests that need a GPU.
#[cfg(feature = "cuda")]
mod cuda {
    use std::process::Command;

    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::LaunchConfig;

    use super::*;
    use crate::model::device::footprint::bytes_per_token;
    use crate::model::device::gpu::used_bytes;

    const TRAP: &str = ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry trap_all()\n{\n\ttrap;\n}\n";

    #[test]
    fn too_little_memory_in_a_layer_loses_no_row_on_the_gpu() {
        check_every_layer(DeviceChoice::Cuda(0), DtypeChoice::F32, 1e-4);
        // Kernels of cuBLAS differ with the size of the batch.
        check_every_layer(DeviceChoice::Cuda(0), DtypeChoice::Bf16, 5e-2);
    }

    #[test]
    fn a_pass_takes_no_more_memory_than_estimated() {
        let mut classifier = classifier("gemma3", DeviceChoice::Cuda(0), DtypeChoice::F32);
        let many: Vec<Row> = rows(&classifier).into_iter().cycle().take(60).collect();
        let tokens: usize = many.iter().map(Row::own_tokens).sum();
        // The first call allocates what later calls reuse.
        score_checked(&mut classifier, &many).unwrap();
        let card = classifier.model().device().as_cuda_device().unwrap().clone();
        let (before, _) = used_bytes(&card).unwrap();
        score_checked(&mut classifier, &many).unwrap();
        let (_, peak) = used_bytes(&card).unwrap();
        let estimate = tokens as u64 * bytes_per_token(classifier.model().config(), classifier.placement().dtype);
        let used = peak - before;
        assert!(
            used <= estimate,
            "{used} bytes for {tokens} tokens, estimated at {estimate}"
        );
    }

    /// A device that fails for good is distinguished from a comment that cannot be scored. The failure breaks every use
    /// of the GPU in its process, so the test runs in a process of its own.
    #[test]
    fn a_device_that_fails_for_good_is_a_device_fault() {
        let child = "stream::score::out_of_memory::cuda::breaks_the_device";
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", child, "--ignored", "--nocapture"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("found a device fault"), "{text}");
    }

    #[test]
    #[ignore = "run by a_device_that_fails_for_good_is_a_device_fault in a process of its own"]
    fn breaks_the_device() {
        let mut classifier = classifier("gemma3", DeviceChoice::Cuda(0), DtypeChoice::F32);
        let rows = rows(&classifier);
        let canary = rows[..1].to_vec();
        score_checked(&mut classifier, &rows).unwrap();
        let card = classifier.model().device().as_cuda_device().unwrap().clone();
        let trap = card.get_or_load_custom_func("trap_all", "trap", TRAP).unwrap();
        let config = LaunchConfig::for_num_elems(1);
        #[expect(unsafe_code, reason = "launching a kernel is a foreign function call")]
        // SAFETY: the kernel takes no arguments and accesses no memory.
        unsafe { trap.builder().launch(config) }.w().unwrap();
        let first_attempt = score_checked(&mut classifier, &rows);
        let mut search = FailureSearch {
            scorer: &mut classifier,
            canary: &canary,
            failures: 0,
        };
        let fault = search.resolve(&rows, first_attempt).unwrap_err();
        println!("found a device fault: {fault}");
        // Exit without dropping: the handles of the CUDA libraries panic if they cannot be closed.
        std::process::exit(0);
    }
}
