//! Makes a running daemon observable: its log, metrics and health checks over HTTP, and notifications to systemd; and
//! sets up its process and signals.

pub(crate) mod announce;
pub mod health;
pub(crate) mod http;
pub mod log;
pub mod memory;
pub mod metrics;
pub mod work;
pub(crate) mod notify;
pub mod process;
mod process_metrics;
pub(crate) mod signals;
