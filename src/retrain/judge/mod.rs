//! Calibrates a challenger, derives its thresholds, and compares it with the champion.

mod sampling;
mod logistic;
pub(crate) mod scale;
pub mod calibration;
pub mod evaluation;
pub mod thresholds;
pub(crate) mod measure;
pub mod gate;
