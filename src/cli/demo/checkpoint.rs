//! The checkpoint that `demo` runs on when none is named: a reference of the tests, carried in the
//! binary. Its weights are random, so it shows how a stream behaves, not how a model judges.

use std::io;
use std::path::Path;

const FILES: [(&str, &[u8]); 3] = [
    (
        "config.json",
        include_bytes!("../../../tests/fixtures/gemma3/config.json"),
    ),
    (
        "tokenizer.json",
        include_bytes!("../../../tests/fixtures/gemma3/tokenizer.json"),
    ),
    (
        "model.safetensors",
        include_bytes!("../../../tests/fixtures/gemma3/model.safetensors"),
    ),
];

/// Writes the checkpoint into a folder.
///
/// # Errors
/// The file system's.
pub(super) fn unpack(folder: &Path) -> io::Result<()> {
    FILES
        .iter()
        .try_for_each(|(name, bytes)| std::fs::write(folder.join(name), bytes))
}
