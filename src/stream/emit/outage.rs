//! Logs an outage as two lines: one when outputs cannot be committed, and one when they can again.

use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

/// A failure that is overcome within this time is not an outage. A change of the assignment takes about as long.
const MIN_OUTAGE: Duration = Duration::from_secs(2);

/// How long outputs could not be committed.
#[derive(Debug, Default)]
pub(super) struct Outage {
    since: Option<Instant>,
    /// The reason in the last line about this outage; empty if there is none.
    logged: String,
    missing_topic: Option<(String, Instant)>,
}

impl Outage {
    /// Notes at `now` that outputs have not been committed for this reason, at least since `since`.
    pub fn note_failure(&mut self, since: Instant, now: Instant, reason: &str) {
        let since = *self.since.get_or_insert(since);
        if now.saturating_duration_since(since) < MIN_OUTAGE {
            debug!(reason, "outputs cannot be committed at the moment");
        } else if self.logged.is_empty() {
            self.log(reason);
        }
    }

    /// Notes that an output topic does not exist. Returns since when it has been missing.
    pub fn note_missing_topic(&mut self, now: Instant, topic: &str) -> Instant {
        self.since.get_or_insert(now);
        let reason = format!("the topic `{topic}` does not exist");
        if self.logged != reason {
            self.log(&reason);
        }
        match &self.missing_topic {
            Some((missing, since)) if missing == topic => *since,
            _ => {
                self.missing_topic = Some((topic.to_owned(), now));
                now
            }
        }
    }

    fn log(&mut self, reason: &str) {
        warn!(reason, "outputs cannot be committed; trying until they can");
        reason.clone_into(&mut self.logged);
    }

    /// Notes that outputs were committed.
    pub fn note_commit(&mut self, now: Instant) {
        if let Some(since) = self.since.take()
            && !self.logged.is_empty()
        {
            let seconds = now.saturating_duration_since(since).as_secs();
            info!(seconds, "outputs are committed again");
        }
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failure_that_lasts_is_an_outage() {
        let (mut outage, start) = (Outage::default(), Instant::now());
        outage.note_failure(start, start, "no broker answers");
        assert!(outage.logged.is_empty());
        outage.note_failure(start + MIN_OUTAGE, start + MIN_OUTAGE, "no broker answers");
        assert_eq!(outage.logged, "no broker answers");
        // One line is enough, whatever fails afterwards.
        outage.note_failure(start, start + 2 * MIN_OUTAGE, "timed out");
        assert_eq!(outage.logged, "no broker answers");
        outage.note_commit(start + 3 * MIN_OUTAGE);
        assert!(outage.since.is_none() && outage.logged.is_empty());
        // What was waited for counts from the beginning of the wait.
        outage.note_failure(start, start + MIN_OUTAGE, "timed out");
        assert_eq!(outage.logged, "timed out");
    }

    #[test]
    fn a_missing_topic_is_named_at_once() {
        let (mut outage, start) = (Outage::default(), Instant::now());
        assert_eq!(outage.note_missing_topic(start, "decisions"), start);
        assert_eq!(outage.logged, "the topic `decisions` does not exist");
        assert_eq!(outage.note_missing_topic(start + MIN_OUTAGE, "decisions"), start);
        assert_eq!(
            outage.note_missing_topic(start + MIN_OUTAGE, "dead"),
            start + MIN_OUTAGE
        );
    }
}
