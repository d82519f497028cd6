//! Messages from the rebalance callback to the emit stage, which owns the open transaction.

use crossbeam_channel::Sender;

use super::ownership::Epoch;
use crate::message::NextOffset;

/// A change of assignment that the emit stage must act on.
#[derive(Debug)]
pub enum Rebalance {
    /// A partition was assigned and is read from an offset that its group has not committed yet; the next commit
    /// includes that offset.
    Assigned {
        partition: i32,
        epoch: Epoch,
        /// The first offset to read.
        next: NextOffset,
    },
    /// Partitions are about to be revoked: commit their finished records, drop the rest, then reply on `done`.
    Revoked {
        /// The partitions with the epochs that end.
        partitions: Vec<(i32, Epoch)>,
        /// Wakes the callback, which waits until the commit has succeeded or failed.
        done: Sender<()>,
    },
    /// Partitions were lost without a chance to commit: abort the transaction.
    Lost(Vec<(i32, Epoch)>),
}
