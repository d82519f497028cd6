//! Streaming moderation filter: comments in from Kafka, the probability that each is hateful and a decision out.
//!
//! The modules are listed from the bottom up: each one uses only modules above it in this list, and
//! `tests/it/layers.rs` fails on a `use` that points the other way.
//!
//! | layer | modules |
//! |---|---|
//! | the ground | [`fault`], [`hash`], [`message`], [`config`], [`ops`], [`kafka`] |
//! | the model | [`scorer`] (the seam), [`prompt`], [`model`], [`classifier`] |
//! | the stream | [`decide`], [`stream`] |
//! | changing what serves | [`registry`], [`serving`], [`retrain`] |
//! | the commands | [`cli`] |

pub mod fault;
pub mod hash;
pub mod message;
pub mod config;
pub mod ops;
pub mod kafka;

pub mod scorer;
pub mod prompt;
pub mod model;
pub mod classifier;

pub mod decide;
pub mod stream;

pub mod registry;
pub mod serving;
pub mod retrain;

pub mod cli;
