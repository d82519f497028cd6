//! Which partitions this process owns, and under which assignment.
//!
//! Written by the rebalance callback, read by every stage. A partition that leaves and comes back has
//! another epoch, so that what was read before cannot be mistaken for what is read now.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Counts the assignments of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(u64);

/// Shared by all stages.
#[derive(Debug, Default)]
pub struct Ownership {
    state: Mutex<OwnershipState>,
}

#[derive(Debug, Default)]
struct OwnershipState {
    last: u64,
    epochs: BTreeMap<i32, Epoch>,
}

impl Ownership {
    /// A partition is ours from now on.
    pub fn assign(&self, partition: i32) -> Epoch {
        let mut state = self.lock();
        state.last += 1;
        let epoch = Epoch(state.last);
        state.epochs.insert(partition, epoch);
        epoch
    }

    /// Partitions are no longer ours.
    pub fn revoke(&self, partitions: &[i32]) {
        let mut state = self.lock();
        for partition in partitions {
            state.epochs.remove(partition);
        }
    }

    /// The assignment under which a partition is ours.
    pub fn epoch(&self, partition: i32) -> Option<Epoch> {
        self.lock().epochs.get(&partition).copied()
    }

    /// Whether a partition is ours still, under the same assignment.
    pub fn owns(&self, partition: i32, epoch: Epoch) -> bool {
        self.epoch(partition) == Some(epoch)
    }

    /// The partitions that are ours, in order.
    pub fn partitions(&self) -> Vec<i32> {
        self.lock().epochs.keys().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, OwnershipState> {
        // Every change is one insertion or removal: a panic elsewhere cannot have left it torn.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_that_comes_back_has_another_epoch() {
        let ownership = Ownership::default();
        let (first, other) = (ownership.assign(3), ownership.assign(4));
        assert!(ownership.owns(3, first) && ownership.owns(4, other));
        ownership.revoke(&[3]);
        assert!(!ownership.owns(3, first) && ownership.owns(4, other));
        let second = ownership.assign(3);
        assert!(!ownership.owns(3, first) && ownership.owns(3, second));
        assert_eq!(ownership.partitions(), [3, 4]);
    }
}
