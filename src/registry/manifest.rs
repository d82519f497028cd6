//! What a version is made of, and the name that follows from it.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::records::RecordKind;
use crate::decide::{Calibration, DerivedThresholds};
use crate::hash::content_hash;

/// Format of [`Manifest`].
pub const MANIFEST_FORMAT: u32 = 1;

/// Hexadecimal digits of a version: 64 bits, enough to tell versions apart; what they hold is proven
/// by whole hashes.
const VERSION_DIGITS: usize = 16;

/// Name of a version: the beginning of the SHA-256 of its manifest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Version(String);

/// A text that names no version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no version, expected {VERSION_DIGITS} hexadecimal digits")]
pub struct VersionError(String);

impl Version {
    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Version {
    type Err = VersionError;

    fn from_str(text: &str) -> Result<Self, VersionError> {
        let digits = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if text.len() == VERSION_DIGITS && digits(text) {
            Ok(Self(text.to_owned()))
        } else {
            // Whatever it is, it is short in a message.
            Err(VersionError(text.chars().take(40).collect()))
        }
    }
}

impl TryFrom<String> for Version {
    type Error = VersionError;

    fn try_from(text: String) -> Result<Self, VersionError> {
        text.parse()
    }
}

impl From<Version> for String {
    fn from(version: Version) -> Self {
        version.0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One file of a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// As `sha256sum` prints it, after `sha256:`.
    pub sha256: String,
    /// Its size.
    pub bytes: u64,
}

/// `manifest.json`: everything about a version. Written last, so a version that has one is whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: u32,
    /// Follows from all the rest.
    pub version: Version,
    /// Its files, without the manifest.
    pub files: BTreeMap<String, FileEntry>,
    /// Content hash of the adapter, as decisions name it.
    pub adapter: String,
    /// What it rests on, as hashes of records in the registry.
    pub records: BTreeMap<RecordKind, String>,
    /// What its maker says of it.
    #[serde(flatten)]
    pub facts: VersionFacts,
}

/// What the maker of a version says of it. What only people and reports read is plain JSON here: the
/// registry does not know how adapters are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VersionFacts {
    /// RFC 3339 UTC.
    pub created_at: String,
    /// The version that was in service and that it was measured against; none for the bare base.
    pub parent: Option<Version>,
    /// Fingerprint of the base model.
    pub base: String,
    /// Hash of the prompt that it was trained under.
    pub prompt: String,
    /// Version of the normaliser, or `none`.
    pub normalizer: String,
    /// From margin to probability.
    pub calibration: Calibration,
    /// Where its bands begin.
    pub thresholds: DerivedThresholds,
    /// Seed of the training.
    pub seed: u64,
    /// Everything else that shaped the training.
    pub hyperparameters: Value,
    /// The snapshot of the feedback: its hash, offsets and counts.
    pub data: Value,
    /// The evaluation on the test part.
    pub metrics: Value,
    /// The gate's verdict.
    pub gate: Value,
}

impl Manifest {
    /// Describes files and gives the result its name.
    pub(super) fn new(
        files: BTreeMap<String, FileEntry>,
        adapter: String,
        records: BTreeMap<RecordKind, String>,
        facts: VersionFacts,
    ) -> Self {
        let mut manifest = Self {
            format: MANIFEST_FORMAT,
            version: Version("0".repeat(VERSION_DIGITS)),
            files,
            adapter,
            records,
            facts,
        };
        let value = serde_json::to_value(&manifest).expect("names, numbers and JSON always have a JSON form");
        manifest.version = version_of(&value);
        manifest
    }

    /// The bytes of `manifest.json`.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("names, numbers and JSON always have a JSON form");
        bytes.push(b'\n');
        bytes
    }

    /// Reads a manifest back and shows that it is the one of this name; the error is what was found
    /// and what was expected.
    pub(super) fn parse(bytes: &[u8], version: &Version) -> Result<Self, (String, String)> {
        let json = |error: serde_json::Error| (error.to_string(), "a manifest".to_owned());
        let value: Value = serde_json::from_slice(bytes).map_err(json)?;
        if value["format"] != MANIFEST_FORMAT {
            return Err((
                format!("format {}", value["format"]),
                format!("{MANIFEST_FORMAT}, which this release knows"),
            ));
        }
        let found = version_of(&value);
        if found != *version {
            return Err((format!("it hashes to {found}"), version.to_string()));
        }
        let manifest: Self = serde_json::from_value(value).map_err(json)?;
        if manifest.version != *version {
            return Err((format!("it names version {}", manifest.version), version.to_string()));
        }
        match manifest.files.keys().find(|name| !is_file_name(name)) {
            Some(name) => Err((format!("a file `{name}`"), "a plain file name".to_owned())),
            None => Ok(manifest),
        }
    }
}

