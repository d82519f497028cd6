//! The trainer, its optimiser, and the PEFT files that come out.

pub mod optimizer;
pub mod peft;
pub mod trainer;
