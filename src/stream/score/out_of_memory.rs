//! Too little memory in any layer of the model, and a device that fails for good: what the score stage makes of it.

use std::path::Path;

#[cfg(feature = "cuda")]
use candle_core::Device;

use super::search::Search;
use crate::classifier::Classifier;
use crate::config::{Config, DeviceChoice, DtypeChoice, ModelConfig, Sources};
use crate::model::forward::faults::OutOfMemory;
use crate::scorer::{Row, Scorer, call};

fn classifier(family: &str, device: DeviceChoice) -> Classifier {
    let config = Config::load(&Sources::default()).unwrap();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let model = ModelConfig {
        path: Some(fixtures.join(family)),
        adapter: Some(fixtures.join(family).join("lora_qv")),
        device,
        dtype: DtypeChoice::F32,
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

/// Bytes that tensors hold on a GPU.
fn used_bytes(classifier: &Classifier) -> Option<u64> {
    match classifier.model().device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(card) => Some(crate::model::device::card::used_bytes(card).unwrap().0),
        _ => None,
    }
}

/// Every layer in turn has too little memory for the whole batch: halves are scored, nothing is lost, and on a
/// GPU what the failed calls held is free again.
fn a_starved_layer_loses_nothing(device: DeviceChoice, tolerance: f32) {
    for family in ["gemma", "gemma2", "gemma3"] {
        let mut classifier = classifier(family, device);
        let rows = rows(&classifier);
        let canary = rows[..1].to_vec();
        let expected = call(&mut classifier, &rows).unwrap();
        let room = 4 * rows.iter().map(Row::cost).max().unwrap();
        for layer in 0..classifier.model().config().num_layers() {
            let before = used_bytes(&classifier);
            let starved = OutOfMemory::in_layer(layer, room);
            let tried = match classifier.begin(&rows) {
                Ok(_) => panic!("{family} layer {layer}: expected too little memory"),
                Err(error) => Err(error),
            };
            let mut search = Search {
                scorer: &mut classifier,
                canary: &canary,
                failures: 0,
            };
            let found = search.resolve(&rows, tried).unwrap();
            assert!(search.failures > 1, "{family} layer {layer}: {}", search.failures);
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.into_iter().zip(&expected) {
                assert!((found.unwrap() - expected).abs() <= tolerance, "{family} layer {layer}");
            }
            drop(starved);
            assert_eq!(
                used_bytes(&classifier),
                before,
                "{family} layer {layer}: bytes that are held"
            );
        }
    }
}

#[test]
fn a_starved_layer_loses_nothing_on_the_cpu() {
    a_starved_layer_loses_nothing(DeviceChoice::Cpu, 1e-5);
}

/// On a GPU, which must be there.
#[cfg(feature = "cuda")]
mod cuda {
    use std::process::Command;

    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::LaunchConfig;

    use super::*;
    use crate::model::device::card::used_bytes;
    use crate::model::device::footprint::pass_bytes;

    const TRAP: &str = ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry trap_all()\n{\n\ttrap;\n}\n";

    #[test]
    fn a_starved_layer_loses_nothing_on_the_gpu() {
        a_starved_layer_loses_nothing(DeviceChoice::Cuda(0), 1e-4);
    }

    #[test]
    fn a_pass_takes_no_more_than_is_said() {
        let mut classifier = classifier("gemma3", DeviceChoice::Cuda(0));
        let many: Vec<Row> = rows(&classifier).into_iter().cycle().take(60).collect();
        let tokens: usize = many.iter().map(Row::cost).sum();
        // The first call makes what is made once.
        call(&mut classifier, &many).unwrap();
        let card = classifier.model().device().as_cuda_device().unwrap().clone();
        let (before, _) = used_bytes(&card).unwrap();
        call(&mut classifier, &many).unwrap();
        let (_, most) = used_bytes(&card).unwrap();
        let said = tokens as u64 * pass_bytes(classifier.model().config(), classifier.position().dtype);
        let took = most - before;
        assert!(took <= said, "{took} bytes for {tokens} tokens, {said} said");
    }

    /// A device that fails for good is told from a comment that cannot be scored. It breaks all that its process
    /// does on the card, so it has a process to itself.
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
    #[ignore = "a_device_that_fails_for_good_is_a_device_fault runs it in a process of its own"]
    fn breaks_the_device() {
        let mut classifier = classifier("gemma3", DeviceChoice::Cuda(0));
        let rows = rows(&classifier);
        let canary = rows[..1].to_vec();
        call(&mut classifier, &rows).unwrap();
        let card = classifier.model().device().as_cuda_device().unwrap().clone();
        let trap = card.get_or_load_custom_func("trap_all", "trap", TRAP).unwrap();
        let config = LaunchConfig::for_num_elems(1);
        #[expect(unsafe_code, reason = "a launch is a foreign call")]
        // SAFETY: the kernel takes nothing and touches nothing.
        unsafe { trap.builder().launch(config) }.w().unwrap();
        let tried = call(&mut classifier, &rows);
        let mut search = Search {
            scorer: &mut classifier,
            canary: &canary,
            failures: 0,
        };
        let fault = search.resolve(&rows, tried).unwrap_err();
        println!("found a device fault: {fault}");
        // The libraries' handles panic when they cannot be closed in order.
        std::process::exit(0);
    }
}
