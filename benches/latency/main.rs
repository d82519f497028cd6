//! Measures how long a comment waits for its decision, in the whole daemon with the bundled model: at a quarter, a half,
//! three quarters and all of its capacity, and how it recovers from twice that.
//!
//! `./dev bench latency` starts an Apache Kafka node and measures on it and on the embedded broker. `cargo bench --bench
//! latency` uses the node that `MODERATORD_TEST_BROKERS` or `--brokers ADDRESS` names, if any. `--help` lists the other
//! arguments. To compare builds or settings at the same rate, use `--daemon`, `--set`, `--capacity` and `--load`.
//!
//! Comments arrive at random, independently of one another (a Poisson process). They are sent when they are due, however
//! slow the daemon is, and their latency counts from when they were due, so a daemon that falls behind cannot slow down
//! the load (no coordinated omission). Quantiles are taken from the sorted latencies of all comments.
//!
//! Prints a table, and writes the figures and a plot to `benches/results/latency-CPU.json` and `.svg`.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot run panics")]

mod attack;
mod daemon;
mod figures;
mod load;
mod plot;
#[path = "../support/mod.rs"]
mod support;

use std::io::Write;
use std::time::Duration;

use serde_json::json;

use daemon::Daemon;
use figures::{BrokerFigures, LevelFigures, Recovery};
use load::{Load, Phase};
use support::arguments::{
    argument, arguments, flag, has_flag, number, number_argument, option, read_arguments, repeated_option,
};
use support::brokers::{Broker, serve_if_requested};
use support::machine::{field, results_file};

/// The loads that are measured, relative to the capacity.
const LOADS: [f64; 4] = [0.25, 0.5, 0.75, 1.0];

/// How long the capacity is measured.
const CAPACITY_TIME: Duration = Duration::from_secs(8);

/// The load after an overload, relative to the capacity.
const RECOVERY_LOAD: f64 = 0.5;

fn main() {
    if serve_if_requested() {
        return;
    }
    read_arguments(
        "./dev bench latency",
        "Measures how long comments wait for their decisions at several loads, and after an overload",
        vec![
            number::<f64>("seconds", "N", "Time at each load (default: 30)"),
            repeated_option("set", "KEY=VALUE", "Setting of the daemon in TOML"),
            option("brokers", "ADDRESS", "Apache Kafka node to measure on"),
            flag("apache-only", "Leave out the embedded broker"),
            flag("attack", "Measure while the API is attacked or overloaded"),
            number::<f64>("duplicates", "SHARE", "Measure a flood of identical comments"),
            number::<f64>(
                "load",
                "SHARE",
                "Measure this share of the capacity alone, and write no results",
            ),
            number::<f64>(
                "capacity",
                "RATE",
                "Capacity in comments per second, instead of measuring it",
            ),
            option("daemon", "PATH", "Build of moderatord to measure"),
            option(attack::ATTACKER, "KIND", "").hide(true),
            option("address", "ADDRESS", "").hide(true),
        ],
    );
    if attack::attack_if_requested() {
        return;
    }
    let seconds: f64 = number_argument("seconds").unwrap_or(30.0);
    let settings: Vec<String> = arguments("set");
    let mut brokers = Vec::new();
    if !has_flag("apache-only") {
        brokers.push(("embedded broker, at least once", Broker::embedded()));
    }
    match argument("brokers").map(Broker::at).or_else(Broker::apache) {
        Some(broker) => brokers.push(("Apache Kafka, exactly once", broker)),
        None => print("Apache Kafka: not measured, because neither --brokers nor MODERATORD_TEST_BROKERS is set"),
    }
    if let Some(share) = number_argument("duplicates") {
        brokers
            .into_iter()
            .for_each(|(name, broker)| flood(name, broker, share, &settings));
        return;
    }
    let time = Duration::from_secs_f64(seconds);
    if has_flag("attack") {
        for (name, mut broker) in brokers {
            attack::measure(name, &mut broker, time, &settings);
        }
        return;
    }
    if let Some(share) = number_argument("load") {
        for (_, mut broker) in brokers {
            drop(levels(&mut broker, time, &settings, &[share]));
        }
        return;
    }
    let measured: Vec<BrokerFigures> = brokers
        .into_iter()
        .map(|(name, broker)| measure(name, broker, time, &settings))
        .collect();
    let (cpu, threads) = machine();
    let results = json!({
        "cpu": cpu,
        "threads": threads,
        "model": "bundled",
        "settings": settings,
        "seconds_per_load": seconds,
        "brokers": measured.iter().map(BrokerFigures::json).collect::<Vec<_>>(),
    });
    let file = results_file("latency", &cpu);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file.with_extension("json"), format!("{results:#}\n")).unwrap();
    std::fs::write(file.with_extension("svg"), plot::svg(&measured, &cpu)).unwrap();
    print(&format!("written: {} and .svg", file.with_extension("json").display()));
}

