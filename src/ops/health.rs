//! Tracks whether the daemon is doing its work, for the health checks and the watchdog.
//!
//! A daemon counts as alive only while it scores batches; a running thread is not enough. An idle daemon scores a
//! canary for this purpose. It counts as ready only if the stream does its work too ([`StreamWork::problem`]): an
//! outage of Kafka makes a daemon not ready, but a restart would not end the outage, so the daemon stays alive. Times
//! are passed in as arguments, so nothing here reads a clock.

use std::fmt;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::work::StreamWork;

/// A phase in the life of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The model is being loaded and warmed up, and the daemon joins the consumer group.
    Starting,
    /// Comments are being read and scored.
    Serving,
    /// No more comments are read, and those in flight are being finished.
    Draining,
    /// The daemon is stopping because of an error.
    Failed,
}

/// The result of a health check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HealthVerdict {
    /// The check passed.
    Healthy,
    /// The check failed, for this reason.
    Unhealthy(String),
}

/// The health of the daemon, which the pipeline updates, and which the health checks and the watchdog read.
pub struct Health {
    stall_limit: Duration,
    state: Mutex<HealthState>,
    /// Returns what the stream is doing at the moment.
    stream: OnceLock<Box<dyn Fn() -> StreamWork + Send + Sync>>,
}

#[derive(Debug)]
struct HealthState {
    /// Whether there is a stream to be ready.
    streams: bool,
    phase: Phase,
    last_scored: Option<Instant>,
}

impl Health {
    /// Creates the state of a daemon that is starting.
    ///
    /// A serving daemon that has not scored a batch for longer than `stall_limit` counts as stalled.
    pub fn new(stall_limit: Duration) -> Self {
        Self {
            stall_limit,
            state: Mutex::new(HealthState {
                streams: true,
                phase: Phase::Starting,
                last_scored: None,
            }),
            stream: OnceLock::new(),
        }
    }

    /// Lets readiness depend on the stream, of which `work` returns what it is doing when it is called.
    ///
    /// Only the first stream counts.
    pub fn watch(&self, work: impl Fn() -> StreamWork + Send + Sync + 'static) {
        let _ = self.stream.set(Box::new(work));
    }

    /// Lets readiness depend on the scorer alone, because there is no stream.
    pub fn without_stream(&self) {
        self.lock().streams = false;
    }

    /// Returns what the stream is doing, or `None` if it has not been started.
    pub fn work(&self) -> Option<StreamWork> {
        self.stream.get().map(|work| work())
    }

    /// Changes the phase; a daemon that has failed stays in that phase.
    pub fn enter(&self, phase: Phase) {
        let mut state = self.lock();
        if state.phase != Phase::Failed {
            state.phase = phase;
        }
    }

    /// Records that a batch or the canary was scored.
    pub fn record_scored(&self, now: Instant) {
        let mut state = self.lock();
        state.last_scored = Some(state.last_scored.map_or(now, |last| last.max(now)));
    }

    /// Returns the current phase.
    pub fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// Returns whether the daemon is alive: it has not failed and, if it is serving, has recently scored a batch.
    ///
    /// A daemon that is starting or draining always counts as alive, because the start and stop timeouts of systemd
    /// cover these phases.
    pub fn alive(&self, now: Instant) -> HealthVerdict {
        let state = self.lock();
        match state.phase {
            Phase::Failed => HealthVerdict::Unhealthy("failed".into()),
            Phase::Starting | Phase::Draining => HealthVerdict::Healthy,
            Phase::Serving => self.scores_batches(&state, now),
        }
    }

