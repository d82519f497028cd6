//! Compares our packed scorer on this machine's CPU with PyTorch, llama.cpp and candle-transformers, in turns.
//!
//! `cargo bench --bench scorer` (`-- --comments N --rounds N --python PATH --compile --save`). The model is a Gemma 3 of the
//! published 270M shape with random weights. The workload is that of moderation: a shared prefix of 24 tokens, a comment
//! of a realistic length, a suffix of 8 tokens, and two label logits. PyTorch runs in sorted, padded batches of its best
//! size, with the prefix's keys and values computed in advance (`benches/peers/pytorch.py`); it is left out if Python
//! lacks `torch` or `transformers`. `--compile` adds variants that `torch.compile` has compiled, one of them with torchao's
//! 8-bit weights; compiling takes minutes. llama.cpp runs through its Python package, in f32 and Q8_0, with the prefix
//! shared by packed sequences (`benches/peers/llama.py`). candle-transformers runs in sorted, padded batches of 16. `--save` writes the
//! figures to `benches/results`, from where README's table comes.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints its results and panics if it cannot run"
)]

mod products;
mod results;
#[path = "../support/mod.rs"]
mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor};
use moderatord::classifier::oracle::Oracle;
use moderatord::config::Quantize;
use moderatord::model::device::Placement;
use moderatord::model::files::checkpoint::Checkpoint;
use moderatord::model::forward::gemma::{Gemma, PackedRow, PrefixCache};
use moderatord::model::forward::linear::LoraMode;
use moderatord::model::forward::load::LoadOptions;
use moderatord::ops::memory;
use results::{Figures, Measured};
use support::arguments::{argument, flag, has_flag, number, number_argument, option, read_arguments};
use support::peer::Peer;
use support::{Random, comment_lengths, cpu_time, random_gemma};

const PREFIX: usize = 24;
const SUFFIX: usize = 8;
const PADDED_BATCH: usize = 16;
/// The maximum number of own tokens in one of our passes.
const PASS_TOKENS: usize = 512;
const LABELS: [u32; 2] = [1001, 1002];

