//! The manifest of a version, and the version's name, which is derived from it.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::records::RecordKind;
use crate::decide::{Calibration, DerivedThresholds};
use crate::hash::content_hash;

/// The format number of the manifests that this release reads and writes.
const MANIFEST_FORMAT: u32 = 1;

/// Length of a version in hexadecimal digits. These 64 bits only distinguish versions from each other; contents are
/// verified with complete hashes.
const VERSION_DIGITS: usize = 16;

/// The name of a version: the first 16 hexadecimal digits of the SHA-256 of its manifest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Version(String);

/// A string that is not the name of a version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a version, expected {VERSION_DIGITS} hexadecimal digits")]
pub struct VersionError(String);

impl Version {
    /// Returns the version that the content of a manifest has: the beginning of the hash of all its fields except
    /// `version`. Formatting and the order of fields do not matter.
    pub fn of(manifest: &Value) -> Self {
        let mut manifest = manifest.clone();
        if let Some(fields) = manifest.as_object_mut() {
            fields.remove("version");
        }
        let hash = content_hash(canonical(&manifest).as_bytes());
        let digits = hash.trim_start_matches("sha256:");
        Self(digits[..VERSION_DIGITS].to_owned())
    }

    /// Returns the hexadecimal digits.
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
            // Keeps the message short.
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

/// The hash and size of one file of a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// SHA-256 of the content in hexadecimal, after `sha256:`.
    pub sha256: String,
    /// Size in bytes.
    pub bytes: u64,
}

/// The content of `manifest.json`, which describes a version. It is written last, so a version that has one is
/// complete.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Number of the format, at present 1.
    pub format: u32,
    /// Name of the version, derived from all other fields.
    pub version: Version,
    /// The files of the version by name, without the manifest itself.
    pub files: BTreeMap<String, FileEntry>,
    /// Content hash of the adapter, as recorded in decisions.
    pub adapter: String,
    /// Hashes of the registry records that the version depends on, such as its prompt.
    pub records: BTreeMap<RecordKind, String>,
    /// How the version was made and evaluated.
    #[serde(flatten)]
    pub facts: VersionFacts,
}

/// How a version was made and evaluated, as stated by its publisher.
///
/// Fields that only people and reports read are untyped JSON, so that the registry does not depend on training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VersionFacts {
    /// Time of creation, in RFC 3339 format and UTC.
    pub created_at: String,
    /// The version in service that it was compared with; `None` for the bare base model.
    pub parent: Option<Version>,
    /// Fingerprint of the base model.
    pub base: String,
    /// Hash of the prompt that it was trained with.
    pub prompt: String,
    /// Version of the normaliser, or `none`.
    pub normalizer: String,
    /// Maps margins to probabilities.
    pub calibration: Calibration,
    /// Thresholds that were derived for this version.
    pub thresholds: DerivedThresholds,
    /// How the thresholds were derived: targets, precision, recall and their intervals. Null in manifests from before
    /// it was recorded.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub threshold_derivation: Value,
    /// Random seed of the training run.
    pub seed: u64,
    /// All other settings of the training run.
    pub hyperparameters: Value,
    /// The feedback that it was trained on: hash, offsets and counts.
    pub data: Value,
    /// Evaluation on the test part.
    pub metrics: Value,
    /// Verdict of the promotion gate, with `promote` and, except in old manifests, a `sentence` for people.
    pub gate: Value,
}

