//! Searches the highest rate at which a server keeps the limit of the 99th percentile.

use crate::load::{Load, Outcome, Step};

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
const MAX_CONFIRMATIONS: usize = 6;

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
        for _ in 0..MAX_STEPS {
            if load.run(self.step(rate, STEP_SECONDS, STEP_REQUESTS)).is_kept {
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
            let outcome = load.run(self.step(rate, CONFIRM_SECONDS, CONFIRM_REQUESTS));
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
