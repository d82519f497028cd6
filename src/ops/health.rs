//! Whether the daemon does its work, as one shared state.
//!
//! Alive means working: only scored batches count (an idle daemon scores a canary), never a thread
//! that merely runs. Times are passed in; nothing here reads a clock.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Where the daemon is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Loading, warming up, joining the group.
    Starting,
    /// Taking comments in.
    Serving,
    /// Finishing what it has.
    Draining,
    /// Going down on an error.
    Failed,
}

/// What a probe is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HealthVerdict {
    /// All is well.
    Good,
    /// In words, why not.
    Bad(String),
}

/// Shared by the pipeline, which feeds it, and the probes, which ask.
#[derive(Debug)]
pub struct Health {
    /// No scored batch for this long means that nothing works.
    stall_limit: Duration,
    state: Mutex<HealthState>,
}

#[derive(Debug)]
struct HealthState {
    phase: Phase,
    last_scored: Option<Instant>,
}

impl Health {
    /// A daemon that is starting; `stall_limit` is how long a working one may go without a batch.
    pub fn new(stall_limit: Duration) -> Self {
        Self {
            stall_limit,
            state: Mutex::new(HealthState {
                phase: Phase::Starting,
                last_scored: None,
            }),
        }
    }

    /// The daemon enters a phase. A failed daemon stays failed.
    pub fn enter(&self, phase: Phase) {
        let mut state = self.lock();
        if state.phase != Phase::Failed {
            state.phase = phase;
        }
    }

    /// A batch, or the canary, was scored.
    pub fn scored(&self, now: Instant) {
        let mut state = self.lock();
        state.last_scored = Some(state.last_scored.map_or(now, |last| last.max(now)));
    }

    /// The phase.
    pub fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// Liveness: not failed, and once serving, a batch was scored lately. While starting and draining
    /// systemd's own start and stop timeouts watch.
    pub fn alive(&self, now: Instant) -> HealthVerdict {
        let state = self.lock();
        match state.phase {
            Phase::Failed => HealthVerdict::Bad("failed".into()),
            Phase::Starting | Phase::Draining => HealthVerdict::Good,
            Phase::Serving => self.working(&state, now),
        }
    }

    /// Readiness: serving, and a batch was scored lately.
    pub fn ready(&self, now: Instant) -> HealthVerdict {
        let state = self.lock();
        match state.phase {
            Phase::Starting => HealthVerdict::Bad("starting".into()),
            Phase::Draining => HealthVerdict::Bad("draining".into()),
            Phase::Failed => HealthVerdict::Bad("failed".into()),
            Phase::Serving => self.working(&state, now),
        }
    }

    fn working(&self, state: &HealthState, now: Instant) -> HealthVerdict {
        match state.last_scored.map(|last| now.saturating_duration_since(last)) {
            Some(idle) if idle <= self.stall_limit => HealthVerdict::Good,
            Some(idle) => HealthVerdict::Bad(format!("no batch scored for {} s", idle.as_secs())),
            None => HealthVerdict::Bad("no batch scored yet".into()),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HealthState> {
        // A thread that panicked while holding two plain values cannot have left them torn.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alive_means_working() {
        let limit = Duration::from_secs(10);
        let (health, start) = (Health::new(limit), Instant::now());
        let good = |verdict| verdict == HealthVerdict::Good;
        assert!(good(health.alive(start)) && !good(health.ready(start)));
        health.enter(Phase::Serving);
        assert!(!good(health.alive(start)) && !good(health.ready(start)));
        health.scored(start);
        assert!(good(health.alive(start + limit)) && good(health.ready(start + limit)));
        let stalled = start + limit + Duration::from_secs(2);
        assert_eq!(
            health.ready(stalled),
            HealthVerdict::Bad("no batch scored for 12 s".into())
        );
        assert!(!good(health.alive(stalled)));
        health.scored(stalled);
        assert!(good(health.alive(stalled)));
        // A batch that finished earlier cannot set the clock back.
        health.scored(start);
        assert!(good(health.alive(stalled)));
    }

    #[test]
    fn draining_is_alive_but_not_ready_and_failed_is_neither() {
        let (health, now) = (Health::new(Duration::from_secs(1)), Instant::now());
        health.enter(Phase::Draining);
        assert_eq!(
            (health.alive(now), health.ready(now)),
            (HealthVerdict::Good, HealthVerdict::Bad("draining".into()))
        );
        health.enter(Phase::Failed);
        health.enter(Phase::Serving);
        assert_eq!(health.phase(), Phase::Failed);
        assert_eq!(health.alive(now), HealthVerdict::Bad("failed".into()));
    }
}
