//! The committed offset of each partition, from which the consumer lag is computed.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::message::NextOffset;

/// The committed offsets of the partitions that this process owns.
///
/// Updated at each assignment and commit, and read whenever the client reports its statistics.
#[derive(Debug, Default)]
pub struct CommittedOffsets {
    offsets: Mutex<BTreeMap<i32, NextOffset>>,
}

impl CommittedOffsets {
    /// Records the committed offset of a partition.
    pub fn set(&self, partition: i32, next: NextOffset) {
        self.lock().insert(partition, next);
    }

    /// Forgets partitions that this process no longer owns.
    pub fn remove(&self, partitions: &[i32]) {
        let mut offsets = self.lock();
        for partition in partitions {
            offsets.remove(partition);
        }
    }

    /// Returns the committed offset of a partition, or `None` if this process does not own it.
    pub fn get(&self, partition: i32) -> Option<NextOffset> {
        self.lock().get(&partition).copied()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<i32, NextOffset>> {
        // A poisoned map is still consistent: each change is one insertion or removal.
        self.offsets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
