//! Where reading a partition begins. Pure.

use crate::config::{OnGap, Start};
use crate::stream::Gap;

/// What the group and the broker say of one partition at its assignment.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// The partition.
    pub partition: i32,
    /// The group's committed offset, which is the next one to read.
    pub committed: Option<i64>,
    /// The oldest offset that there is.
    pub low: i64,
    /// The next offset to be written.
    pub high: i64,
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

/// The committed offset where it can still be read; otherwise as the settings say.
///
/// # Errors
/// The gap, unless the settings say to go on.
pub fn beginning(extent: Extent, start: Start, on_gap: OnGap) -> Result<Beginning, Gap> {
    let Extent {
        partition,
        committed,
        low,
        high,
    } = extent;
    let Some(next) = committed else {
        let offset = match start {
            Start::Earliest => low,
            Start::Latest => high,
        };
        return Ok(Beginning {
            offset,
            is_committed: false,
            skipped: None,
        });
    };
    if (low..=high).contains(&next) {
        return Ok(Beginning {
            offset: next,
            is_committed: true,
            skipped: None,
        });
    }
    let gap = Gap {
        partition,
        next,
        low,
        high,
    };
    match on_gap {
        OnGap::Stop => Err(gap),
        // Of a topic that was cut or made anew nothing has been read: from its oldest record on.
        OnGap::Continue => Ok(Beginning {
            offset: low,
            is_committed: false,
            skipped: Some(gap),
        }),
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
                low: 10,
                high: 20,
            };
            let found = beginning(extent, start, OnGap::Stop);
            assert_eq!(
                found.as_ref().ok().map(|beginning| beginning.offset),
                expected,
                "{committed:?}"
            );
            let regardless = beginning(extent, start, OnGap::Continue).unwrap();
            assert_eq!(regardless.offset, expected.unwrap_or(10));
            assert_eq!(regardless.skipped, found.err());
        };
        check(None, Start::Earliest, Some(10));
        check(None, Start::Latest, Some(20));
        // Committed offsets win over both; the end itself is where an idle group stands.
        check(Some(10), Start::Latest, Some(10));
        check(Some(20), Start::Earliest, Some(20));
        check(Some(9), Start::Earliest, None);
        check(Some(21), Start::Latest, None);
    }
}
