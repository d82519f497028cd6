//! One set of weights and one description of the layers.
//!
//! [`config`] says what a checkpoint is, [`checkpoint`] and [`lora`] read and check its files,
//! [`gemma`] computes, [`classifier`] answers: the margin of each row. Every fault in a file becomes
//! a [`Problem`] that names the file, the thing, what was found and what was expected.

pub mod bundled;
pub mod checkpoint;
pub mod classifier;
pub mod config;
mod cross_entropy;
pub mod device;
mod differentiable;
#[cfg(test)]
mod faults;
mod footprint;
pub mod gemma;
pub mod kernels;
mod linear;
mod load;
pub mod lora;
pub mod oracle;
mod packing;
mod problem;
mod random;
mod rope;
pub mod tensor_file;
pub mod training;
mod transfer;

pub use classifier::Classifier;
pub use linear::LoraMode;
pub use load::LoadOptions;
pub use problem::{LoadError, Problem};
pub use transfer::Answer;
