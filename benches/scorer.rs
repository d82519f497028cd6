//! Compares our packed scorer with candle-transformers on this machine's CPU, with a Gemma 3 of the published 270M
//! shape, random weights and f32. Prints ratios of comments per second within one run.
//!
//! `cargo bench --bench scorer` (`-- --comments N --rounds N`). The workload is that of moderation: a shared prefix of
//! 24 tokens, a comment of a realistic length, a suffix of 8 tokens, and two label logits. The baselines run one
//! comment at a time, and batches of 16 that are sorted by length and padded.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot run panics")]

mod support;

use std::io::Write;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor};
use moderatord::classifier::oracle::Oracle;
use moderatord::config::Quantize;
use moderatord::model::device::Placement;
use moderatord::model::files::checkpoint::Checkpoint;
use moderatord::model::forward::gemma::{Gemma, PackedRow, PrefixCache};
use moderatord::model::forward::linear::LoraMode;
use moderatord::model::forward::load::LoadOptions;
use support::{Random, comment_lengths, cpu_time, median, random_gemma};

const PREFIX: usize = 24;
const SUFFIX: usize = 8;
const PADDED_BATCH: usize = 16;
/// The maximum number of own tokens in one of our passes.
const PASS_TOKENS: usize = 512;
const LABELS: [u32; 2] = [1001, 1002];

fn main() {
    let comments = argument("--comments").unwrap_or(64);
    let rounds = argument("--rounds").unwrap_or(3);
    let mut out = std::io::stdout().lock();
    let folder = tempfile::tempdir().unwrap();
    let config = random_gemma::config("gemma-3-270m").unwrap();
    random_gemma::write(folder.path(), &config, 1).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let load = |quantize| {
        Gemma::load(
            &checkpoint,
            None,
            LoadOptions {
                lora: LoraMode::Merged,
                quantize,
                placement: Placement::cpu(),
            },
        )
        .unwrap()
    };
    let work = Work::draw(comments, checkpoint.config().vocab_size);
    writeln!(
        out,
        "{comments} comments, {} own tokens after a prefix of {PREFIX}, {} threads, median of {rounds} rounds",
        work.own_tokens(),
        std::thread::available_parallelism().map_or(1, usize::from)
    )
    .unwrap();

    let ours = load(Quantize::None);
    if std::env::args().any(|argument| argument == "--profile") {
        // Runs only our own passes, for use with a profiler.
        let prefix = ours.cache_prefix(&work.prefix).unwrap();
        (0..rounds).for_each(|_| packed(&ours, &prefix, &work).unwrap());
        return;
    }
    let quantized = load(Quantize::Q8_0);
    let mut theirs = Oracle::load(&checkpoint, DType::F32).unwrap();
    let difference = agreement(&ours, &mut theirs, &work).unwrap();
    writeln!(
        out,
        "largest difference from the label logits of candle-transformers over 8 comments: {difference:.1e}"
    )
    .unwrap();

    let prefix = ours.cache_prefix(&work.prefix).unwrap();
    let quantized_prefix = quantized.cache_prefix(&work.prefix).unwrap();
    let mut times: Vec<Vec<(f64, f64)>> = vec![Vec::new(); 5];
    for _ in 0..rounds {
        times[0].push(time(|| one_at_a_time(&mut theirs, &work).unwrap()));
        times[1].push(time(|| sorted_padded(&mut theirs, &work).unwrap()));
        times[2].push(time(|| packed(&ours, &prefix, &work).unwrap()));
        times[3].push(time(|| packed_whole(&ours, &work).unwrap()));
        times[4].push(time(|| packed(&quantized, &quantized_prefix, &work).unwrap()));
    }
    let medians: Vec<(f64, f64)> = times
        .iter()
        .map(|times| {
            (
                median(times.iter().map(|t| t.0).collect()),
                median(times.iter().map(|t| t.1).collect()),
            )
        })
        .collect();
    let best = (medians[0].0.min(medians[1].0), medians[0].1.min(medians[1].1));
    let names = [
        "candle-transformers, one at a time",
        "candle-transformers, sorted batches of 16",
        "ours, packed, shared prefix, f32",
        "ours, packed, prefix computed each time, f32",
        "ours, packed, shared prefix, Q8_0",
    ];
    writeln!(
        out,
        "\n{:<46}{:>16}{:>16}",
        "speed relative to the better baseline", "by wall clock", "by CPU time"
    )
    .unwrap();
    for (name, (wall, cpu)) in names.iter().zip(&medians) {
        writeln!(out, "{name:<46}{:>15.2}x{:>15.2}x", best.0 / wall, best.1 / cpu).unwrap();
    }
    let gemm = matmul_rate();
    let share = work.useful_flops(&ours) / medians[2].0 / gemm;
    writeln!(
        out,
        "\nuseful FLOPs of our scorer in f32, as a share of this machine's f32 matmul rate: {:.0} %",
        share * 100.0
    )
    .unwrap();
}

