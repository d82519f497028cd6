//! Labelled rows: read from feedback, and split into parts that do not leak into each other.

pub mod near_duplicates;
pub mod feedback;
pub mod dataset;
pub mod gather;
