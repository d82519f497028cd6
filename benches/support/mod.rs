//! Code that the benchmarks share: arguments, brokers, random checkpoints of published shapes, comments, the machine, and a
//! CPU-time clock.

#![allow(dead_code, reason = "no benchmark uses all of it")]

pub mod arguments;
pub mod brokers;
pub mod comments;
pub mod machine;
pub mod peer;
pub mod random_gemma;

use std::time::Duration;

/// Returns the token counts of real comments in a fixed order.
pub fn comment_lengths() -> Vec<usize> {
    let json: serde_json::Value = serde_json::from_str(include_str!("comment_lengths.json")).unwrap();
    json["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tokens| tokens.as_u64().unwrap() as usize)
        .collect()
}

/// Returns the CPU time of all threads of this process, which other processes affect less than the wall clock.
pub fn cpu_time() -> Duration {
    cpu_time_of("self")
}

/// Returns the CPU time of all threads of a process.
pub fn cpu_time_of(process: &str) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // These are the fields after the parenthesised name. utime and stime are the 14th and 15th fields of the line, in
    // hundredths of a second on every Linux.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

/// Returns the time that the processors of the machine were busy, but for programs of low priority, which give way to all
/// others.
pub fn busy_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let line = stat.lines().next().unwrap();
    let fields = line
        .split_whitespace()
        .skip(1)
        .map(|field| field.parse::<u64>().unwrap());
    // user, nice, system, idle, iowait, irq, softirq and steal, in hundredths of a second.
    let busy = fields
        .take(8)
        .enumerate()
        .filter(|(index, _)| ![1, 3, 4].contains(index));
    Duration::from_millis(busy.map(|(_, ticks)| ticks * 10).sum())
}

/// Returns the middle one of an odd number of measurements, or the upper middle one of an even number.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Returns the value that a share of the sorted values does not exceed.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

/// A 64-bit linear congruential generator (Knuth's MMIX constants) that returns the same numbers on every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    /// Returns a random number between 0 and 1.
    pub fn uniform(&mut self) -> f64 {
        (self.next() as f64 + 0.5) / (1u64 << 31) as f64
    }

    /// Returns a random time to the next arrival of a Poisson process, 1 on average.
    pub fn exponential(&mut self) -> f64 {
        -self.uniform().ln()
    }
}
