//! Trains a new adapter on labelled feedback, and decides whether it may replace the one in service.
//!
//! `data` gathers and splits labelled rows, `train` trains an adapter, `judge` calibrates it and compares it with
//! the version in service, `report` writes the outcome as an HTML page, and `session` runs these steps in order.

pub mod data;
pub mod train;
pub mod judge;
pub mod report;
pub(crate) mod session;
