//! What can be wrong with a checkpoint, an adapter or a prompt.

use std::fmt;
use std::path::Path;

/// One fault: which file, which thing in it, what was found and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Problem {
    file: String,
    text: String,
}

impl Problem {
    /// A fault in `file`, in words that name the thing, what was found and what was expected.
    pub fn new(file: &Path, text: impl Into<String>) -> Self {
        Self {
            file: file.display().to_string(),
            text: text.into(),
        }
    }

    /// A fault in the settings rather than in a file; `key` names the setting.
    pub fn setting(key: &str, text: impl Into<String>) -> Self {
        Self {
            file: key.to_owned(),
            text: text.into(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file, self.text)
    }
}

/// Everything that keeps a model from being served; never empty.
#[derive(Debug, thiserror::Error)]
pub struct LoadError {
    /// Every fault found, in the order in which the files are read.
    pub problems: Vec<Problem>,
}

impl From<Problem> for LoadError {
    fn from(problem: Problem) -> Self {
        Self {
            problems: vec![problem],
        }
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}
