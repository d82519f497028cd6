//! The tables that the chaos test prints.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use super::faults::FaultKind;
use super::memory::MemorySamples;
use super::observer::{Observer, now};

/// Returns how often each kind of fault was injected, and how long comments waited then.
pub fn faults(injected: &[(i64, FaultKind)], observer: &Observer) -> String {
    let ends = injected.iter().skip(1).map(|(begun, _)| *begun).chain([now()]);
    let mut ages: BTreeMap<FaultKind, Vec<Duration>> = BTreeMap::new();
    for ((begun, kind), end) in injected.iter().zip(ends) {
        let age = observer.oldest_unfinished(0, *begun, end);
        ages.entry(*kind).or_default().push(age);
    }
    let mut table = "fault                 injected  oldest unfinished comment until the next fault\n\
                     \x20                               median   greatest\n"
        .to_owned();
    for kind in FaultKind::ALL {
        let mut ages = ages.remove(&kind).unwrap_or_default();
        ages.sort_unstable();
        let seconds = |index: usize| ages.get(index).map_or(0.0, Duration::as_secs_f64);
        let (median, greatest) = (seconds(ages.len() / 2), seconds(ages.len().saturating_sub(1)));
        let name = kind.name();
        writeln!(table, "{name:<20} {:>9} {median:>13.1} s {greatest:>8.1} s", ages.len()).unwrap();
    }
    table
}

/// Returns what each process used that lived for long enough.
pub fn memory(samples: &BTreeMap<(usize, u32), MemorySamples>) -> String {
    let mut table = "resident memory\n".to_owned();
    for ((daemon, id), samples) in samples {
        if let Some(summary) = samples.summary() {
            writeln!(table, "daemon {daemon}, process {id}: {summary}").unwrap();
        }
    }
    table
}
