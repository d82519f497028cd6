//! Reads settings from the merged tree one key at a time, and collects all faults.
//!
//! serde would stop at the first fault. A key that was never read is reported as unknown.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use config::{Value, ValueKind};

use super::layers::default_value;
use super::nearest::nearest;
use crate::fault::Fault;

/// The settings whose values may contain a secret, together with all settings below them. No fault shows them, because a
/// value that is in the wrong place or of the wrong type may still be one.
const SECRET_KEYS: [&str; 4] = [
    "kafka.brokers",
    "kafka.password_file",
    "kafka.properties",
    "registry.url",
];

/// The merged tree of settings, with the faults found so far.
pub(super) struct SettingsReader {
    root: Value,
    /// The path of the settings file as it appears in `SettingValue::origin`, and its folder.
    file: Option<(String, PathBuf)>,
    faults: Vec<Fault>,
    /// The keys that were read; all other keys are unknown.
    known_keys: BTreeSet<String>,
}

/// The value of a setting, with its key and the layer that it comes from.
#[derive(Debug, Clone)]
pub(super) struct SettingValue {
    key: String,
    kind: ValueKind,
    origin: Option<String>,
}

impl SettingValue {
    /// Returns whether the value comes from the environment or a flag, where all values are strings.
    ///
    /// In a settings file, a number or boolean that is written as a string is a fault.
    fn is_from_untyped_layer(&self) -> bool {
        self.origin
            .as_deref()
            .is_some_and(|origin| origin.starts_with("environment variable ") || origin.starts_with("flag "))
    }

    /// Returns the entries if the value is a table.
    pub(super) fn table(&self) -> Option<BTreeMap<String, SettingValue>> {
        let ValueKind::Table(table) = &self.kind else {
            return None;
        };
        let entry = |(name, value): (&String, &Value)| (name.clone(), found(&format!("{}.{name}", self.key), value));
        Some(table.iter().map(entry).collect())
    }

    /// Returns the value as text if it is a string, a number or a boolean.
    pub(super) fn scalar(&self) -> Option<String> {
        match &self.kind {
            ValueKind::Table(_) | ValueKind::Array(_) | ValueKind::Nil => None,
            kind => Some(kind.to_string()),
        }
    }
}

impl SettingsReader {
    pub(super) fn new(root: Value, file: Option<&Path>, faults: Vec<Fault>) -> Self {
        let folder = |path: &Path| path.parent().map(Path::to_path_buf).unwrap_or_default();
        Self {
            root,
            file: file.map(|path| (path.display().to_string(), folder(path))),
            faults,
            known_keys: BTreeSet::new(),
        }
    }

