//! The figures of one run, and the table made from them.

use std::collections::BTreeMap;

use serde_json::json;

use crate::support::machine::{cpu_model, results_file};
use crate::support::median;
use crate::{SUFFIX, Work};

/// A time in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    wall: f64,
    /// Of all threads.
    cpu: f64,
}

impl Measured {
    pub fn new(wall: f64, cpu: f64) -> Self {
        Self { wall, cpu }
    }

    fn median(times: &[Self]) -> Self {
        let median = |field: fn(&Self) -> f64| median(times.iter().map(field).collect());
        Self::new(median(|time| time.wall), median(|time| time.cpu))
    }
}

/// What was measured so far.
pub struct Figures {
    comments: usize,
    own_tokens: usize,
    threads: usize,
    operations: f64,
    /// In the order in which they were first added.
    runs: Vec<(String, Vec<Measured>, Vec<[f32; 2]>)>,
    /// Our runs with one thread.
    one_thread: BTreeMap<String, Vec<Measured>>,
    /// The rates of products by type and library, in operations per second.
    rates: BTreeMap<(String, String), Vec<f64>>,
}

impl Figures {
    /// `operations` is the number of operations that the work needs.
    pub fn new(work: &Work, threads: usize, operations: f64) -> Self {
        Self {
            comments: work.comments.len(),
            own_tokens: work.own_tokens(),
            threads,
            operations,
            runs: Vec::new(),
            one_thread: BTreeMap::new(),
            rates: BTreeMap::new(),
        }
    }

    /// Adds one round of a scorer, and the logits that it computed for each comment.
    pub fn add(&mut self, name: &str, time: Measured, logits: Vec<[f32; 2]>) {
        match self.runs.iter_mut().find(|(other, ..)| other == name) {
            Some((_, times, _)) => times.push(time),
            None => self.runs.push((name.to_owned(), vec![time], logits)),
        }
    }

    /// Adds one round of a scorer with one thread.
    pub fn add_one_thread(&mut self, name: &str, time: Measured) {
        self.one_thread.entry(name.to_owned()).or_default().push(time);
    }

    /// Adds a measurement of a library's matrix product.
    pub fn rate(&mut self, dtype: &str, library: &str, rate: f64) {
        let key = (dtype.to_owned(), library.to_owned());
        self.rates.entry(key).or_default().push(rate);
    }

    /// Returns the library with the fastest product of a type, and its rate.
    fn fastest(&self, dtype: &str) -> Option<(&str, f64)> {
        let rates = self.rates.iter().filter(|((other, _), _)| other == dtype);
        rates
            .map(|((_, library), rates)| (library.as_str(), median(rates.clone())))
            .max_by(|(_, a), (_, b)| a.total_cmp(b))
    }

    /// Returns the table in Markdown.
    pub fn table(&self) -> String {
        let medians: Vec<Measured> = self.runs.iter().map(|(_, times, _)| Measured::median(times)).collect();
        let is_peer = |name: &str| !name.starts_with("moderatord");
        let f32_peer = |field: fn(&Measured) -> f64| {
            let peers = self.runs.iter().zip(&medians);
            let peers = peers.filter(|((name, ..), _)| is_peer(name) && name.contains("f32"));
            peers.map(|(_, time)| field(time)).fold(f64::INFINITY, f64::min)
        };
        let (wall, cpu) = (f32_peer(|time| time.wall), f32_peer(|time| time.cpu));
        let mut table = String::from(
            "| | speed, by wall clock | speed, by CPU time | share of the fastest product |\n|---|---|---|---|\n",
        );
        for ((name, ..), time) in self.runs.iter().zip(&medians) {
            let dtype = ["int8", "bf16"]
                .into_iter()
                .find(|dtype| name.contains(dtype))
                .unwrap_or("f32");
            let share = self.fastest(dtype).map_or_else(String::new, |(_, rate)| {
                format!("{:.0} % of {dtype}", self.operations / time.wall / rate * 100.0)
            });
            table += &format!(
                "| {name} | {:.2}x | {:.2}x | {share} |\n",
                wall / time.wall,
                cpu / time.cpu
            );
        }
        table += "\nThe fastest product of each type on this machine: ";
        let fastest = ["f32", "bf16", "int8"]
            .into_iter()
            .filter_map(|dtype| self.fastest(dtype).map(|(library, _)| format!("{dtype} {library}")));
        table += &(fastest.collect::<Vec<_>>().join(", ") + ".\n");
        for ((name, ..), time) in self.runs.iter().zip(&medians) {
            if let Some(alone) = self.one_thread.get(name) {
                let ratio = Measured::median(alone).wall / time.wall;
                table += &format!("{} threads of {name} are {ratio:.2}x as fast as one.\n", self.threads);
            }
        }
        for (name, largest, p99) in self.differences() {
            table += &format!(
                "Margins of {name} differ from those in f32 by at most {largest:.1e} (99th percentile {p99:.1e}).\n"
            );
        }
        table
    }

    /// Returns the largest difference and its 99th percentile between the margins of each run and those of our f32.
    fn differences(&self) -> Vec<(&str, f32, f32)> {
        let Some((reference, _, exact)) = self.runs.first() else {
            return Vec::new();
        };
        let runs = self
            .runs
            .iter()
            .filter(|(name, _, logits)| name != reference && logits.len() == exact.len());
        runs.map(|(name, _, logits)| {
            let margin = |[hateful, other]: &[f32; 2]| hateful - other;
            let mut differences: Vec<f32> = (logits.iter().zip(exact))
                .map(|(found, exact)| (margin(found) - margin(exact)).abs())
                .collect();
            differences.sort_by(f32::total_cmp);
            let last = differences.len() - 1;
            (name.as_str(), differences[last], differences[last * 99 / 100])
        })
        .collect()
    }

    /// Writes the figures and the table to `benches/results`.
    pub fn save(&self, table: &str) {
        let cpu = cpu_model();
        let rounds = |times: &[Measured]| -> serde_json::Value {
            let times = times.iter().map(|time| json!({"wall_s": time.wall, "cpu_s": time.cpu}));
            times.collect()
        };
        let runs: serde_json::Map<_, _> = (self.runs.iter())
            .map(|(name, times, _)| (name.clone(), rounds(times)))
            .collect();
        let one_thread: serde_json::Map<_, _> = (self.one_thread.iter())
            .map(|(name, times)| (name.clone(), rounds(times)))
            .collect();
        let rates: serde_json::Map<_, _> = (self.rates.iter())
            .map(|((dtype, library), rates)| (format!("{dtype} {library}"), rates.clone().into()))
            .collect();
        let figures = json!({
            "command": "./dev bench cpu --save",
            "cpu": cpu,
            "threads": self.threads,
            "comments": self.comments,
            "own_tokens": self.own_tokens,
            "suffix_tokens": SUFFIX,
            "useful_operations": self.operations,
            "rounds": runs,
            "rounds_with_one_thread": one_thread,
            "product_operations_per_second": rates,
        });
        let file = results_file("cpu", &cpu);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        let text = serde_json::to_string_pretty(&figures).unwrap() + "\n";
        std::fs::write(file.with_extension("json"), text).unwrap();
        std::fs::write(file.with_extension("md"), table).unwrap();
    }
}
