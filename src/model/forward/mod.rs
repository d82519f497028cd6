//! The forward pass over packed rows, and the loading of its weights.

mod delta;
#[cfg(test)]
mod frozen;
pub mod linear;
pub(crate) mod rope;
pub(crate) mod packing;
#[cfg(test)]
pub(crate) mod memory_limit;
#[cfg(feature = "cuda")]
pub(in crate::model) mod gpu;
pub mod gemma;
pub mod load;
mod mlp;
