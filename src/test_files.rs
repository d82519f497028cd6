//! Finds the files that unit tests read.

use std::path::{Path, PathBuf};

/// Returns a path below the folder of the crate. The environment variable, which cargo sets, takes precedence over the
/// folder where the test was built, because a packed test runs on another machine.
pub(crate) fn test_file(path: &str) -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&root).join(path)
}
