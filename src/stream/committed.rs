//! The committed offset of each partition, and what is committed beside it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

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
/// Updated at each assignment and commit, and read whenever the client reports its statistics.
#[derive(Debug, Default)]
pub struct CommittedOffsets {
    state: Mutex<CommittedState>,
}

#[derive(Debug, Default)]
struct CommittedState {
    offsets: BTreeMap<i32, NextOffset>,
    metadata: OffsetMetadata,
}

impl CommittedOffsets {
    /// Records the committed offset of a partition.
    pub fn set(&self, partition: i32, next: NextOffset) {
        self.lock().offsets.insert(partition, next);
    }

    /// Forgets partitions that this process no longer owns.
    pub fn remove(&self, partitions: &[i32]) {
        let mut state = self.lock();
        for partition in partitions {
            state.offsets.remove(partition);
        }
    }

    /// Returns the committed offset of a partition, or `None` if this process does not own it.
    pub fn get(&self, partition: i32) -> Option<NextOffset> {
        self.lock().offsets.get(&partition).copied()
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
