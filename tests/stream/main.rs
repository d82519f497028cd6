//! Tests of the whole stream: they write input records and check the outputs that a reader of committed records sees.
//!
//! The tests run on the embedded broker, with at-least-once delivery. If `MODERATORD_TEST_BROKERS` is set, they run on
//! that Apache Kafka broker instead, with exactly-once delivery. Tests that need Apache Kafka are ignored by default;
//! `tests/kafka/suite` starts a broker and runs all of them.

#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test")]

#[path = "../common/mod.rs"]
mod common;

mod broker;
mod cluster;
mod daemon;

mod apache;
mod duplicates;
mod failures;
mod flow;
mod limits;
mod membership;
mod outages;
mod process;
mod readiness;
mod requests;
mod retrain;

#[path = "../soak/mod.rs"]
mod soak;
