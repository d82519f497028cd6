//! Computes content hashes, which are always written as `sha256:` and lower-case hexadecimal digits.

use sha2::{Digest, Sha256};

/// Returns the bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = |byte: &u8| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]];
    bytes.iter().flat_map(digits).map(char::from).collect()
}

/// Returns the SHA-256 hash of the bytes as `sha256:` and 64 hexadecimal digits.
pub fn content_hash(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

/// Returns the content hash of an adapter: the hash of a list with the name and hash of each of its two PEFT files.
pub(crate) fn adapter_hash(config: &[u8], weights: &[u8]) -> String {
    let files = format!(
        "adapter_config.json {}\nadapter_model.safetensors {}\n",
        content_hash(config),
        content_hash(weights)
    );
    content_hash(files.as_bytes())
}
