//! A better adapter from labelled feedback.
//!
//! [`data`] gathers and splits labelled rows, [`train`] fits an adapter, [`judge`] calibrates and compares it with the
//! version in service, [`report`] explains the outcome to people, and [`session`] runs them in that order.

pub mod data;
pub mod train;
pub mod judge;
pub mod report;
pub mod session;
