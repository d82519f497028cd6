//! One set of weights and one description of the layers.
//!
//! [`config`] describes the architecture, [`files`] reads and checks checkpoints and adapters, [`transfer`] moves data
//! between host and device, [`device`] chooses where and in which dtype the model computes, [`forward`] computes logits
//! over packed rows with the [`kernels`], and [`training`] adds the backward pass. Knows no prompt and no stage. Everything wrong with a file becomes a
//! [`Fault`](crate::fault::Fault) that names the file, the thing, what was found and what was expected.

pub mod config;
pub mod files;
pub mod transfer;
pub mod kernels;
pub mod device;
pub mod forward;
pub mod training;
