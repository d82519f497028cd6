//! The Perspective API: `comments:analyze` and `comments:suggestscore`.
//!
//! <https://github.com/conversationai/perspectiveapi/blob/main/2-api/methods.md>. Attributes are mapped to classifiers by
//! the settings. What is not computed here is refused, in the form and with the words of the original, by name.

mod analyze;
mod discovery;
mod error;
mod names;
mod request;
mod spans;
mod suggest;

pub(super) use analyze::analyze;
pub(super) use discovery::{described_methods, described_schemas, discovery};
pub(super) use error::answer as problem;
pub(super) use suggest::suggest_score;
