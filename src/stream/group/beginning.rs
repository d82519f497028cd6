//! Where reading a partition begins. Pure.

use crate::config::{OnGap, Start};
use crate::stream::control::Gap;

/// What the group and the broker say of one partition at its assignment.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// The partition.
    pub partition: i32,
    /// The group's committed offset, which is the next one to read.
    pub committed: Option<i64>,
    /// The oldest offset that there is, and the next that a reader of committed records will see;
    /// absent where no broker leads the partition just now.
    pub ends: Option<(i64, i64)>,
}

/// Where to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beginning {
    /// The first offset to read.
    pub offset: i64,
    /// The group has committed this very offset.
    pub is_committed: bool,
    /// What is passed over, because the operator said so.
    pub skipped: Option<Gap>,
}

/// The committed offset unless retention has removed it; otherwise as the settings say. Nothing where
/// that cannot be known yet.
///
/// An offset beyond the end is not judged here: a group may stand at the very end of a topic whose last
/// records are not committed yet. The first fetch tells.
///
/// # Errors
/// The gap, unless the settings say to go on.
pub fn beginning(extent: Extent, start: Start, on_gap: OnGap) -> Result<Option<Beginning>, Gap> {
    let at = |offset, is_committed, skipped| Beginning {
        offset,
        is_committed,
        skipped,
    };
    let (next, (low, high)) = match (extent.committed, extent.ends) {
        (Some(next), None) => return Ok(Some(at(next, true, None))),
        (None, None) => return Ok(None),
        (None, Some((low, high))) => {
            let offset = match start {
                Start::Earliest => low,
                Start::Latest => high,
            };
            return Ok(Some(at(offset, false, None)));
        }
        (Some(next), Some(ends)) => (next, ends),
    };
    if next >= low {
        return Ok(Some(at(next, true, None)));
    }
    let gap = Gap {
        partition: extent.partition,
        next,
        low,
        high,
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
    fn committed_then_settings_then_gap() {
        let check = |committed, start, expected: Option<i64>| {
            let extent = Extent {
                partition: 1,
                committed,
                ends: Some((10, 20)),
            };
            let found = beginning(extent, start, OnGap::Stop);
            let offset = |found: &Option<Beginning>| found.as_ref().map(|beginning| beginning.offset);
            assert_eq!(found.as_ref().ok().and_then(offset), expected, "{committed:?}");
            let regardless = beginning(extent, start, OnGap::Continue).unwrap().unwrap();
            assert_eq!(regardless.offset, expected.unwrap_or(10));
            assert_eq!(regardless.skipped, found.err());
        };
        check(None, Start::Earliest, Some(10));
        check(None, Start::Latest, Some(20));
        // Committed offsets win over both; the end itself is where an idle group stands.
        check(Some(10), Start::Latest, Some(10));
        check(Some(20), Start::Earliest, Some(20));
        check(Some(9), Start::Earliest, None);
        // Beyond what can be seen may still be committed records' end.
        check(Some(21), Start::Latest, Some(21));
    }

    #[test]
    fn without_a_leader_a_committed_offset_is_good_enough() {
        let find = |committed| {
            let extent = Extent {
                partition: 1,
                committed,
                ends: None,
            };
            beginning(extent, Start::Earliest, OnGap::Stop).unwrap()
        };
        assert_eq!(
            find(Some(7)).map(|beginning| (beginning.offset, beginning.is_committed)),
            Some((7, true))
        );
        assert_eq!(find(None), None);
    }
}
