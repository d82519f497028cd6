//! Reads a [`GemmaConfig`] from the text of a `config.json` and reports every fault in it.
//!
//! A missing field has the default of its class in transformers 5.24 (`GemmaConfig`, `Gemma2Config`,
//! `Gemma3TextConfig`), and a field that transformers does not read for a family is not read here either.

use std::path::Path;

use serde_json::{Map, Value};

use super::fields::{Fields, shown};
use super::{Family, GemmaConfig, LayerConfig};
use crate::fault::{Fault, Faults};

/// Far above any published checkpoint. Limits how much memory the numbers of a hostile file can make us allocate.
const MAX_DIMENSION: usize = 1 << 20;
const MAX_LAYERS: usize = 512;
const MAX_HEADS: usize = 4096;
const MAX_POSITIONS: usize = (u16::MAX as usize) << 8;

/// The defaults that differ between families.
struct Defaults {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    max_position_embeddings: usize,
    final_logit_softcapping: Option<f64>,
    attn_logit_softcapping: Option<f64>,
}

impl Family {
    fn defaults(self) -> Defaults {
        match self {
            Self::Gemma => Defaults {
                vocab_size: 256_000,
                hidden_size: 3072,
                intermediate_size: 24_576,
                num_hidden_layers: 28,
                num_attention_heads: 16,
                num_key_value_heads: 16,
                max_position_embeddings: 8192,
                final_logit_softcapping: None,
                attn_logit_softcapping: None,
            },
            Self::Gemma2 => Defaults {
                vocab_size: 256_000,
                hidden_size: 2304,
                intermediate_size: 9216,
                num_hidden_layers: 26,
                num_attention_heads: 8,
                num_key_value_heads: 4,
                max_position_embeddings: 8192,
                final_logit_softcapping: Some(30.0),
                attn_logit_softcapping: Some(50.0),
            },
            Self::Gemma3 => Defaults {
                vocab_size: 262_208,
                max_position_embeddings: 131_072,
                final_logit_softcapping: None,
                attn_logit_softcapping: None,
                ..Self::Gemma2.defaults()
            },
        }
    }
}

pub(super) fn read(file: &Path, text: &str) -> Result<GemmaConfig, Faults> {
    let json: Value = serde_json::from_str(text).map_err(|error| Fault::file(file, format!("not JSON: {error}")))?;
    let Some(top) = json.as_object() else {
        return Err(Fault::file(file, format!("is {}, expected an object", shown(&json))).into());
    };
    let mut faults = Faults::default();
    let nested = faults.collect(text_config(file, top));
    let mut fields = Fields::new(file, top);
    let outputs = fields.outputs();
    check_plain_weights(&mut fields);
    let Some(nested) = nested else {
        faults.extend(fields.faults);
        return Err(faults);
    };
    // A multimodal checkpoint has its own flag, and that of its text decoder means nothing: the decoder has no
    // unembedding.
    let tie_word_embeddings = match nested {
        Some(_) if fields.get("tie_word_embeddings") == Some(&Value::Null) => false,
        _ => fields.flag("tie_word_embeddings", true),
    };
    faults.extend(fields.faults);
    let mut reader = ConfigReader {
        fields: Fields::new(file, nested.unwrap_or(top)),
        is_nested: nested.is_some(),
    };
    let config = reader.read();
    faults.extend(reader.fields.faults);
    match config {
        Some(config) if faults.is_empty() => Ok(GemmaConfig {
            tie_word_embeddings,
            // A classification head has no cap.
            final_logit_softcapping: config.final_logit_softcapping.filter(|_| outputs.classifier.is_none()),
            outputs,
            ..config
        }),
        _ => Err(faults),
    }
}

