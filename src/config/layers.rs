//! Merges the layers of settings: defaults, settings file, environment and flags, where later layers win.
//!
//! The `config` crate merges the layers. Each value records the layer that it comes from, so that a fault can name the
//! file, environment variable or flag to correct.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

use config::{FileFormat, Format, Map, Value, ValueKind};

use super::reader;
use crate::fault::Fault;

/// The defaults are the shipped settings file itself, so that the two cannot differ.
const DEFAULTS: &str = include_str!("../../config/moderatord.toml");

/// The prefix of all environment variables that set a setting.
const PREFIX: &str = "MODERATORD__";

/// The environment variable in which systemd passes the folders of `StateDirectory=`, separated by colons.
const STATE_DIRECTORY: &str = "STATE_DIRECTORY";

/// The tables whose keys are chosen by the operator. Not every key can be part of a variable's name, so a variable may
/// also set such a table as a whole, as in TOML.
const OPEN_TABLES: [[&str; 2]; 5] = [
    ["policy", "communities"],
    ["kafka", "properties"],
    ["input", "ops"],
    ["api", "openai"],
    ["api", "perspective"],
];

/// Those of the open tables in whose keys upper and lower case differ.
const CASE_SENSITIVE_TABLES: [[&str; 2]; 4] = [
    ["policy", "communities"],
    ["input", "ops"],
    ["api", "openai"],
    ["api", "perspective"],
];

/// The maximum size of a settings file, so that a wrong path to a huge file does not exhaust the memory.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Returns the default of a section's key.
pub(super) fn default_value(section: &str, key: &str) -> Option<ValueKind> {
    let mut defaults = parse(None, DEFAULTS).ok()?;
    let mut section = defaults.remove(section)?.into_table().ok()?;
    Some(section.remove(key)?.kind)
}

/// The sources of settings besides the defaults.
///
/// This type is not `Debug`, because the environment may contain secrets.
#[derive(Clone, Default)]
pub struct Sources {
    /// The settings file, if there is one.
    pub file: Option<PathBuf>,
    /// Environment variables; those other than `STATE_DIRECTORY` whose names do not start with `MODERATORD__` are
    /// ignored.
    pub environment: Vec<(OsString, OsString)>,
    /// The key, the value and the name of each flag that sets a setting.
    pub flags: Vec<(&'static str, String, &'static str)>,
}

impl Sources {
    /// Returns the environment of this process together with a settings file.
    pub fn process(file: Option<PathBuf>) -> Self {
        Self {
            file,
            environment: std::env::vars_os()
                .filter(|(name, _)| name == STATE_DIRECTORY || name.to_string_lossy().starts_with(PREFIX))
                .collect(),
            flags: Vec::new(),
        }
    }

    /// Returns all settings by key, with those masked that may contain a secret.
    pub fn shown(&self) -> BTreeMap<String, String> {
        reader::shown(&self.merge().0)
    }

    /// Merges all layers into one tree, and returns a fault for each layer that cannot be read.
    pub(super) fn merge(&self) -> (Value, Vec<Fault>) {
        let mut faults = Vec::new();
        let mut layers = Vec::new();
        match parse(None, DEFAULTS) {
            Ok(layer) => layers.push(layer),
            Err(reason) => faults.push(Fault::setting("built-in defaults", reason)),
        }
        layers.push(self.state_directory());
        if let Some(path) = &self.file {
            match read(path).and_then(|text| parse(Some(&path.display().to_string()), &text)) {
                Ok(layer) => layers.push(layer),
                Err(reason) => faults.push(Fault::file(path, reason)),
            }
        }
        let named = CASE_SENSITIVE_TABLES.map(|table| (table, self.names_in(table, &layers)));
        layers.push(self.environment(&named, &mut faults));
        layers.push(self.flags());
        let mut builder = config::Config::builder();
        for layer in layers {
            builder = builder.add_source(SettingsLayer(layer));
        }
        match builder.build() {
            Ok(config) => (config.cache, faults),
            Err(error) => {
                faults.push(Fault::setting("settings", error.to_string()));
                (Map::<String, Value>::new().into(), faults)
            }
        }
    }

    /// Returns the state folder of the service manager as the default of `registry.state`.
    fn state_directory(&self) -> Map<String, Value> {
        let mut tree = SettingsTree::default();
        let folders = self.environment.iter().find(|(name, _)| name == STATE_DIRECTORY);
        let folders = folders.and_then(|(_, folders)| folders.to_str());
        if let Some(first) = folders.and_then(|folders| folders.split(':').next()) {
            let origin = format!("environment variable {STATE_DIRECTORY}");
            let path = ["registry".to_owned(), "state".to_owned()];
            tree.insert(&path, Value::new(Some(&origin), first));
        }
        tree.into_map()
    }

