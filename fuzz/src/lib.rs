//! What the fuzz targets share.
//!
//! Each file in `fuzz_targets` feeds arbitrary bytes to one reader of untrusted input, and panics if a promise of that
//! reader is broken. `./dev fuzz` builds and runs them.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Once;

use moderatord::config::{Markup, Normalize, PromptConfig};
use moderatord::fault::Faults;
use moderatord::prompt::Prompt;
use serde_json::Value;

thread_local! {
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs a check in which the code under test may catch panics of its libraries.
///
/// The panic hook of libfuzzer-sys ends the process at any panic, even at one that would be caught. This function
/// replaces it, and ends the process only if a panic leaves `check`.
pub fn with_caught_panics(check: impl FnOnce()) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        std::panic::set_hook(Box::new(|panic| {
            let backtrace = std::backtrace::Backtrace::force_capture();
            LAST_PANIC.with_borrow_mut(|last| *last = format!("{panic}\n{backtrace}"));
        }));
    });
    if catch_unwind(AssertUnwindSafe(check)).is_err() {
        LAST_PANIC.with_borrow(|last| eprintln!("{last}"));
        std::process::abort();
    }
}

/// A temporary folder for readers that open files. It is not removed, because libFuzzer ends the process without
/// running destructors; `fuzz/run` removes the folder above it.
pub struct Folder(PathBuf);

impl Folder {
    /// Creates an empty folder.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a writable folder for temporary files");
        Self(folder.keep())
    }

    /// Returns the path of a file in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file, or removes it if there is no content. A new file replaces the old one, because readers may still
    /// have that one mapped.
    pub fn write(&self, name: &str, content: Option<&[u8]>) {
        let path = self.path(name);
        drop(std::fs::remove_file(&path));
        if let Some(content) = content {
            std::fs::write(path, content).expect("the folder is writable");
        }
    }
}

impl Default for Folder {
    fn default() -> Self {
        Self::new()
    }
}

/// Checks that a refused file is explained, and that the explanation is not much longer than the file.
pub fn check_faults(faults: &Faults, input: &[u8]) {
    assert!(!faults.is_empty(), "the file is refused without a fault");
    let bytes: usize = faults.iter().map(|fault| fault.to_string().len()).sum();
    assert!(bytes < 100 * (input.len() + 1000), "{bytes} bytes of faults");
}

/// Splits an input into its sections, which are separated by a byte that no UTF-8 text contains.
pub fn sections<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut sections = input.splitn(N, |&byte| byte == 0xff);
    std::array::from_fn(|_| sections.next().unwrap_or_default())
}

/// Builds a safetensors file from the text of its header and some data, which is repeated up to the size that the
/// header states. Random changes would hardly ever keep the two sizes in a file correct.
pub fn safetensors(header: &[u8], data: &[u8]) -> Vec<u8> {
    let end = |tensor: &Value| tensor["data_offsets"][1].as_u64();
    let json: Value = serde_json::from_slice(header).unwrap_or_default();
    let size = json
        .as_object()
        .and_then(|tensors| tensors.values().filter_map(end).max());
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    match size {
        Some(size) if size <= 1 << 16 && !data.is_empty() => {
            file.extend(data.iter().cycle().take(usize::try_from(size).expect("it is small")));
        }
        _ => file.extend_from_slice(data),
    }
    file
}

/// Returns a frame around windows of the given limits, with the labels and the separator of the published method.
pub fn prompt_config(max_window_tokens: usize, max_windows: usize) -> PromptConfig {
    PromptConfig {
        labels: ["Positive".into(), "Negative".into()],
        hateful_label: "Negative".into(),
        // Short, because every window repeats it.
        instructions: "[{labels}]".into(),
        separator: "<separator>".into(),
        template: None,
        markup: Markup::None,
        normalize: Normalize::Full,
        max_window_tokens: Some(max_window_tokens),
        max_windows: Some(max_windows),
        windows: None,
    }
}

/// Checks what holds for the rows of every text with every tokenizer.
pub fn check_rows(prompt: &Prompt, prefix: &[u32], max_windows: usize, vocab_size: usize) {
    assert!(
        (1..=max_windows).contains(&prompt.rows.len()),
        "{} rows",
        prompt.rows.len()
    );
    for row in &prompt.rows {
        assert!(row.shared < row.tokens.len(), "the last token is not the row's own");
        assert_eq!(row.tokens[..row.shared], prefix[..row.shared]);
        assert!(row.tokens.iter().all(|&id| (id as usize) < vocab_size));
    }
}
