//! The architecture as data: one [`GemmaConfig`] for Gemma 1, 2 and 3 (text), read from the
//! checkpoint's `config.json`.
//!
//! Published checkpoints and those that transformers 5 writes describe the same model in different
//! words (flat `rope_theta` or nested `rope_parameters`; `sliding_window_pattern` or
//! `layer_types`); both are understood. What the engine does not compute is refused by name.

mod read;

use std::path::Path;

use crate::fault::Faults;

/// Which published architecture the checkpoint has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `gemma`: Gemma 1.
    Gemma,
    /// `gemma2`: soft-caps, alternating windows, norms after each block.
    Gemma2,
    /// `gemma3_text`: QK norm, local and global RoPE.
    Gemma3,
}

impl Family {
    /// The `model_type` of `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Gemma => "gemma",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3_text",
        }
    }

    /// Whether blocks norm their outputs too (`pre_` and `post_feedforward_layernorm`).
    pub fn has_post_norms(self) -> bool {
        self != Self::Gemma
    }

    /// Whether queries and keys are normed per head.
    pub fn has_qk_norm(self) -> bool {
        self == Self::Gemma3
    }
}

/// Rotary position embedding of one kind of layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Positions are divided by this (linear scaling); 1 for none.
    pub factor: f64,
}

/// What distinguishes one layer from another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerConfig {
    /// A query sees itself and the `window - 1` tokens before it; `None`: all before it.
    pub window: Option<usize>,
    /// The layer's rotary embedding.
    pub rope: Rope,
}

/// A Gemma text decoder, as data.
#[derive(Debug, Clone, PartialEq)]
pub struct GemmaConfig {
    /// The architecture.
    pub family: Family,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Queries are multiplied by this: `query_pre_attn_scalar^-0.5`, in Gemma 1 `head_dim^-0.5`.
    pub query_scale: f64,
    /// Attention scores become `cap * tanh(score / cap)`.
    pub attn_logit_softcapping: Option<f64>,
    /// Logits become `cap * tanh(logit / cap)`.
    pub final_logit_softcapping: Option<f64>,
    /// Positions the checkpoint was made for.
    pub max_position_embeddings: usize,
    /// Whether the unembedding is the embedding.
    pub tie_word_embeddings: bool,
    /// One entry a layer, first to last.
    pub layers: Vec<LayerConfig>,
}

impl GemmaConfig {
    /// Reads the text of a `config.json`; `file` is only named in errors.
    ///
    /// # Errors
    /// All faults found: an architecture we do not compute, a field missing or out of range.
    pub fn parse(file: &Path, text: &str) -> Result<Self, Faults> {
        read::read(file, text)
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// `sqrt(hidden_size)`: what embeddings are multiplied by.
    pub fn embedding_scale(&self) -> f64 {
        (self.hidden_size as f64).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<GemmaConfig, Faults> {
        GemmaConfig::parse(Path::new("config.json"), text)
    }

    fn fixture(path: &str) -> GemmaConfig {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path);
        parse(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn both_styles_of_config_describe_the_same_model() {
        for folder in ["gemma", "gemma2", "gemma3", "gemma3_linear8"] {
            let published = fixture(&format!("{folder}/config.json"));
            let variant = if folder == "gemma" {
                "config_legacy_gelu.json"
            } else {
                "config_transformers5.json"
            };
            assert_eq!(published, fixture(&format!("{folder}/{variant}")), "{folder}");
        }
    }

    #[test]
    fn layers_are_data() {
        let windows = |path| {
            fixture(path)
                .layers
                .iter()
                .map(|layer| layer.window)
                .collect::<Vec<_>>()
        };
        assert_eq!(windows("gemma/config.json"), [None; 3]);
        assert_eq!(windows("gemma2/config.json"), [Some(16), None, Some(16), None]);
        assert_eq!(windows("gemma3_linear8/config.json"), [Some(16), Some(16), None]);
        let global = fixture("gemma3_linear8/config.json").layers[2];
        assert_eq!(
            global.rope,
            Rope {
                theta: 1e6,
                factor: 8.0
            }
        );
    }

    #[test]
    fn a_multimodal_config_is_read_through_its_text_part() {
        let config = parse(
            r#"{"model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
                "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}}"#,
        )
        .unwrap();
        assert_eq!(
            (config.num_layers(), config.head_dim, config.vocab_size),
            (34, 256, 262_208)
        );
        assert_eq!(
            config.layers[5],
            LayerConfig {
                window: None,
                rope: Rope {
                    theta: 1e6,
                    factor: 8.0
                }
            }
        );
        assert_eq!(
            config.layers[0],
            LayerConfig {
                window: Some(1024),
                rope: Rope {
                    theta: 1e4,
                    factor: 1.0
                }
            }
        );
    }

    #[test]
    fn all_faults_are_reported_together() {
        let text = r#"{"model_type": "gemma", "vocab_size": 0, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 4000000000, "num_attention_heads": 4, "num_key_value_heads": 3, "head_dim": 33,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "hidden_act": "relu", "rope_theta": -1,
            "attention_bias": true}"#;
        let text = parse(text).unwrap_err().to_string();
        for part in [
            "`vocab_size` is 0, expected 1 to",
            "`num_hidden_layers` is 4000000000, expected 1 to 512",
            "`num_key_value_heads` is 3, expected a divisor of 4",
            "`head_dim` is 33, expected an even number",
            "`hidden_act` is Relu",
            "`rope_theta` is -1",
            "`attention_bias` is true",
        ] {
            assert!(text.contains(part), "{part} not in\n{text}");
        }
    }

    #[test]
    fn an_unknown_architecture_is_named() {
        for (text, found) in [
            (r#"{"model_type": "llama"}"#, "`llama`"),
            ("{}", "nothing"),
            ("[", "not JSON"),
        ] {
            let text = parse(text).unwrap_err().to_string();
            assert!(text.contains(found), "{text}");
        }
    }
}
