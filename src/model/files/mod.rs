//! The files of a model: checkpoints in Hugging Face layout, the bundled checkpoint, and adapters in PEFT's layout.

pub(crate) mod tensor_file;
pub mod bundled;
pub mod checkpoint;
pub mod lora;
