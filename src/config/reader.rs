//! Takes settings out of the merged tree one key at a time and keeps every fault it meets.
//!
//! serde would stop at the first. A key that nothing asked for is unknown.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use config::{Value, ValueKind};

use super::nearest::nearest;
use crate::fault::Fault;

/// The merged tree, and what was found wrong with it so far.
pub(super) struct SettingsReader {
    root: Value,
    /// The settings file's name as an origin, and its folder.
    file: Option<(String, PathBuf)>,
    faults: Vec<Fault>,
    /// Keys that were asked for; everything else is unknown.
    known: BTreeSet<String>,
}

/// A value as it stands in a layer.
#[derive(Debug, Clone)]
pub(super) struct SettingValue {
    key: String,
    kind: ValueKind,
    origin: Option<String>,
}

impl SettingValue {
    /// Environment and flags know only text; a file has types and must use them.
    fn is_text_only(&self) -> bool {
        self.origin
            .as_deref()
            .is_some_and(|origin| origin.starts_with("environment variable ") || origin.starts_with("flag "))
    }
}

impl SettingsReader {
    pub(super) fn new(root: Value, file: Option<&Path>, faults: Vec<Fault>) -> Self {
        let folder = |path: &Path| path.parent().map(Path::to_path_buf).unwrap_or_default();
        Self {
            root,
            file: file.map(|path| (path.display().to_string(), folder(path))),
            faults,
            known: BTreeSet::new(),
        }
    }

    /// The value at a key, which is known from now on.
    pub(super) fn find(&mut self, key: &str) -> Option<SettingValue> {
        self.known.insert(key.to_owned());
        self.peek(key)
    }

    fn peek(&self, key: &str) -> Option<SettingValue> {
        let mut value = &self.root;
        for name in key.split('.') {
            let ValueKind::Table(table) = &value.kind else {
                return None;
            };
            value = table.get(name)?;
        }
        Some(found(key, value)).filter(|found| !matches!(found.kind, ValueKind::Nil))
    }

    /// What stands under a key whose names are the operator's own.
    pub(super) fn entries(&mut self, key: &str) -> BTreeMap<String, SettingValue> {
        let Some(table) = self.find(key) else {
            return BTreeMap::new();
        };
        let ValueKind::Table(entries) = &table.kind else {
            self.reject(&table, "expected a table");
            return BTreeMap::new();
        };
        let entry = |(name, value): (&String, &Value)| (name.clone(), found(&format!("{key}.{name}"), value));
        entries.iter().map(entry).collect()
    }

    pub(super) fn reject(&mut self, found: &SettingValue, expected: impl Into<String>) {
        let fault = Fault::setting(&found.key, expected).with_origin(found.origin.clone());
        self.faults.push(fault.with_value(Some(shown(&found.kind))));
    }

    /// As [`SettingsReader::reject`] without the value, which may be a secret.
    pub(super) fn reject_unquoted(&mut self, found: &SettingValue, expected: impl Into<String>) {
        self.faults
            .push(Fault::setting(&found.key, expected).with_origin(found.origin.clone()));
    }

    /// A fault that lies between keys, or in one that is not set.
    pub(super) fn fault(&mut self, key: &str, expected: impl Into<String>) {
        match self.peek(key) {
            Some(found) => self.reject(&found, expected),
            None => self.faults.push(Fault::setting(key, expected)),
        }
    }

    /// Text that is not empty.
    pub(super) fn string(&mut self, key: &str) -> Option<String> {
        let found = self.find(key)?;
        match &found.kind {
            ValueKind::String(text) if !text.is_empty() => Some(text.clone()),
            ValueKind::String(_) => {
                self.reject(&found, "expected a text that is not empty");
                None
            }
            _ => {
                self.reject(&found, "expected a text");
                None
            }
        }
    }

    /// Text; an empty one means that the setting is not used.
    pub(super) fn optional_string(&mut self, key: &str) -> Option<String> {
        match self.find(key)?.kind {
            ValueKind::String(text) if text.is_empty() => None,
            _ => self.string(key),
        }
    }

