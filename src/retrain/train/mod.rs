//! Trains an adapter with AdamW, and writes it in PEFT's file format.

pub mod optimizer;
pub mod peft;
pub mod trainer;
