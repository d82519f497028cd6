//! Reads a [`GemmaConfig`] from the text of a `config.json` and reports every fault in it.

use std::path::Path;

use candle_nn::Activation;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Family, GemmaConfig, LayerConfig, Rope};
use crate::fault::{Fault, Faults};

/// Far above any published checkpoint. Limits how much memory the numbers of a hostile file can make us allocate.
const MAX_DIMENSION: usize = 1 << 20;
const MAX_LAYERS: usize = 512;

/// The fields of `config.json`, as published or as written by transformers 5.
#[derive(Debug, Deserialize)]
struct RawModelConfig {
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: Option<f64>,
    max_position_embeddings: Option<usize>,
    hidden_act: Option<Activation>,
    hidden_activation: Option<Activation>,
    rope_theta: Option<f64>,
    rope_local_base_freq: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<Value>,
    query_pre_attn_scalar: Option<f64>,
    sliding_window: Option<usize>,
    sliding_window_pattern: Option<usize>,
    #[serde(rename = "_sliding_window_pattern")]
    private_sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    attention_bias: Option<bool>,
    use_bidirectional_attention: Option<Value>,
    tie_word_embeddings: Option<bool>,
    quantization_config: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
}

pub(super) fn read(file: &Path, text: &str) -> Result<GemmaConfig, Faults> {
    let mut json: Value =
        serde_json::from_str(text).map_err(|error| Fault::file(file, format!("not JSON: {error}")))?;
    // A multimodal checkpoint nests the config of its text decoder and omits values that equal the defaults of
    // transformers' Gemma3TextConfig.
    if let Some(nested) = json.get_mut("text_config").map(Value::take) {
        json = with_text_defaults(nested);
    }
    let raw: RawModelConfig =
        serde_json::from_value(json).map_err(|error| Fault::file(file, format!("cannot read: {error}")))?;
    ConfigReader {
        file,
        faults: Faults::default(),
    }
    .read(&raw)
}

/// Adds the defaults of transformers' `Gemma3TextConfig` to a nested config, where they may be omitted.
fn with_text_defaults(mut nested: Value) -> Value {
    let defaults = serde_json::json!({
        "model_type": "gemma3_text", "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072, "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
        "sliding_window": 4096, "sliding_window_pattern": 6,
    });
    if let (Some(nested), Some(defaults)) = (nested.as_object_mut(), defaults.as_object()) {
        for (key, value) in defaults {
            nested.entry(key.clone()).or_insert_with(|| value.clone());
        }
    }
    nested
}

/// Collects every fault instead of stopping at the first.
struct ConfigReader<'a> {
    file: &'a Path,
    faults: Faults,
}

