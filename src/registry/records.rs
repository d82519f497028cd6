//! What decisions name by hash, kept so that a decision can be explained later; and the split key.

use std::fmt;

use object_store::path::Path;
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::store::Created;
use super::{Registry, RegistryError};
use crate::hash::{content_hash, hex};

/// Larger than any record.
const MAX_RECORD_BYTES: u64 = 1 << 20;

/// What a record describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordKind {
    /// Frame, labels and windows.
    Prompt,
    /// Thresholds of all communities.
    Policy,
    /// From margin to probability.
    Calibration,
    /// The normaliser's version.
    Normalizer,
}

impl RecordKind {
    /// Name of its folder.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prompt => "prompt",
            Self::Policy => "policy",
            Self::Calibration => "calibration",
            Self::Normalizer => "normalizer",
        }
    }
}

/// `records/<kind>/<hash>.json`; nothing for a hash that is none of ours.
pub(super) fn path(kind: RecordKind, hash: &str) -> Option<Path> {
    let digits = hash.strip_prefix("sha256:")?;
    let plain = digits.len() == 64 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    plain.then(|| Path::from(format!("records/{}/{digits}.json", kind.as_str())))
}

/// Decides for ever on which side of the split a text falls.
#[derive(Clone, PartialEq, Eq)]
pub struct SplitKey([u8; 32]);

impl SplitKey {
    /// The key itself.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SplitKey {
    /// Leaves the key out: who knows it can choose on which side a text falls.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SplitKey(..)")
    }
}

/// `keys/split.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredKey {
    format: u32,
    /// Hexadecimal.
    key: String,
}

impl Registry {
    /// Stores a record's canonical JSON, once, and gives its hash.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn put_record(&self, kind: RecordKind, canonical: &str) -> Result<String, RegistryError> {
        let hash = content_hash(canonical.as_bytes());
        let path = path(kind, &hash).expect("a content hash is one of ours");
        self.store.create_same(&path, canonical.as_bytes().to_vec()).await?;
        Ok(hash)
    }

    /// A record's JSON, proven by its hash; nothing where there is none.
    ///
    /// # Errors
    /// [`RegistryError`].
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
        Ok(Some(text.map_err(|_| self.store.corrupt(&path, "no UTF-8", "JSON"))?))
    }

    /// The split key, made when it is asked for the first time.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn split_key(&self) -> Result<SplitKey, RegistryError> {
        let path = Path::from("keys/split.json");
        let mut key = [0; 32];
        rand::rng().fill(&mut key);
        let stored = StoredKey {
            format: 1,
            key: hex(&key),
        };
        // Looked at first: a registry that cannot be written to may still be asked.
        let mut found = self.store.get(&path, MAX_RECORD_BYTES).await?;
        if found.is_none() {
            let bytes = serde_json::to_vec(&stored).expect("a text and a number have a JSON form");
            if self.store.create_object(&path, bytes).await? == Created::New {
                return Ok(SplitKey(key));
            }
            // Another process made one in between.
            found = self.store.get(&path, MAX_RECORD_BYTES).await?;
        }
        let key = found.and_then(|bytes| parse_key(&bytes));
        key.ok_or_else(|| self.store.corrupt(&path, "something else", "a split key of 32 bytes"))
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
    fn only_our_hashes_have_a_path() {
        let hash = content_hash(b"x");
        let path = path(RecordKind::Policy, &hash).unwrap().to_string();
        assert_eq!(path, format!("records/policy/{}.json", &hash[7..]));
        for other in ["identity", "none", "sha256:../x", "nfc-1", &hash[..70]] {
            assert!(super::path(RecordKind::Policy, other).is_none(), "{other}");
        }
    }

    #[test]
    fn a_key_is_read_or_refused_and_never_printed() {
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