fn main() {
    read_arguments(
        "./dev bench cpu",
        "Compares the scorer on the CPU with PyTorch, llama.cpp and candle-transformers",
        vec![
            number::<usize>("comments", "N", "Number of comments (default: 64)"),
            number::<usize>("rounds", "N", "Number of rounds (default: 5)"),
            option(
                "python",
                "PATH",
                "Python that has the other libraries (default: python3)",
            ),
            flag(
                "compile",
                "Also measure what torch.compile has compiled, which takes minutes",
            ),
            option("profile", "f32|int8", "Run only our own passes, for a profiler"),
            flag("save", "Write the figures to benches/results"),
        ],
    );
    memory::keep_freed_memory();
    let comments = number_argument("comments").unwrap_or(64);
    let rounds = number_argument("rounds").unwrap_or(5);
    let python = argument("python").unwrap_or_else(|| "python3".to_owned());
    let threads = rayon::current_num_threads();
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = write_checkpoint(folder.path());
    let work = Work::draw(comments, checkpoint.config().vocab_size);
    let mut ours = [("f32", Quantize::None), ("int8", Quantize::Int8)]
        .map(|(name, quantize)| Ours::load(&checkpoint, name, quantize, &work));
    if let Some(name) = argument("profile") {
        // Runs only our own passes, for use with a profiler.
        let ours = ours.iter().find(|ours| ours.name == name).unwrap();
        (0..rounds).for_each(|_| drop(ours.score(&work).unwrap()));
        return;
    }
    let work_file = work.write(folder.path());
    let thread_count = threads.to_string();
    let mut options = vec!["--threads", &thread_count];
    options.extend(has_flag("compile").then_some("--compile"));
    let mut peers = Vec::new();
    for (name, script) in [("PyTorch", "pytorch.py"), ("llama.cpp", "llama.py")] {
        let options = if name == "PyTorch" { &options[..] } else { &options[..2] };
        match Peer::start(&python, script, folder.path(), &work_file, options) {
            Ok(peer) => peers.push((name, peer)),
            Err(reason) => say(&format!("{name} is not measured: {reason}")),
        }
    }
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let mut candle = Oracle::load(&checkpoint, DType::F32).unwrap();
    say(&format!(
        "{comments} comments, {} own tokens after a prefix of {PREFIX}, {threads} threads, median of {rounds} rounds",
        work.own_tokens(),
    ));

    let mut figures = Figures::new(&work, threads, ours[0].useful_operations(&work));
    for round in 0..rounds {
        say(&format!("round {} of {rounds}", round + 1));
        figures.rate("f32", "candle", products::candle_f32());
        figures.rate("f32", "rten-gemm", products::packed_f32());
        figures.rate("int8", "rten-gemm", products::packed_int8());
        for ours in &mut ours {
            let (time, logits) = timed(|| ours.score(&work).unwrap());
            figures.add(&format!("moderatord, {}", ours.name), time, logits);
            let (time, _) = one_thread.install(|| timed(|| ours.score(&work).unwrap()));
            figures.add_one_thread(&format!("moderatord, {}", ours.name), time);
        }
        for (name, peer) in &mut peers {
            let version = peer.ready["version"].as_str().unwrap().to_owned();
            let variants: Vec<String> = serde_json::from_value(peer.ready["variants"].clone()).unwrap();
            for variant in variants {
                let answer = peer.ask(&variant);
                let logits = serde_json::from_value(answer["logits"].clone()).unwrap();
                let time = Measured::new(answer["wall"].as_f64().unwrap(), answer["cpu"].as_f64().unwrap());
                let batch = answer["batch"].as_str().unwrap();
                let name = format!("{name} {version}, {variant}, batches of {batch}");
                figures.add(&name, time, logits);
            }
            if *name == "PyTorch" {
                for (dtype, rate) in peer.ask("products").as_object().unwrap() {
                    figures.rate(dtype, name, rate.as_f64().unwrap());
                }
            }
        }
        let (time, logits) = timed(|| sorted_padded(&mut candle, &work).unwrap());
        figures.add("candle-transformers, f32, batches of 16", time, logits);
    }
    let table = figures.table();
    say(&table);
    if has_flag("save") {
        figures.save(&table);
    }
}

/// Prints a line.
fn say(line: &str) {
    println!("{line}");
}

fn write_checkpoint(folder: &Path) -> Checkpoint {
    let config = random_gemma::config("gemma-3-270m").unwrap();
    random_gemma::write(folder, &config, 1).unwrap();
    Checkpoint::open(folder).unwrap()
}

/// Our scorer in one arithmetic.
struct Ours {
    name: &'static str,
    model: Gemma,
    prefix: PrefixCache,
}

impl Ours {
    fn load(checkpoint: &Checkpoint, name: &'static str, quantize: Quantize, work: &Work) -> Self {
        let options = LoadOptions {
            lora: LoraMode::Merged,
            quantize,
            placement: Placement::cpu(),
            for_training: false,
        };
        let model = Gemma::load(checkpoint, None, options).unwrap();
        let prefix = model.cache_prefix(&work.prefix).unwrap();
        Self { name, model, prefix }
    }