fn argument(name: &str) -> Option<usize> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1).and_then(|value| value.parse().ok())
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

    fn own_tokens(&self) -> usize {
        self.comments.iter().map(Vec::len).sum()
    }

    fn whole(&self, comment: &[u32]) -> Vec<u32> {
        [&self.prefix, comment].concat()
    }

    /// Returns the FLOPs that two label logits of each comment need: those of the linear layers for its own tokens (in
    /// the last layer, only keys and values for all tokens and the rest for one position), and those of the attended
    /// pairs.
    fn useful_flops(&self, model: &Gemma) -> f64 {
        let config = model.config();
        let (hidden, inter) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        );
        let (layers, rest) = (config.num_layers(), 2 * hidden * q + 3 * hidden * inter);
        let linear = rest + 2 * hidden * kv;
        let flops = |comment: &Vec<u32>| {
            let t = comment.len();
            let pairs: usize = (0..t).map(|i| PREFIX + i + 1).sum::<usize>() * (layers - 1) + PREFIX + t;
            2 * t * linear * (layers - 1) + 2 * t * 2 * hidden * kv + 2 * rest + 4 * q * pairs
        };
        self.comments.iter().map(flops).sum::<usize>() as f64
    }
}

/// Returns the wall-clock time and the CPU time of `work`, in seconds.
fn time(work: impl FnOnce()) -> (f64, f64) {
    let (wall, cpu) = (Instant::now(), cpu_time());
    work();
    let cpu: Duration = cpu_time() - cpu;
    (wall.elapsed().as_secs_f64(), cpu.as_secs_f64())
}

fn one_at_a_time(oracle: &mut Oracle, work: &Work) -> Result<()> {
    for comment in &work.comments {
        let ids = Tensor::new(work.whole(comment), &Device::Cpu)?.unsqueeze(0)?;
        oracle.forward(&ids)?.flatten_all()?.to_vec1::<f32>()?;
    }
    Ok(())
}

fn sorted_padded(oracle: &mut Oracle, work: &Work) -> Result<()> {
    let mut rows: Vec<Vec<u32>> = work.comments.iter().map(|comment| work.whole(comment)).collect();
    rows.sort_by_key(Vec::len);
    for batch in rows.chunks_mut(PADDED_BATCH) {
        let width = batch.iter().map(Vec::len).max().unwrap_or(0);
        batch.iter_mut().for_each(|row| row.resize(width, 0));
        let ids = Tensor::new(batch.concat(), &Device::Cpu)?.reshape((batch.len(), width))?;
        oracle.forward(&ids)?.flatten_all()?.to_vec1::<f32>()?;
    }
    Ok(())
}

/// Scores as the daemon does: in passes of [`PASS_TOKENS`] with the cached prefix.
fn packed(model: &Gemma, prefix: &PrefixCache, work: &Work) -> Result<()> {
    let rows: Vec<PackedRow<'_>> = work
        .comments
        .iter()
        .map(|comment| PackedRow {
            own: comment,
            shared: PREFIX,
        })
        .collect();
    passes(model, Some(prefix), &rows)
}

/// Scores without sharing the prefix, to show the effect of packing alone.
fn packed_whole(model: &Gemma, work: &Work) -> Result<()> {
    let whole: Vec<Vec<u32>> = work.comments.iter().map(|comment| work.whole(comment)).collect();
    let rows: Vec<PackedRow<'_>> = whole.iter().map(|ids| PackedRow { own: ids, shared: 0 }).collect();
    passes(model, None, &rows)
}

fn passes(model: &Gemma, prefix: Option<&PrefixCache>, rows: &[PackedRow<'_>]) -> Result<()> {
    let labels = model.unembedding_rows(&LABELS)?;
    let mut rest = rows;
    while !rest.is_empty() {
        let mut tokens = 0;
        let fits = |row: &&PackedRow<'_>| {
            tokens += row.own.len();
            tokens <= PASS_TOKENS
        };
        let (pass, after) = rest.split_at(rest.iter().take_while(fits).count().max(1));
        rest = after;
        model.begin(pass, prefix, &labels)?.wait()?;
    }
    Ok(())
}

fn agreement(ours: &Gemma, theirs: &mut Oracle, work: &Work) -> Result<f32> {
    let prefix = ours.cache_prefix(&work.prefix)?;
    let labels = ours.unembedding_rows(&LABELS)?;
    let mut largest = 0f32;
    for comment in work.comments.iter().take(8) {
        let row = PackedRow {
            own: comment,
            shared: PREFIX,
        };
        let ours = ours.begin(&[row], Some(&prefix), &labels)?.wait()?;
        let ids = Tensor::new(work.whole(comment), &Device::Cpu)?.unsqueeze(0)?;
        let theirs = theirs.forward(&ids)?.flatten_all()?;
        for (ours, id) in ours.iter().zip(LABELS) {
            largest = largest.max((ours - theirs.get(id as usize)?.to_scalar::<f32>()?).abs());
        }
    }
    Ok(largest)
}

/// Returns the FLOPs per second of candle's f32 matrix product at a shape that this model uses.
fn matmul_rate() -> f64 {
    let (m, k, n) = (PASS_TOKENS, 2048, 2048);
    let a = Tensor::rand(-1f32, 1f32, (m, k), &Device::Cpu).unwrap();
    let b = Tensor::rand(-1f32, 1f32, (n, k), &Device::Cpu).unwrap();
    let runs: Vec<f64> = (0..9)
        .map(|_| time(|| drop(a.matmul(&b.t().unwrap()).unwrap())).0)
        .collect();
    (2 * m * k * n) as f64 / median(runs)
}