impl Manifest {
    /// Creates the manifest and derives the version from it.
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
        let value = serde_json::to_value(&manifest).expect("strings, numbers and JSON values serialise to JSON");
        manifest.version = Version::of(&value);
        manifest
    }

    /// Returns the content of `manifest.json`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("strings, numbers and JSON values serialise to JSON");
        bytes.push(b'\n');
        bytes
    }

    /// Parses a manifest and verifies that it is the manifest of `version`.
    ///
    /// # Errors
    /// Returns what was found and what was expected.
    pub fn parse(bytes: &[u8], version: &Version) -> Result<Self, (String, String)> {
        let json = |error: serde_json::Error| (error.to_string(), "a manifest".to_owned());
        let value: Value = serde_json::from_slice(bytes).map_err(json)?;
        if value["format"] != MANIFEST_FORMAT {
            return Err((
                format!("format {}", value["format"]),
                format!("format {MANIFEST_FORMAT}"),
            ));
        }
        let found = Version::of(&value);
        if found != *version {
            return Err((format!("its hash gives version {found}"), version.to_string()));
        }
        let manifest: Self = serde_json::from_value(value).map_err(json)?;
        if manifest.version != *version {
            return Err((format!("it is for version {}", manifest.version), version.to_string()));
        }
        match manifest.files.keys().find(|name| !is_file_name(name)) {
            Some(name) => Err((format!("the file name `{name}`"), "a plain file name".to_owned())),
            None => Ok(manifest),
        }
    }
}

/// Returns whether a name is safe on every store and cannot leave its folder: letters, digits, `_`, `-` and `.`, with
/// a letter or digit first.
pub(super) fn is_file_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    name.len() <= 100
        && name.bytes().all(is_allowed)
        && name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        && name != "manifest.json"
}

/// Serialises JSON without white space and with sorted keys, whatever order the map type keeps.
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
                provisional: false,
            },
            threshold_derivation: Value::Null,
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
    fn a_manifest_reads_back_and_its_version_is_verified() {
        let manifest = manifest();
        let bytes = manifest.to_bytes();
        assert_eq!(Manifest::parse(&bytes, &manifest.version), Ok(manifest.clone()));
        let check = |from: &str, to: &str, expected: &str| {
            let changed = String::from_utf8(bytes.clone()).unwrap().replace(from, to);
            let (found, _) = Manifest::parse(changed.as_bytes(), &manifest.version).unwrap_err();
            assert!(found.starts_with(expected), "{found}");
        };
        check("sha256:base", "sha256:other", "its hash gives version ");
        check("0.93", "0.92", "its hash gives version ");
        check("\"format\": 1", "\"format\": 2", "format 2");
        check(
            manifest.version.as_str(),
            "ffffffffffffffff",
            "it is for version ffffffffffffffff",
        );
        check("{", "", "trailing characters");
    }

    /// Registries hold manifests from before the derivation of the thresholds was recorded.
    #[test]
    fn a_manifest_of_an_earlier_release_can_be_read() {
        let mut value = serde_json::to_value(manifest()).unwrap();
        assert!(value.get("threshold_derivation").is_none());
        value["thresholds"] = json!({"review": null, "block": 0.93, "representative": false});
        let version = Version::of(&value);
        value["version"] = version.as_str().into();
        let read = Manifest::parse(value.to_string().as_bytes(), &version).unwrap();
        assert_eq!(read.facts, facts());
    }

    #[test]
    fn the_version_covers_fields_that_a_later_release_adds() {
        let manifest = manifest();
        let text = String::from_utf8(manifest.to_bytes()).unwrap();
        let more = text.replacen('{', r#"{"later": 1,"#, 1);
        assert!(Manifest::parse(more.as_bytes(), &manifest.version).is_err());
        let value: Value = serde_json::from_str(&more).unwrap();
        let version = Version::of(&value);
        let renamed = more.replace(manifest.version.as_str(), version.as_str());
        assert_eq!(
            Manifest::parse(renamed.as_bytes(), &version).map(|manifest| manifest.facts),
            Ok(facts())
        );
    }

    #[test]
    fn invalid_versions_and_file_names_are_rejected() {
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
        /// A version must not change when its manifest is reformatted.
        #[test]
        fn the_canonical_form_is_json_and_does_not_depend_on_formatting(value in values()) {
            let text = canonical(&value);
            let back: Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(canonical(&back), text.clone());
            let pretty: Value = serde_json::from_str(&serde_json::to_string_pretty(&value).unwrap()).unwrap();
            prop_assert_eq!(canonical(&pretty), text);
        }
    }
}
