//! Reads `moderatord.json`, in which a model brings the defaults that suit it. The settings override them.
//!
//! ```json
//! {
//!   "format": 1,
//!   "languages": ["en"],
//!   "window": {
//!     "max_tokens": 48,
//!     "max_windows": 96,
//!     "correction": [{ "windows": 2, "margin": 0.3 }, { "windows": 64, "margin": 1.2 }]
//!   },
//!   "thresholds": { "review": 0.5, "block": 0.9 },
//!   "calibration": { "platt": { "slope": 1.2, "intercept": -0.3 } }
//! }
//! ```
//!
//! The file is beside `config.json`, and every key but `format` is optional. It is not part of the hash of the base model. What it
//! says of windows is part of the prompt's hash, and its languages and thresholds are part of the policy's.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::{MAX_TOKENS_RANGE, MAX_WINDOWS_RANGE, ModelConfig, ModelWindows, WindowCorrection, WindowEdges};
use crate::fault::{Fault, Faults};
use crate::message::Thresholds;
use crate::model::files::bundled;
use crate::prompt::Scope;

/// The name of the file.
pub const FILE: &str = "moderatord.json";

/// The format that this release reads.
const FORMAT: u32 = 1;

/// Larger than any such file, and small enough to read into memory.
const MAX_BYTES: u64 = 1 << 20;

/// The defaults that a model brings.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelDefaults {
    /// The languages that it was trained for, if it says so.
    pub scope: Option<Scope>,
    /// How texts are cut into windows.
    pub windows: ModelWindows,
    /// The thresholds that apply if the settings have none.
    pub thresholds: Option<Thresholds>,
    /// The calibration of the bare base model in JSON, which [`crate::decide::Calibration`] reads.
    pub calibration: Option<serde_json::Value>,
}

