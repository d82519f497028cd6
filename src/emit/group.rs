//! The outputs and offsets that are committed together. Pure.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::output::Output;
use crate::message::NextOffset;
use crate::stream::{Epoch, Ownership};

/// More outputs than this are committed without waiting for others.
const MAX_OUTPUTS: usize = 5_000;
/// More bytes of them likewise.
const MAX_BYTES: usize = 16 << 20;

/// Filled until it is committed, and kept until that has succeeded.
#[derive(Debug, Default)]
pub(super) struct Group {
    outputs: Vec<Output>,
    bytes: usize,
    offsets: BTreeMap<i32, (Epoch, NextOffset)>,
    due: Option<Instant>,
    /// Not to be tried before, whatever is due.
    not_before: Option<Instant>,
    /// A partition left and came back in between.
    is_torn: bool,
}

impl Group {
    /// Adds an output, which covers its record's offset. The first sets the time of the commit.
    pub fn push(&mut self, output: Output, now: Instant, interval: Duration) {
        let place = output.record.place;
        self.cover(
            place.partition,
            place.epoch,
            NextOffset::after(place.offset),
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
            .retain(|output| stays(output.record.place.partition, output.record.place.epoch));
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