    /// Returns the value of a key, and records the key as known.
    pub(super) fn find(&mut self, key: &str) -> Option<SettingValue> {
        self.known_keys.insert(key.to_owned());
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

    /// Returns the entries of a table whose keys are chosen by the operator.
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

    /// Adds a fault for a value that was found, and shows the value unless it may contain a secret.
    pub(super) fn reject(&mut self, found: &SettingValue, expected: impl Into<String>) {
        if may_contain_secret(&found.key) {
            return self.reject_without_value(found, expected);
        }
        let fault = Fault::setting(&found.key, expected).with_origin(found.origin.clone());
        self.faults.push(fault.with_value(Some(display_value(&found.kind))));
    }

    /// Adds a fault as [`SettingsReader::reject`] does, but without the value, which may be a secret.
    pub(super) fn reject_without_value(&mut self, found: &SettingValue, expected: impl Into<String>) {
        self.faults
            .push(Fault::setting(&found.key, expected).with_origin(found.origin.clone()));
    }

    /// Adds a fault for a key, with its value if it is set.
    pub(super) fn fault(&mut self, key: &str, expected: impl Into<String>) {
        match self.peek(key) {
            Some(found) => self.reject(&found, expected),
            None => self.faults.push(Fault::setting(key, expected)),
        }
    }

    /// Reads a non-empty string.
    pub(super) fn string(&mut self, key: &str) -> Option<String> {
        let found = self.find(key)?;
        match &found.kind {
            ValueKind::String(text) if !text.is_empty() => Some(text.clone()),
            ValueKind::String(_) => {
                self.reject(&found, "expected a non-empty string");
                None
            }
            _ => {
                self.reject(&found, "expected a string");
                None
            }
        }
    }

    /// Reads a string; an empty string is treated as not set.
    pub(super) fn optional_string(&mut self, key: &str) -> Option<String> {
        match self.find(key)?.kind {
            ValueKind::String(text) if text.is_empty() => None,
            _ => self.string(key),
        }
    }

    /// Reads a path; a relative path in the settings file is relative to the folder of that file. The name of a model on
    /// the hub (`hf://`) stays as it is.
    pub(super) fn optional_path(&mut self, key: &str) -> Option<PathBuf> {
        self.optional_string(key).map(|path| self.resolve(key, path))
    }

    fn resolve(&self, key: &str, path: String) -> PathBuf {
        let origin = self.peek(key).and_then(|found| found.origin);
        match &self.file {
            _ if path.starts_with("hf://") => PathBuf::from(path),
            Some((file, folder)) if origin.as_ref() == Some(file) => folder.join(path),
            _ => PathBuf::from(path),
        }
    }

    /// Reads a list of non-empty strings, which may be written as one string with commas.
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
                self.reject(&found, "expected a list of non-empty strings");
                None
            }
        }
    }

    /// Reads one non-empty string or a list of them. Only where all values are strings, a string with commas is a list.
    pub(super) fn string_or_list(&mut self, key: &str) -> Option<Vec<String>> {
        let found = self.find(key)?;
        match &found.kind {
            ValueKind::String(_) if !found.is_from_untyped_layer() => self.string(key).map(|text| vec![text]),
            _ => self.strings(key),
        }
    }

    pub(super) fn bool(&mut self, key: &str) -> Option<bool> {
        let found = self.find(key)?;
        match &found.kind {
            ValueKind::Boolean(value) => return Some(*value),
            ValueKind::String(text) if found.is_from_untyped_layer() => {
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
            ValueKind::String(text) if found.is_from_untyped_layer() => text.trim().parse().ok(),
            _ => None,
        };
        if value.is_some_and(|value| range.contains(&value)) {
            return value;
        }
        let (from, to) = range.into_inner();
        self.reject(&found, format!("expected an integer from {from} to {to}"));
        None
    }

    /// Returns whether a key is set to anything but an empty string.
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.peek(key)
            .is_some_and(|found| !matches!(&found.kind, ValueKind::String(text) if text.is_empty()))
    }

    /// Returns whether a key has its default, even if a settings file repeats it, as a copy of the shipped file does.
    pub(super) fn is_default(&self, key: &str) -> bool {
        let Some(found) = self.peek(key) else {
            return true;
        };
        let default = key
            .split_once('.')
            .and_then(|(section, key)| default_value(section, key));
        // Entries of a list also record where they come from, so the values are compared as text.
        default.is_some_and(|default| default.to_string() == found.kind.to_string())
    }

    /// Reads a number within a range.
    pub(super) fn number(&mut self, key: &str, range: RangeInclusive<f64>) -> Option<f64> {
        let found = self.find(key)?;
        self.number_in(&found, range)
    }

    /// Reads a number from 0 to 1 from a value that was found before.
    pub(super) fn probability(&mut self, found: &SettingValue) -> Option<f64> {
        self.number_in(found, 0.0..=1.0)
    }

    fn number_in(&mut self, found: &SettingValue, range: RangeInclusive<f64>) -> Option<f64> {
        let value = match &found.kind {
            ValueKind::Float(value) => Some(*value),
            ValueKind::I64(value) => i32::try_from(*value).ok().map(f64::from),
            ValueKind::String(text) if found.is_from_untyped_layer() => text.trim().parse().ok(),
            _ => None,
        };
        if value.is_some_and(|value| range.contains(&value)) {
            return value;
        }
        let (from, to) = range.into_inner();
        self.reject(found, format!("expected a number from {from:?} to {to:?}"));
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
            self.reject(&found, format!("expected {}", alternatives(&names)));
        }
        chosen.map(|&(_, choice)| choice)
    }

    /// Reads a name or a boolean. `booleans` are the choices that `false` and `true` stand for.
    pub(super) fn choice_or_bool<T: Copy>(&mut self, key: &str, choices: &[(&str, T)], booleans: [T; 2]) -> Option<T> {
        let found = self.find(key)?;
        match &found.kind {
            ValueKind::Boolean(value) => return Some(booleans[usize::from(*value)]),
            ValueKind::String(text) => {
                if let Some(&(_, choice)) = choices.iter().find(|(name, _)| name == text) {
                    return Some(choice);
                }
                if let (true, Ok(value)) = (found.is_from_untyped_layer(), text.parse::<bool>()) {
                    return Some(booleans[usize::from(value)]);
                }
            }
            _ => {}
        }
        let names = choices.iter().map(|(name, _)| format!("\"{name}\""));
        let names: Vec<String> = names.chain(["true".to_owned(), "false".to_owned()]).collect();
        self.reject(&found, format!("expected {}", alternatives(&names)));
        None
    }

    /// Adds a fault for each unknown key, then returns all faults and all known keys.
    pub(super) fn finish(mut self) -> (Vec<Fault>, BTreeSet<String>) {
        let root = self.root.clone();
        self.reject_unknown_keys("", &root);
        (self.faults, self.known_keys)
    }

    fn reject_unknown_keys(&mut self, prefix: &str, value: &Value) {
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
            if self.known_keys.contains(&key) {
                continue;
            }
            let below = format!("{key}.");
            let is_section = self.known_keys.iter().any(|known| known.starts_with(&below));
            let found = found(&key, value);
            match (is_section, &value.kind) {
                (true, ValueKind::Table(_)) => self.reject_unknown_keys(&key, value),
                // A section has settings of all kinds, so the value may be a secret.
                (true, _) => self.reject_without_value(&found, "expected a section"),
                (false, _) => {
                    let origin = found.origin.clone().or_else(|| first_origin(value));
                    let names = self.known_keys.iter().map(String::as_str);
                    let suggestion = nearest(&key, names).map(|name| format!("; did you mean `{name}`?"));
                    let text = format!("unknown key{}", suggestion.unwrap_or_default());
                    // The value is left out, because the key may be a misspelt name of a secret.
                    self.faults.push(Fault::setting(&key, text).with_origin(origin));
                }
            }
        }
    }
}

