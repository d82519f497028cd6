//! What the rebalance callback asks of the emit stage, which owns the open transaction.

use crossbeam_channel::Sender;

use super::ownership::Epoch;
use crate::message::NextOffset;

/// A change of assignment that the emit stage must act on.
#[derive(Debug)]
pub enum Rebalance {
    /// A partition begins at an offset that its group has not committed yet.
    Begins {
        /// The partition.
        partition: i32,
        /// The assignment.
        epoch: Epoch,
        /// The first offset to read.
        next: NextOffset,
    },
    /// Partitions are about to leave: commit what is finished, drop the rest, then answer.
    Revoked {
        /// The partitions, and the assignments that end.
        partitions: Vec<(i32, Epoch)>,
        /// Wakes the callback, which waits until the transaction is settled.
        done: Sender<()>,
    },
    /// Partitions have left already: abort.
    Lost(Vec<(i32, Epoch)>),
}
