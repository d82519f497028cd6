//! The outputs and offsets that are committed together. Pure.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::output::Output;
use crate::message::NextOffset;
use crate::stream::ownership::{Epoch, Ownership};

/// More outputs than this are committed without waiting for others.
const MAX_OUTPUTS: usize = 5_000;
/// More bytes of them likewise.
const MAX_BYTES: usize = 16 << 20;

/// Filled until it is committed, and kept until that has succeeded.
#[derive(Debug, Default)]
pub(super) struct CommitGroup {
    outputs: Vec<Output>,
    bytes: usize,
    offsets: BTreeMap<i32, (Epoch, NextOffset)>,
    due: Option<Instant>,
    /// Not to be tried before, whatever is due.
    not_before: Option<Instant>,
    /// A partition left and came back in between.
    is_torn: bool,
}

impl CommitGroup {
    /// Adds an output, which covers its record's offset. The first sets the time of the commit.
    pub fn push(&mut self, output: Output, now: Instant, interval: Duration) {
        let position = output.record.position;
        self.cover(
            position.partition,
            position.epoch,
            NextOffset::after(position.offset),
            now,
            interval,
        );
        self.bytes += output.own_bytes();
        self.outputs.push(output);
    }

    /// Adds an offset to commit, without an output.
    pub fn cover(&mut self, partition: i32, epoch: Epoch, next: NextOffset, now: Instant, interval: Duration) {
        let before = self.offsets.insert(partition, (epoch, next));
        self.is_torn |= before.is_some_and(|(before, _)| before != epoch);
        self.due.get_or_insert(now + interval);
    }

    /// When to commit, if there is anything to.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        let is_full = self.outputs.len() >= MAX_OUTPUTS || self.bytes >= MAX_BYTES;
        let due = if is_full { Some(now) } else { self.due };
        due.map(|due| self.not_before.map_or(due, |not_before| due.max(not_before)))
    }

    /// Puts the commit off.
    pub fn defer(&mut self, until: Instant) {
        self.not_before = Some(until);
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

    /// Where an output stands, unless it was dropped meanwhile.
    pub fn index_of(&self, number: usize) -> Option<usize> {
        self.outputs.iter().position(|output| output.number == number)
    }

    /// Partition and next offset of each partition.
    pub fn offsets(&self) -> impl Iterator<Item = (i32, NextOffset)> {
        self.offsets.iter().map(|(&partition, &(_, next))| (partition, next))
    }

    /// Outputs, and bytes of them, that are kept.
    pub fn load(&self) -> (usize, usize) {
        (self.outputs.len(), self.bytes)
    }

    /// Whether every partition in it is still ours, under the assignment that it was read under.
    pub fn is_owned(&self, ownership: &Ownership) -> bool {
        let owns = |(&partition, &(epoch, _)): (&i32, &(Epoch, NextOffset))| ownership.owns(partition, epoch);
        !self.is_torn && self.offsets.iter().all(owns)
    }

    /// Drops what belongs to partitions that are no longer ours, or are leaving: their new owner reads
    /// it again.
    pub fn keep_owned(&mut self, ownership: &Ownership, leaving: &[i32]) {
        let stays = |partition: i32, epoch| ownership.owns(partition, epoch) && !leaving.contains(&partition);
        self.outputs
            .retain(|output| stays(output.record.position.partition, output.record.position.epoch));
        self.offsets
            .retain(|&partition, &mut (epoch, _)| stays(partition, epoch));
        self.bytes = self.outputs.iter().map(Output::own_bytes).sum();
        self.is_torn = false;
        if self.offsets.is_empty() {
            (self.due, self.not_before) = (None, None);
        }
    }

    /// Everything is committed.
    pub fn take(&mut self) -> Self {
        std::mem::take(self)
    }
}

#[cfg(test)]
mod tests {
    use super::super::output::tests::{SamplePartition, origin};
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(50);

    /// A group with the outputs of the records at `offsets` of the sample's partition.
    fn group(sample: &SamplePartition, offsets: &[i64], now: Instant) -> CommitGroup {
        let mut group = CommitGroup::default();
        for (number, &offset) in offsets.iter().enumerate() {
            let mut output = origin().output(sample.tombstone(offset));
            output.number = number;
            group.push(output, now, INTERVAL);
        }
        group
    }

    #[test]
    fn the_first_output_sets_the_time_of_the_commit() {
        let (sample, now) = (SamplePartition::default(), Instant::now());
        let mut group = CommitGroup::default();
        assert!(group.is_empty() && group.due(now).is_none());
        group.push(origin().output(sample.tombstone(41)), now, INTERVAL);
        group.push(origin().output(sample.tombstone(44)), now + INTERVAL / 2, INTERVAL);
        assert_eq!(group.due(now), Some(now + INTERVAL));
        assert_eq!(group.offsets().collect::<Vec<_>>(), [(2, NextOffset::after(44))]);
        group.defer(now + 3 * INTERVAL);
        assert_eq!(group.due(now), Some(now + 3 * INTERVAL));
        assert_eq!(group.take().load().0, 2);
        assert!(group.is_empty() && group.due(now).is_none());
    }

    #[test]
    fn a_full_group_is_due_at_once() {
        let (sample, now) = (SamplePartition::default(), Instant::now());
        let offsets: Vec<i64> = (0..MAX_OUTPUTS as i64).collect();
        assert_eq!(group(&sample, &offsets, now).due(now), Some(now));
        assert_eq!(group(&sample, &offsets[1..], now).due(now), Some(now + INTERVAL));
    }

    #[test]
    fn an_offset_alone_is_committed_too() {
        let (sample, now) = (SamplePartition::default(), Instant::now());
        let mut group = CommitGroup::default();
        group.cover(2, sample.epoch, NextOffset::from_committed(7), now, INTERVAL);
        assert!(!group.is_empty() && group.outputs().is_empty());
        assert!(group.is_owned(&sample.ownership));
    }

    #[test]
    fn what_is_no_longer_owned_is_dropped() {
        let (sample, now) = (SamplePartition::default(), Instant::now());
        let mut leaving = group(&sample, &[1, 2], now);
        leaving.keep_owned(&sample.ownership, &[]);
        assert_eq!((leaving.load().0, leaving.index_of(1)), (2, Some(1)));
        leaving.keep_owned(&sample.ownership, &[2]);
        assert!(leaving.is_empty() && leaving.due(now).is_none());

        let mut lost = group(&sample, &[1, 2], now);
        sample.ownership.revoke(&[2]);
        assert!(!lost.is_owned(&sample.ownership));
        lost.keep_owned(&sample.ownership, &[]);
        assert!(lost.is_empty() && lost.outputs().is_empty());
    }

    #[test]
    fn a_partition_that_left_and_came_back_tears_the_group() {
        let (sample, now) = (SamplePartition::default(), Instant::now());
        let mut group = group(&sample, &[1], now);
        let epoch = sample.ownership.assign(2);
        group.cover(2, epoch, NextOffset::from_committed(1), now, INTERVAL);
        // The offset is owned, but the output was read under the earlier assignment.
        assert!(!group.is_owned(&sample.ownership));
        group.keep_owned(&sample.ownership, &[]);
        assert!(group.is_owned(&sample.ownership) && group.outputs().is_empty());
    }
}
