//! Configures Kafka clients, classifies their errors, checks topics, reads topics once and runs the embedded broker.
//!
//! The clients that read comments and write decisions belong to the stages of [`crate::stream`].

pub(crate) mod errors;
pub mod client;
pub(crate) mod log;
pub(crate) mod describe;
pub(crate) mod group_members;
pub mod topic_limits;
pub mod topics;
pub(crate) mod snapshot;
pub(crate) mod feedback;
pub mod embedded;

pub(crate) use client::properties_faults;
pub(crate) use log::QuietContext;
