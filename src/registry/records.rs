//! Records, which store what decisions refer to by hash, so that decisions can be explained later; and the split key.

use std::fmt;

use object_store::path::Path;
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::store::CreateOutcome;
use super::{Registry, RegistryError};
use crate::hash::{content_hash, hex};

/// Upper bound on the size of a record in bytes.
const MAX_RECORD_BYTES: u64 = 1 << 20;

/// The kind of content that a record describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordKind {
    /// The prompt template, its labels and the limits of windows.
    Prompt,
    /// The thresholds of all communities.
    Policy,
    /// The function from margins to probabilities.
    Calibration,
    /// The version of the text normaliser.
    Normalizer,
}

impl RecordKind {
    /// Returns the name of the folder for this kind.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Prompt => "prompt",
            Self::Policy => "policy",
            Self::Calibration => "calibration",
            Self::Normalizer => "normalizer",
        }
    }
}

/// Returns the path `records/<kind>/<sha256>.json`, or `None` if `hash` is not a content hash.
pub(super) fn path(kind: RecordKind, hash: &str) -> Option<Path> {
    let digits = hash.strip_prefix("sha256:")?;
    let is_valid = digits.len() == 64 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    is_valid.then(|| Path::from(format!("records/{}/{digits}.json", kind.as_str())))
}

/// The secret key that assigns texts to the training, validation and test parts. A text always gets the same part.
#[derive(Clone, PartialEq, Eq)]
pub struct SplitKey([u8; 32]);

impl SplitKey {
    /// Returns the bytes of the key.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SplitKey {
    /// Omits the key: with it, somebody could craft texts for a chosen part.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SplitKey(..)")
    }
}

/// The content of `keys/split.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredKey {
    format: u32,
    /// The key in hexadecimal.
    key: String,
}

impl Registry {
    /// Stores the canonical JSON of a record unless it is already stored, and returns its hash.
    ///
    /// # Errors
    /// Returns an error if the store fails, or if something else is stored under this hash.
    pub async fn put_record(&self, kind: RecordKind, canonical: &str) -> Result<String, RegistryError> {
        let hash = content_hash(canonical.as_bytes());
        let path = path(kind, &hash).expect("content_hash returns a valid hash");
        // Read before writing, so that an existing record is found even in a read-only registry.
        let found = self.store.get(&path, MAX_RECORD_BYTES).await?;
        if found.as_deref() == Some(canonical.as_bytes()) {
            return Ok(hash);
        }
        self.store
            .create_identical(&path, canonical.as_bytes().to_vec())
            .await?;
        Ok(hash)
    }

    /// Reads the JSON of a record and verifies its hash. Returns `None` if there is no such record.
    ///
    /// # Errors
    /// Returns an error if the store fails, or if the record does not match its hash.
    pub async fn record(&self, kind: RecordKind, hash: &str) -> Result<Option<String>, RegistryError> {
        let Some(path) = path(kind, hash) else {
            return Ok(None);
        };
        let Some(bytes) = self.store.get(&path, MAX_RECORD_BYTES).await? else {
            return Ok(None);
        };
        let found = content_hash(&bytes);
        if found != hash {
            return Err(self.store.corrupt(&path, found, hash));
        }
        let text = String::from_utf8(bytes);
        Ok(Some(
            text.map_err(|_| self.store.corrupt(&path, "invalid UTF-8", "JSON"))?,
        ))
    }

    /// Returns the split key. The first call creates it.
    ///
    /// # Errors
    /// Returns an error if the store fails, or if the stored key is not valid.
    pub async fn split_key(&self) -> Result<SplitKey, RegistryError> {
        let path = Path::from("keys/split.json");
        let mut key = [0; 32];
        rand::rng().fill(&mut key);
        let stored = StoredKey {
            format: 1,
            key: hex(&key),
        };
        // Read before writing, so that an existing key is found even in a read-only registry.
        let mut found = self.store.get(&path, MAX_RECORD_BYTES).await?;
        if found.is_none() {
            let bytes = serde_json::to_vec(&stored).expect("a string and a number serialise to JSON");
            if self.store.create_object(&path, bytes).await? == CreateOutcome::Created {
                return Ok(SplitKey(key));
            }
            // Another process created one in the meantime.
            found = self.store.get(&path, MAX_RECORD_BYTES).await?;
        }
        let key = found.and_then(|bytes| parse_key(&bytes));
        key.ok_or_else(|| self.store.corrupt(&path, "invalid content", "a split key of 32 bytes"))
    }
}

fn parse_key(bytes: &[u8]) -> Option<SplitKey> {
    let stored: StoredKey = serde_json::from_slice(bytes).ok()?;
    if stored.format != 1 || stored.key.len() != 64 || !stored.key.is_ascii() {
        return None;
    }
    let mut key = [0; 32];
    for (byte, digits) in key.iter_mut().zip(stored.key.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(SplitKey(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_content_hashes_have_a_path() {
        let hash = content_hash(b"x");
        let path = path(RecordKind::Policy, &hash).unwrap().to_string();
        assert_eq!(path, format!("records/policy/{}.json", &hash[7..]));
        for other in ["identity", "none", "sha256:../x", "nfc-1", &hash[..70]] {
            assert!(super::path(RecordKind::Policy, other).is_none(), "{other}");
        }
    }

    #[test]
    fn invalid_keys_are_rejected_and_no_key_is_printed() {
        let json = |key: &str| format!(r#"{{"format":1,"key":"{key}"}}"#);
        let key = parse_key(json(&"0f".repeat(32)).as_bytes()).unwrap();
        assert_eq!(key.as_bytes(), [15; 32]);
        assert_eq!(format!("{key:?}"), "SplitKey(..)");
        for bad in [
            "",
            "0f",
            &"zz".repeat(32),
            &"+1".repeat(32).replace("+1+1", "é é"),
            &"0f".repeat(33),
        ] {
            assert!(parse_key(json(bad).as_bytes()).is_none(), "{bad}");
        }
    }
}
