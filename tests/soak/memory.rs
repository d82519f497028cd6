//! Samples the resident memory of processes and fits a line to it.

use std::time::{Duration, Instant};

/// Samples are not used until a process has loaded its model.
const WARM_UP: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_secs(2);
/// Fewer samples, a minute's worth, say nothing about a slope.
const MIN_SAMPLES: usize = 30;

/// The samples of one process.
pub struct MemorySamples {
    id: u32,
    start: Instant,
    /// Seconds since the start, and MB.
    samples: Vec<(f64, f64)>,
}

impl MemorySamples {
    pub fn new(id: u32) -> Self {
        Self {
            id,
            start: Instant::now(),
            samples: Vec::new(),
        }
    }

    /// Takes a sample if one is due and the process exists.
    pub fn sample(&mut self) {
        let seconds = self.start.elapsed().as_secs_f64();
        let is_due = self
            .samples
            .last()
            .is_none_or(|&(last, _)| seconds - last >= INTERVAL.as_secs_f64());
        if is_due && let Some(megabytes) = resident(self.id) {
            self.samples.push((seconds, megabytes));
        }
    }

    /// Returns the number of samples after the warm-up with the first, the greatest and the last of them in MB, and the
    /// slope of their second half in MB per hour, or `None` if the process did not live for long enough. In the first half,
    /// the process fills its caches.
    pub fn summary(&self) -> Option<String> {
        let warm: Vec<_> = self
            .samples
            .iter()
            .filter(|(at, _)| *at >= WARM_UP.as_secs_f64())
            .collect();
        if warm.len() < MIN_SAMPLES {
            return None;
        }
        let (first, last) = (warm.first()?, warm.last()?);
        let greatest = warm.iter().map(|(_, megabytes)| *megabytes).fold(0.0, f64::max);
        Some(format!(
            "{:>4} samples in {:>5.0} s: first {:.1} MB, greatest {:.1} MB, last {:.1} MB, second half {:+.1} MB/h",
            warm.len(),
            last.0 - first.0,
            first.1,
            greatest,
            last.1,
            slope(&warm[warm.len() / 2..])? * 3600.0
        ))
    }
}

/// Returns the resident memory of a process in MB, or `None` if there is no such process.
fn resident(id: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    Some(kibibytes * 1024.0 / 1e6)
}

/// Returns the slope of the least-squares line, or `None` if there are too few points for one.
fn slope(points: &[&(f64, f64)]) -> Option<f64> {
    let count = points.len() as f64;
    let mean = |value: fn(&(f64, f64)) -> f64| points.iter().map(|point| value(point)).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let covariance: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    let variance: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    (variance > 0.0).then_some(covariance / variance)
}

#[test]
fn the_slope_of_a_noisy_line_is_found() {
    let noise = [0.5, -0.5, -0.5, 0.5];
    let points: Vec<_> = (0..40)
        .map(|x| (f64::from(x), 3.0 + 0.25 * f64::from(x) + noise[x as usize % 4]))
        .collect();
    let found = slope(&points.iter().collect::<Vec<_>>()).unwrap();
    assert!((found - 0.25).abs() < 0.005, "{found}");
    assert_eq!(slope(&[&(1.0, 2.0)]), None);
}
