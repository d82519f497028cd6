//! A better adapter from labelled feedback.

pub mod optimizer;
