//! Finished records back into the order in which they were read, per partition and assignment.
//!
//! A record's output may be produced, and its offset committed, only once every earlier record of its
//! partition is finished. [`Lanes`] holds back what finished early.

use std::collections::BTreeMap;

use super::ownership::Epoch;
use super::record::RecordPosition;

/// One lane a partition.
#[derive(Debug)]
pub struct Lanes<T> {
    lanes: BTreeMap<i32, Lane<T>>,
}

#[derive(Debug)]
struct Lane<T> {
    epoch: Epoch,
    /// Every record before this sequence was released.
    next: u64,
    early: BTreeMap<u64, T>,
    /// The assignment is over: what still comes of it is dropped.
    is_closed: bool,
}

impl<T> Default for Lanes<T> {
    fn default() -> Self {
        Self { lanes: BTreeMap::new() }
    }
}

impl<T> Lanes<T> {
    /// A record is finished: gives everything that may go on now, in the order of reading.
    ///
    /// What was read under an assignment older than the lane's is dropped; the first record of a
    /// newer one drops what the older held back.
    pub fn finish(&mut self, position: RecordPosition, item: T) -> impl Iterator<Item = T> {
        let lane = self
            .lanes
            .entry(position.partition)
            .or_insert_with(|| Lane::new(position.epoch));
        if position.epoch > lane.epoch {
            *lane = Lane::new(position.epoch);
        }
        if position.epoch == lane.epoch && !lane.is_closed {
            lane.early.insert(position.sequence, item);
        }
        std::iter::from_fn(move || {
            let item = lane.early.remove(&lane.next)?;
            lane.next += 1;
            Some(item)
        })
    }

    /// Assignments are over: what they held back is dropped, and so is what still comes of them.
    pub fn close(&mut self, assignments: &[(i32, Epoch)]) {
        for &(partition, epoch) in assignments {
            let lane = self.lanes.entry(partition).or_insert_with(|| Lane::new(epoch));
            if epoch >= lane.epoch {
                *lane = Lane::new(epoch);
                lane.is_closed = true;
            }
        }
    }

    /// Records held back in all lanes.
    pub fn held_back(&self) -> usize {
        self.lanes.values().map(|lane| lane.early.len()).sum()
    }
}

impl<T> Lane<T> {
    fn new(epoch: Epoch) -> Self {
        Self {
            epoch,
            next: 0,
            early: BTreeMap::new(),
            is_closed: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::ownership::Ownership;
    use super::*;

    fn position(partition: i32, epoch: Epoch, sequence: u64) -> RecordPosition {
        RecordPosition {
            partition,
            epoch,
            sequence,
            // Offsets have holes: compaction and transaction markers.
            offset: sequence as i64 * 3 + 7,
        }
    }

    #[test]
    fn an_older_assignment_is_dropped_and_a_newer_one_starts_afresh() {
        let ownership = Ownership::default();
        let (old, new) = (ownership.assign(0), ownership.assign(0));
        let mut lanes = Lanes::default();
        assert_eq!(lanes.finish(position(0, old, 0), 'a').collect::<Vec<_>>(), ['a']);
        assert_eq!(lanes.finish(position(0, old, 2), 'c').count(), 0);
        assert_eq!(lanes.finish(position(0, new, 1), 'y').count(), 0);
        assert_eq!(lanes.finish(position(0, old, 1), 'b').count(), 0);
        assert_eq!(lanes.held_back(), 1);
        assert_eq!(lanes.finish(position(0, new, 0), 'x').collect::<Vec<_>>(), ['x', 'y']);
        lanes.finish(position(0, new, 5), 'z').for_each(drop);
        lanes.close(&[(0, new), (1, new)]);
        assert_eq!(lanes.held_back(), 0);
        // What was on its way when the partition left must not wait for predecessors that never come.
        assert_eq!(lanes.finish(position(0, new, 2), 'z').count(), 0);
        assert_eq!(lanes.held_back(), 0);
        let newest = ownership.assign(0);
        assert_eq!(lanes.finish(position(0, newest, 0), 'n').collect::<Vec<_>>(), ['n']);
        // A late word about an assignment that was followed by another closes nothing.
        lanes.close(&[(0, new)]);
        assert_eq!(lanes.finish(position(0, newest, 1), 'm').collect::<Vec<_>>(), ['m']);
    }

    proptest! {
        /// Whatever the order of finishing, each partition's records come out once, in order of
        /// reading, and never before an earlier one is finished.
        #[test]
        fn records_come_out_once_and_in_order(
            counts in prop::collection::vec(0u64..12, 1..4),
            shuffle in prop::collection::vec(any::<prop::sample::Index>(), 48),
        ) {
            let ownership = Ownership::default();
            let epochs: Vec<Epoch> = (0..).map(|partition| ownership.assign(partition)).take(counts.len()).collect();
            let mut waiting: Vec<(usize, u64)> = counts
                .iter()
                .enumerate()
                .flat_map(|(partition, &count)| (0..count).map(move |sequence| (partition, sequence)))
                .collect();
            let mut lanes = Lanes::default();
            let mut finished: Vec<Vec<u64>> = vec![Vec::new(); counts.len()];
            let mut released: Vec<Vec<u64>> = vec![Vec::new(); counts.len()];
            for pick in shuffle {
                if waiting.is_empty() { break }
                let (partition, sequence) = waiting.swap_remove(pick.index(waiting.len()));
                finished[partition].push(sequence);
                let position = position(partition as i32, epochs[partition], sequence);
                released[partition].extend(lanes.finish(position, sequence));
                let contiguous = (0..).take_while(|sequence| finished[partition].contains(sequence)).count() as u64;
                prop_assert_eq!(&released[partition], &(0..contiguous).collect::<Vec<_>>());
            }
            if waiting.is_empty() {
                prop_assert_eq!(lanes.held_back(), 0);
            }
        }
    }
}
