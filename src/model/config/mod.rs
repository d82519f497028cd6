//! The architecture as data: one [`GemmaConfig`] for Gemma 1, 2 and 3 (text), read from the checkpoint's `config.json`.
//!
//! Published checkpoints and those written by transformers 5 describe the same model with different fields (flat
//! `rope_theta` or nested `rope_parameters`, `sliding_window_pattern` or `layer_types`). Both forms are accepted.
//! The file is read as transformers 5.24 reads it, and features that the forward pass does not compute are reported as
//! faults.

mod fields;
mod head;
mod read;
mod rope;

use std::path::Path;

pub use head::Outputs;

use crate::config::Projection;
use crate::fault::Faults;

/// The published architecture that a checkpoint has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Gemma 1 (`gemma`).
    Gemma,
    /// Gemma 2 (`gemma2`), which adds soft-caps, sliding windows in every other layer, and norms after each block.
    Gemma2,
    /// Gemma 3 (`gemma3_text`), which adds norms of queries and keys, and separate RoPE for local and global layers.
    Gemma3,
}

impl Family {
    /// Returns the `model_type` that `config.json` uses for this family.
    pub(crate) fn model_type(self) -> &'static str {
        match self {
            Self::Gemma => "gemma",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3_text",
        }
    }

    /// Returns whether the outputs of attention and MLP are normed too (`post_attention_layernorm` and
    /// `post_feedforward_layernorm`).
    pub fn has_post_norms(self) -> bool {
        self != Self::Gemma
    }

    /// Returns whether queries and keys are normed per head.
    pub fn has_qk_norm(self) -> bool {
        self == Self::Gemma3
    }
}

/// The parameters of a rotary position embedding, which layers of one type share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f64,
    /// The divisor of positions (linear scaling), or 1 without scaling.
    pub factor: f64,
}

/// What distinguishes one layer from another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerConfig {
    /// The number of tokens that a query attends to, including its own; `None` if it attends to all tokens up to its
    /// own.
    pub window: Option<usize>,
    /// The rotary position embedding of this layer.
    pub rope: Rope,
}

/// The shape and constants of a Gemma text decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct GemmaConfig {
    /// The architecture, which decides which norms exist and what `config.json` must contain.
    pub family: Family,
    /// The number of rows of the embedding.
    pub vocab_size: usize,
    /// The width of the residual stream.
    pub hidden_size: usize,
    /// The width of the MLP.
    pub intermediate_size: usize,
    /// The number of query heads.
    pub num_attention_heads: usize,
    /// The number of key and value heads, a divisor of the number of query heads.
    pub num_key_value_heads: usize,
    /// The width of a head, an even number.
    pub head_dim: usize,
    /// The number added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// The factor of queries: `query_pre_attn_scalar^-0.5`, or `head_dim^-0.5` in Gemma 1.
    pub query_scale: f64,
    /// If set, attention scores become `cap * tanh(score / cap)`.
    pub attn_logit_softcapping: Option<f64>,
    /// If set, logits become `cap * tanh(logit / cap)`.
    pub final_logit_softcapping: Option<f64>,
    /// The number of positions that the checkpoint supports.
    pub max_position_embeddings: usize,
    /// Whether the embedding also serves as the unembedding, unless the weights contain another one.
    pub tie_word_embeddings: bool,
    /// The outputs of a classification head, if the checkpoint has one.
    pub outputs: Outputs,
    /// The configuration of each layer, first to last.
    pub layers: Vec<LayerConfig>,
}

impl GemmaConfig {
    /// Reads the text of a `config.json`. The path `file` appears only in errors.
    ///
    /// # Errors
    /// Returns every fault found: an unsupported architecture or feature, and each field that is missing or out of
    /// range.
    pub fn parse(file: &Path, text: &str) -> Result<Self, Faults> {
        read::read(file, text)
    }

    /// Returns the number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Returns the factor of embeddings, `sqrt(hidden_size)`.
    pub(crate) fn embedding_scale(&self) -> f64 {
        (self.hidden_size as f64).sqrt()
    }

    /// Returns the number of weights in all linear layers of one decoder layer.
    pub(crate) fn linear_weights_per_layer(&self) -> usize {
        let weights = |projection: Projection| projection.shape(self).iter().product::<usize>();
        Projection::ALL.into_iter().map(weights).sum()
    }
}

