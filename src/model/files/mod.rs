//! Files that hold a model: checkpoints in Hugging Face layout, the bundled one, and PEFT adapters.

pub mod tensor_file;
pub mod bundled;
pub mod checkpoint;
pub mod lora;