    /// Returns the keys of a table that the layers below the environment, or variables for the whole table, set.
    fn names_in(&self, table: [&str; 2], layers: &[Map<String, Value>]) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        let mut add = |value: &Value| {
            if let ValueKind::Table(table) = &value.kind {
                names.extend(table.keys().cloned());
            }
        };
        for layer in layers {
            if let Some(ValueKind::Table(section)) = layer.get(table[0]).map(|value| &value.kind)
                && let Some(value) = section.get(table[1])
            {
                add(value);
            }
        }
        for (name, value) in &self.environment {
            let path = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).map(key_path);
            if let Some(value) = value.to_str().filter(|_| path.is_some_and(|path| path == table)) {
                parse_inline_table(&String::new(), value).iter().for_each(&mut add);
            }
        }
        names
    }

    /// Returns the settings of the environment. `named` has the keys of the case-sensitive tables that are set elsewhere.
    fn environment(
        &self,
        named: &[([&'static str; 2], BTreeSet<String>)],
        faults: &mut Vec<Fault>,
    ) -> Map<String, Value> {
        let mut tree = SettingsTree::default();
        // Sorted, so that faults are reported in the same order on every run.
        let variables: BTreeMap<_, _> = self.environment.iter().map(|(name, value)| (name, value)).collect();
        for (name, value) in variables {
            let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX)) else {
                continue;
            };
            let origin = format!("environment variable {name}");
            let Some(value) = value.to_str() else {
                faults.push(Fault::setting(name, "is not valid UTF-8"));
                continue;
            };
            let mut path = key_path(&name[PREFIX.len()..]);
            if let Some((table, names)) = named.iter().find(|(table, _)| path.len() > 2 && path[..2] == *table) {
                match meant(&path[2], names, *table) {
                    Ok(name) => path[2] = name,
                    Err(reason) => {
                        faults.push(Fault::setting(&path.join("."), reason).with_origin(Some(origin)));
                        continue;
                    }
                }
            }
            if !OPEN_TABLES.iter().any(|table| path == *table) {
                tree.insert(&path, Value::new(Some(&origin), value));
                continue;
            }
            match parse_inline_table(&origin, value) {
                Some(table) => tree.insert_all(&path, table),
                None => faults.push(Fault::setting(&path.join("."), EXPECTED_TABLE).with_origin(Some(origin))),
            }
        }
        tree.into_map()
    }

    fn flags(&self) -> Map<String, Value> {
        let mut tree = SettingsTree::default();
        for (key, value, flag) in &self.flags {
            let path: Vec<String> = key.split('.').map(str::to_owned).collect();
            tree.insert(&path, Value::new(Some(&format!("flag {flag}")), value.as_str()));
        }
        tree.into_map()
    }
}

/// Converts the name of an environment variable, without its prefix, to the path of a key.
///
/// `MODEL__PATH` is converted to `model` and `path`. A community's id and the value of an operation keep their case. In the
/// names of librdkafka's settings, underscores become dots, because a shell does not allow dots in the name of a variable.
fn key_path(name: &str) -> Vec<String> {
    let raw: Vec<&str> = name.split("__").collect();
    let mut path: Vec<String> = raw.iter().map(|segment| segment.to_lowercase()).collect();
    let is_below = |table: [&str; 2]| path.len() > 2 && path[..2] == table;
    if CASE_SENSITIVE_TABLES.into_iter().any(is_below) {
        path[2] = raw[2].to_owned();
    } else if is_below(["kafka", "properties"]) {
        path[2] = path[2].replace('_', ".");
    }
    path
}

/// Returns the key of a case-sensitive table that a variable means.
///
/// By convention, the names of variables are upper case, so case is ignored unless a key is spelt in exactly this way. A
/// name that fits no key is a new one, but not in upper case throughout, which says nothing about the case that is meant.
fn meant(name: &str, names: &BTreeSet<String>, [section, table]: [&str; 2]) -> Result<String, String> {
    if names.contains(name) {
        return Ok(name.to_owned());
    }
    let folded = name.to_lowercase();
    let candidates: Vec<&String> = names.iter().filter(|known| known.to_lowercase() == folded).collect();
    match candidates[..] {
        [known] => Ok(known.clone()),
        [] if name.chars().any(char::is_uppercase) && !name.chars().any(char::is_lowercase) => Err(format!(
            "no key of [{section}.{table}] has this name in upper or lower case, and a variable in upper case cannot say \
             which is meant; set it in the file, or with {PREFIX}{}__{}='{{ \"{folded}\" = .. }}'",
            section.to_uppercase(),
            table.to_uppercase(),
        )),
        [] => Ok(name.to_owned()),
        _ => {
            let known: Vec<String> = candidates.iter().map(|known| format!("`{known}`")).collect();
            Err(format!(
                "{} differ only in upper and lower case; expected one of them, spelt in the same way",
                known.join(" and ")
            ))
        }
    }
}