    /// Returns whether the daemon is ready: it is serving, has recently scored a batch, and its stream does its work.
    pub fn ready(&self, now: Instant) -> HealthVerdict {
        let (scores, streams) = {
            let state = self.lock();
            let scores = match state.phase {
                Phase::Starting => HealthVerdict::Unhealthy("starting".into()),
                Phase::Draining => HealthVerdict::Unhealthy("draining".into()),
                Phase::Failed => HealthVerdict::Unhealthy("failed".into()),
                Phase::Serving => self.scores_batches(&state, now),
            };
            (scores, state.streams)
        };
        match scores {
            HealthVerdict::Healthy if !streams => HealthVerdict::Healthy,
            HealthVerdict::Healthy => {
                let problem = match self.work() {
                    Some(work) => work.problem(now),
                    None => Some("the stream has not been started".to_owned()),
                };
                problem.map_or(HealthVerdict::Healthy, HealthVerdict::Unhealthy)
            }
            unhealthy @ HealthVerdict::Unhealthy(_) => unhealthy,
        }
    }

    fn scores_batches(&self, state: &HealthState, now: Instant) -> HealthVerdict {
        match state.last_scored.map(|last| now.saturating_duration_since(last)) {
            Some(idle) if idle <= self.stall_limit => HealthVerdict::Healthy,
            Some(idle) => HealthVerdict::Unhealthy(format!("no batch scored for {} s", idle.as_secs())),
            None => HealthVerdict::Unhealthy("no batch scored yet".into()),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HealthState> {
        // The state is two plain values, which a panic cannot leave inconsistent.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::work::GroupState;
    use super::*;

    /// The stream of a spare member, which counts as ready.
    fn spare() -> StreamWork {
        StreamWork {
            group: GroupState::Settled,
            ..StreamWork::default()
        }
    }

    #[test]
    fn an_outage_makes_a_daemon_not_ready_but_leaves_it_alive() {
        let (health, start) = (Health::new(Duration::from_secs(60)), Instant::now());
        health.enter(Phase::Serving);
        health.record_scored(start);
        assert_eq!(
            health.ready(start),
            HealthVerdict::Unhealthy("the stream has not been started".into())
        );
        health.watch(move || StreamWork {
            unreachable_since: Some(start),
            ..spare()
        });
        assert_eq!(health.ready(start), HealthVerdict::Healthy);
        let later = start + Duration::from_secs(30);
        assert_eq!(
            health.ready(later),
            HealthVerdict::Unhealthy("no broker reachable for 30 s".into())
        );
        assert_eq!(health.alive(later), HealthVerdict::Healthy);
    }

    #[test]
    fn a_serving_daemon_is_alive_and_ready_only_while_it_scores_batches() {
        let limit = Duration::from_secs(10);
        let (health, start) = (Health::new(limit), Instant::now());
        health.watch(spare);
        let healthy = |verdict| verdict == HealthVerdict::Healthy;
        assert!(healthy(health.alive(start)) && !healthy(health.ready(start)));
        health.enter(Phase::Serving);
        assert!(!healthy(health.alive(start)) && !healthy(health.ready(start)));
        health.record_scored(start);
        assert!(healthy(health.alive(start + limit)) && healthy(health.ready(start + limit)));
        let stalled = start + limit + Duration::from_secs(2);
        assert_eq!(
            health.ready(stalled),
            HealthVerdict::Unhealthy("no batch scored for 12 s".into())
        );
        assert!(!healthy(health.alive(stalled)));
        health.record_scored(stalled);
        assert!(healthy(health.alive(stalled)));
        // A batch that was finished earlier, but is recorded later, does not change the result.
        health.record_scored(start);
        assert!(healthy(health.alive(stalled)));
    }

    #[test]
    fn draining_is_alive_but_not_ready_and_failed_is_neither() {
        let (health, now) = (Health::new(Duration::from_secs(1)), Instant::now());
        health.enter(Phase::Draining);
        assert_eq!(
            (health.alive(now), health.ready(now)),
            (HealthVerdict::Healthy, HealthVerdict::Unhealthy("draining".into()))
        );
        health.enter(Phase::Failed);
        health.enter(Phase::Serving);
        assert_eq!(health.phase(), Phase::Failed);
        assert_eq!(health.alive(now), HealthVerdict::Unhealthy("failed".into()));
    }
}