/// The content of the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: u32,
    languages: Option<Vec<String>>,
    window: Option<Window>,
    thresholds: Option<FileThresholds>,
    calibration: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileThresholds {
    review: f64,
    block: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Window {
    max_tokens: Option<usize>,
    max_windows: Option<usize>,
    #[serde(default)]
    correction: WindowCorrection,
}

impl ModelDefaults {
    /// Reads the defaults of the model that the settings name, or of the bundled one. A model without the file has none.
    ///
    /// # Errors
    /// Returns every fault of the file.
    pub fn of_model(model: &ModelConfig) -> Result<Self, Faults> {
        let Some(folder) = &model.path else {
            return Self::parse(&PathBuf::from(bundled::NAME).join(FILE), bundled::DEFAULTS);
        };
        let path = folder.join(FILE);
        let size = match std::fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Ok(Self::default()),
            found => found.map(|found| found.len()),
        };
        let fault = |error: std::io::Error| Fault::file(&path, format!("cannot read: {error}"));
        if size.map_err(fault)? > MAX_BYTES {
            return Err(Fault::file(&path, format!("is too large, expected at most {MAX_BYTES} bytes")).into());
        }
        Self::parse(&path, &std::fs::read_to_string(&path).map_err(fault)?)
    }

    /// Reads the content of the file. `path` is used only to name it in errors.
    fn parse(path: &Path, text: &str) -> Result<Self, Faults> {
        let file: File = serde_json::from_str(text).map_err(|error| Fault::file(path, error.to_string()))?;
        let mut faults = Faults::default();
        if file.format != FORMAT {
            let text = format!("`format` is {}, expected {FORMAT}", file.format);
            faults.push(Fault::file(path, text));
        }
        let windows = file.window.map_or_else(ModelWindows::default, |window| {
            for (key, value, range) in [
                ("max_tokens", window.max_tokens, MAX_TOKENS_RANGE),
                ("max_windows", window.max_windows, MAX_WINDOWS_RANGE),
            ] {
                if let Some(value) = value.filter(|value| !range.contains(value)) {
                    let (from, to) = range.into_inner();
                    let text = format!("`window.{key}` is {value}, expected an integer from {from} to {to}");
                    faults.push(Fault::file(path, text));
                }
            }
            ModelWindows {
                max_tokens: window.max_tokens,
                max_windows: window.max_windows,
                edges: WindowEdges::Sentences,
                correction: window.correction,
            }
        });
        let scope = file
            .languages
            .map(|codes| Scope::new(codes).map_err(|error| Fault::file(path, format!("`languages` {error}"))));
        let scope = faults.collect(scope.transpose()).flatten();
        let thresholds = file.thresholds.map(|FileThresholds { review, block }| {
            if !(0.0 <= review && review <= block && block <= 1.0) {
                let text = format!(
                    "`thresholds.review` is {review} and `thresholds.block` is {block}, expected numbers from 0 to 1 with review <= \
                     block"
                );
                faults.push(Fault::file(path, text));
            }
            Thresholds { review, block }
        });
        if faults.is_empty() {
            Ok(Self {
                scope,
                windows,
                thresholds,
                calibration: file.calibration,
            })
        } else {
            Err(faults)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ModelDefaults, String> {
        ModelDefaults::parse(Path::new(FILE), text).map_err(|faults| faults.on_one_line())
    }

    #[test]
    fn every_key_is_optional_but_the_format() {
        assert_eq!(parse(r#"{"format": 1}"#), Ok(ModelDefaults::default()));
        let defaults = parse(r#"{"format": 1, "window": {"max_tokens": 48}}"#).unwrap();
        assert_eq!(
            (
                defaults.windows.max_tokens,
                defaults.windows.max_windows,
                defaults.windows.edges
            ),
            (Some(48), None, WindowEdges::Sentences)
        );
        assert!(parse("{}").unwrap_err().contains("missing field `format`"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value() {
        for (text, expected) in [
            (r#"{"format": 2}"#, "moderatord.json: `format` is 2, expected 1"),
            (
                r#"{"format": 1, "languages": ["en", "xx"]}"#,
                "moderatord.json: `languages` has `xx`, expected codes of ISO 639-1",
            ),
            (
                r#"{"format": 1, "languages": []}"#,
                "`languages` is empty, expected at least one code",
            ),
            (
                r#"{"format": 1, "thresholds": {"review": 0.9, "block": 0.5}}"#,
                "`thresholds.review` is 0.9 and `thresholds.block` is 0.5, expected",
            ),
            (
                r#"{"format": 1, "thresholds": {"review": 0.9}}"#,
                "missing field `block`",
            ),
            (r#"{"format": 1, "windows": {}}"#, "unknown field `windows`, expected"),
            (
                r#"{"format": 1, "window": {"overlap": 3}}"#,
                "unknown field `overlap`, expected one of `max_tokens`",
            ),
            (
                r#"{"format": 1, "window": {"max_tokens": 8, "max_windows": 0}}"#,
                "`window.max_tokens` is 8, expected an integer from 16 to 8192; moderatord.json: `window.max_windows` is 0",
            ),
            (
                r#"{"format": 1, "window": {"correction": [{"windows": 1, "margin": 0.5}]}}"#,
                "`correction` has 1 windows after 1",
            ),
            ("{", "EOF while parsing"),
        ] {
            let found = parse(text).unwrap_err();
            assert!(found.contains(expected), "{found}");
        }
    }

    #[test]
    fn the_bundled_model_has_valid_defaults_and_a_folder_without_the_file_has_none() {
        let mut model = crate::config::Config::load(&crate::config::Sources::default())
            .unwrap()
            .model;
        assert_ne!(ModelDefaults::of_model(&model), Ok(ModelDefaults::default()));
        model.path = Some(crate::test_files::test_file("tests/fixtures/gemma3"));
        assert_eq!(ModelDefaults::of_model(&model), Ok(ModelDefaults::default()));
    }
}
