//! The forward pass over packed rows, and the loading of its weights.

mod delta;
mod frozen;
pub mod linear;
pub(crate) mod rope;
pub(crate) mod packing;
#[cfg(test)]
pub(crate) mod memory_limit;
pub mod gemma;
pub mod load;
mod mlp;
