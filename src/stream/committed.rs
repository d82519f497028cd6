//! How far each partition is committed, for the consumer lag.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::message::NextOffset;

/// Written at each commit, read whenever the lag is told.
#[derive(Debug, Default)]
pub struct CommittedOffsets {
    next: Mutex<BTreeMap<i32, NextOffset>>,
}

impl CommittedOffsets {
    /// A partition is committed up to here.
    pub fn committed(&self, partition: i32, next: NextOffset) {
        self.lock().insert(partition, next);
    }

    /// Partitions are no longer ours.
    pub fn forget(&self, partitions: &[i32]) {
        let mut next = self.lock();
        for partition in partitions {
            next.remove(partition);
        }
    }

    /// The next offset to commit of a partition, where it is ours.
    pub fn next(&self, partition: i32) -> Option<NextOffset> {
        self.lock().get(&partition).copied()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<i32, NextOffset>> {
        // Each change is one insertion or removal.
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
