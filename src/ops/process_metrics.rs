//! Renders the metrics of the process, under the names that Prometheus's client libraries use.
//!
//! They are read from the kernel when a client asks for them. A value that cannot be read is left out.

use std::fmt::Write;
use std::fs;
use std::time::{Duration, SystemTime};

use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{ClockId, clock_gettime};

use super::metrics as names;
use super::process::open_files_limit;

/// The unit of the times in `/proc`, which Linux never changes, because programs depend on it.
const TICKS_PER_SECOND: f64 = 100.0;

/// Returns the metrics in Prometheus's text format.
pub(crate) fn render() -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let mut text = String::new();
    let mut add = |name: &str, kind: &str, help: &str, value: Option<f64>| {
        if let Some(value) = value {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n");
        }
    };
    add(
        names::PROCESS_CPU_SECONDS,
        "counter",
        "CPU time of the process in seconds, in user and system mode.",
        cpu_seconds(),
    );
    add(
        names::PROCESS_RESIDENT_MEMORY,
        "gauge",
        "Memory of the process that is in RAM, in bytes.",
        status_field(&status, "VmRSS:").map(|kib| kib * 1024.0),
    );
    add(
        names::PROCESS_OPEN_FDS,
        "gauge",
        "Number of open file descriptors.",
        open_file_descriptors(),
    );
    add(
        names::PROCESS_MAX_FDS,
        "gauge",
        "Maximum number of open file descriptors.",
        open_files_limit().map(|limit| limit as f64),
    );
    add(
        names::PROCESS_START_TIME,
        "gauge",
        "Time at which the process started, in seconds since 1970.",
        start_time(&stat),
    );
    add(
        names::PROCESS_THREADS,
        "gauge",
        "Number of threads of the process.",
        status_field(&status, "Threads:"),
    );
    text
}

fn cpu_seconds() -> Option<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let [user, system] =
        [usage.user_time(), usage.system_time()].map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6);
    Some(user + system)
}

/// Returns the number of a line of `/proc/self/status`.
fn status_field(status: &str, name: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

fn open_file_descriptors() -> Option<f64> {
    // The folder itself is open while it is read.
    let count = fs::read_dir("/proc/self/fd").ok()?.count();
    Some(count.saturating_sub(1) as f64)
}

fn start_time(stat: &str) -> Option<f64> {
    // The name of the program, in parentheses, may contain spaces. The start is the 20th field after it, as a time
    // since the machine was booted.
    let (_, fields) = stat.rsplit_once(')')?;
    let start: f64 = fields.split_whitespace().nth(19)?.parse().ok()?;
    let since_boot = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(now.as_secs_f64() - since_boot.as_secs_f64() + start / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str, name: &str) -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    #[test]
    fn the_metrics_describe_this_process() {
        let before = render();
        let file = fs::File::open("/proc/self/status").unwrap();
        let memory = std::hint::black_box(vec![1u8; 64 << 20]);
        let text = render();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert!(value(&text, names::PROCESS_CPU_SECONDS) > 0.0);
        assert!(value(&text, names::PROCESS_RESIDENT_MEMORY) >= memory.len() as f64);
        assert!(value(&text, names::PROCESS_OPEN_FDS) >= 4.0);
        assert!(value(&text, names::PROCESS_MAX_FDS) >= value(&text, names::PROCESS_OPEN_FDS));
        assert!(value(&text, names::PROCESS_THREADS) >= 2.0);
        // The test has been running for less than an hour.
        let age = now.as_secs_f64() - value(&text, names::PROCESS_START_TIME);
        assert!((-1.0..3600.0).contains(&age), "{age}");
        assert_eq!(before.matches("# TYPE").count(), 6, "{before}");
        drop(file);
    }

    #[test]
    fn what_the_kernel_does_not_report_is_left_out() {
        assert_eq!(status_field("Name:\tx\n", "VmRSS:"), None);
        assert_eq!(start_time(""), None);
        assert_eq!(start_time("1 (a b) c) S 1"), None);
    }
}
