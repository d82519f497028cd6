//! Comments per second by batch budget, and what a comment waits at a given load.

use std::time::{Duration, Instant};

use moderatord::batch::{Batcher, Limits};
use moderatord::model::gemma::Gemma;
use moderatord::score::Row;
use serde_json::{Value, json};

use crate::work::{PREFIX, Work, score, useful_flops};

/// Own tokens of a micro-batch.
const BUDGETS: [usize; 6] = [512, 1024, 2048, 4096, 8192, 16384];
const LINGER: Duration = Duration::from_millis(5);
const COMMENTS: usize = 4096;

pub struct Best {
    pub max_tokens: usize,
    comments_per_second: f64,
}

/// Tells the figures after each budget; gives the fastest.
pub fn throughput(gemma: &Gemma, matmul: f64, seconds: f64, mut tell: impl FnMut(Value)) -> Best {
    let work = Work::new(gemma, COMMENTS);
    let mut best = Best {
        max_tokens: BUDGETS[0],
        comments_per_second: 0.0,
    };
    let mut figures = Vec::new();
    for max_tokens in BUDGETS {
        let batches = work.batches(max_tokens);
        score(gemma, &work.prefix, batches[0]);
        let (start, mut comments, mut flops) = (Instant::now(), 0, 0.0);
        for batch in batches.iter().cycle() {
            score(gemma, &work.prefix, batch);
            comments += batch.len();
            flops += useful_flops(gemma, batch);
            if start.elapsed().as_secs_f64() >= seconds / 2.0 {
                break;
            }
        }
        let took = start.elapsed().as_secs_f64();
        let rate = comments as f64 / took;
        figures.push(json!({
            "max_tokens": max_tokens,
            "comments_per_s": rate,
            "useful_share_of_matmul": flops / took / matmul,
        }));
        tell(json!(figures));
        if rate > best.comments_per_second {
            best = Best {
                max_tokens,
                comments_per_second: rate,
            };
        }
    }
    best
}

/// Comments arrive one by one, evenly; each waits for its micro-batch, and that for the one before.
pub fn latency(gemma: &Gemma, best: &Best, seconds: f64) -> Value {
    let work = Work::new(gemma, COMMENTS);
    let mut figures = Vec::new();
    for load in [0.25, 0.5, 0.75, 1.0] {
        let gap = Duration::from_secs_f64(1.0 / (best.comments_per_second * load));
        let mut batcher = Batcher::new(Limits {
            max_tokens: best.max_tokens,
            linger: LINGER,
        });
        let (start, mut arrived, mut latencies) = (Instant::now(), 0u32, Vec::new());
        while start.elapsed().as_secs_f64() < seconds / 2.0 {
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
            if !batcher.is_due(now) {
                std::thread::sleep(Duration::from_micros(100));
                continue;
            }
            let batch = batcher.take().unwrap();
            let comments: Vec<Vec<u32>> = batch.rows.iter().map(|row| row.tokens[PREFIX..].to_vec()).collect();
            score(gemma, &work.prefix, &comments);
            let done = Instant::now();
            latencies.extend(
                batch
                    .items
                    .iter()
                    .map(|(arrival, _)| (done - *arrival).as_secs_f64() * 1e3),
            );
        }
        latencies.sort_by(f64::total_cmp);
        let quantile = |share: f64| latencies.get((latencies.len() as f64 * share) as usize).copied();
        figures.push(json!({ "load": load, "p50_ms": quantile(0.5), "p99_ms": quantile(0.99) }));
    }
    json!(figures)
}