/// Returns all settings of a merged tree by key, as people may see them: what may contain a secret is masked.
pub(super) fn shown(root: &Value) -> BTreeMap<String, String> {
    let mut shown = BTreeMap::new();
    add_shown("", root, &mut shown);
    shown
}

fn add_shown(key: &str, value: &Value, shown: &mut BTreeMap<String, String>) {
    let is_set =
        !matches!(&value.kind, ValueKind::Nil) && !matches!(&value.kind, ValueKind::String(text) if text.is_empty());
    if may_contain_secret(key) {
        // A broker's address is not a secret, but whatever stands there by mistake may be one.
        shown.insert(key.to_owned(), if is_set { "***" } else { "" }.to_owned());
        return;
    }
    let ValueKind::Table(table) = &value.kind else {
        shown.insert(key.to_owned(), display_value(&value.kind));
        return;
    };
    for (name, value) in table {
        let key = if key.is_empty() {
            name.clone()
        } else {
            format!("{key}.{name}")
        };
        add_shown(&key, value, shown);
    }
}

fn may_contain_secret(key: &str) -> bool {
    SECRET_KEYS.iter().any(|secret| {
        let rest = key.strip_prefix(secret);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    })
}

fn found(key: &str, value: &Value) -> SettingValue {
    SettingValue {
        key: key.to_owned(),
        kind: value.kind.clone(),
        origin: value.origin().map(str::to_owned),
    }
}

/// Returns the origin of a value. Merged tables have none, so for a table it is the origin of the first entry with one.
fn first_origin(value: &Value) -> Option<String> {
    let below = match &value.kind {
        ValueKind::Table(table) => table.values().find_map(first_origin),
        _ => None,
    };
    value.origin().map(str::to_owned).or(below)
}

/// Joins alternatives with commas and a final "or".
fn alternatives(names: &[String]) -> String {
    match names {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        names => names.concat(),
    }
}

/// Formats a value as in a settings file, and shortens a long string.
fn display_value(kind: &ValueKind) -> String {
    const MAX_CHARS: usize = 80;
    match kind {
        ValueKind::Table(_) => "{..}".to_owned(),
        ValueKind::Array(values) => {
            let values: Vec<String> = values.iter().map(|value| display_value(&value.kind)).collect();
            format!("[{}]", values.join(", "))
        }
        ValueKind::String(text) => {
            let mut shown: String = text.chars().take(MAX_CHARS).flat_map(char::escape_debug).collect();
            if text.chars().count() > MAX_CHARS {
                // Writing to a String cannot fail.
                let _ = write!(shown, "..");
            }
            format!("\"{shown}\"")
        }
        kind => kind.to_string(),
    }
}
