//! Measures models of published shapes on a GPU and compares them with a plain matrix product. The weights are random,
//! and each checkpoint, of up to 5.3 GB, is written to a temporary folder. Each figure is written to a JSON file as
//! soon as it is measured.
//!
//!     gpu OUT.json [--device cuda:0] [--shape NAME] [--seconds S] [--rows N]
//!
//! `benches/gpu/run` runs this benchmark on a machine without cargo. `--device cpu` tests the benchmark itself on a
//! machine without a GPU; its figures are then meaningless.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot run panics")]
#![allow(clippy::print_stdout, reason = "a benchmark prints its results")]

#[path = "../support/mod.rs"]
mod support;

mod breakdown;
mod machine;
mod ready;
mod serving;
mod training;
mod work;

use std::path::PathBuf;

use moderatord::config::{Config, DeviceChoice, ModelConfig, Quantize, Sources};
use moderatord::model::device::Placement;
use moderatord::model::files::checkpoint::Checkpoint;
use moderatord::model::files::lora::Adapter;
use moderatord::model::forward::gemma::Gemma;
use moderatord::model::forward::linear::LoraMode;
use moderatord::model::forward::load::LoadOptions;
use serde_json::{Value, json};
use support::random_gemma;
use tempfile::TempDir;

/// The default rank of `moderatord retrain`.
const ADAPTER_RANK: usize = 8;

fn main() {
    // `cargo bench` adds the flag `--bench`.
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    let Some(path) = arguments.first().filter(|argument| !argument.starts_with("--")) else {
        println!("skipped: expected OUT.json [--device cuda:0|cpu] [--shape NAME] [--seconds S] [--rows N]");
        return;
    };
    let seconds = value("--seconds").map_or(4.0, |value| value.parse().unwrap());
    let rows = value("--rows").map_or(80, |value| value.parse().unwrap());
    let shapes: Vec<String> = match value("--shape") {
        Some(shape) => vec![shape],
        None => random_gemma::SHAPES.iter().map(ToString::to_string).collect(),
    };
    let model = model(value("--device").as_deref().unwrap_or("cuda:0"));
    let placement = Placement::from_settings(&model).unwrap();
    let mut results = Results::new(path.into());
    results.set("device", json!(placement.name()));
    results.set("dtype", json!(placement.dtype_name()));
    let rates = machine::measure(&placement, seconds);
    results.set("matmul_tflops", json!(rates.matmul / 1e12));
    results.set("copy_gb_per_s", json!(rates.copy / 1e9));
    for shape in shapes {
        let checkpoint = RandomCheckpoint::write(&shape);
        let gemma = checkpoint.load(&placement, None);
        let best = serving::throughput(&gemma, rates.matmul, seconds, |figures| {
            results.set(&format!("{shape} throughput"), figures);
        });
        results.set(&format!("{shape} latency"), serving::latency(&gemma, &best, seconds));
        let adapted = checkpoint.load(&placement, Some(ADAPTER_RANK));
        let figures = serving::with_adapter(&adapted, &best, seconds);
        drop(adapted);
        results.set(&format!("{shape} with an adapter"), figures);
        results.set(&format!("{shape} time"), breakdown::measure(&gemma, best.max_tokens));
        results.set(&format!("{shape} training"), training::measure(gemma, rows));
        results.set(
            &format!("{shape} ready"),
            ready::measure(checkpoint.folder.path(), &model),
        );
    }
}

/// A checkpoint of random weights in a temporary folder.
struct RandomCheckpoint {
    folder: TempDir,
    checkpoint: Checkpoint,
}

impl RandomCheckpoint {
    fn write(shape: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        random_gemma::write(folder.path(), &random_gemma::config(shape).unwrap(), 1).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        Self { folder, checkpoint }
    }

    /// Loads the model as the daemon does, with an adapter on every linear layer if a rank is given.
    fn load(&self, placement: &Placement, rank: Option<usize>) -> Gemma {
        let config = self.checkpoint.config();
        let adapter = rank.map(|rank| {
            let folder = self.folder.path().join("adapter");
            random_gemma::write_adapter(&folder, config, rank, 2).unwrap();
            Adapter::load(&folder, config, "").unwrap()
        });
        let options = LoadOptions {
            lora: LoraMode::Merged,
            quantize: Quantize::None,
            placement: placement.clone(),
            for_training: false,
        };
        Gemma::load(&self.checkpoint, adapter.as_ref(), options).unwrap()
    }
}

fn model(device: &str) -> ModelConfig {
    let mut model = Config::load(&Sources::default()).unwrap().model;
    model.device = match device.split_once(':') {
        None if device == "cpu" => DeviceChoice::Cpu,
        Some(("cuda", ordinal)) => DeviceChoice::Cuda(ordinal.parse().unwrap()),
        _ => panic!("device is `{device}`, expected cpu or cuda:N"),
    };
    model
}

/// The figures by name. The whole file is written again after each figure.
struct Results {
    path: PathBuf,
    figures: serde_json::Map<String, Value>,
}

impl Results {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            figures: serde_json::Map::new(),
        }
    }

    fn set(&mut self, name: &str, value: Value) {
        println!("{name}: {value}");
        self.figures.insert(name.to_owned(), value);
        let text = serde_json::to_string_pretty(&self.figures).unwrap();
        let unfinished = self.path.with_extension("unfinished");
        std::fs::write(&unfinished, text + "\n").unwrap();
        std::fs::rename(&unfinished, &self.path).unwrap();
    }
}
