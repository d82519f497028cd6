//! Which partitions this process owns, and in which epoch.
//!
//! The rebalance callback writes this state, and every stage reads it. A partition that is revoked and assigned again
//! gets a new epoch, so that records read before cannot be confused with records read now.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Numbers the assignments of partitions to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(u64);

/// The partitions that this process owns, shared by all stages.
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
    /// Records that a partition was assigned to this process, and returns its new epoch.
    pub fn assign(&self, partition: i32) -> Epoch {
        let mut state = self.lock();
        state.last += 1;
        let epoch = Epoch(state.last);
        state.epochs.insert(partition, epoch);
        epoch
    }

    /// Records that this process no longer owns these partitions.
    pub fn revoke(&self, partitions: &[i32]) {
        let mut state = self.lock();
        for partition in partitions {
            state.epochs.remove(partition);
        }
    }

    /// Returns the current epoch of a partition, or `None` if this process does not own it.
    pub fn epoch(&self, partition: i32) -> Option<Epoch> {
        self.lock().epochs.get(&partition).copied()
    }

    /// Returns whether this process still owns a partition in the same epoch.
    pub fn owns(&self, partition: i32, epoch: Epoch) -> bool {
        self.epoch(partition) == Some(epoch)
    }

    /// Returns the partitions that this process owns, in ascending order.
    pub fn partitions(&self) -> Vec<i32> {
        self.lock().epochs.keys().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, OwnershipState> {
        // A poisoned state is still consistent: each change is one insertion or removal.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_that_is_assigned_again_has_a_new_epoch() {
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
