//! How the brokers are reached: client settings, topics, error codes, one-time reads, and the embedded broker.
//!
//! The clients that read and write records live in the stages of [`crate::stream`].

pub mod errors;
pub mod client;
pub(crate) mod log;
pub mod describe;
pub mod topics;
pub mod snapshot;
pub mod embedded;

pub use client::{Role, properties_faults};
pub use errors::{ErrorClass, reason};
pub use log::QuietContext;
