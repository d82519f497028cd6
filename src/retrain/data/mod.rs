//! Reads labelled feedback, and splits it into training, validation and test parts that do not overlap.

pub mod near_duplicates;
pub mod feedback;
pub mod dataset;
pub mod gather;
