//! The Gemma decoder: files, forward pass and training.
//!
//! [`config`] describes the architecture, [`transfer`] moves data between host and device, [`files`] reads and checks
//! checkpoints and adapters, [`device`] chooses the device and dtype, [`forward`] computes logits over packed rows with
//! the [`kernels`] and the `products`, and [`training`] adds the backward pass. Nothing here depends on prompts or on stages of the
//! stream. Each problem with a file becomes a [`Fault`](crate::fault::Fault) that names the file, what was found
//! and what was expected.

pub mod config;
pub mod transfer;
pub mod files;
pub mod kernels;
mod products;
pub mod device;
pub mod forward;
pub mod training;
