//! Reports all problems with settings, files and topics at once.
//!
//! Checks collect [`Fault`]s instead of returning at the first one, so that an operator can fix a deployment in one go.
//! [`Faults`] is the error type of all functions that check something. A command that fails with it exits with code 78.

use std::fmt;
use std::path::Path;

use crate::plural::Count;

/// A problem with a setting, file or topic: its name, the value found, the origin of that value and what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// A settings key in dotted form or the path of a file; empty if `text` already names the subject.
    subject: String,
    /// The value as written; `None` if nothing was set or if the value may be a secret.
    value: Option<String>,
    /// The file, environment variable or flag that set the value; `None` for a default.
    origin: Option<String>,
    /// What is wrong, and what was expected instead.
    text: String,
}

impl Fault {
    /// Creates a fault in a file. `text` names the part of the file, what was found there and what was expected.
    pub(crate) fn file(path: &Path, text: impl Into<String>) -> Self {
        Self::setting(&path.display().to_string(), text)
    }

    /// Creates a fault in the setting `key`. `text` describes the problem and what was expected.
    pub(crate) fn setting(key: &str, text: impl Into<String>) -> Self {
        Self {
            subject: key.to_owned(),
            value: None,
            origin: None,
            text: text.into(),
        }
    }

    /// Creates a fault whose text already names its subject.
    pub(crate) fn other(text: impl fmt::Display) -> Self {
        Self::setting("", text.to_string())
    }

    /// Adds the value found, which is shown to the operator and so must not be a secret.
    #[must_use]
    pub(crate) fn with_value(self, value: Option<String>) -> Self {
        Self { value, ..self }
    }

    /// Adds the file, environment variable or flag that set the value.
    #[must_use]
    pub(crate) fn with_origin(self, origin: Option<String>) -> Self {
        Self { origin, ..self }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.subject.is_empty() {
            return f.write_str(&self.text);
        }
        f.write_str(&self.subject)?;
        if let Some(value) = &self.value {
            write!(f, " = {value}")?;
        }
        if let Some(origin) = &self.origin {
            write!(f, " ({origin})")?;
        }
        write!(f, ": {}", self.text)
    }
}

/// The faults that a check found, in the order in which they were found.
///
/// Its text is a count followed by one indented line for each fault.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Faults(Vec<Fault>);

impl Faults {
    /// Adds a fault after those found so far.
    pub(crate) fn push(&mut self, fault: Fault) {
        self.0.push(fault);
    }

    /// Returns whether no fault was found.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Iterates over the faults in the order in which they were found.
    pub fn iter(&self) -> std::slice::Iter<'_, Fault> {
        self.0.iter()
    }

    /// Returns the value of `result`, or adds its faults to these and returns `None`.
    pub(crate) fn collect<T>(&mut self, result: Result<T, impl Into<Self>>) -> Option<T> {
        result.map_err(|faults| self.extend(faults.into())).ok()
    }

    /// Returns the faults joined by semicolons, for a log line or a longer message.
    pub(crate) fn on_one_line(&self) -> String {
        let faults: Vec<String> = self.iter().map(ToString::to_string).collect();
        faults.join("; ")
    }
}

impl std::error::Error for Faults {}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Count(self.0.len(), "fault"))?;
        for fault in &self.0 {
            write!(f, "\n  {fault}")?;
        }
        Ok(())
    }
}

impl From<Fault> for Faults {
    fn from(fault: Fault) -> Self {
        Self(vec![fault])
    }
}

impl From<Vec<Fault>> for Faults {
    fn from(faults: Vec<Fault>) -> Self {
        Self(faults)
    }
}

impl Extend<Fault> for Faults {
    fn extend<I: IntoIterator<Item = Fault>>(&mut self, faults: I) {
        self.0.extend(faults);
    }
}

impl IntoIterator for Faults {
    type Item = Fault;
    type IntoIter = std::vec::IntoIter<Fault>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a> IntoIterator for &'a Faults {
    type Item = &'a Fault;
    type IntoIter = std::slice::Iter<'a, Fault>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_shows_its_subject_value_and_origin() {
        let check = |fault: Fault, expected: &str| assert_eq!(fault.to_string(), expected);
        let linger = || Fault::setting("batch.linger", "expected a duration such as \"20ms\"");
        check(linger(), "batch.linger: expected a duration such as \"20ms\"");
        check(
            linger()
                .with_value(Some("20".into()))
                .with_origin(Some("moderatord.toml".into())),
            "batch.linger = 20 (moderatord.toml): expected a duration such as \"20ms\"",
        );
        check(
            Fault::file(Path::new("config.json"), "not JSON"),
            "config.json: not JSON",
        );
        check(Fault::other("no broker answers"), "no broker answers");
    }

    #[test]
    fn faults_are_counted_and_shown_in_order() {
        let mut faults = Faults::default();
        assert_eq!(faults.collect(Ok::<_, Fault>(7)), Some(7));
        assert!(faults.is_empty());
        assert_eq!(faults.collect(Err::<(), _>(Fault::other("first"))), None);
        assert_eq!(faults.to_string(), "1 fault\n  first");
        faults.push(Fault::other("second"));
        assert_eq!(faults.to_string(), "2 faults\n  first\n  second");
        assert_eq!(faults.on_one_line(), "first; second");
    }
}