    /// Scores as the daemon does: in passes of [`PASS_TOKENS`] with the cached prefix.
    fn score(&self, work: &Work) -> Result<Vec<[f32; 2]>> {
        let labels = self.model.unembedding_rows(&LABELS)?;
        let row = |own| PackedRow { own, shared: PREFIX };
        let rows: Vec<PackedRow<'_>> = work.comments.iter().map(|comment| row(&comment[..])).collect();
        let mut logits = Vec::with_capacity(rows.len());
        let mut rest = &rows[..];
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = |row: &&PackedRow<'_>| {
                tokens += row.own.len();
                tokens <= PASS_TOKENS
            };
            let (pass, after) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            rest = after;
            let pairs = self.model.begin(pass, Some(&self.prefix), &labels)?.wait()?;
            logits.extend_from_slice(pairs.as_chunks::<2>().0);
        }
        Ok(logits)
    }

    /// Returns the operations that two label logits of each comment need: those of the linear layers for its own tokens
    /// (in the last layer, only keys and values for all tokens and the rest for one position), and those of the
    /// attended pairs.
    fn useful_operations(&self, work: &Work) -> f64 {
        let config = self.model.config();
        let (hidden, inter) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        );
        let (layers, rest) = (config.num_layers(), 2 * hidden * q + 3 * hidden * inter);
        let linear = rest + 2 * hidden * kv;
        let operations = |comment: &Vec<u32>| {
            let t = comment.len();
            let pairs: usize = (0..t).map(|i| PREFIX + i + 1).sum::<usize>() * (layers - 1) + PREFIX + t;
            2 * t * linear * (layers - 1) + 2 * t * 2 * hidden * kv + 2 * rest + 4 * q * pairs
        };
        work.comments.iter().map(operations).sum::<usize>() as f64
    }
}

/// Token ids of a prefix, and of comments with their suffix.
struct Work {
    prefix: Vec<u32>,
    comments: Vec<Vec<u32>>,
}

impl Work {
    fn draw(comments: usize, vocabulary: usize) -> Self {
        let mut random = Random::new(7);
        let lengths = comment_lengths();
        let mut ids = |count: usize| (0..count).map(|_| (random.next() % vocabulary as u64) as u32).collect();
        let prefix = ids(PREFIX);
        // Takes lengths at regular intervals, so that a small sample includes the tail of the distribution.
        let stride = (lengths.len() / comments).max(1);
        let comments = lengths
            .iter()
            .step_by(stride)
            .take(comments)
            .map(|tokens| ids(tokens + SUFFIX))
            .collect();
        Self { prefix, comments }
    }

    /// Writes the work for PyTorch, and returns the file.
    fn write(&self, folder: &Path) -> std::path::PathBuf {
        let path = folder.join("work.json");
        let work = serde_json::json!({"prefix": self.prefix, "comments": self.comments, "labels": LABELS});
        std::fs::write(&path, work.to_string()).unwrap();
        path
    }

    fn own_tokens(&self) -> usize {
        self.comments.iter().map(Vec::len).sum()
    }
}

/// Returns the time of `work` and its result.
fn timed<T>(work: impl FnOnce() -> T) -> (Measured, T) {
    let (wall, cpu) = (Instant::now(), cpu_time());
    let result = work();
    let cpu: Duration = cpu_time() - cpu;
    (Measured::new(wall.elapsed().as_secs_f64(), cpu.as_secs_f64()), result)
}

/// Returns the logits of the labels for each comment.
fn sorted_padded(oracle: &mut Oracle, work: &Work) -> Result<Vec<[f32; 2]>> {
    let mut rows: Vec<(usize, Vec<u32>)> = (work.comments.iter())
        .map(|comment| [&work.prefix[..], comment].concat())
        .enumerate()
        .collect();
    rows.sort_by_key(|(_, ids)| ids.len());
    for batch in rows.chunks_mut(PADDED_BATCH) {
        let width = batch.iter().map(|(_, ids)| ids.len()).max().unwrap_or(0);
        let ids: Vec<u32> = batch
            .iter_mut()
            .flat_map(|(_, ids)| {
                ids.resize(width, 0);
                ids.clone()
            })
            .collect();
        let ids = Tensor::new(ids, &Device::Cpu)?.reshape((batch.len(), width))?;
        // The model returns the logits of the last, padded position, so they are computed but not compared.
        oracle.forward(&ids)?.flatten_all()?.to_vec1::<f32>()?;
    }
    Ok(Vec::new())
}
