//! Collects the outputs and offsets that are committed together. Does no I/O and reads no clock.

use std::collections::BTreeMap;
use std::time::Instant;

use super::output::Output;
use super::pace::CommitPace;
use crate::message::NextOffset;
use crate::stream::ownership::{Epoch, Ownership};

/// A group with this many outputs is committed without waiting for the commit interval.
const MAX_OUTPUTS: usize = 5_000;

/// A group whose outputs have this many bytes is committed without waiting for the commit interval.
const MAX_BYTES: usize = 16 << 20;

/// The outputs and offsets of the next commit, kept until that commit has succeeded.
#[derive(Debug, Default)]
pub(super) struct CommitGroup {
    outputs: Vec<Output>,
    bytes: usize,
    offsets: BTreeMap<i32, (Epoch, NextOffset)>,
    /// Offsets at which partitions start, and which are committed even if no output follows.
    starts: BTreeMap<i32, (Epoch, NextOffset)>,
    /// When the first output or offset was added.
    since: Option<Instant>,
    /// Set after a failed commit: the next attempt must not be made before this time.
    not_before: Option<Instant>,
    /// A partition was revoked and assigned again while the group was collected.
    mixes_epochs: bool,
}

impl CommitGroup {
    /// Adds an output and the offset of its record.
    pub fn push(&mut self, output: Output, now: Instant) {
        let position = output.record.position;
        self.add_offset(
            position.partition,
            position.epoch,
            NextOffset::after(position.offset),
            now,
        );
        self.bytes += output.own_bytes();
        self.outputs.push(output);
    }

    /// Adds the offset at which a partition starts, without an output.
    pub fn add_start(&mut self, partition: i32, epoch: Epoch, next: NextOffset, now: Instant) {
        self.starts.insert(partition, (epoch, next));
        self.add_offset(partition, epoch, next, now);
    }

    fn add_offset(&mut self, partition: i32, epoch: Epoch, next: NextOffset, now: Instant) {
        let before = self.offsets.insert(partition, (epoch, next));
        self.mixes_epochs |= before.is_some_and(|(before, _)| before != epoch);
        self.since.get_or_insert(now);
    }

    /// Returns when to commit, or `None` if there is nothing to commit. `in_flight` is the number of all records in
    /// flight, of which the group holds some.
    pub fn due(&self, now: Instant, pace: &CommitPace, in_flight: usize) -> Option<Instant> {
        let since = self.since?;
        let due = if self.is_full(MAX_OUTPUTS) {
            now
        } else {
            pace.due(since, self.outputs.len(), in_flight)
        };
        Some(self.not_before.map_or(due, |not_before| due.max(not_before)))
    }

    /// Returns whether no more outputs should be added, given the maximum number of outputs.
    pub fn is_full(&self, max_outputs: usize) -> bool {
        self.outputs.len() >= max_outputs.min(MAX_OUTPUTS) || self.bytes >= MAX_BYTES
    }

    /// Postpones the commit.
    pub fn defer(&mut self, until: Instant) {
        self.not_before = Some(until);
    }

    /// Takes out an output to send it again. Its offset stays, because the output is about to be put back.
    pub fn remove(&mut self, index: usize) -> Output {
        self.outputs.remove(index)
    }

    /// Puts an output back where it was.
    pub fn insert(&mut self, index: usize, output: Output) {
        self.outputs.insert(index, output);
    }

    pub fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    pub fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    pub fn outputs_mut(&mut self) -> &mut [Output] {
        &mut self.outputs
    }

    /// Returns the index of the output with the given number, or `None` if it was dropped in the meantime.
    pub fn index_of(&self, number: usize) -> Option<usize> {
        self.outputs.iter().position(|output| output.number == number)
    }

    /// Returns each partition with the offset to commit.
    pub fn offsets(&self) -> impl Iterator<Item = (i32, NextOffset)> {
        self.offsets.iter().map(|(&partition, &(_, next))| (partition, next))
    }

    /// Returns the number of bytes that the outputs take in addition to their records.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns whether every partition in the group is still owned, in the epoch in which its records were read.
    pub fn is_owned(&self, ownership: &Ownership) -> bool {
        let owns = |(&partition, &(epoch, _)): (&i32, &(Epoch, NextOffset))| ownership.owns(partition, epoch);
        !self.mixes_epochs && self.offsets.iter().all(owns)
    }

    /// Drops the outputs and offsets of partitions that are `leaving` or no longer owned in the same epoch. Their new
    /// owner reads the records again.
    pub fn retain_owned(&mut self, ownership: &Ownership, leaving: &[i32]) {
        let is_kept = |partition: i32, epoch| ownership.owns(partition, epoch) && !leaving.contains(&partition);
        self.outputs
            .retain(|output| is_kept(output.record.position.partition, output.record.position.epoch));
        for offsets in [&mut self.offsets, &mut self.starts] {
            offsets.retain(|&partition, &mut (epoch, _)| is_kept(partition, epoch));
        }
        self.bytes = self.outputs.iter().map(Output::own_bytes).sum();
        self.mixes_epochs = false;
        if self.offsets.is_empty() {
            (self.since, self.not_before) = (None, None);
        }
    }

    /// Takes the outputs out of the group, with the offsets that they cover. What remains are the offsets at which
    /// partitions start.
    pub fn take_outputs(&mut self) -> Vec<Output> {
        self.offsets.clone_from(&self.starts);
        self.bytes = 0;
        if self.offsets.is_empty() {
            (self.since, self.not_before) = (None, None);
        }
        std::mem::take(&mut self.outputs)
    }

