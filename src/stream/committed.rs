//! The committed offset of each partition, and what is committed beside it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::message::NextOffset;

/// The longest metadata string that is parsed. Kafka's own limit is 4096 bytes by default.
const MAX_METADATA_BYTES: usize = 4096;

/// What the group keeps in the metadata string of its committed offsets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffsetMetadata {
    /// Kafka's id of the comments topic to which the offset belongs. The offset means nothing in a recreated topic of
    /// the same name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic_id: Option<String>,
    /// The number of partitions that the comments topic had when the group first started. `kafka.start` applies to
    /// these partitions; any other was added later and is read from its beginning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_partitions: Option<i32>,
}

impl OffsetMetadata {
    /// Parses a metadata string; one that this daemon has not written holds nothing.
    pub fn parse(text: &str) -> Self {
        // An array would be read as the fields in their order.
        if text.len() > MAX_METADATA_BYTES || !text.starts_with('{') {
            return Self::default();
        }
        serde_json::from_str(text).unwrap_or_default()
    }

    /// Returns the string to commit, or `None` if there is nothing to keep.
    pub fn to_text(&self) -> Option<String> {
        let has_content = *self != Self::default();
        has_content.then(|| serde_json::to_string(self).expect("numbers and text always have a JSON form"))
    }
}

/// The committed offsets of the partitions that this process owns, and the metadata that is committed with them.
///
/// Updated at each assignment, record and commit, and read whenever the client reports its statistics.
#[derive(Debug, Default)]
pub struct CommittedOffsets {
    state: Mutex<CommittedState>,
}

#[derive(Debug, Default)]
struct CommittedState {
    partitions: BTreeMap<i32, PartitionOffsets>,
    metadata: OffsetMetadata,
    last_commit: Option<(Instant, SystemTime)>,
}

#[derive(Debug)]
struct PartitionOffsets {
    committed: NextOffset,
    /// The offset after the last record that was read.
    read: NextOffset,
    /// Since when the first offset has been waiting to be committed, if it is new.
    pending_since: Option<Instant>,
}

impl CommittedOffsets {
    /// Records where a newly assigned partition is read from. An offset that is not committed yet is `pending` since
    /// then.
    pub fn start(&self, partition: i32, next: NextOffset, pending_since: Option<Instant>) {
        let offsets = PartitionOffsets {
            committed: next,
            read: next,
            pending_since,
        };
        self.lock().partitions.insert(partition, offsets);
    }

    /// Records how far a partition was read.
    pub fn record_read(&self, partition: i32, next: NextOffset) {
        if let Some(offsets) = self.lock().partitions.get_mut(&partition) {
            offsets.read = next;
        }
    }

    /// Records the committed offset of a partition, unless this process no longer owns it.
    pub fn set(&self, partition: i32, next: NextOffset) {
        if let Some(offsets) = self.lock().partitions.get_mut(&partition) {
            offsets.committed = next;
            offsets.pending_since = None;
        }
    }

    /// Records that a commit has succeeded, in the two clocks of `now`.
    pub fn record_commit(&self, now: Instant, time: SystemTime) {
        self.lock().last_commit = Some((now, time));
    }

    /// Returns the time of the last successful commit.
    pub fn last_commit(&self) -> Option<(Instant, SystemTime)> {
        self.lock().last_commit
    }

    /// Returns since when the first offset of a partition has been waiting to be committed, if one does.
    pub fn pending_since(&self) -> Option<Instant> {
        let state = self.lock();
        state
            .partitions
            .values()
            .filter_map(|offsets| offsets.pending_since)
            .min()
    }

    /// Forgets partitions that this process no longer owns.
    pub fn remove(&self, partitions: &[i32]) {
        let mut state = self.lock();
        for partition in partitions {
            state.partitions.remove(partition);
        }
    }

