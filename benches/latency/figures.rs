//! Quantiles of latencies, and the table and JSON that show them.

use std::time::Duration;

use serde_json::{Value, json};

use crate::load::Sample;
use crate::support::quantile;

/// The latencies that the plot shows, by the share of comments that were faster.
pub const QUANTILES: [f64; 9] = [0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999];

/// Quantiles of latencies in milliseconds.
pub struct Quantiles {
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
    /// Those of [`QUANTILES`].
    pub curve: Vec<f64>,
}

impl Quantiles {
    fn new(mut values: Vec<f64>) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| quantile(&values, share);
        Self {
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: at(1.0),
            curve: QUANTILES.map(at).to_vec(),
        }
    }

    fn json(&self) -> Value {
        json!({"p50": self.p50, "p99": self.p99, "p99.9": self.p999, "max": self.max, "curve": self.curve})
    }

    fn cells(&self) -> String {
        format!("{:>9.1}{:>9.1}{:>9.1}", self.p50, self.p99, self.p999)
    }
}

/// What was measured at one load.
pub struct LevelFigures {
    /// The load relative to the capacity.
    pub share: f64,
    rate: f64,
    count: usize,
    /// The CPU time of the daemon per second.
    cores: f64,
    /// Until the decision was read by a consumer that reads only what is committed.
    pub visible: Quantiles,
    /// From append to append, if the broker notes the times.
    append: Option<Quantiles>,
}

impl LevelFigures {
    pub const HEADER: &str = "milliseconds             append to append        due to visible, committed\n\
         load  comments    p50      p99    p99.9      p50      p99    p99.9  cores";

    pub fn new(share: f64, rate: f64, cores: f64, samples: &[Sample]) -> Self {
        let append: Option<Vec<f64>> = samples
            .iter()
            .map(|sample| sample.append.map(|millis| millis as f64))
            .collect();
        Self {
            share,
            rate,
            count: samples.len(),
            cores,
            visible: Quantiles::new(samples.iter().map(|sample| millis(sample.visible)).collect()),
            append: append.map(Quantiles::new),
        }
    }

    pub fn row(&self) -> String {
        let none = || format!("{:>9}{:>9}{:>9}", "-", "-", "-");
        format!(
            "{:>3.0} %{:>8}{}{}{:>7.2}",
            self.share * 100.0,
            self.count,
            self.append.as_ref().map_or_else(none, Quantiles::cells),
            self.visible.cells(),
            self.cores
        )
    }

    fn json(&self) -> Value {
        json!({
            "load": self.share,
            "comments_per_second": self.rate,
            "comments": self.count,
            "cores": self.cores,
            "due_to_visible_ms": self.visible.json(),
            "append_to_append_ms": self.append.as_ref().map(Quantiles::json),
        })
    }
}

/// How the daemon recovers from twice its capacity.
pub struct Recovery {
    pub overload: Duration,
    /// From the end of the overload until latencies were normal again, if they were.
    pub recovered_after: Option<Duration>,
    /// How long it takes to work off what the overload has left at the measured capacity.
    ideal: Duration,
    /// The median latency in milliseconds of the comments that were due in each second.
    pub timeline: Vec<f64>,
}

impl Recovery {
    /// Latencies are normal while their median within a second is at most `normal`, in milliseconds. After the overload,
    /// the load was `share` of the capacity.
    pub fn new(overload: Duration, normal: f64, share: f64, samples: &[Sample]) -> Self {
        let seconds = samples.last().map_or(0, |last| last.due.as_secs());
        let median = |second| {
            let due = samples.iter().filter(|sample| sample.due.as_secs() == second);
            let values: Vec<f64> = due.map(|sample| millis(sample.visible)).collect();
            if values.is_empty() {
                0.0
            } else {
                Quantiles::new(values).p50
            }
        };
        // The last second is not a whole one.
        let timeline: Vec<f64> = (0..seconds).map(median).collect();
        let end = overload.as_secs_f64().ceil() as usize;
        let recovered = timeline.iter().skip(end).position(|&median| median <= normal);
        Self {
            overload,
            recovered_after: recovered.map(|second| Duration::from_secs(second as u64)),
            ideal: overload.div_f64(1.0 - share),
            timeline,
        }
    }

    pub fn line(&self) -> String {
        let recovered = match self.recovered_after {
            Some(after) => format!("normal again after {:.0} s", after.as_secs_f64()),
            None => "not normal again".to_owned(),
        };
        format!(
            "after {:.0} s at 200 %, then 50 %: {recovered}; the backlog alone takes {:.0} s",
            self.overload.as_secs_f64(),
            self.ideal.as_secs_f64()
        )
    }

    fn json(&self) -> Value {
        json!({
            "overload_s": self.overload.as_secs_f64(),
            "recovered_after_s": self.recovered_after.map(|after| after.as_secs_f64()),
            "backlog_s": self.ideal.as_secs_f64(),
            "median_ms_by_second": self.timeline,
        })
    }
}

/// Everything that was measured on one broker.
pub struct BrokerFigures {
    pub name: String,
    /// Comments per second.
    pub capacity: f64,
    pub levels: Vec<LevelFigures>,
    pub recovery: Recovery,
}

impl BrokerFigures {
    pub fn json(&self) -> Value {
        json!({
            "broker": self.name,
            "capacity_comments_per_second": self.capacity,
            "levels": self.levels.iter().map(LevelFigures::json).collect::<Vec<_>>(),
            "recovery": self.recovery.json(),
        })
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
