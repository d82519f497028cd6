//! What the outside sees of a running daemon: its log, metrics and health over HTTP, and readiness and liveness
//! for systemd.

pub mod health;
pub mod http;
pub mod log;
pub mod metrics;
pub mod notify;
