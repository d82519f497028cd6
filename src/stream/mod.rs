//! The stream: comments in, decisions, dead letters and offsets out.
//!
//! Four stages, each a thread that is built and run the same way: [`ingest`] reads, [`encode`] turns events into
//! rows, [`score`] gives them margins, [`emit`] writes and commits. They are joined by bounded channels and know
//! the types in the modules above them, never one another; [`pipeline`] puts them together.

pub mod control;
pub mod ownership;
pub mod in_flight;
pub mod record;
pub mod offsets;
pub mod committed;
pub mod batch;
pub mod rebalance;
pub mod decode;
pub mod group;

pub mod ingest;
pub mod encode;
pub mod score;
pub mod emit;

pub mod pipeline;
