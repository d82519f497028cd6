//! What is in service: an append-only series of pointers, the highest of which counts.
//!
//! Promotion, rollback and history are one mechanism. A pointer is made with create-if-absent under
//! the number after the one that its maker knew, so of two makers one fails and is told so.

use object_store::path::Path;
use serde::{Deserialize, Serialize};

use super::Version;

/// Larger than any pointer.
pub(super) const MAX_POINTER_BYTES: u64 = 64 << 10;

/// One step of the history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pointer {
    /// Its place in the series, from 1.
    pub sequence: u64,
    /// What is in service from here on; none for the bare base.
    pub version: Option<Version>,
    /// SHA-256 of that version's manifest.
    pub manifest_sha256: Option<String>,
    /// Why it changed.
    pub change: Change,
    /// When, RFC 3339 UTC.
    pub at: String,
}

/// Why what is in service changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Change {
    /// A version passed the gate, or an operator chose it.
    Promote,
    /// Back to what was in service before.
    Rollback {
        /// The pointer whose version is in service again; 0 for the time before the first.
        restores: u64,
    },
}

impl Pointer {
    /// The pointer that was in effect where this one begins: itself, or what it restores. Going back
    /// again goes on from there, not to what was rolled back.
    pub(super) fn effective(&self) -> u64 {
        match self.change {
            Change::Promote => self.sequence,
            Change::Rollback { restores } => restores,
        }
    }
}

pub(super) fn folder() -> Path {
    Path::from("pointers")
}

pub(super) fn path(sequence: u64) -> Path {
    Path::from(format!("pointers/{sequence:08}.json"))
}

/// The number of a pointer's path; other objects that somebody put there are none.
pub(super) fn sequence(path: &Path) -> Option<u64> {
    let number = path.filename()?.strip_suffix(".json")?.parse().ok()?;
    (self::path(number) == *path).then_some(number)
}

/// Where a rollback goes: the latest pointer before the one in effect with another version, or the
/// bare base (0) before the first. Nothing where the bare base is in service and nothing came before.
pub(super) fn before(history: &[Pointer]) -> Option<u64> {
    let current = history.last()?;
    let effective = current.effective();
    let earlier = history.iter().rev().filter(|pointer| pointer.sequence < effective);
    let other = earlier.clone().find(|pointer| pointer.version != current.version);
    match other {
        // A rollback restored something: that is what was in service.
        Some(pointer) => Some(pointer.effective()),
        None => current.version.is_some().then_some(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_have_numbers() {
        assert_eq!(path(42).to_string(), "pointers/00000042.json");
        for number in [1, 42, 99_999_999, 100_000_000] {
            assert_eq!(sequence(&path(number)), Some(number));
        }
        for other in [
            "pointers/42.json",
            "pointers/00000042.json.bak",
            "pointers/x.json",
            "pointers/+0000042.json",
            "elsewhere/00000042.json",
        ] {
            assert_eq!(sequence(&Path::from(other)), None, "{other}");
        }
    }

    /// `A`, `B`... promote a version, a number rolls back to that pointer.
    fn history(steps: &str) -> Vec<Pointer> {
        let mut history: Vec<Pointer> = Vec::new();
        for (index, step) in steps.chars().enumerate() {
            let restores = step.to_digit(10).map(u64::from);
            let version = match restores {
                Some(0) => None,
                Some(number) => history[number as usize - 1].version.clone(),
                None => format!("{:016x}", step as u32).parse().ok(),
            };
            history.push(Pointer {
                sequence: index as u64 + 1,
                version,
                manifest_sha256: None,
                change: restores.map_or(Change::Promote, |restores| Change::Rollback { restores }),
                at: String::new(),
            });
        }
        history
    }

    #[test]
    fn a_rollback_goes_back_and_back_again() {
        let check = |steps: &str, expected: Option<u64>| assert_eq!(before(&history(steps)), expected, "{steps}");
        check("", None);
        check("A", Some(0));
        check("AB", Some(1));
        // Back once: A is in service, before it was the bare base, not B.
        check("AB1", Some(0));
        check("AB10", None);
        check("ABC", Some(2));
        check("ABC2", Some(1));
        check("ABC21", Some(0));
        // After a rollback something new came: before it was what the rollback restored.
        check("AB1C", Some(1));
        check("AB1C1", Some(0));
        // The same version again is no other.
        check("AAB", Some(2));
        check("ABB", Some(1));
        check("A0B", Some(0));
    }

    #[test]
    fn a_pointer_reads_back() {
        for pointer in history("AB10") {
            let json = serde_json::to_string(&pointer).unwrap();
            assert_eq!(serde_json::from_str::<Pointer>(&json).unwrap(), pointer);
        }
    }
}
