//! Searches the highest rate at which a server keeps the limit of the 99th percentile.

use std::time::{Duration, Instant};

use crate::load::{FOREIGN_CORES, Load, Outcome, Step};
use crate::support::arguments::has_flag;
use crate::support::busy_time;

/// How long a step of the search takes, and the run that confirms its result, in seconds.
const STEP_SECONDS: f64 = 3.0;
const CONFIRM_SECONDS: f64 = 8.0;

/// The fewest requests of a step and of the run that confirms. Of fewer, a 99th percentile says little.
const STEP_REQUESTS: usize = 100;
const CONFIRM_REQUESTS: usize = 250;

/// How the rate changes until it is between one that is kept and one that is not.
const RAMP: f64 = 1.25;

/// How close these two are at the end.
const RESOLUTION: f64 = 1.05;

/// The most steps of a search, and the most attempts to confirm its result.
const MAX_STEPS: usize = 12;
const MAX_CONFIRMATIONS: usize = 20;

/// How long a search waits altogether for other programs to end, which would spoil it.
const PATIENCE: Duration = Duration::from_secs(300);

/// The pause before another look at what other programs do.
const LOOK: Duration = Duration::from_millis(500);

/// A search for one server.
pub struct Search {
    /// The limit of the 99th percentile in milliseconds.
    pub limit: f64,
    /// The rate of the first step.
    pub start: f64,
}

impl Search {
    /// Returns the run that confirms the highest rate, or `None` if the limit is not kept at any rate that was tried.
    pub fn run(&self, load: &Load<'_>) -> Option<Outcome> {
        let (mut kept, mut missed) = (None, None);
        let mut rate = self.start;
        let mut patience = PATIENCE;
        for _ in 0..MAX_STEPS {
            let step = self.step(rate, STEP_SECONDS, STEP_REQUESTS);
            if undisturbed(load, step, &mut patience).is_kept {
                kept = Some(rate);
            } else {
                missed = Some(rate);
            }
            rate = match (kept, missed) {
                (Some(kept), Some(missed)) if missed / kept <= RESOLUTION => break,
                (Some(kept), Some(missed)) => f64::sqrt(kept * missed),
                (Some(kept), None) => kept * RAMP,
                (None, _) => rate / RAMP,
            };
        }
        let mut rate = kept?;
        for _ in 0..MAX_CONFIRMATIONS {
            let outcome = undisturbed(load, self.step(rate, CONFIRM_SECONDS, CONFIRM_REQUESTS), &mut patience);
            if outcome.is_kept {
                return Some(outcome);
            }
            rate /= RESOLUTION;
        }
        None
    }

    fn step(&self, rate: f64, seconds: f64, least: usize) -> Step {
        Step {
            rate,
            requests: least.max((rate * seconds) as usize),
            limit: self.limit,
        }
    }
}

/// Runs a step while other programs are quiet, and again if it missed the limit because of them.
fn undisturbed(load: &Load<'_>, step: Step, patience: &mut Duration) -> Outcome {
    loop {
        while !patience.is_zero() && is_busy(LOOK) {
            *patience = patience.saturating_sub(LOOK);
        }
        let start = Instant::now();
        let outcome = load.run(step);
        if has_flag("steps") {
            let (kept, disturbed) = (outcome.is_kept, outcome.is_disturbed);
            println!(
                "    {:.1}: {}, {} failed, kept {kept}, disturbed {disturbed}",
                step.rate,
                outcome.line(),
                outcome.failed
            );
        }
        if outcome.is_kept || !outcome.is_disturbed || patience.is_zero() {
            return outcome;
        }
        *patience = patience.saturating_sub(start.elapsed());
    }
}

/// Returns whether other programs take much of the machine for some time, in which this one does nothing.
fn is_busy(time: Duration) -> bool {
    let busy = busy_time();
    std::thread::sleep(time);
    (busy_time() - busy).as_secs_f64() > FOREIGN_CORES * time.as_secs_f64()
}
