//! A clock of a daemon's own that can jump, with libfaketime.

use std::path::{Path, PathBuf};

/// Names the library; `tests/soak/run` sets it if libfaketime is installed.
const LIBRARY: &str = "MODERATORD_TEST_LIBFAKETIME";

pub struct Clock {
    library: String,
    file: PathBuf,
}

impl Clock {
    /// Returns a clock that shows the right time, or `None` if libfaketime is not installed.
    pub fn new(folder: &Path) -> Option<Self> {
        let library = std::env::var(LIBRARY).ok()?;
        let clock = Self {
            library,
            file: folder.join("clock"),
        };
        clock.jump(0);
        Some(clock)
    }

    /// Returns what to add to the environment of a process that uses the clock.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("LD_PRELOAD", self.library.clone()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.display().to_string()),
            // Reads the file at most once a second.
            ("FAKETIME_CACHE_DURATION", "1".to_owned()),
            // A real clock that jumps leaves the monotonic one alone.
            ("DONT_FAKE_MONOTONIC", "1".to_owned()),
        ]
    }

    /// Sets how many seconds the clock is ahead.
    pub fn jump(&self, seconds: i64) {
        let part = self.file.with_extension("part");
        std::fs::write(&part, format!("{seconds:+}\n")).unwrap();
        std::fs::rename(part, &self.file).unwrap();
    }
}
