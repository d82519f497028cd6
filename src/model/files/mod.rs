//! The files of a model: checkpoints in Hugging Face layout, the bundled checkpoint, and adapters in PEFT's layout.

mod formats;
pub(crate) mod tensor_file;
mod contents;
mod sentencepiece;
pub mod bundled;
pub mod checkpoint;
pub mod lora;
