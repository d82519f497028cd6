//! The small checkpoint in this binary, which is used if `model.path` is not set.
//!
//! Its card, `models/moderatord-mini/README.md`, describes what it can be used for and how it was made.

/// The name that stands in for the checkpoint's folder in logs and errors.
pub const NAME: &str = "moderatord-mini";

pub(super) const CONFIG: &str = include_str!("../../../models/moderatord-mini/config.json");
/// The bytes of the bundled checkpoint's `tokenizer.json`.
pub const TOKENIZER: &[u8] = include_bytes!("../../../models/moderatord-mini/tokenizer.json");
/// The bundled checkpoint's `moderatord.json`.
pub(crate) const DEFAULTS: &str = include_str!("../../../models/moderatord-mini/moderatord.json");
pub(super) const WEIGHTS: &[u8] = include_bytes!("../../../models/moderatord-mini/model.safetensors");