    /// A path; one from the settings file is relative to that file's folder.
    pub(super) fn optional_path(&mut self, key: &str) -> Option<PathBuf> {
        self.optional_string(key).map(|path| self.resolved(key, path))
    }

    fn resolved(&self, key: &str, path: String) -> PathBuf {
        let origin = self.peek(key).and_then(|found| found.origin);
        match &self.file {
            Some((file, folder)) if origin.as_ref() == Some(file) => folder.join(path),
            _ => PathBuf::from(path),
        }
    }

    /// Texts, none empty: a list, or one text with commas.
    pub(super) fn strings(&mut self, key: &str) -> Option<Vec<String>> {
        let found = self.find(key)?;
        let texts: Option<Vec<String>> = match &found.kind {
            ValueKind::String(text) if text.is_empty() => Some(Vec::new()),
            ValueKind::String(text) => Some(text.split(',').map(|text| text.trim().to_owned()).collect()),
            ValueKind::Array(values) => values
                .iter()
                .map(|value| match &value.kind {
                    ValueKind::String(text) => Some(text.clone()),
                    _ => None,
                })
                .collect(),
            _ => None,
        };
        match texts {
            Some(texts) if texts.iter().all(|text| !text.is_empty()) => Some(texts),
            _ => {
                self.reject(&found, "expected a list of texts, none empty");
                None
            }
        }
    }

    pub(super) fn bool(&mut self, key: &str) -> Option<bool> {
        let found = self.find(key)?;
        match &found.kind {
            ValueKind::Boolean(value) => return Some(*value),
            ValueKind::String(text) if found.is_text_only() => {
                if let Ok(value) = text.parse() {
                    return Some(value);
                }
            }
            _ => {}
        }
        self.reject(&found, "expected true or false");
        None
    }

    pub(super) fn integer(&mut self, key: &str, range: RangeInclusive<usize>) -> Option<usize> {
        let found = self.find(key)?;
        let value = match &found.kind {
            ValueKind::I64(value) => usize::try_from(*value).ok(),
            ValueKind::U64(value) => usize::try_from(*value).ok(),
            ValueKind::String(text) if found.is_text_only() => text.trim().parse().ok(),
            _ => None,
        };
        if value.is_some_and(|value| range.contains(&value)) {
            return value;
        }
        let (from, to) = range.into_inner();
        self.reject(&found, format!("expected an integer from {from} to {to}"));
        None
    }

