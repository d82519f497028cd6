//! The stream, from records in to records out, as a reader of committed records sees it.
//!
//! Runs on the embedded broker, where delivery is at least once; with `MODERATORD_TEST_BROKERS` set on
//! that Apache Kafka, where it is exactly once. Tests that only a real broker can tell are ignored
//! without one: `tests/kafka/suite` starts one and runs them all.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

#[path = "../common/mod.rs"]
mod common;

mod broker;
mod daemon;

mod apache;
mod failures;
mod flow;
mod limits;
mod membership;
mod process;
mod retrain;
