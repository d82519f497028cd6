//! Pointers, which name the version in service. They form an append-only series, and the highest number applies.
//!
//! Promotion, rollback and history share this mechanism. A writer creates the pointer after the last one that it has
//! seen, with create-if-absent, so if two writers compete, one of them gets an error.

use std::fmt;

use object_store::path::Path;
use serde::{Deserialize, Serialize};

use super::Version;

/// Upper bound on the size of a pointer in bytes.
pub(super) const MAX_POINTER_BYTES: u64 = 64 << 10;

/// A record that names the version in service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pointer {
    /// Number of the pointer in the series, from 1.
    pub sequence: u64,
    /// The version in service; `None` for the bare base model.
    pub version: Option<Version>,
    /// SHA-256 of the manifest of that version.
    pub manifest_sha256: Option<String>,
    /// Whether this was a promotion or a rollback.
    pub change: Change,
    /// Time of the change, in RFC 3339 format and UTC.
    pub at: String,
}

/// The kind of change that a pointer records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Change {
    /// A version was promoted, by `retrain` or by an operator.
    Promote,
    /// A version that was in service before was put back.
    Rollback {
        /// Number of the pointer whose version is in service again; 0 for the state before the first pointer.
        restores: u64,
    },
}

impl Pointer {
    /// Parses the content of the pointer with the given number.
    ///
    /// # Errors
    /// Returns what was found instead of that pointer.
    pub fn parse(bytes: &[u8], sequence: u64) -> Result<Self, String> {
        let pointer: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if pointer.sequence == sequence {
            Ok(pointer)
        } else {
            Err(format!("pointer {}", pointer.sequence))
        }
    }

    /// Returns the number of the pointer whose state this one puts into effect: its own, or that of the pointer that
    /// it restores. The next rollback starts from there, and so does not return to the version that was rolled back.
    pub(super) fn effective(&self) -> u64 {
        match self.change {
            Change::Promote => self.sequence,
            Change::Rollback { restores } => restores,
        }
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Some(version) => write!(f, "pointer {} (version {version})", self.sequence),
            None => write!(f, "pointer {} (the bare base model)", self.sequence),
        }
    }
}

pub(super) fn folder() -> Path {
    Path::from("pointers")
}

pub(super) fn path(sequence: u64) -> Path {
    Path::from(format!("pointers/{sequence:08}.json"))
}

/// Returns the number of the pointer at `path`, or `None` if it is not the path of a pointer.
pub(super) fn sequence(path: &Path) -> Option<u64> {
    let number = path.filename()?.strip_suffix(".json")?.parse().ok()?;
    (self::path(number) == *path).then_some(number)
}

/// Returns the pointer that a rollback restores: the latest one before the pointer in effect that has another version,
/// or 0 (the bare base model) if there is none. Returns `None` if the bare base model is in service and nothing was in
/// service before.
pub(super) fn rollback_target(history: &[Pointer]) -> Option<u64> {
    let current = history.last()?;
    let effective = current.effective();
    let earlier = history.iter().rev().filter(|pointer| pointer.sequence < effective);
    let other = earlier.clone().find(|pointer| pointer.version != current.version);
    match other {
        // If that pointer is itself a rollback, the pointer that it restored was in effect.
        Some(pointer) => Some(pointer.effective()),
        None => current.version.is_some().then_some(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_paths_convert_both_ways() {
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

    /// Builds a history. A letter promotes that version, and a digit rolls back to that pointer.
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
    fn repeated_rollbacks_go_back_step_by_step() {
        let check =
            |steps: &str, expected: Option<u64>| assert_eq!(rollback_target(&history(steps)), expected, "{steps}");
        check("", None);
        check("A", Some(0));
        check("AB", Some(1));
        // After one rollback, A is in service. Before A it was the bare base model, not B.
        check("AB1", Some(0));
        check("AB10", None);
        check("ABC", Some(2));
        check("ABC2", Some(1));
        check("ABC21", Some(0));
        // C was promoted after a rollback, so the version before C is the one that the rollback restored.
        check("AB1C", Some(1));
        check("AB1C1", Some(0));
        // Promoting the same version again does not count as a change.
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
