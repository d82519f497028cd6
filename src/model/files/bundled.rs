//! The small checkpoint that this binary carries: what `model.path` stands for when nobody sets it.
//!
//! Its card, `models/moderatord-mini/README.md`, says what it is for and what not, and how it was made.

/// What it is called where a checkpoint's folder would be named.
pub const NAME: &str = "moderatord-mini";

pub(super) const CONFIG: &str = include_str!("../../../models/moderatord-mini/config.json");
/// Its `tokenizer.json`.
pub const TOKENIZER: &[u8] = include_bytes!("../../../models/moderatord-mini/tokenizer.json");
pub(super) const WEIGHTS: &[u8] = include_bytes!("../../../models/moderatord-mini/model.safetensors");
