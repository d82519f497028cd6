//! The table and the JSON of what was measured.

use std::fs;

use serde_json::{Value, json};

use crate::load::Outcome;
use crate::overhead::Overhead;
use crate::support::machine::{cpu_model, results_file};
use crate::support::median;

const COMMAND: &str = "./dev bench http --save";

const NOTES: &str = "Each request has one comment. Requests arrive at random, and latencies count from when a request was \
due. The highest rate is searched at which 99 of 100 answers come within the limit and no request fails. The servers in \
Python are `benches/peers/http_server.py` with the fastest options that were found \
([what was tried](http-peer-options.md)); it computes the same margins. text-embeddings-inference and vLLM were not \
compared: there were no binaries of them for a CPU.";

/// What was measured of one server.
pub struct SideFigures {
    pub name: String,
    /// With one caller at a time.
    pub alone: Option<Outcome>,
    /// The highest rate of each round, or `None` if the limit was not kept at any rate.
    pub rounds: Vec<Option<Outcome>>,
}

impl SideFigures {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            alone: None,
            rounds: Vec::new(),
        }
    }

    /// Returns the median of the rounds in which the limit was kept.
    fn median(&self, field: fn(&Outcome) -> f64) -> f64 {
        median(self.rounds.iter().flatten().map(field).collect())
    }

    /// Returns the rate of each round, which is zero if the limit was not kept.
    fn rates(&self) -> Vec<f64> {
        let rate = |outcome: &Option<Outcome>| outcome.as_ref().map_or(0.0, |outcome| outcome.rate);
        self.rounds.iter().map(rate).collect()
    }

    fn rate(&self) -> f64 {
        let rates = self.rates();
        if rates.is_empty() { 0.0 } else { median(rates) }
    }

    fn is_peer(&self) -> bool {
        !self.name.starts_with("moderatord")
    }

    fn json(&self) -> Value {
        let outcome = |outcome: &Outcome| {
            json!({
                "requests_per_second": outcome.rate,
                "p50_ms": outcome.p50,
                "p99_ms": outcome.p99,
                "cpu_s_per_1000": outcome.cpu,
                "batch_rows": outcome.batch,
                "memory_bytes": outcome.memory,
                "disturbed_by_other_programs": outcome.is_disturbed,
            })
        };
        json!({
            "name": self.name,
            "one_caller": self.alone.as_ref().map(outcome),
            "rounds": self.rounds.iter().map(|found| found.as_ref().map(outcome)).collect::<Vec<_>>(),
        })
    }
}

/// What was measured in one comparison.
pub struct ComparisonFigures {
    name: String,
    /// The limit of the 99th percentile in milliseconds.
    limit: f64,
    /// Those of the packages of the servers in Python.
    pub versions: Option<Value>,
    pub sides: Vec<SideFigures>,
    pub overheads: Vec<Overhead>,
}

impl ComparisonFigures {
    pub fn new(name: &str, limit: f64) -> Self {
        Self {
            name: name.to_owned(),
            limit,
            versions: None,
            sides: Vec::new(),
            overheads: Vec::new(),
        }
    }

    /// Returns the table in Markdown. All figures but latencies, batches and memory are relative to the fastest server in
    /// Python.
    pub fn table(&self) -> String {
        let mut text = format!("## {}\n\n", self.name);
        let peers = self.sides.iter().filter(|side| side.is_peer() && side.rate() > 0.0);
        let best = peers.max_by(|a, b| a.rate().total_cmp(&b.rate()));
        if let Some(best) = best {
            text += &format!(
                "99 of 100 answers within {} ms, median of {} round(s). Relative to {}:\n\n\
                 | | requests per second | in single rounds | CPU time per request | p50 | p99 | mean batch | memory |\n\
                 |---|---|---|---|---|---|---|---|\n",
                self.limit,
                best.rounds.len(),
                best.name
            );
            for side in &self.sides {
                text += &self.row(side, best);
            }
        }
        if !self.overheads.is_empty() {
            text.push('\n');
        }
        for overhead in &self.overheads {
            text += &(overhead.line() + "\n");
        }
        text
    }

    fn row(&self, side: &SideFigures, best: &SideFigures) -> String {
        if side.rounds.iter().all(Option::is_none) {
            return format!("| {} | not within the limit at any rate | | | | | | |\n", side.name);
        }
        let relative = |field: fn(&Outcome) -> f64| side.median(field) / best.median(field);
        let ratios = side.rates().into_iter().map(|rate| rate / best.rate());
        let range = |pick: fn(f64, f64) -> f64| ratios.clone().reduce(pick).unwrap_or(f64::NAN);
        let share_of_limit = |field: fn(&Outcome) -> f64| 100.0 * side.median(field) / self.limit;
        let batches: Vec<f64> = side
            .rounds
            .iter()
            .flatten()
            .filter_map(|outcome| outcome.batch)
            .collect();
        let batch = if batches.is_empty() {
            "-".to_owned()
        } else {
            format!("{:.1}", median(batches))
        };
        format!(
            "| {} | {:.2}x | {:.2}x to {:.2}x | {:.2}x | {:.0} % of the limit | {:.0} % | {batch} | {:.2}x |\n",
            side.name,
            side.rate() / best.rate(),
            range(f64::min),
            range(f64::max),
            relative(|outcome| outcome.cpu),
            share_of_limit(|outcome| outcome.p50),
            share_of_limit(|outcome| outcome.p99),
            relative(|outcome| outcome.memory),
        )
    }

    fn json(&self) -> Value {
        json!({
            "comparison": self.name,
            "p99_limit_ms": self.limit,
            "versions": self.versions,
            "servers": self.sides.iter().map(SideFigures::json).collect::<Vec<_>>(),
            "http_overhead": self.overheads.iter().map(Overhead::json).collect::<Vec<_>>(),
        })
    }
}

/// Writes the figures and the tables to `benches/results`.
pub fn save(comparisons: &[ComparisonFigures], report: &str) {
    let (cpu, threads) = (cpu_model(), std::thread::available_parallelism().map_or(1, usize::from));
    let figures = json!({
        "command": COMMAND,
        "cpu": cpu,
        "threads": threads,
        "comparisons": comparisons.iter().map(ComparisonFigures::json).collect::<Vec<_>>(),
    });
    let versions = comparisons
        .iter()
        .find_map(|comparison| comparison.versions.as_ref()?.as_object());
    let versions: Vec<String> = versions
        .into_iter()
        .flatten()
        .map(|(name, version)| format!("{name} {}", version.as_str().unwrap_or_default()))
        .collect();
    let text = format!(
        "# Requests per second over HTTP\n\n`{COMMAND}` on {cpu}, {threads} threads, the load included. {}.\n\n{NOTES}\n\n{report}",
        versions.join(", ")
    );
    let file = results_file("http", &cpu);
    fs::write(file.with_extension("json"), format!("{figures:#}\n")).unwrap();
    fs::write(file.with_extension("md"), text).unwrap();
    println!("written: {} and .md", file.with_extension("json").display());
}