impl Projection {
    /// Returns the shape (outputs, inputs) of the weight of this linear layer.
    pub fn shape(self, config: &GemmaConfig) -> [usize; 2] {
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        match self {
            Self::Q => [queries, config.hidden_size],
            Self::K | Self::V => [keys, config.hidden_size],
            Self::O => [config.hidden_size, queries],
            Self::Gate | Self::Up => [config.intermediate_size, config.hidden_size],
            Self::Down => [config.hidden_size, config.intermediate_size],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<GemmaConfig, Faults> {
        GemmaConfig::parse(Path::new("config.json"), text)
    }

    fn fixture(path: &str) -> GemmaConfig {
        let text = std::fs::read_to_string(crate::test_files::test_file("tests/fixtures").join(path)).unwrap();
        parse(&text).unwrap()
    }

    #[test]
    fn published_and_transformers_5_configs_give_the_same_model() {
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
    fn windows_and_ropes_are_read_for_each_layer() {
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

    /// The files are read as transformers 5.24 reads them: what KerasHub exports, and forms of `rope_parameters`.
    #[test]
    fn variants_of_a_config_give_the_same_model() {
        let check = |variant: &str, expected: &str, change: fn(&mut GemmaConfig)| {
            let mut expected = fixture(expected);
            change(&mut expected);
            assert_eq!(
                fixture(&format!("config_variants/{variant}.json")),
                expected,
                "{variant}"
            );
        };
        check("gemma-kerashub-export", "gemma/config.json", |_| ());
        check("gemma3-kerashub-export", "gemma3/config.json", |config| {
            config.max_position_embeddings = 131_072;
        });
        check("gemma3-rope-flat", "gemma3/config.json", |_| ());
        check("gemma3-rope-full-only", "gemma3/config.json", |config| {
            config.layers[2].rope.factor = 8.0;
        });
        check("gemma3_linear8-rope-type-twice", "gemma3_linear8/config.json", |_| ());
    }

    #[test]
    fn missing_fields_have_the_defaults_of_transformers() {
        let config = parse(r#"{"model_type": "gemma2"}"#).unwrap();
        assert_eq!(
            (config.num_layers(), config.hidden_size, config.vocab_size),
            (26, 2304, 256_000)
        );
        assert_eq!(
            (config.attn_logit_softcapping, config.final_logit_softcapping),
            (Some(50.0), Some(30.0))
        );
        let config = parse(r#"{"model_type": "gemma2", "final_logit_softcapping": null}"#).unwrap();
        assert_eq!(config.final_logit_softcapping, None);
        let config =
            parse(r#"{"model_type": "gemma3_text", "attn_logit_softcapping": 9, "_sliding_window_pattern": 2}"#);
        let config = config.unwrap();
        assert_eq!((config.vocab_size, config.attn_logit_softcapping), (262_208, None));
        assert_eq!((config.layers[4].window, config.layers[5].window), (Some(4096), None));
        let config = parse(
            r#"{"model_type": "gemma", "final_logit_softcapping": 3, "rope_scaling": {"type": "linear",
            "factor": 2}}"#,
        );
        let config = config.unwrap();
        assert_eq!(
            (config.num_layers(), config.head_dim, config.final_logit_softcapping),
            (28, 256, None)
        );
        assert_eq!(
            config.layers[0].rope,
            Rope {
                theta: 1e4,
                factor: 2.0
            }
        );
    }

    #[test]
    fn forms_that_transformers_reads_otherwise_are_faults() {
        for (text, part) in [
            (
                r#"{"model_type": "gemma3_text", "rope_parameters": {"rope_type": "linear", "factor": 8}}"#,
                "which transformers ignores because it is not nested",
            ),
            (
                r#"{"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 8}}"#,
                "in which transformers ignores `type`",
            ),
            (
                r#"{"model_type": "gemma2", "rope_parameters": {"full_attention": {"rope_theta": 5}}}"#,
                "nested by layer type",
            ),
            (
                r#"{"model_type": "gemma", "partial_rotary_factor": 0.5}"#,
                "`partial_rotary_factor` is 0.5",
            ),
            (r#"{"model_type": "gemma", "rope_theta": null}"#, "`rope_theta` is null"),
            (r#"{"model_type": "gemma", "head_dim": null}"#, "`head_dim` is null"),
            (r#"{"model_type": "gemma3"}"#, "`text_config` is missing"),
            (
                r#"{"model_type": "gemma3", "text_config": {"model_type": "gemma2"}}"#,
                "`text_config.model_type` is",
            ),
            (
                r#"{"model_type": "gemma", "rope_scaling": {"rope_type": "yarn"}}"#,
                "`rope_type` is `yarn`",
            ),
            (
                r#"{"model_type": "gemma", "tie_word_embeddings": 1}"#,
                "`tie_word_embeddings` is 1",
            ),
        ] {
            let found = parse(text).unwrap_err().to_string();
            assert!(found.contains(part), "{part} not in\n{found}");
        }
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
            "`hidden_act` is \"relu\"",
            "`rope_theta` is -1",
            "`attention_bias` is true",
        ] {
            assert!(text.contains(part), "{part} not in\n{text}");
        }
    }

    #[test]
    fn the_model_type_is_named_if_it_is_unsupported() {
        for (text, found) in [
            (r#"{"model_type": "llama"}"#, "`llama`"),
            ("{}", "`model_type` is missing"),
            ("[", "not JSON"),
        ] {
            let text = parse(text).unwrap_err().to_string();
            assert!(text.contains(found), "{text}");
        }
    }
}
