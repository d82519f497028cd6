//! Compares `moderatord serve` with a server in Python (`benches/peers/http_server.py`): how many requests per second each
//! answers while 99 of 100 answers take no longer than a limit, and no request fails.
//!
//! `./dev bench http` installs what the server in Python needs, unless `PYTHON` names an interpreter that has it. `--help`
//! lists the arguments.
//!
//! Each request has one comment. Requests arrive at random, independently of one another (a Poisson process). They are
//! sent when they are due, on an idle connection that is kept open, however slow the server is; latencies count from when
//! they were due, so a server that falls behind cannot slow down the load (no coordinated omission). The servers take
//! turns in several rounds. The load, which runs on the same machine, is as light as possible: its requests are made in
//! advance.
//!
//! moderatord's cache is off, so that nothing is gained from texts that come again. Comments are not cut into windows,
//! except where that is said, so that both sides compute the same. It is checked first that they compute the same margins.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints its results and panics if it cannot run"
)]

mod ceiling;
mod client;
mod figures;
mod load;
mod overhead;
mod server;
#[path = "../support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use ceiling::Search;
use figures::{ComparisonFigures, SideFigures};
use load::{CALLERS, Load, one_caller, saturate};
use overhead::Overhead;
use server::Server;
use support::arguments::{
    argument, arguments, flag, has_flag, number, number_argument, option, read_arguments, repeated_option,
};
use support::comments::texts;
use support::random_gemma;

/// The number of different texts.
const TEXTS: usize = 20_000;

/// One table: a model, and the servers that are compared with it.
struct Comparison {
    name: &'static str,
    /// The bundled model, or a published shape, which gets random weights.
    model: &'static str,
    /// The limit of the 99th percentile in milliseconds: 100 unless a server cannot keep that even with one caller at a
    /// time.
    limit: f64,
    /// moderatord with settings in TOML. If the other side has the same model, its margins are compared with the first's.
    ours: &'static [(&'static str, &'static str)],
    /// Servers in Python with their options.
    peers: &'static [(&'static str, &'static str)],
}

const BUNDLED: &str = "bundled";

const F32: (&str, &str) = ("moderatord, f32", ONE_ROW);
const INT8: (&str, &str) = (
    "moderatord, int8",
    "model.quantize = \"int8\"\nprompt.max_window_tokens = 2048\n",
);

/// One row for each comment. The bundled model would cut long ones into several overlapping windows.
const ONE_ROW: &str = "prompt.max_window_tokens = 2048\n";

const COMPARISONS: [Comparison; 3] = [
    Comparison {
        name: "bundled",
        model: BUNDLED,
        limit: 100.0,
        ours: &[F32, INT8, ("moderatord, f32, the model's own windows", "")],
        peers: &[
            ("transformers, f32", "--dtype f32 --processes 2 --threads 1"),
            ("transformers, int8", "--dtype int8 --processes 2 --threads 1"),
        ],
    },
    Comparison {
        name: "detoxify",
        model: BUNDLED,
        limit: 500.0,
        ours: &[F32, INT8],
        peers: &[
            ("shape of Detoxify, f32", "--model roberta --dtype f32"),
            ("shape of Detoxify, int8", "--model roberta --dtype int8"),
        ],
    },
    Comparison {
        name: "gemma-3-270m",
        model: "gemma-3-270m",
        limit: 2000.0,
        ours: &[F32, INT8],
        peers: &[
            ("transformers, f32", "--dtype f32"),
            ("transformers, int8", "--dtype int8"),
            ("shape of Detoxify, int8", "--model roberta --dtype int8"),
        ],
    },
];

/// The largest difference between the margins of the two sides.
const TOLERANCE: f64 = 1e-4;

/// The texts whose margins are compared.
const COMPARED: usize = 20;

/// How long a saturated server is measured to find where to begin the search.
const SATURATED: Duration = Duration::from_secs(4);

/// A server and what was measured.
struct Side {
    server: Server,
    figures: SideFigures,
    /// Where the next search begins.
    rate: f64,
}

fn main() {
    read_arguments(
        "./dev bench http",
        "Compares `moderatord serve` with a server of FastAPI, uvicorn and transformers",
        vec![
            repeated_option("only", "NAME", "Comparison to make (default: all)")
                .value_parser(COMPARISONS.each_ref().map(|comparison| comparison.name)),
            number::<usize>("rounds", "N", "Number of rounds (default: 3)"),
            number::<f64>("p99", "MILLISECONDS", "Limit of the 99th percentile"),
            repeated_option(
                "peer",
                "NAME: OPTIONS",
                "Options of the server in Python, instead of the best ones",
            ),
            option("daemon", "PATH", "Build of moderatord to measure"),
            flag("peers-only", "Measure only the server in Python"),
            flag("overhead-only", "Measure only what HTTP adds to a forward pass"),
            flag("steps", "Print each step of a search"),
            flag("save", "Write the figures to benches/results"),
        ],
    );
    let rounds: usize = number_argument("rounds").unwrap_or(3);
    let texts = texts(TEXTS);
    let chosen = arguments("only");
    let is_chosen = |comparison: &&Comparison| chosen.is_empty() || chosen.iter().any(|name| name == comparison.name);
    let comparisons = COMPARISONS.iter().filter(is_chosen);
    let measured: Vec<ComparisonFigures> = comparisons
        .map(|comparison| comparison.measure(&texts, rounds))
        .collect();
    let tables: Vec<String> = measured.iter().map(ComparisonFigures::table).collect();
    let report = tables.join("\n");
    println!("\n{report}");
    if has_flag("save") {
        figures::save(&measured, &report);
    }
}