    /// Whether a key is set to something that is not empty.
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.peek(key)
            .is_some_and(|found| !matches!(&found.kind, ValueKind::String(text) if text.is_empty()))
    }

    /// A number of a range.
    pub(super) fn number(&mut self, key: &str, range: RangeInclusive<f64>) -> Option<f64> {
        let found = self.find(key)?;
        let value = match &found.kind {
            ValueKind::Float(value) => Some(*value),
            ValueKind::I64(value) => i32::try_from(*value).ok().map(f64::from),
            ValueKind::String(text) if found.is_text_only() => text.trim().parse().ok(),
            _ => None,
        };
        if value.is_some_and(|value| range.contains(&value)) {
            return value;
        }
        let (from, to) = range.into_inner();
        self.reject(&found, format!("expected a number from {from} to {to}"));
        None
    }

    /// A number in `0..=1`.
    pub(super) fn probability(&mut self, found: &SettingValue) -> Option<f64> {
        let value = match &found.kind {
            ValueKind::Float(value) => Some(*value),
            // 0 and 1 are the only whole numbers that pass the range.
            ValueKind::I64(value) => i32::try_from(*value).ok().map(f64::from),
            ValueKind::String(text) if found.is_text_only() => text.trim().parse().ok(),
            _ => None,
        };
        if value.is_some_and(|value| (0.0..=1.0).contains(&value)) {
            return value;
        }
        self.reject(found, "expected a number from 0.0 to 1.0");
        None
    }

    pub(super) fn duration(&mut self, key: &str, range: RangeInclusive<Duration>) -> Option<Duration> {
        let found = self.find(key)?;
        let value = match &found.kind {
            ValueKind::String(text) => humantime::parse_duration(text.trim()).ok(),
            _ => None,
        };
        if value.is_some_and(|value| range.contains(&value)) {
            return value;
        }
        let (from, to) = range.into_inner();
        let [from, to] = [from, to].map(humantime::format_duration);
        self.reject(&found, format!("expected a duration from \"{from}\" to \"{to}\""));
        None
    }

    pub(super) fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)]) -> Option<T> {
        let found = self.find(key)?;
        let chosen = match &found.kind {
            ValueKind::String(text) => choices.iter().find(|(name, _)| name == text),
            _ => None,
        };
        if chosen.is_none() {
            let names: Vec<String> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
            self.reject(&found, format!("expected {}", names.join(" or ")));
        }
        chosen.map(|&(_, choice)| choice)
    }

    /// A fault for every key that nothing asked for, then all faults and all known keys.
    pub(super) fn finish(mut self) -> (Vec<Fault>, BTreeSet<String>) {
        let root = self.root.clone();
        self.unknown("", &root);
        (self.faults, self.known)
    }

    fn unknown(&mut self, prefix: &str, value: &Value) {
        let ValueKind::Table(table) = &value.kind else {
            return;
        };
        let ordered: BTreeMap<&String, &Value> = table.iter().collect();
        for (name, value) in ordered {
            let key = if prefix.is_empty() {
                name.clone()
            } else {
                format!("{prefix}.{name}")
            };
            if self.known.contains(&key) {
                continue;
            }
            let below = format!("{key}.");
            let is_section = self.known.iter().any(|known| known.starts_with(&below));
            let found = found(&key, value);
            match (is_section, &value.kind) {
                (true, ValueKind::Table(_)) => self.unknown(&key, value),
                (true, _) => self.reject(&found, "expected a section"),
                (false, _) => {
                    let origin = found.origin.clone().or_else(|| first_origin(value));
                    let names = self.known.iter().map(String::as_str);
                    let meant = nearest(&key, names).map(|name| format!("; did you mean `{name}`?"));
                    // The value stays out: a misspelt password is still a password.
                    self.faults.push(
                        Fault::setting(&key, format!("unknown key{}", meant.unwrap_or_default())).with_origin(origin),
                    );
                }
            }
        }
    }
}

impl SettingValue {
    /// The entries of a table, or nothing.
    pub(super) fn table(&self) -> Option<BTreeMap<String, SettingValue>> {
        let ValueKind::Table(table) = &self.kind else {
            return None;
        };
        let entry = |(name, value): (&String, &Value)| (name.clone(), found(&format!("{}.{name}", self.key), value));
        Some(table.iter().map(entry).collect())
    }

    /// Text, number or boolean as text.
    pub(super) fn scalar(&self) -> Option<String> {
        match &self.kind {
            ValueKind::Table(_) | ValueKind::Array(_) | ValueKind::Nil => None,
            kind => Some(kind.to_string()),
        }
    }
}

fn found(key: &str, value: &Value) -> SettingValue {
    SettingValue {
        key: key.to_owned(),
        kind: value.kind.clone(),
        origin: value.origin().map(str::to_owned),
    }
}

/// Tables lose their origin when they are merged; what stands in them keeps it.
fn first_origin(value: &Value) -> Option<String> {
    let below = match &value.kind {
        ValueKind::Table(table) => table.values().find_map(first_origin),
        _ => None,
    };
    value.origin().map(str::to_owned).or(below)
}

/// A value as one would write it in the file, cut short.
fn shown(kind: &ValueKind) -> String {
    const LONGEST: usize = 80;
    match kind {
        ValueKind::Table(_) => "{..}".to_owned(),
        ValueKind::Array(values) => {
            let values: Vec<String> = values.iter().map(|value| shown(&value.kind)).collect();
            format!("[{}]", values.join(", "))
        }
        ValueKind::String(text) => {
            let mut shown: String = text.chars().take(LONGEST).flat_map(char::escape_debug).collect();
            if text.chars().count() > LONGEST {
                // Writing to a String cannot fail.
                let _ = write!(shown, "..");
            }
            format!("\"{shown}\"")
        }
        kind => kind.to_string(),
    }
}