    /// Returns the committed offset of a partition, or `None` if this process does not own it.
    pub fn get(&self, partition: i32) -> Option<NextOffset> {
        self.lock().partitions.get(&partition).map(|offsets| offsets.committed)
    }

    /// Returns the number of records up to `end` that are not finished and committed, or `None` if this process does
    /// not own the partition.
    ///
    /// Markers of transactions, and records of aborted ones, have offsets too, but nobody reads or commits them. The
    /// client's `position` is beyond those that it has passed, so they do not count once every record before it is
    /// committed.
    pub fn lag(&self, partition: i32, position: i64, end: i64) -> Option<i64> {
        let state = self.lock();
        let offsets = state.partitions.get(&partition)?;
        let committed = offsets.committed.get();
        let finished = if committed >= offsets.read.get() {
            committed.max(position)
        } else {
            committed
        };
        Some((end - finished).max(0))
    }

    /// Returns the metadata to commit with each offset.
    pub fn metadata(&self) -> OffsetMetadata {
        self.lock().metadata.clone()
    }

    /// Replaces the metadata to commit with each offset.
    pub fn set_metadata(&self, metadata: OffsetMetadata) {
        self.lock().metadata = metadata;
    }

    fn lock(&self) -> MutexGuard<'_, CommittedState> {
        // A poisoned state is still consistent: each change is one insertion, removal or assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_of_transactions_that_were_passed_are_no_lag() {
        let offsets = CommittedOffsets::default();
        let next = NextOffset::from_committed;
        let check = |position, end, lag| assert_eq!(offsets.lag(3, position, end), lag, "{offsets:?}");
        check(0, 10, None);
        offsets.start(3, next(10), None);
        // Nothing was read since the assignment; the client reports no position.
        check(-1001, 12, Some(2));
        // A record at offset 10, and a marker at 11 that the client has not passed.
        offsets.record_read(3, next(11));
        check(11, 12, Some(2));
        // The client has passed the marker, but the record is not committed.
        check(12, 12, Some(2));
        offsets.set(3, next(11));
        check(11, 12, Some(1));
        check(12, 12, Some(0));
        // Records after the marker that were not read.
        check(12, 15, Some(3));
        offsets.record_read(3, next(13));
        check(13, 15, Some(4));
        offsets.remove(&[3]);
        check(13, 15, None);
        // A commit that succeeds after the partition was revoked does not bring it back.
        offsets.set(3, next(13));
        check(13, 15, None);
    }

    #[test]
    fn a_first_offset_is_pending_until_it_is_committed() {
        let (offsets, now) = (CommittedOffsets::default(), Instant::now());
        let next = NextOffset::from_committed;
        offsets.start(0, next(5), None);
        assert_eq!(offsets.pending_since(), None);
        offsets.start(1, next(0), Some(now));
        assert_eq!(offsets.pending_since(), Some(now));
        offsets.set(0, next(6));
        assert_eq!(offsets.pending_since(), Some(now));
        offsets.set(1, next(0));
        assert_eq!(offsets.pending_since(), None);
        offsets.start(1, next(0), Some(now));
        offsets.remove(&[1]);
        assert_eq!(offsets.pending_since(), None);
    }

    #[test]
    fn metadata_reads_back_and_foreign_text_holds_nothing() {
        let metadata = OffsetMetadata {
            topic_id: Some("id".into()),
            first_partitions: Some(6),
        };
        let text = metadata.to_text().unwrap();
        assert_eq!(text, r#"{"topic_id":"id","first_partitions":6}"#);
        assert_eq!(OffsetMetadata::parse(&text), metadata);
        assert_eq!(OffsetMetadata::default().to_text(), None);
        for foreign in [
            "",
            "NULL",
            "{}",
            "[1]",
            "{\"first_partitions\":\"six\"}",
            &"x".repeat(5000),
        ] {
            assert_eq!(
                OffsetMetadata::parse(foreign),
                OffsetMetadata::default(),
                "{foreign:.20}"
            );
        }
    }
}