/// Returns the config of the text decoder in a multimodal checkpoint, which nests it, or `None` in one of text alone.
fn text_config<'a>(file: &Path, top: &'a Map<String, Value>) -> Result<Option<&'a Map<String, Value>>, Fault> {
    let nests = top.get("model_type").and_then(Value::as_str) == Some("gemma3");
    match top.get("text_config") {
        Some(Value::Object(nested)) if nests => Ok(Some(nested)),
        found if nests => {
            let found = found.map_or_else(|| "missing".to_owned(), shown);
            let text = format!("`text_config` is {found}, expected the config of the text decoder in a `gemma3`");
            Err(Fault::file(file, text))
        }
        Some(value) if !value.is_null() => {
            let found = top.get("model_type").map_or_else(|| "missing".to_owned(), shown);
            let text = format!("`model_type` is {found} beside `text_config`, expected \"gemma3\"");
            Err(Fault::file(file, text))
        }
        _ => Ok(None),
    }
}

/// Reports weights that are not stored as numbers.
fn check_plain_weights(fields: &mut Fields<'_>) {
    if fields.set("quantization_config").is_some() {
        fields.fault("`quantization_config` is set, expected plain weights: quantised checkpoints are not supported");
    }
}

/// Reads the config of a text decoder.
struct ConfigReader<'a> {
    fields: Fields<'a>,
    /// Whether the decoder belongs to a multimodal checkpoint.
    is_nested: bool,
}

