//! What the outside sees of a running daemon: metrics and health over HTTP, readiness and liveness
//! to systemd.

pub mod health;
pub mod http;
pub mod metrics;
pub mod notify;
