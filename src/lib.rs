//! A streaming moderation filter: reads comments from Kafka, scores them with a Gemma classifier and publishes
//! decisions.
//!
//! The modules are declared from the bottom up: each module uses only modules that are declared above it, and
//! `tests/it/layers.rs` fails if a `use` points the other way.
//!
//! | layer | modules |
//! |---|---|
//! | foundations | [`fault`], [`hash`], [`message`], [`config`], [`ops`], [`kafka`], [`hub`] |
//! | model | [`scorer`] (the interface between stream and model), [`prompt`], [`model`], [`classifier`] |
//! | stream | [`decide`], [`stream`] |
//! | adapter versions | [`registry`], [`serving`], [`retrain`] |
//! | scoring over HTTP | [`api`] |
//! | commands | [`cli`] |

#[cfg(test)]
mod test_files;
mod plural;
mod json;
pub mod fault;
pub mod hash;
pub mod message;
pub mod config;
pub mod ops;
pub mod kafka;
pub mod hub;

pub mod scorer;
pub mod prompt;
pub mod model;
pub mod classifier;

pub mod decide;
pub mod stream;

pub mod registry;
pub mod serving;
pub mod api;
pub mod retrain;

pub mod cli;
