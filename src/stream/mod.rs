//! The stream: reads comments from Kafka, scores them, and writes decisions and dead letters with the offsets they
//! cover.
//!
//! There are four stages, each a thread that is built and run in the same way: `ingest` reads records, `encode` turns
//! events into rows, `score` computes their margins, and `emit` writes the outputs and commits. Bounded channels join
//! them. A stage depends only on the shared modules that are declared above the stages, never on another stage;
//! [`pipeline`] puts them together.

pub mod control;
mod ownership;
mod in_flight;
pub(crate) mod text_key;
mod record;
pub(crate) mod cache;
mod offsets;
mod committed;
mod status;
pub mod batch;
pub(crate) mod hand_over;
mod rebalance;
pub mod decode;
mod group;

mod ingest;
mod encode;
pub mod score;
mod emit;

pub mod pipeline;
