//! A better adapter from labelled feedback.

pub mod dataset;
pub mod evaluation;
pub mod feedback;
pub mod near_duplicates;
pub mod optimizer;
pub mod peft;
pub mod trainer;