fn read(path: &Path) -> Result<String, String> {
    let read = || -> std::io::Result<String> {
        let mut text = String::new();
        std::fs::File::open(path)?
            .take(MAX_FILE_BYTES + 1)
            .read_to_string(&mut text)?;
        Ok(text)
    };
    match read() {
        Ok(text) if text.len() as u64 > MAX_FILE_BYTES => Err(format!(
            "is larger than {MAX_FILE_BYTES} bytes, expected settings in TOML"
        )),
        Ok(text) => Ok(text),
        Err(error) => Err(format!("cannot read the settings file: {error}")),
    }
}

fn parse(origin: Option<&String>, text: &str) -> Result<Map<String, Value>, String> {
    FileFormat::Toml.parse(origin, text).map_err(|error| {
        // The lines between the first and the last quote the file, which may contain a secret.
        let text = error.to_string();
        let mut lines = text.lines().filter(|line| !line.trim().is_empty());
        match (lines.next(), lines.next_back()) {
            (Some(location), Some(reason)) => format!("{location}: {reason}"),
            (Some(reason), None) => reason.to_owned(),
            _ => "is not valid TOML".to_owned(),
        }
    })
}

const EXPECTED_TABLE: &str = "expected an inline table in TOML, such as { \"a name\" = .., another = .. }";

/// Parses the value of a variable that sets a table. The reason of a failure is not returned, because it may quote a
/// secret.
fn parse_inline_table(origin: &String, text: &str) -> Option<Value> {
    let mut parsed = FileFormat::Toml.parse(Some(origin), &format!("table = {text}")).ok()?;
    let table = parsed.remove("table")?;
    // A text with line breaks could contain further keys.
    (parsed.is_empty() && matches!(table.kind, ValueKind::Table(_))).then_some(table)
}

/// Nested tables of settings, built from one dotted key at a time.
#[derive(Debug, Default)]
struct SettingsTree(BTreeMap<String, SettingsNode>);

#[derive(Debug)]
enum SettingsNode {
    Leaf(Value),
    Branch(SettingsTree),
}

impl SettingsTree {
    fn insert(&mut self, path: &[String], value: Value) {
        match path {
            [] => {}
            [name] => {
                self.0.insert(name.clone(), SettingsNode::Leaf(value));
            }
            [name, rest @ ..] => {
                let node = self
                    .0
                    .entry(name.clone())
                    .or_insert_with(|| SettingsNode::Branch(Self::default()));
                // A variable that sets a whole section is a fault anyway, so it is replaced by the keys below it.
                if let SettingsNode::Leaf(_) = node {
                    *node = SettingsNode::Branch(Self::default());
                }
                if let SettingsNode::Branch(tree) = node {
                    tree.insert(rest, value);
                }
            }
        }
    }

    /// Inserts the entries of a table one by one, so that other variables can override each of them.
    fn insert_all(&mut self, path: &[String], value: Value) {
        let ValueKind::Table(table) = value.kind else {
            return self.insert(path, value);
        };
        for (name, value) in table {
            self.insert_all(&[path, &[name]].concat(), value);
        }
    }

    fn into_map(self) -> Map<String, Value> {
        let value = |node| match node {
            SettingsNode::Leaf(value) => value,
            SettingsNode::Branch(tree) => tree.into_map().into(),
        };
        self.0.into_iter().map(|(name, node)| (name, value(node))).collect()
    }
}

/// One layer, in the form that the `config` crate merges.
#[derive(Debug, Clone)]
struct SettingsLayer(Map<String, Value>);

impl config::Source for SettingsLayer {
    fn clone_into_box(&self) -> Box<dyn config::Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, config::ConfigError> {
        Ok(self.0.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_name_is_converted_to_its_key() {
        let check = |name: &str, expected: &[&str]| assert_eq!(key_path(name), expected, "{name}");
        check("MODEL__PATH", &["model", "path"]);
        check(
            "KAFKA__PROPERTIES__SSL_CA_LOCATION",
            &["kafka", "properties", "ssl.ca.location"],
        );
        check(
            "POLICY__COMMUNITIES__Garden_1__REVIEW",
            &["policy", "communities", "Garden_1", "review"],
        );
        check(
            "POLICY__COMMUNITIES__GARDEN__REVIEW",
            &["policy", "communities", "GARDEN", "review"],
        );
        check("KAFKA__PROPERTIES", &["kafka", "properties"]);
    }

    #[test]
    fn a_syntax_error_does_not_quote_the_file() {
        let error = parse(Some(&"f".to_owned()), "[kafka]\npassword = \"hunter2\nx = 1").unwrap_err();
        assert!(error.contains("line 2") && !error.contains("hunter2"), "{error}");
    }
}