/// A daemon under measurement.
struct Measured {
    load: Load,
    capacity: f64,
    levels: Vec<LevelFigures>,
    _daemon: Daemon,
}

/// Measures the capacity of a new daemon, and these shares of it.
fn levels(broker: &mut Broker, time: Duration, settings: &[String], shares: &[f64]) -> Measured {
    let daemon = Daemon::start(broker, settings);
    let mut load = Load::start(broker, &daemon.topics, 0.0);
    load.wait_until_ready();
    let capacity = number_argument("capacity").unwrap_or_else(|| load.capacity(CAPACITY_TIME));
    print(LevelFigures::HEADER);
    let mut levels = Vec::new();
    for &share in shares {
        let rate = capacity * share;
        let before = daemon.cpu_time();
        let samples = load.run(&[Phase { rate, time }]);
        let cores = (daemon.cpu_time() - before).as_secs_f64() / time.as_secs_f64();
        let level = LevelFigures::new(share, rate, cores, &samples);
        print(&level.row());
        levels.push(level);
    }
    Measured {
        load,
        capacity,
        levels,
        _daemon: daemon,
    }
}

/// Measures everything on one broker.
fn measure(name: &str, mut broker: Broker, time: Duration, settings: &[String]) -> BrokerFigures {
    print(&format!("\n{name}, {} threads", machine().1));
    let Measured {
        mut load,
        capacity,
        levels,
        _daemon,
    } = levels(&mut broker, time, settings, &LOADS);
    let normal = levels[1].visible.p99;
    let overload = time / 3;
    // What an overload leaves is worked off at half of the capacity while the other half is used, and with some reserve.
    let phases = [
        Phase {
            rate: 2.0 * capacity,
            time: overload,
        },
        Phase {
            rate: RECOVERY_LOAD * capacity,
            time: 3 * overload + Duration::from_secs(5),
        },
    ];
    let recovery = Recovery::new(overload, normal, RECOVERY_LOAD, &load.run(&phases));
    print(&recovery.line());
    BrokerFigures {
        name: name.to_owned(),
        capacity,
        levels,
        recovery,
    }
}

/// Compares the capacity for a flood of identical comments with and without the cache.
fn flood(name: &str, mut broker: Broker, share: f64, settings: &[String]) {
    let capacities = [0, 65_536].map(|entries| {
        let settings: Vec<String> = settings
            .iter()
            .cloned()
            .chain([format!("cache.entries={entries}")])
            .collect();
        let daemon = Daemon::start(&mut broker, &settings);
        let mut load = Load::start(&broker, &daemon.topics, share);
        load.wait_until_ready();
        load.capacity(CAPACITY_TIME)
    });
    let [without, with] = capacities;
    print(&format!(
        "{name}: with {:.0} % duplicates, the cache raises the throughput {:.1} times",
        share * 100.0,
        with / without
    ));
}

fn print(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").unwrap();
}

/// Returns the model of the CPU and the number of its threads.
fn machine() -> (String, usize) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    (field("model name"), threads)
}
