//! Streaming moderation filter: comments in from Kafka, the probability that each is hateful and a
//! decision out.
//!
//! The modules stand in reading order: what travels ([`message`]), then each stage on its way.

pub mod cli;
pub mod config;
pub mod message;
pub mod telemetry;

pub mod kafka;
pub mod stream;

pub mod ingest;

pub mod batch;
pub mod decode;
pub mod encode;
pub mod prompt;

pub mod model;
pub mod ops;
pub mod registry;
pub mod retrain;
pub mod score;

pub mod decide;
pub mod emit;

pub mod pipeline;
pub mod serving;
