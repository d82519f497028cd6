//! Settings: defaults, then the file, then the environment, into one validated [`Config`].

use std::path::PathBuf;

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU where the build and the machine have one, else the CPU, said loudly.
    Auto,
    /// The CPU.
    Cpu,
    /// This CUDA device or an error.
    Cuda(usize),
}

/// How frozen weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantize {
    /// As they are computed with.
    None,
    /// Blocks of 32 eight-bit integers with one scale.
    Q8_0,
}

/// The model to serve.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Folder in Hugging Face layout: `config.json`, `tokenizer.json`, safetensors.
    pub path: PathBuf,
    /// Folder in PEFT layout, or the bare base.
    pub adapter: Option<PathBuf>,
    /// Where it runs.
    pub device: DeviceChoice,
    /// How frozen weights are held.
    pub quantize: Quantize,
}

/// The frame around a comment.
#[derive(Debug, Clone)]
pub struct PromptConfig {
    /// The two labels, in the order in which the instructions list them.
    pub labels: [String; 2],
    /// Which of the two means hateful.
    pub hateful_label: String,
    /// What stands before the first separator; `{labels}` becomes the labels, joined by a comma.
    pub instructions: String,
    /// Stands between the parts of the frame.
    pub separator: String,
    /// Normalise comments before they are tokenised.
    pub normalize: bool,
    /// Tokens of comment text in one window.
    pub max_window_tokens: usize,
    /// Windows scored of one comment; a longer one is forced to at least review.
    pub max_windows: usize,
}