    /// Takes out the outputs of a partition that are committed already, because their offsets are before `committed`.
    pub fn take_committed(&mut self, partition: i32, committed: NextOffset) -> Vec<Output> {
        let is_committed = |output: &mut Output| {
            let position = output.record.position;
            position.partition == partition && NextOffset::after(position.offset) <= committed
        };
        let taken: Vec<Output> = self.outputs.extract_if(.., is_committed).collect();
        self.starts
            .retain(|&start, &mut (_, next)| start != partition || next > committed);
        taken
    }

    /// Takes everything out of the group.
    pub fn take(&mut self) -> Self {
        std::mem::take(self)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::output::tests::{SamplePartition, origin};
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(50);

    /// A group with the outputs of the records at `offsets` of the sample's partition.
    fn group(sample: &SamplePartition, offsets: &[i64], now: Instant) -> CommitGroup {
        let mut group = CommitGroup::default();
        for (number, &offset) in offsets.iter().enumerate() {
            let mut output = origin().output(sample.tombstone(offset));
            output.number = number;
            group.push(output, now);
        }
        group
    }

    /// Returns when a group is committed if far more is in flight.
    fn due(group: &CommitGroup, now: Instant) -> Option<Instant> {
        group.due(now, &CommitPace::new(INTERVAL), 1_000_000)
    }

    #[test]
    fn the_first_output_sets_the_time_of_the_commit() {
        let (sample, now) = (SamplePartition::default(), Instant::now());
        let mut group = CommitGroup::default();
        assert!(group.is_empty() && due(&group, now).is_none());
        group.push(origin().output(sample.tombstone(41)), now);
        group.push(origin().output(sample.tombstone(44)), now + INTERVAL / 2);
        assert_eq!(due(&group, now), Some(now + INTERVAL));
        assert_eq!(group.due(now, &CommitPace::new(INTERVAL), 2), Some(now));
        assert_eq!(group.offsets().collect::<Vec<_>>(), [(2, NextOffset::after(44))]);
        group.defer(now + 3 * INTERVAL);
        assert_eq!(due(&group, now), Some(now + 3 * INTERVAL));
        assert_eq!(group.take().outputs().len(), 2);
        assert!(group.is_empty() && due(&group, now).is_none());
    }

    #[test]
    fn a_full_group_is_due_at_once() {
        let (sample, now) = (SamplePartition::default(), Instant::now());
        let offsets: Vec<i64> = (0..MAX_OUTPUTS as i64).collect();
        assert_eq!(due(&group(&sample, &offsets, now), now), Some(now));
        assert_eq!(due(&group(&sample, &offsets[1..], now), now), Some(now + INTERVAL));
    }

    #[test]
    fn an_offset_without_an_output_is_committed() {
        let (sample, now) = (SamplePartition::default(), Instant::now());
        let mut group = CommitGroup::default();
        group.add_start(2, sample.epoch, NextOffset::from_committed(7), now);
        assert!(!group.is_empty() && group.outputs().is_empty());
        assert!(group.is_owned(&sample.ownership));
    }

    #[test]
    fn without_its_outputs_a_group_still_commits_where_partitions_start() {
        let (sample, now) = (SamplePartition::default(), Instant::now());
        let mut ordinary = group(&sample, &[7, 8], now);
        assert_eq!(ordinary.take_outputs().len(), 2);
        assert!(ordinary.is_empty() && due(&ordinary, now).is_none());

        let mut started = CommitGroup::default();
        started.add_start(2, sample.epoch, NextOffset::from_committed(7), now);
        started.push(origin().output(sample.tombstone(7)), now);
        assert_eq!(started.take_outputs().len(), 1);
        let offsets: Vec<_> = started.offsets().collect();
        assert_eq!(offsets, [(2, NextOffset::from_committed(7))]);
        assert_eq!(due(&started, now), Some(now + INTERVAL));
    }

    #[test]
    fn what_a_transaction_has_committed_is_taken_out() {
        let (sample, now) = (SamplePartition::default(), Instant::now());
        let mut group = group(&sample, &[7, 8, 9], now);
        group.add_start(3, sample.epoch, NextOffset::from_committed(4), now);
        let taken = group.take_committed(2, NextOffset::from_committed(9));
        assert_eq!(taken.len(), 2);
        assert_eq!(group.outputs()[0].record.position.offset, 9);
        assert!(group.take_committed(3, NextOffset::from_committed(4)).is_empty());
        group.take_outputs();
        assert!(group.is_empty());
    }

    #[test]
    fn outputs_that_are_no_longer_owned_are_dropped() {
        let (sample, now) = (SamplePartition::default(), Instant::now());
        let mut leaving = group(&sample, &[1, 2], now);
        leaving.retain_owned(&sample.ownership, &[]);
        assert_eq!((leaving.outputs().len(), leaving.index_of(1)), (2, Some(1)));
        leaving.retain_owned(&sample.ownership, &[2]);
        assert!(leaving.is_empty() && due(&leaving, now).is_none());

        let mut lost = group(&sample, &[1, 2], now);
        sample.ownership.revoke(&[2]);
        assert!(!lost.is_owned(&sample.ownership));
        lost.retain_owned(&sample.ownership, &[]);
        assert!(lost.is_empty() && lost.outputs().is_empty());
    }

    #[test]
    fn a_group_that_mixes_epochs_is_not_owned() {
        let (sample, now) = (SamplePartition::default(), Instant::now());
        let mut group = group(&sample, &[1], now);
        let epoch = sample.ownership.assign(2);
        group.add_start(2, epoch, NextOffset::from_committed(1), now);
        // The offset is owned, but the record of the output was read in the earlier epoch.
        assert!(!group.is_owned(&sample.ownership));
        group.retain_owned(&sample.ownership, &[]);
        assert!(group.is_owned(&sample.ownership) && group.outputs().is_empty());
    }
}
