//! Puts finished records back into the order in which they were read, per partition and epoch.
//!
//! The output of a record may be written, and its offset committed, only once every earlier record of its partition is
//! finished. [`Lanes`] holds back the records that finish early.

use std::collections::BTreeMap;

use super::ownership::Epoch;
use super::record::RecordPosition;

/// One lane for each partition.
#[derive(Debug)]
pub struct Lanes<T> {
    lanes: BTreeMap<i32, Lane<T>>,
}

#[derive(Debug)]
struct Lane<T> {
    epoch: Epoch,
    /// Every record before this sequence number is finished and was released.
    watermark: u64,
    /// The records that are held back, by sequence number.
    held_back: BTreeMap<u64, T>,
    /// The epoch has ended: records that still arrive from it are dropped.
    has_ended: bool,
}

impl<T> Default for Lanes<T> {
    fn default() -> Self {
        Self { lanes: BTreeMap::new() }
    }
}

impl<T> Lanes<T> {
    /// Adds a finished record, and returns the records that this releases, in the order in which they were read.
    ///
    /// A record from an epoch older than the lane's is dropped. The first record of a newer epoch drops everything that
    /// the older one held back.
    pub fn insert(&mut self, position: RecordPosition, item: T) -> impl Iterator<Item = T> {
        let lane = self
            .lanes
            .entry(position.partition)
            .or_insert_with(|| Lane::new(position.epoch));
        if position.epoch > lane.epoch {
            *lane = Lane::new(position.epoch);
        }
        if position.epoch == lane.epoch && !lane.has_ended {
            lane.held_back.insert(position.sequence, item);
        }
        std::iter::from_fn(move || {
            let item = lane.held_back.remove(&lane.watermark)?;
            lane.watermark += 1;
            Some(item)
        })
    }

    /// Ends epochs: drops the records that they hold back, and those that still arrive.
    pub fn end_epochs(&mut self, epochs: &[(i32, Epoch)]) {
        for &(partition, epoch) in epochs {
            let lane = self.lanes.entry(partition).or_insert_with(|| Lane::new(epoch));
            if epoch >= lane.epoch {
                *lane = Lane::new(epoch);
                lane.has_ended = true;
            }
        }
    }

    /// Returns the number of records that are held back in all lanes.
    pub fn waiting_count(&self) -> usize {
        self.lanes.values().map(|lane| lane.held_back.len()).sum()
    }
}

impl<T> Lane<T> {
    fn new(epoch: Epoch) -> Self {
        Self {
            epoch,
            watermark: 0,
            held_back: BTreeMap::new(),
            has_ended: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::stream::ownership::Ownership;

    fn position(partition: i32, epoch: Epoch, sequence: u64) -> RecordPosition {
        RecordPosition {
            partition,
            epoch,
            sequence,
            // Compaction and transaction markers leave holes between offsets.
            offset: sequence as i64 * 3 + 7,
        }
    }

    #[test]
    fn an_older_epoch_is_dropped_and_a_newer_one_starts_from_nothing() {
        let ownership = Ownership::default();
        let (old, new) = (ownership.assign(0), ownership.assign(0));
        let mut lanes = Lanes::default();
        assert_eq!(lanes.insert(position(0, old, 0), 'a').collect::<Vec<_>>(), ['a']);
        assert_eq!(lanes.insert(position(0, old, 2), 'c').count(), 0);
        assert_eq!(lanes.insert(position(0, new, 1), 'y').count(), 0);
        assert_eq!(lanes.insert(position(0, old, 1), 'b').count(), 0);
        assert_eq!(lanes.waiting_count(), 1);
        assert_eq!(lanes.insert(position(0, new, 0), 'x').collect::<Vec<_>>(), ['x', 'y']);
        lanes.insert(position(0, new, 5), 'z').for_each(drop);
        lanes.end_epochs(&[(0, new), (1, new)]);
        assert_eq!(lanes.waiting_count(), 0);
        // A record in flight when its partition is revoked must not wait for predecessors that never arrive.
        assert_eq!(lanes.insert(position(0, new, 2), 'z').count(), 0);
        assert_eq!(lanes.waiting_count(), 0);
        let newest = ownership.assign(0);
        assert_eq!(lanes.insert(position(0, newest, 0), 'n').collect::<Vec<_>>(), ['n']);
        // Ending an epoch that a newer one has replaced has no effect.
        lanes.end_epochs(&[(0, new)]);
        assert_eq!(lanes.insert(position(0, newest, 1), 'm').collect::<Vec<_>>(), ['m']);
    }

    proptest! {
        /// In whatever order records finish, those of a partition are released once, in the order in which they were
        /// read, and never before an earlier one is finished.
        #[test]
        fn records_are_released_once_and_in_order(
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
                released[partition].extend(lanes.insert(position, sequence));
                let contiguous = (0..).take_while(|sequence| finished[partition].contains(sequence)).count() as u64;
                prop_assert_eq!(&released[partition], &(0..contiguous).collect::<Vec<_>>());
            }
            if waiting.is_empty() {
                prop_assert_eq!(lanes.waiting_count(), 0);
            }
        }
    }
}
