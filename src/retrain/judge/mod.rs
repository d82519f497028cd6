//! Whether a challenger is better, and how its margins become probabilities and bands.

mod sampling;
mod logistic;
pub mod calibration;
pub mod evaluation;
pub mod thresholds;
pub mod measure;
pub mod gate;
