//! Outputs that wait to be sent, in the order in which their records were read. Does no I/O and reads no clock.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::output::Output;
use crate::stream::ownership::Ownership;

/// The size of a group after outputs were refused. Each refusal costs the group's transaction, so it must not cost much.
const MIN_GROUP: usize = 64;

/// The wait after a failure; it doubles with each further failure, up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(50);

const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// Outputs that are not part of the current group, and when they may be.
#[derive(Debug)]
pub(super) struct Backlog {
    outputs: VecDeque<Output>,
    /// Nothing is sent before this time.
    resume_at: Option<Instant>,
    backoff: Duration,
    max_group: usize,
}

impl Default for Backlog {
    fn default() -> Self {
        Self {
            outputs: VecDeque::new(),
            resume_at: None,
            backoff: MIN_BACKOFF,
            max_group: usize::MAX,
        }
    }
}

impl Backlog {
    /// Adds the output of the record that was read last.
    pub fn push(&mut self, output: Output) {
        self.outputs.push_back(output);
    }

    /// Takes the next output to send, unless it is too early after a failure.
    pub fn pop(&mut self, now: Instant) -> Option<Output> {
        self.is_due(now).then(|| self.outputs.pop_front()).flatten()
    }

    /// Returns whether there is an output to send now.
    pub fn is_due(&self, now: Instant) -> bool {
        !self.outputs.is_empty() && self.resume_at.is_none_or(|resume_at| resume_at <= now)
    }

    /// Puts outputs back that were sent and not committed.
    pub fn put_back(&mut self, outputs: Vec<Output>) {
        for output in outputs.into_iter().rev() {
            self.outputs.push_front(output);
        }
    }

    /// Drops the outputs of partitions that are `leaving` or no longer owned in the same epoch.
    pub fn retain_owned(&mut self, ownership: &Ownership, leaving: &[i32]) {
        self.outputs.retain(|output| {
            let position = output.record.position;
            ownership.owns(position.partition, position.epoch) && !leaving.contains(&position.partition)
        });
    }

    /// Sends nothing for a while, longer each time until something is committed. Returns how long.
    pub fn back_off(&mut self, now: Instant) -> Duration {
        let wait = self.backoff;
        self.resume_at = Some(now + wait);
        self.backoff = (self.backoff * 2).min(MAX_BACKOFF);
        wait
    }

    /// Makes the groups small, until commits succeed again.
    pub fn shrink_groups(&mut self) {
        self.max_group = MIN_GROUP;
    }

    /// Notes that a group was committed.
    pub fn note_commit(&mut self) {
        self.resume_at = None;
        self.backoff = MIN_BACKOFF;
        self.max_group = self.max_group.saturating_mul(2);
    }

    /// Returns the largest number of outputs for a group.
    pub fn max_group(&self) -> usize {
        self.max_group
    }

    pub fn len(&self) -> usize {
        self.outputs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.outputs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::super::output::tests::{SamplePartition, origin};
    use super::*;

    fn backlog(sample: &SamplePartition, offsets: &[i64]) -> Backlog {
        let mut backlog = Backlog::default();
        for &offset in offsets {
            backlog.push(origin().output(sample.tombstone(offset)));
        }
        backlog
    }

    fn offsets(backlog: &mut Backlog, now: Instant) -> Vec<i64> {
        std::iter::from_fn(|| backlog.pop(now))
            .map(|output| output.record.position.offset)
            .collect()
    }

    #[test]
    fn outputs_that_are_put_back_come_first() {
        let (sample, now) = (SamplePartition::default(), Instant::now());
        let mut backlog = backlog(&sample, &[1, 2, 3, 4]);
        let sent = vec![backlog.pop(now).unwrap(), backlog.pop(now).unwrap()];
        backlog.put_back(sent);
        assert_eq!(offsets(&mut backlog, now), [1, 2, 3, 4]);
    }

    #[test]
    fn nothing_is_sent_for_a_while_after_a_failure() {
        let (sample, mut now) = (SamplePartition::default(), Instant::now());
        let mut backlog = backlog(&sample, &[1]);
        for expected in [50, 100, 200, 400, 800, 1600, 2000, 2000] {
            backlog.back_off(now);
            let wait = Duration::from_millis(expected);
            assert!(backlog.pop(now + wait - Duration::from_millis(1)).is_none());
            let output = backlog.pop(now + wait).unwrap();
            backlog.put_back(vec![output]);
            now += wait;
        }
        backlog.back_off(now);
        backlog.note_commit();
        assert_eq!(offsets(&mut backlog, now), [1]);
    }

    #[test]
    fn groups_grow_again_with_each_commit() {
        let mut backlog = Backlog::default();
        assert_eq!(backlog.max_group(), usize::MAX);
        backlog.shrink_groups();
        assert_eq!(backlog.max_group(), MIN_GROUP);
        backlog.note_commit();
        assert_eq!(backlog.max_group(), 2 * MIN_GROUP);
        (0..100).for_each(|_| backlog.note_commit());
        assert_eq!(backlog.max_group(), usize::MAX);
    }

    #[test]
    fn outputs_of_partitions_that_are_not_owned_are_dropped() {
        let sample = SamplePartition::default();
        let mut kept = backlog(&sample, &[1, 2]);
        kept.retain_owned(&sample.ownership, &[3]);
        assert_eq!(kept.len(), 2);
        kept.retain_owned(&sample.ownership, &[2]);
        assert!(kept.is_empty());
        let mut lost = backlog(&sample, &[1, 2]);
        sample.ownership.revoke(&[2]);
        lost.retain_owned(&sample.ownership, &[]);
        assert!(lost.is_empty());
    }
}