impl ConfigReader<'_> {
    fn fault(&mut self, text: impl Into<String>) {
        self.faults.push(Fault::file(self.file, text));
    }

    fn read(mut self, raw: &RawModelConfig) -> Result<GemmaConfig, Faults> {
        let family = match raw.model_type.as_deref() {
            Some("gemma") => Family::Gemma,
            Some("gemma2") => Family::Gemma2,
            Some("gemma3_text" | "gemma3") => Family::Gemma3,
            found => {
                let found = found.map_or("missing".to_owned(), |name| format!("`{name}`"));
                self.fault(format!(
                    "`model_type` is {found}, expected `gemma`, `gemma2` or `gemma3_text`"
                ));
                return Err(self.faults);
            }
        };
        self.check_supported(raw, family);
        let layers = self.dimension("num_hidden_layers", raw.num_hidden_layers, MAX_LAYERS);
        let config = GemmaConfig {
            family,
            vocab_size: self.dimension("vocab_size", raw.vocab_size, MAX_DIMENSION),
            hidden_size: self.dimension("hidden_size", raw.hidden_size, MAX_DIMENSION),
            intermediate_size: self.dimension("intermediate_size", raw.intermediate_size, MAX_DIMENSION),
            num_attention_heads: self.dimension("num_attention_heads", raw.num_attention_heads, 4096),
            num_key_value_heads: self.dimension("num_key_value_heads", raw.num_key_value_heads, 4096),
            head_dim: self.dimension("head_dim", raw.head_dim, 4096),
            rms_norm_eps: self.positive("rms_norm_eps", raw.rms_norm_eps),
            query_scale: match family {
                Family::Gemma => (raw.head_dim.unwrap_or(1) as f64).powf(-0.5),
                _ => self
                    .positive("query_pre_attn_scalar", raw.query_pre_attn_scalar)
                    .powf(-0.5),
            },
            attn_logit_softcapping: self.cap("attn_logit_softcapping", raw.attn_logit_softcapping),
            final_logit_softcapping: self.cap("final_logit_softcapping", raw.final_logit_softcapping),
            max_position_embeddings: self.dimension(
                "max_position_embeddings",
                raw.max_position_embeddings,
                usize::from(u16::MAX) << 8,
            ),
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(true),
            layers: self.layers(raw, family, layers),
        };
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        if kv_heads > 0 && heads % kv_heads != 0 {
            self.fault(format!(
                "`num_key_value_heads` is {kv_heads}, expected a divisor of {heads} query heads"
            ));
        }
        if !config.head_dim.is_multiple_of(2) {
            self.fault(format!("`head_dim` is {}, expected an even number", config.head_dim));
        }
        if self.faults.is_empty() {
            Ok(config)
        } else {
            Err(self.faults)
        }
    }

    /// Reports features that the forward pass does not compute.
    fn check_supported(&mut self, raw: &RawModelConfig, family: Family) {
        let with_key = |key, activation: Option<Activation>| activation.map(|found| (key, found));
        let found = with_key("hidden_activation", raw.hidden_activation).or(with_key("hidden_act", raw.hidden_act));
        match found {
            Some((_, Activation::GeluPytorchTanh)) => {}
            // In Gemma 1 checkpoints, "gelu" stands for the tanh form (transformers' GemmaMLP).
            Some((_, Activation::Gelu)) if family == Family::Gemma => {}
            Some((key, found)) => self.fault(format!("`{key}` is {}, expected `gelu_pytorch_tanh`", json!(found))),
            None => self.fault("`hidden_activation` is missing, expected `gelu_pytorch_tanh`"),
        }
        if raw.attention_bias == Some(true) {
            self.fault("`attention_bias` is true, expected false: projections with biases are not supported");
        }
        if raw
            .use_bidirectional_attention
            .as_ref()
            .is_some_and(|value| !matches!(value, Value::Null | Value::Bool(false)))
        {
            self.fault("`use_bidirectional_attention` is set, expected false: only causal decoders are supported");
        }
        if raw.quantization_config.as_ref().is_some_and(|value| !value.is_null()) {
            self.fault("`quantization_config` is set, expected plain weights: quantised checkpoints are not supported");
        }
    }

    fn dimension(&mut self, name: &str, value: Option<usize>, max: usize) -> usize {
        match value {
            Some(value) if (1..=max).contains(&value) => value,
            Some(value) => {
                self.fault(format!("`{name}` is {value}, expected 1 to {max}"));
                1
            }
            None => {
                self.fault(format!("`{name}` is missing, expected 1 to {max}"));
                1
            }
        }
    }

    /// The decoder computes in f32, in which the smallest and the largest numbers of a file would be 0 or infinite.
    fn positive(&mut self, name: &str, value: Option<f64>) -> f64 {
        match value {
            Some(value) if value > 0.0 && (value as f32).is_normal() => value,
            found => {
                let found = found.map_or("missing".to_owned(), |value| format!("{value:?}"));
                self.fault(format!(
                    "`{name}` is {found}, expected a number above 0 in the range of f32"
                ));
                1.0
            }
        }
    }

    fn cap(&mut self, name: &str, value: Option<f64>) -> Option<f64> {
        value.map(|_| self.positive(name, value))
    }

    fn layers(&mut self, raw: &RawModelConfig, family: Family, count: usize) -> Vec<LayerConfig> {
        let global = self.rope(raw, "full_attention", raw.rope_theta, raw.rope_scaling.as_ref());
        let local = match family {
            // In Gemma 2, layers with and without a window use the same RoPE. Gemma 1 has no windows.
            Family::Gemma | Family::Gemma2 => global,
            Family::Gemma3 => self.rope(raw, "sliding_attention", raw.rope_local_base_freq, None),
        };
        let sliding = self.sliding_layers(raw, family, count);
        let window = if sliding.contains(&true) {
            self.dimension("sliding_window", raw.sliding_window, MAX_DIMENSION)
        } else {
            0
        };
        let layer = |&sliding: &bool| match sliding {
            true => LayerConfig {
                window: Some(window),
                rope: local,
            },
            false => LayerConfig {
                window: None,
                rope: global,
            },
        };
        sliding.iter().map(layer).collect()
    }

    /// Returns the RoPE of one layer type. It comes from `rope_parameters` if that field is set (transformers 5; flat
    /// or nested by layer type), and from the flat fields of published checkpoints otherwise.
    fn rope(&mut self, raw: &RawModelConfig, layer_type: &str, theta: Option<f64>, scaling: Option<&RawRope>) -> Rope {
        let nested = raw
            .rope_parameters
            .as_ref()
            .map(|value| value.get(layer_type).unwrap_or(value).clone());
        let nested: Option<RawRope> = match nested.map(serde_json::from_value).transpose() {
            Ok(nested) => nested,
            Err(error) => {
                self.fault(format!("`rope_parameters` cannot be read: {error}"));
                None
            }
        };
        let name = if layer_type == "full_attention" {
            "rope_theta"
        } else {
            "rope_local_base_freq"
        };
        let theta = nested.as_ref().and_then(|rope| rope.rope_theta).or(theta);
        let theta = self.positive(name, theta);
        let scaling = nested.as_ref().or(scaling);
        let factor = match scaling.and_then(|rope| rope.rope_type.as_deref()) {
            None | Some("default") => 1.0,
            Some("linear") => self.positive("rope factor", scaling.and_then(|rope| rope.factor)),
            Some(other) => {
                self.fault(format!("`rope_type` is `{other}`, expected `default` or `linear`"));
                1.0
            }
        };
        Rope { theta, factor }
    }

    /// Returns for each layer whether it has a window.
    fn sliding_layers(&mut self, raw: &RawModelConfig, family: Family, count: usize) -> Vec<bool> {
        if family == Family::Gemma {
            return vec![false; count];
        }
        if let Some(types) = &raw.layer_types {
            if types.len() != count {
                self.fault(format!("`layer_types` has {} entries, expected {count}", types.len()));
            }
            // A longer list is reported above, and a file has room for millions of entries.
            for (index, name) in types.iter().take(count).enumerate() {
                if name != "sliding_attention" && name != "full_attention" {
                    self.fault(format!(
                        "`layer_types[{index}]` is `{name}`, expected `sliding_attention` or `full_attention`"
                    ));
                }
            }
            return types.iter().map(|name| name == "sliding_attention").collect();
        }
        // In Gemma 2, every second layer attends without a window; in Gemma 3, every `pattern`-th layer does.
        let pattern = match family {
            Family::Gemma2 => Some(2),
            _ => raw.sliding_window_pattern.or(raw.private_sliding_window_pattern),
        };
        let pattern = self.dimension("sliding_window_pattern", pattern, MAX_LAYERS);
        (0..count).map(|layer| (layer + 1) % pattern != 0).collect()
    }
}
