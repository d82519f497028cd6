//! Chooses the offset from which a newly assigned partition is read. Does no I/O.

use crate::config::{OnGap, Start};
use crate::stream::control::Gap;

/// The offsets of a partition that are known when it is assigned.
#[derive(Debug, Clone, Copy)]
pub struct KnownOffsets {
    pub partition: i32,
    /// The partition was added to the topic after the group had first started.
    pub is_new: bool,
    /// The group's committed offset, which is the next one to read.
    pub committed: Option<i64>,
    /// The committed offset belongs to an earlier topic of the same name.
    pub is_new_topic: bool,
    /// The oldest offset, and the next one that a reader of committed records will see; `None` if the partition has no
    /// leader at the moment.
    pub range: Option<(i64, i64)>,
}

/// The offset from which a partition is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartOffset {
    pub offset: i64,
    /// The group has already committed this offset.
    pub is_committed: bool,
    /// The gap that is skipped, because `kafka.on_gap` is `continue`.
    pub skipped: Option<Gap>,
}

/// Returns the committed offset if the partition still holds it, and otherwise the offset that the settings choose.
/// Returns `None` if too little is known to decide.
///
/// A committed offset beyond the end is accepted here: the group may have committed the very end of a topic whose last
/// records belong to an open transaction. If the offset really is out of range, the first fetch fails.
///
/// # Errors
/// Returns the gap if retention has deleted records that the group has not read, unless `on_gap` is `continue`.
pub fn choose_start(known: KnownOffsets, start: Start, on_gap: OnGap) -> Result<Option<StartOffset>, Gap> {
    let at = |offset, is_committed, skipped| StartOffset {
        offset,
        is_committed,
        skipped,
    };
    let (next, (low, high)) = match (known.committed, known.range) {
        (Some(next), None) if !known.is_new_topic => return Ok(Some(at(next, true, None))),
        (_, None) => return Ok(None),
        (None, Some((low, high))) => {
            // Records in a new partition were written after the group had started, so none may be skipped.
            let offset = match start {
                Start::Latest if !known.is_new => high,
                Start::Earliest | Start::Latest => low,
            };
            return Ok(Some(at(offset, false, None)));
        }
        (Some(next), Some(range)) => (next, range),
    };
    if next >= low && !known.is_new_topic {
        return Ok(Some(at(next, true, None)));
    }
    let gap = Gap {
        partition: known.partition,
        next,
        low,
        high,
        is_new_topic: known.is_new_topic,
    };
    match on_gap {
        OnGap::Stop => Err(gap),
        OnGap::Continue => Ok(Some(at(low, false, Some(gap)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_committed_offset_is_used_unless_retention_has_deleted_it() {
        let check = |committed, start, expected: Option<i64>| {
            let known = KnownOffsets {
                partition: 1,
                is_new: false,
                committed,
                is_new_topic: false,
                range: Some((10, 20)),
            };
            let found = choose_start(known, start, OnGap::Stop);
            let offset = |found: &Option<StartOffset>| found.as_ref().map(|start| start.offset);
            assert_eq!(found.as_ref().ok().and_then(offset), expected, "{committed:?}");
            let continued = choose_start(known, start, OnGap::Continue).unwrap().unwrap();
            assert_eq!(continued.offset, expected.unwrap_or(10));
            assert_eq!(continued.skipped, found.err());
        };
        check(None, Start::Earliest, Some(10));
        check(None, Start::Latest, Some(20));
        // A committed offset overrides the setting, even at the end of the partition, where that of an idle group is.
        check(Some(10), Start::Latest, Some(10));
        check(Some(20), Start::Earliest, Some(20));
        check(Some(9), Start::Earliest, None);
        // An offset beyond the visible end may follow records of an open transaction.
        check(Some(21), Start::Latest, Some(21));
    }

    #[test]
    fn a_partition_that_was_added_later_is_read_from_its_beginning() {
        let check = |is_new, committed, expected| {
            let known = KnownOffsets {
                partition: 7,
                is_new,
                committed,
                is_new_topic: false,
                range: Some((10, 20)),
            };
            let start = choose_start(known, Start::Latest, OnGap::Stop).unwrap().unwrap();
            assert_eq!(start.offset, expected);
        };
        check(false, None, 20);
        check(true, None, 10);
        check(true, Some(15), 15);
    }

    #[test]
    fn an_offset_of_an_earlier_topic_is_a_gap_wherever_it_lies() {
        for next in [5, 15, 25] {
            let known = KnownOffsets {
                partition: 1,
                is_new: false,
                committed: Some(next),
                is_new_topic: true,
                range: Some((10, 20)),
            };
            let gap = choose_start(known, Start::Latest, OnGap::Stop).unwrap_err();
            assert!(gap.to_string().contains("recreated"), "{gap}");
            let continued = choose_start(known, Start::Latest, OnGap::Continue).unwrap().unwrap();
            assert_eq!((continued.offset, continued.is_committed), (10, false));
            // Without the range nothing can be decided, so the lookup is repeated.
            let known = KnownOffsets { range: None, ..known };
            assert_eq!(choose_start(known, Start::Latest, OnGap::Continue), Ok(None));
        }
    }

    #[test]
    fn without_a_leader_a_committed_offset_is_used_unchecked() {
        let find = |committed| {
            let known = KnownOffsets {
                partition: 1,
                is_new: false,
                committed,
                is_new_topic: false,
                range: None,
            };
            choose_start(known, Start::Earliest, OnGap::Stop).unwrap()
        };
        assert_eq!(
            find(Some(7)).map(|start| (start.offset, start.is_committed)),
            Some((7, true))
        );
        assert_eq!(find(None), None);
    }
}
