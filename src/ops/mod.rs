//! Makes a running daemon observable: its log, metrics and health checks over HTTP, and notifications to systemd.

pub mod health;
pub(crate) mod http;
pub mod log;
pub mod metrics;
pub(crate) mod notify;
