//! Decides when outputs are committed. Does no I/O and reads no clock.
//!
//! A commit costs about the same whether it covers one output or thousands. While the daemon keeps up with its input,
//! an output that waits for others only gets later; under load, commits that cover few outputs would take capacity
//! from everything else. The records in flight tell the two apart: a daemon that keeps up has few records besides those
//! whose outputs are ready.

use std::time::{Duration, Instant};

/// When the next group of outputs is committed.
#[derive(Debug)]
pub(super) struct CommitPace {
    /// How long outputs wait at most (`kafka.commit_interval`).
    interval: Duration,
    /// Set by a commit: no commit is early before this time.
    early_from: Option<Instant>,
}

impl CommitPace {
    pub fn new(interval: Duration) -> Self {
        Self {
            interval,
            early_from: None,
        }
    }

    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// Notes a commit that has succeeded. The next early one waits for as long as this one took, so that at most half of
    /// the time goes into early commits, however slow the brokers are.
    pub fn note_commit(&mut self, start: Instant, end: Instant) {
        self.early_from = Some(end + end.saturating_duration_since(start));
    }

    /// Returns when to commit a group whose first output or offset was added at `since`, and which holds the outputs of
    /// `ready` of the records in flight.
    ///
    /// The commit is early if that is at least half of them. A group without outputs is never committed early.
    pub fn due(&self, since: Instant, ready: usize, in_flight: usize) -> Instant {
        let latest = since + self.interval;
        if ready == 0 || 2 * ready < in_flight {
            return latest;
        }
        let earliest = self.early_from.map_or(since, |from| from.max(since));
        earliest.min(latest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(50);

    #[test]
    fn outputs_are_committed_at_once_if_little_else_is_in_flight() {
        let (pace, since) = (CommitPace::new(INTERVAL), Instant::now());
        let check = |ready, in_flight, expected| assert_eq!(pace.due(since, ready, in_flight) - since, expected);
        check(1, 1, Duration::ZERO);
        check(5, 10, Duration::ZERO);
        check(5, 11, INTERVAL);
        check(100, 10_000, INTERVAL);
        // Offsets at which partitions start.
        check(0, 0, INTERVAL);
    }

    #[test]
    fn early_commits_take_at_most_half_of_the_time() {
        let (mut pace, start) = (CommitPace::new(INTERVAL), Instant::now());
        let after = |millis| start + Duration::from_millis(millis);
        pace.note_commit(start, after(8));
        assert_eq!(pace.due(after(3), 1, 1), after(16));
        assert_eq!(pace.due(after(20), 1, 1), after(20));
        // With many records in flight, only the interval counts.
        assert_eq!(pace.due(after(20), 1, 10), after(70));
        // The interval counts too if commits are slower than it.
        pace.note_commit(start, after(400));
        assert_eq!(pace.due(after(410), 1, 1), after(460));
    }
}
