//! The forward pass over packed rows.

pub mod linear;
pub mod rope;
pub mod packing;
#[cfg(test)]
pub(crate) mod faults;
pub mod gemma;
pub mod load;
mod random;