impl Comparison {
    /// Measures all servers in turns.
    fn measure(&self, texts: &[String], rounds: usize) -> ComparisonFigures {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = self.checkpoint(folder.path());
        let limit = number_argument("p99").unwrap_or(self.limit);
        let mut figures = ComparisonFigures::new(self.name, limit);
        if !has_flag("overhead-only") {
            let mut sides = self.start(&checkpoint, texts);
            figures.versions = sides.iter().find_map(|side| side.server.versions());
            sides.iter_mut().for_each(Side::prepare);
            for round in 0..rounds {
                println!(
                    "\n{}, round {} of {rounds}, p99 of at most {limit} ms",
                    self.name,
                    round + 1
                );
                sides.iter_mut().for_each(|side| side.turn(round, limit));
            }
            figures.sides = sides.into_iter().map(|side| side.figures).collect();
        }
        // Of a large model, HTTP is too small a part to be measured.
        if self.name == BUNDLED && !has_flag("peers-only") {
            let measure = |&(name, settings): &(&str, &str)| {
                Overhead::measure(name, &self.settings(&checkpoint, settings), texts)
            };
            figures.overheads = self.ours.iter().map(measure).collect();
        }
        figures
    }

    /// Returns the folder of the model, which is written if its weights are random.
    fn checkpoint(&self, folder: &Path) -> PathBuf {
        if self.model == BUNDLED {
            return Path::new(env!("CARGO_MANIFEST_DIR")).join("models/moderatord-mini");
        }
        random_gemma::write(folder, &random_gemma::config(self.model).unwrap(), 1).unwrap();
        folder.to_owned()
    }

    /// Returns the settings of one of our servers.
    fn settings(&self, checkpoint: &Path, own: &str) -> String {
        let common = "cache.entries = 0\n";
        if self.model == BUNDLED {
            return format!("{common}{own}");
        }
        format!("{common}model.path = \"{}\"\n{own}", checkpoint.display())
    }

    /// Starts all servers, and checks that they compute the same.
    fn start(&self, checkpoint: &Path, texts: &[String]) -> Vec<Side> {
        let mut sides = Vec::new();
        if !has_flag("peers-only") {
            for (name, settings) in self.ours {
                let server = Server::ours(&self.settings(checkpoint, settings), texts);
                sides.push(Side::new(name, server));
            }
        }
        let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_owned());
        let given = arguments("peer");
        let given: Vec<(&str, &str)> = given.iter().map(|peer| peer.split_once(": ").unwrap()).collect();
        for (name, options) in if given.is_empty() { self.peers } else { &given[..] } {
            sides.push(Side::new(name, Server::peer(&python, checkpoint, options, texts)));
        }
        // A model of another kind has other margins.
        let same = sides.iter().find(|side| side.figures.name == "transformers, f32");
        if let Some(same) = same.filter(|_| !has_flag("peers-only")) {
            compare(&sides[0].server, &same.server, &texts[..COMPARED]);
        }
        sides
    }
}

impl Side {
    fn new(name: &str, server: Server) -> Self {
        println!("started {name}");
        Self {
            figures: SideFigures::new(name),
            server,
            rate: 0.0,
        }
    }

    /// Measures one caller, and finds where to begin the search.
    fn prepare(&mut self) {
        let alone = one_caller(&self.server);
        let saturated = saturate(&self.server, CALLERS, SATURATED);
        self.rate = 0.8 * saturated.rate;
        println!("{:<42} one caller: {}", self.figures.name, alone.line());
        println!("{:<42} saturated:  {}", "", saturated.line());
        self.figures.alone = Some(alone);
    }

    /// Searches the highest rate.
    fn turn(&mut self, round: usize, limit: f64) {
        let search = Search {
            limit,
            start: self.rate,
        };
        let found = search.run(&Load::new(&self.server, round));
        let line = found.map_or_else(|| "not within the limit at any rate".to_owned(), |found| found.line());
        println!("{:<42} {line}", self.figures.name);
        self.rate = found.map_or(self.rate, |found| found.rate);
        self.figures.rounds.push(found);
    }
}

/// Checks that two servers compute the same margins.
fn compare(ours: &Server, peer: &Server, texts: &[String]) {
    let differences = texts.iter().map(|text| (ours.margin(text) - peer.margin(text)).abs());
    let largest = differences.fold(0.0, f64::max);
    assert!(
        largest <= TOLERANCE,
        "margins differ by {largest:e}, expected at most {TOLERANCE:e}"
    );
    println!(
        "the margins of {} comments differ by at most {largest:.1e}",
        texts.len()
    );
}
