//! A better adapter from labelled feedback.

pub mod calibration;
pub mod dataset;
pub mod evaluation;
pub mod feedback;
pub mod gate;
pub mod gather;
mod logistic;
pub mod measure;
pub mod near_duplicates;
pub mod optimizer;
pub mod peft;
pub mod report;
mod sampling;
pub mod session;
pub mod thresholds;
pub mod trainer;