impl ConfigReader<'_> {
    fn fault(&mut self, text: impl Into<String>) {
        self.fields.fault(text);
    }

    fn family(&mut self) -> Option<Family> {
        let found = match self.fields.get("model_type") {
            Some(Value::String(name)) => match name.as_str() {
                "gemma" if !self.is_nested => return Some(Family::Gemma),
                "gemma2" if !self.is_nested => return Some(Family::Gemma2),
                "gemma3_text" => return Some(Family::Gemma3),
                name => format!("`{name}`"),
            },
            None if self.is_nested => return Some(Family::Gemma3),
            None => "missing".to_owned(),
            Some(other) => shown(other),
        };
        if self.is_nested {
            self.fault(format!("`text_config.model_type` is {found}, expected `gemma3_text`"));
        } else {
            self.fault(format!(
                "`model_type` is {found}, expected `gemma`, `gemma2` or `gemma3_text`"
            ));
        }
        None
    }

    /// Returns the config, with what the top level of the file decides left at its default.
    fn read(&mut self) -> Option<GemmaConfig> {
        let family = self.family()?;
        self.check_supported(family);
        let defaults = family.defaults();
        let layers = self
            .fields
            .dimension("num_hidden_layers", defaults.num_hidden_layers, MAX_LAYERS);
        let fields = &mut self.fields;
        let head_dim = fields.dimension("head_dim", 256, MAX_HEADS);
        let config = GemmaConfig {
            family,
            vocab_size: fields.dimension("vocab_size", defaults.vocab_size, MAX_DIMENSION),
            hidden_size: fields.dimension("hidden_size", defaults.hidden_size, MAX_DIMENSION),
            intermediate_size: fields.dimension("intermediate_size", defaults.intermediate_size, MAX_DIMENSION),
            num_attention_heads: fields.dimension("num_attention_heads", defaults.num_attention_heads, MAX_HEADS),
            num_key_value_heads: fields.dimension("num_key_value_heads", defaults.num_key_value_heads, MAX_HEADS),
            head_dim,
            rms_norm_eps: fields.positive("rms_norm_eps", 1e-6),
            query_scale: match family {
                Family::Gemma => (head_dim as f64).powf(-0.5),
                _ => fields.positive("query_pre_attn_scalar", 256.0).powf(-0.5),
            },
            attn_logit_softcapping: match family {
                // transformers does not pass the cap of a Gemma 3 to its attention, and Gemma 1 has none.
                Family::Gemma | Family::Gemma3 => None,
                Family::Gemma2 => fields.cap("attn_logit_softcapping", defaults.attn_logit_softcapping),
            },
            final_logit_softcapping: match family {
                Family::Gemma => None,
                // `Gemma3ForConditionalGeneration` has no cap, unlike `Gemma3ForCausalLM`.
                Family::Gemma3 if self.is_nested => None,
                _ => fields.cap("final_logit_softcapping", defaults.final_logit_softcapping),
            },
            max_position_embeddings: fields.dimension(
                "max_position_embeddings",
                defaults.max_position_embeddings,
                MAX_POSITIONS,
            ),
            tie_word_embeddings: true,
            layers: self.layers(family, layers),
            outputs: super::Outputs::default(),
        };
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        if heads % kv_heads != 0 {
            self.fault(format!(
                "`num_key_value_heads` is {kv_heads}, expected a divisor of {heads} query heads"
            ));
        }
        // After another fault, the value is 1.
        if !config.head_dim.is_multiple_of(2) && self.fields.get("head_dim").and_then(Value::as_u64) != Some(0) {
            self.fault(format!("`head_dim` is {}, expected an even number", config.head_dim));
        }
        Some(config)
    }

    /// Reports features that the forward pass does not compute.
    fn check_supported(&mut self, family: Family) {
        // transformers reads the first of these. Published files have both.
        let names = match family {
            Family::Gemma => ["hidden_act", "hidden_activation"],
            _ => ["hidden_activation", "hidden_act"],
        };
        for name in names {
            match self.fields.set(name) {
                None => {}
                Some(Value::String(found)) if found == "gelu_pytorch_tanh" => {}
                // In Gemma 1 checkpoints, "gelu" stands for the tanh form (transformers' GemmaConfig).
                Some(Value::String(found)) if found == "gelu" && family == Family::Gemma => {}
                Some(found) => self.fault(format!("`{name}` is {}, expected `gelu_pytorch_tanh`", shown(found))),
            }
        }
        if self.fields.flag("attention_bias", false) {
            self.fault("`attention_bias` is true, expected false: projections with biases are not supported");
        }
        if self
            .fields
            .set("use_bidirectional_attention")
            .is_some_and(|value| *value != Value::Bool(false))
        {
            self.fault("`use_bidirectional_attention` is set, expected false: only causal decoders are supported");
        }
        if self.is_nested {
            check_plain_weights(&mut self.fields);
        }
    }

    fn layers(&mut self, family: Family, count: usize) -> Vec<LayerConfig> {
        let (global, local) = match family {
            // In Gemma 2, layers with and without a window use the same rope. Gemma 1 has no windows.
            Family::Gemma | Family::Gemma2 => {
                let rope = self.fields.shared_rope();
                (rope, rope)
            }
            Family::Gemma3 => self.fields.ropes_by_layer_type(),
        };
        let sliding = self.sliding_layers(family, count);
        let window = if sliding.contains(&true) {
            self.fields.dimension("sliding_window", 4096, MAX_DIMENSION)
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

    /// Returns for each layer whether it has a window.
    fn sliding_layers(&mut self, family: Family, count: usize) -> Vec<bool> {
        if family == Family::Gemma {
            return vec![false; count];
        }
        match self.fields.set("layer_types") {
            None => {}
            Some(Value::Array(types)) => {
                if types.len() != count {
                    self.fault(format!("`layer_types` has {} entries, expected {count}", types.len()));
                }
                // A longer list is reported above, and a file has room for millions of entries.
                for (index, name) in types.iter().take(count).enumerate() {
                    if name != "sliding_attention" && name != "full_attention" {
                        let name = shown(name);
                        let name = name.trim_matches('"');
                        self.fault(format!(
                            "`layer_types[{index}]` is `{name}`, expected `sliding_attention` or `full_attention`"
                        ));
                    }
                }
                return types.iter().map(|name| name == "sliding_attention").collect();
            }
            Some(other) => self.fault(format!("`layer_types` is {}, expected a list", shown(other))),
        }
        // In Gemma 2, every second layer attends without a window; in Gemma 3, every `pattern`-th layer does.
        // transformers writes the pattern as `_sliding_window_pattern`, which it does not read.
        let pattern = match family {
            Family::Gemma2 => 2,
            _ => self.fields.dimension("sliding_window_pattern", 6, MAX_LAYERS),
        };
        (0..count).map(|layer| (layer + 1) % pattern != 0).collect()
    }
}