/// A name that stays in its folder on every store: letters, digits, `_`, `-`, `.`, none of them first
/// but a letter or digit.
pub(super) fn is_file_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    name.len() <= 100
        && name.bytes().all(plain)
        && name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        && name != "manifest.json"
}

/// The version that a manifest without its version field hashes to.
fn version_of(manifest: &Value) -> Version {
    let mut manifest = manifest.clone();
    if let Some(fields) = manifest.as_object_mut() {
        fields.remove("version");
    }
    let hash = content_hash(canonical(&manifest).as_bytes());
    let digits = hash.trim_start_matches("sha256:");
    Version(digits[..VERSION_DIGITS].to_owned())
}

/// JSON without white space, keys in byte order whatever the map type keeps.
fn canonical(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            let sorted: BTreeMap<&String, &Value> = fields.iter().collect();
            let fields = sorted.into_iter().map(|(key, value)| {
                let key = Value::from(key.as_str());
                format!("{key}:{}", canonical(value))
            });
            format!("{{{}}}", fields.collect::<Vec<_>>().join(","))
        }
        Value::Array(values) => {
            let values: Vec<String> = values.iter().map(canonical).collect();
            format!("[{}]", values.join(","))
        }
        plain => plain.to_string(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    pub(in crate::registry) fn facts() -> VersionFacts {
        VersionFacts {
            created_at: "2026-01-02T03:04:05Z".into(),
            parent: None,
            base: "sha256:base".into(),
            prompt: "sha256:prompt".into(),
            normalizer: "nfc-1".into(),
            calibration: Calibration::Identity,
            thresholds: DerivedThresholds {
                review: None,
                block: Some(0.93),
                representative: false,
            },
            seed: u64::MAX,
            hyperparameters: json!({"rank": 8, "learning_rate": 5e-4}),
            data: json!({"hash": "sha256:data"}),
            metrics: json!({"pr_auc": 0.1 + 0.2}),
            gate: json!({"promote": true}),
        }
    }

    fn manifest() -> Manifest {
        let file = FileEntry {
            sha256: "sha256:00".into(),
            bytes: 3,
        };
        Manifest::new(
            BTreeMap::from([("adapter_config.json".into(), file)]),
            "sha256:adapter".into(),
            BTreeMap::new(),
            facts(),
        )
    }

    #[test]
    fn a_manifest_reads_back_and_its_name_is_proven() {
        let manifest = manifest();
        let bytes = manifest.to_bytes();
        assert_eq!(Manifest::parse(&bytes, &manifest.version), Ok(manifest.clone()));
        let check = |from: &str, to: &str, expected: &str| {
            let spoiled = String::from_utf8(bytes.clone()).unwrap().replace(from, to);
            let (found, _) = Manifest::parse(spoiled.as_bytes(), &manifest.version).unwrap_err();
            assert!(found.starts_with(expected), "{found}");
        };
        check("sha256:base", "sha256:other", "it hashes to ");
        check("0.93", "0.92", "it hashes to ");
        check("\"format\": 1", "\"format\": 2", "format 2");
        check(
            manifest.version.as_str(),
            "ffffffffffffffff",
            "it names version ffffffffffffffff",
        );
        check("{", "", "trailing characters");
    }

    #[test]
    fn what_a_later_release_adds_is_part_of_the_name() {
        let manifest = manifest();
        let text = String::from_utf8(manifest.to_bytes()).unwrap();
        let more = text.replacen('{', r#"{"later": 1,"#, 1);
        assert!(Manifest::parse(more.as_bytes(), &manifest.version).is_err());
        let value: Value = serde_json::from_str(&more).unwrap();
        let version = version_of(&value);
        let renamed = more.replace(manifest.version.as_str(), version.as_str());
        assert_eq!(
            Manifest::parse(renamed.as_bytes(), &version).map(|manifest| manifest.facts),
            Ok(facts())
        );
    }

    #[test]
    fn versions_and_file_names_are_plain() {
        assert!("0123456789abcdef".parse::<Version>().is_ok());
        for text in [
            "",
            "0123456789abcde",
            "0123456789ABCDEF",
            "../../etc/passwd",
            "0123456789abcdef0",
        ] {
            assert!(text.parse::<Version>().is_err(), "{text}");
        }
        for (name, expected) in [
            ("adapter_model.safetensors", true),
            ("report.html", true),
            ("", false),
            (".hidden", false),
            ("a/b", false),
            ("..", false),
            ("a#1", false),
            ("manifest.json", false),
        ] {
            assert_eq!(is_file_name(name), expected, "{name}");
        }
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 20, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(".*", inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// The name survives any formatting: it is the content's.
        #[test]
        fn the_canonical_text_is_json_and_does_not_depend_on_formatting(value in values()) {
            let text = canonical(&value);
            let back: Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(canonical(&back), text.clone());
            let pretty: Value = serde_json::from_str(&serde_json::to_string_pretty(&value).unwrap()).unwrap();
            prop_assert_eq!(canonical(&pretty), text);
        }
    }
}
