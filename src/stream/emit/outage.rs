//! Logs an outage as two lines: one when outputs cannot be committed, and one when they can again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

/// A failure that is overcome within this time is not an outage. A change of the assignment takes about as long.
const MIN_OUTAGE: Duration = Duration::from_secs(2);

/// How long outputs could not be committed.
#[derive(Debug, Default)]
pub(super) struct Outage {
    since: Option<Instant>,
    /// Whether this outage has been logged.
    is_logged: bool,
    /// The output topics that do not exist, and since when.
    missing_topics: BTreeMap<String, Instant>,
}

impl Outage {
    /// Notes at `now` that outputs have not been committed for this reason, at least since `since`.
    pub fn note_failure(&mut self, since: Instant, now: Instant, reason: &str) {
        let since = *self.since.get_or_insert(since);
        if now.saturating_duration_since(since) < MIN_OUTAGE {
            debug!(reason, "outputs cannot be committed at the moment");
        } else if !self.is_logged {
            self.log(reason);
        }
    }

    /// Notes that an output topic does not exist. Returns since when it has been missing.
    pub fn note_missing_topic(&mut self, now: Instant, topic: &str) -> Instant {
        self.since.get_or_insert(now);
        if let Some(&since) = self.missing_topics.get(topic) {
            return since;
        }
        self.missing_topics.insert(topic.to_owned(), now);
        self.log(&format!("the topic `{topic}` does not exist"));
        now
    }

    fn log(&mut self, reason: &str) {
        warn!(reason, "outputs cannot be committed; trying until they can");
        self.is_logged = true;
    }

    /// Notes that outputs were committed.
    pub fn note_commit(&mut self, now: Instant) {
        if let Some(since) = self.since.take()
            && self.is_logged
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
        assert!(!outage.is_logged);
        outage.note_failure(start + MIN_OUTAGE, start + MIN_OUTAGE, "no broker answers");
        assert!(outage.is_logged);
        outage.note_commit(start + 3 * MIN_OUTAGE);
        assert!(outage.since.is_none() && !outage.is_logged);
        // What was waited for counts from the beginning of the wait.
        outage.note_failure(start, start + MIN_OUTAGE, "timed out");
        assert!(outage.is_logged);
    }

    #[test]
    fn a_missing_topic_is_named_at_once() {
        let (mut outage, start) = (Outage::default(), Instant::now());
        assert_eq!(outage.note_missing_topic(start, "decisions"), start);
        assert!(outage.is_logged);
        assert_eq!(outage.note_missing_topic(start + MIN_OUTAGE, "decisions"), start);
        assert_eq!(
            outage.note_missing_topic(start + MIN_OUTAGE, "dead"),
            start + MIN_OUTAGE
        );
        // Each topic has a time of its own.
        assert_eq!(outage.note_missing_topic(start + 2 * MIN_OUTAGE, "decisions"), start);
    }
}
