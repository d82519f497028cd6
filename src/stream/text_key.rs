//! Identifies texts, so that identical ones are recognised.

use sha2::{Digest, Sha256};

/// The SHA-256 of a normalised text.
///
/// It must be infeasible to find two texts with the same key, even for someone who chooses both: otherwise, a harmless
/// text could prepare the margin of a hateful one. Hashing is far cheaper than tokenising.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TextKey([u8; 32]);

impl TextKey {
    /// Returns the key of a normalised text.
    pub fn of(text: &str) -> Self {
        Self(Sha256::digest(text.as_bytes()).into())
    }
}
