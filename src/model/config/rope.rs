//! Rotary position embeddings in a `config.json`: `rope_parameters` (transformers 5), and `rope_theta`, `rope_scaling`
//! and `rope_local_base_freq` (published checkpoints). The rules are those of `convert_rope_params_to_dict` in
//! transformers 5.24 (`modeling_rope_utils.py` and `configuration_gemma3.py`).

use serde_json::{Map, Value};

use super::Rope;
use super::fields::{Fields, shown};

/// The base of Gemma 1 and 2, and of the windowed layers of Gemma 3.
const THETA: f64 = 10_000.0;
/// The base of the layers of Gemma 3 without a window.
const GLOBAL_THETA: f64 = 1_000_000.0;
/// The keys of `rope_parameters` in Gemma 3.
const LAYER_TYPES: [&str; 2] = ["full_attention", "sliding_attention"];

/// The fields of one rope, by name.
type Parameters = Map<String, Value>;

impl Fields<'_> {
    /// Returns the rope of all layers of a Gemma 1 or 2, whose `rope_parameters` are flat. `rope_scaling` replaces them.
    pub(super) fn shared_rope(&mut self) -> Rope {
        let nested = |parameters: &Parameters| LAYER_TYPES.iter().any(|name| parameters.contains_key(*name));
        let parameters = match self.object("rope_scaling") {
            Some(scaling) if !scaling.is_empty() => scaling,
            _ => self.object("rope_parameters").unwrap_or_default(),
        };
        if nested(&parameters) {
            self.fault("`rope_parameters` is nested by layer type, expected the parameters themselves in this family");
        }
        self.rope(&parameters, "rope_theta", THETA)
    }

    /// Returns the ropes of a Gemma 3: that of layers without a window, and that of layers with one.
    ///
    /// transformers ignores `rope_parameters` that are not nested by layer type. If they differ from what it computes
    /// with, they are a fault, because the layers may have been trained with either.
    pub(super) fn ropes_by_layer_type(&mut self) -> (Rope, Rope) {
        let parameters = self.object("rope_parameters");
        let part = |name: &str| parameters.as_ref().and_then(|parameters| parameters.get(name));
        let (full, sliding) = (part("full_attention").cloned(), part("sliding_attention").cloned());
        let mut full = self.parameters("rope_parameters.full_attention", full);
        let sliding = self.parameters("rope_parameters.sliding_attention", sliding);
        if let Some(scaling) = self.object("rope_scaling") {
            // transformers adds a type that is spelled `type` to the rope that already has the `rope_type` default, and
            // so computes without scaling.
            let is_ignored = scaling.contains_key("type")
                && !scaling.contains_key("rope_type")
                && full.as_ref().and_then(rope_type).is_none_or(|name| name == "default");
            if is_ignored && scaling.get("type").and_then(Value::as_str) != Some("default") {
                self.fault(format!(
                    "`rope_scaling` is {}, in which transformers ignores `type`: expected `rope_type`",
                    shown(&Value::Object(scaling.clone()))
                ));
            }
            full.get_or_insert_default().extend(scaling);
        }
        let full = self.rope(&full.unwrap_or_default(), "rope_theta", GLOBAL_THETA);
        let sliding = self.rope(&sliding.unwrap_or_default(), "rope_local_base_freq", THETA);
        if let Some(flat) =
            parameters.filter(|parameters| !LAYER_TYPES.iter().any(|name| parameters.contains_key(*name)))
        {
            let ignored = self.rope(&flat, "rope_theta", GLOBAL_THETA);
            if ignored != full {
                self.fault(format!(
                    "`rope_parameters` is {}, which transformers ignores because it is not nested by layer type: \
                     expected `full_attention` and `sliding_attention`",
                    shown(&Value::Object(flat))
                ));
            }
        }
        (full, sliding)
    }

    /// Returns one rope. A base that its parameters do not name is that of the field `theta`, or else the default.
    fn rope(&mut self, parameters: &Parameters, theta: &str, default: f64) -> Rope {
        for values in [
            self.get("partial_rotary_factor"),
            parameters.get("partial_rotary_factor"),
        ] {
            if let Some(value) = values.filter(|value| value.as_f64() != Some(1.0) && !value.is_null()) {
                self.fault(format!(
                    "`partial_rotary_factor` is {}, expected none: heads are rotated as a whole",
                    shown(value)
                ));
            }
        }
        let base = match parameters.get("rope_theta") {
            Some(value) => self.positive_value(theta, value),
            None => self.positive(theta, default),
        };
        let factor = match rope_type(parameters) {
            None | Some("default") => 1.0,
            Some("linear") => {
                let factor = parameters.get("factor").unwrap_or(&Value::Null);
                self.positive_value("rope factor", factor)
            }
            Some(other) => {
                self.fault(format!("`rope_type` is `{other}`, expected `default` or `linear`"));
                1.0
            }
        };
        Rope { theta: base, factor }
    }

    /// Returns a field that is an object, or `None` if it is missing or `null`.
    fn object(&mut self, name: &str) -> Option<Parameters> {
        let value = self.get(name).cloned();
        self.parameters(name, value)
    }

    fn parameters(&mut self, name: &str, value: Option<Value>) -> Option<Parameters> {
        match value {
            None | Some(Value::Null) => None,
            Some(Value::Object(parameters)) => {
                for key in ["rope_type", "type"] {
                    if let Some(value) = parameters.get(key).filter(|value| !value.is_string()) {
                        self.fault(format!(
                            "`{name}.{key}` is {}, expected `default` or `linear`",
                            shown(value)
                        ));
                    }
                }
                Some(parameters)
            }
            Some(other) => {
                self.fault(format!("`{name}` is {}, expected an object", shown(&other)));
                None
            }
        }
    }
}

/// Returns the type of a rope. Of the two spellings, the current one counts.
fn rope_type(parameters: &Parameters) -> Option<&str> {
    parameters
        .get("rope_type")
        .or(parameters.get("type"))
        .and_then(Value::as_str)
}
