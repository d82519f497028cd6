//! Measures comments per second by token budget, and the latency of a comment at a given load.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use moderatord::model::forward::gemma::Gemma;
use moderatord::model::transfer::PendingLogits;
use moderatord::scorer::Row;
use moderatord::stream::batch::{Batcher, Limits};
use serde_json::{Value, json};

use crate::support::median;
use crate::work::{PREFIX, Work, useful_flops};

/// Token budgets of a micro-batch, in own tokens.
const BUDGETS: [usize; 6] = [512, 1024, 2048, 4096, 8192, 16384];
/// How long the oldest comment waits for others, when latencies are measured.
const LINGERS: [Duration; 2] = [Duration::ZERO, Duration::from_millis(5)];
/// Shares of the highest rate at which comments arrive, when latencies are measured.
const LOADS: [f64; 4] = [0.25, 0.5, 0.75, 1.0];
const COMMENTS: usize = 4096;

pub struct Best {
    pub max_tokens: usize,
    comments_per_second: f64,
}

/// Returns the comments per second, and the FLOPs per second that scoring them needs, in batches of at most
/// `max_tokens` own tokens. As in the daemon, the next batch begins before the previous one has been waited for.
fn rate(gemma: &Gemma, work: &Work, max_tokens: usize, seconds: f64) -> (f64, f64) {
    let batches = work.batches(max_tokens);
    work.score(gemma, batches[0]);
    let (start, mut comments, mut flops, mut in_progress) = (Instant::now(), 0, 0.0, None);
    for batch in batches.iter().cycle() {
        let next = work.begin(gemma, batch.iter().map(Vec::as_slice));
        if let Some(last) = in_progress.replace(next) {
            PendingLogits::wait(last).unwrap();
        }
        comments += batch.len();
        flops += useful_flops(gemma, batch);
        if start.elapsed().as_secs_f64() >= seconds {
            break;
        }
    }
    in_progress.map(PendingLogits::wait).transpose().unwrap();
    let took = start.elapsed().as_secs_f64();
    (comments as f64 / took, flops / took)
}

/// Returns the times in seconds in which one micro-batch is queued and in which it is scored, as medians of `passes`
/// passes. The device is idle before each pass, so that a full queue never makes the host wait.
fn one_pass(gemma: &Gemma, batch: &[Vec<u32>], work: &Work, passes: usize) -> [f64; 2] {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..passes {
        let start = Instant::now();
        let answer = work.begin(gemma, batch.iter().map(Vec::as_slice));
        times[0].push(start.elapsed().as_secs_f64());
        answer.wait().unwrap();
        times[1].push(start.elapsed().as_secs_f64());
    }
    times.map(median)
}

/// Measures the comments per second with an adapter of the given rank on every linear layer, compared with the base
/// alone.
pub fn with_adapter(adapted: &Gemma, rank: usize, best: &Best, seconds: f64) -> Value {
    let (comments, _) = rate(adapted, &Work::new(adapted, COMMENTS), best.max_tokens, seconds);
    json!({
        "rank": rank,
        "max_tokens": best.max_tokens,
        "comments_per_s": comments,
        "share_of_the_base_alone": comments / best.comments_per_second,
    })
}

/// Measures the comments per second with quantised weights, compared with those in bf16.
pub fn quantised(quantised: &Gemma, best: &Best, seconds: f64) -> Value {
    let (comments, _) = rate(quantised, &Work::new(quantised, COMMENTS), best.max_tokens, seconds);
    json!({
        "max_tokens": best.max_tokens,
        "comments_per_s": comments,
        "times_as_fast_as_bf16": comments / best.comments_per_second,
    })
}

/// Measures every budget up to `largest`, reports the figures so far after each, and returns the fastest.
pub fn throughput(gemma: &Gemma, matmul: f64, largest: usize, seconds: f64, mut report: impl FnMut(Value)) -> Best {
    let work = Work::new(gemma, COMMENTS);
    let mut best = Best {
        max_tokens: BUDGETS[0],
        comments_per_second: 0.0,
    };
    let mut figures = Vec::new();
    for max_tokens in BUDGETS.into_iter().filter(|&budget| budget <= largest) {
        let (comments, flops) = rate(gemma, &work, max_tokens, seconds);
        let [queue, pass] = one_pass(gemma, work.batches(max_tokens)[0], &work, 5);
        figures.push(json!({
            "max_tokens": max_tokens,
            "comments_per_s": comments,
            "useful_share_of_matmul": flops / matmul,
            "queue_ms": queue * 1e3,
            "pass_ms": pass * 1e3,
        }));
        report(json!(figures));
        if comments > best.comments_per_second {
            best = Best {
                max_tokens,
                comments_per_second: comments,
            };
        }
    }
    best
}

/// Measures latencies while comments arrive at a constant rate. Each comment waits for its micro-batch, which waits for
/// the one before. As in the daemon, at most two micro-batches are in progress. Comments that arrive in the first
/// `seconds` are not counted, because micro-batches of new sizes take longer. Reports the figures so far after each.
pub fn latency(gemma: &Gemma, best: &Best, seconds: f64, mut report: impl FnMut(Value)) {
    let work = Work::new(gemma, COMMENTS);
    let mut figures = Vec::new();
    for (linger, load) in LINGERS.into_iter().flat_map(|linger| LOADS.map(|load| (linger, load))) {
        let gap = Duration::from_secs_f64(1.0 / (best.comments_per_second * load));
        let mut batcher = Batcher::new(Limits {
            max_tokens: best.max_tokens,
            linger,
        });
        let (start, mut arrived, mut latencies) = (Instant::now(), 0u32, Vec::new());
        let mut in_progress: VecDeque<(PendingLogits, Vec<Instant>)> = VecDeque::new();
        let counted = start + Duration::from_secs_f64(seconds);
        while start.elapsed().as_secs_f64() < 2.0 * seconds {
            let now = Instant::now();
            while start + gap * arrived <= now && !batcher.is_full() {
                let own = &work.comments[arrived as usize % COMMENTS];
                let tokens: Vec<u32> = std::iter::repeat_n(0, PREFIX).chain(own.iter().copied()).collect();
                let row = Row {
                    tokens: tokens.into(),
                    shared: PREFIX,
                };
                let arrival = start + gap * arrived;
                batcher.push(arrival, vec![row], arrival);
                arrived += 1;
            }
            if batcher.is_due(now) && in_progress.len() < 2 {
                let batch = batcher.take().unwrap();
                let answer = work.begin(gemma, batch.rows.iter().map(|row| &row.tokens[PREFIX..]));
                in_progress.push_back((answer, batch.items.iter().map(|(arrival, _)| *arrival).collect()));
            }
            let is_done = |(answer, _): &(PendingLogits, _)| in_progress.len() == 2 || answer.is_ready();
            if in_progress.front().is_some_and(is_done)
                && let Some((answer, arrivals)) = in_progress.pop_front()
            {
                answer.wait().unwrap();
                let done = Instant::now();
                let arrivals = arrivals.iter().filter(|arrival| **arrival >= counted);
                latencies.extend(arrivals.map(|arrival| (done - *arrival).as_secs_f64() * 1e3));
            } else {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        latencies.sort_by(f64::total_cmp);
        let quantile = |share: f64| latencies.get((latencies.len() as f64 * share) as usize).copied();
        figures.push(json!({
            "linger_ms": linger.as_millis() as u64,
            "load": load,
            "comments": latencies.len(),
            "p50_ms": quantile(0.5),
            "p99_ms": quantile(0.99),
        }));
        report(json!(figures));
    }
}
