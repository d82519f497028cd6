//! Measures a model of a published shape on a GPU and compares it with a plain matrix product. The weights are random,
//! and the checkpoint, of up to 5.3 GB, is written to a temporary folder. Each figure is written to a JSON file as soon
//! as it is measured.
//!
//!     gpu OUT.json --shape NAME [--device cuda:0|cpu] [--budget SECONDS] [--max-tokens N]
//!
//! Each shape needs a process of its own, because warming up changes how the device allocates memory. The budget, by
//! default 60 s, decides how long each figure is measured; loading the model comes on top of that. `--max-tokens` leaves
//! out the larger micro-batches. `benches/gpu/run` runs this benchmark on a machine without cargo. `--device cpu --shape
//! tiny` tests the benchmark itself on a machine without a GPU; its figures are then meaningless.

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

use clap::Arg;
use moderatord::config::{Config, DeviceChoice, ModelConfig, Quantize, Sources};
use moderatord::fault::Faults;
use moderatord::model::device::Placement;
use moderatord::model::files::checkpoint::Checkpoint;
use moderatord::model::files::lora::Adapter;
use moderatord::model::forward::gemma::Gemma;
use moderatord::model::forward::linear::LoraMode;
use moderatord::model::forward::load::LoadOptions;
use serde_json::{Value, json};
use support::arguments::{argument, number, number_argument, option, read_arguments};
use support::random_gemma;
use tempfile::TempDir;

/// The ranks of the adapters: the default of `moderatord retrain`, and one that many published adapters have.
const ADAPTER_RANKS: [usize; 2] = [8, 16];
/// About how many times the time of one figure all figures take. The rest is for writing and loading the checkpoint.
const FIGURES: f64 = 70.0;

fn main() {
    read_arguments(
        "gpu",
        "Measures a model of a published shape on a GPU, for benches/gpu/run",
        vec![
            Arg::new("out")
                .value_name("OUT.json")
                .help("File of the figures")
                .requires("shape"),
            option("shape", "NAME", "Shape of the model, such as gemma-2b").requires("out"),
            option("device", "cuda:N|cpu", "Device (default: cuda:0)"),
            number::<f64>("budget", "SECONDS", "Time for all figures (default: 60)"),
            number::<usize>("max-tokens", "N", "Largest micro-batch that is measured"),
        ],
    );
    // `cargo bench` runs every benchmark.
    let (Some(path), Some(shape)) = (argument("out"), argument("shape")) else {
        println!("skipped: expected OUT.json and --shape");
        return;
    };
    let budget: f64 = number_argument("budget").unwrap_or(60.0);
    let largest = number_argument("max-tokens").unwrap_or(usize::MAX);
    let seconds = (budget / FIGURES).min(2.0);
    let model = model(argument("device").as_deref().unwrap_or("cuda:0"));
    let placement = Placement::from_settings(&model).unwrap();
    let mut results = Results::new(path.into());
    results.set("device", json!(placement.name()));
    results.set("dtype", json!(placement.dtype_name()));
    let checkpoint = RandomCheckpoint::write(&shape);
    let gemma = checkpoint.load(&placement, false);
    let rates = machine::measure(&placement, seconds);
    results.set("matmul_tflops", json!(rates.matmul / 1e12));
    results.set("copy_gb_per_s", json!(rates.copy / 1e9));
    let best = serving::throughput(&gemma, rates.matmul, largest, seconds, |figures| {
        results.set("throughput", figures);
    });
    let mut adapters = Vec::new();
    for rank in ADAPTER_RANKS {
        let adapted = gemma.with_adapter(&checkpoint.adapter(rank)).unwrap();
        adapters.push(serving::with_adapter(&adapted, rank, &best, seconds));
        results.set("with an adapter", json!(adapters));
    }
    // Both models are in memory at once: the pool would keep what the first one frees.
    let fp8 = checkpoint.try_load(&placement, false, Quantize::Fp8);
    results.set(
        "fp8",
        match fp8 {
            Ok(fp8) => serving::quantised(&fp8, &best, seconds),
            Err(faults) => json!({ "refused": faults.to_string() }),
        },
    );
    serving::latency(&gemma, &best, seconds, |figures| results.set("latency", figures));
    results.set("time", breakdown::measure(&gemma, best.max_tokens));
    drop(gemma);
    let training = training::measure(checkpoint.load(&placement, true), 8.0 * seconds);
    let trained = training.get("failed").is_none();
    results.set("training", training);
    results.set("ready", ready::measure(checkpoint.folder.path(), &model));
    assert!(trained, "training failed; the results say why");
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

    /// Loads the model as the daemon does, or as `moderatord retrain` does.
    fn load(&self, placement: &Placement, for_training: bool) -> Gemma {
        self.try_load(placement, for_training, Quantize::None).unwrap()
    }

    fn try_load(&self, placement: &Placement, for_training: bool, quantize: Quantize) -> Result<Gemma, Faults> {
        let options = LoadOptions {
            lora: LoraMode::Unmerged,
            quantize,
            placement: placement.clone(),
            for_training,
        };
        Gemma::load(&self.checkpoint, None, options)
    }

    /// Returns an adapter for every linear layer.
    fn adapter(&self, rank: usize) -> Adapter {
        let config = self.checkpoint.config();
        let folder = self.folder.path().join(format!("rank-{rank}"));
        random_gemma::write_adapter(&folder, config, rank, 2).unwrap();
        Adapter::load(&folder, config, "").unwrap()
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
        let newest = value.as_array().and_then(|list| list.last()).unwrap_or(&value);
        println!("{name}: {newest}");
        self.figures.insert(name.to_owned(), value);
        let text = serde_json::to_string_pretty(&self.figures).unwrap();
        let unfinished = self.path.with_extension("unfinished");
        std::fs::write(&unfinished, text + "\n").unwrap();
        std::fs::rename(&unfinished, &self.path).unwrap();
    }
}
