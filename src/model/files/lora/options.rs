//! The options of PEFT's `LoraConfig`, each of which is understood, harmless or refused.
//!
//! The lists are those of PEFT 0.21 and of the versions before it. An option in none of the lists may change the
//! arithmetic in a way that is not known here, so it must not be set.

use serde_json::{Map, Value};

/// Options that [`super::read::AdapterReader`] reads.
const UNDERSTOOD: [&str; 14] = [
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_rslora",
];

/// Options that do not change what a trained adapter computes.
const HARMLESS: [&str; 19] = [
    // Names and versions of files.
    "auto_mapping",
    "base_model_name_or_path",
    "peft_version",
    "revision",
    // How the adapter was trained.
    "inference_mode",
    "lora_dropout",
    "velora_config",
    "lorap_emb_lr",
    "lorap_lr_ratio",
    // How A and B were initialised. `init_lora_weights` says whether that changed the base as well.
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    // Ties adapters of the embeddings, which are refused, because `target_modules` and `modules_to_save` must not name
    // them.
    "ensure_weight_tying",
    // Only used if another option is set that is refused.
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    // Older versions: merging on evaluation, which changes nothing, and a list of the parts of a fused layer that Gemma
    // does not have.
    "merge_weights",
    "enable_lora",
];

/// Options that change the arithmetic and are not supported.
const REFUSED: [(&str, &str); 14] = [
    ("alora_invocation_tokens", "activated LoRA"),
    ("arrow_config", "routing between adapters"),
    ("fan_in_fan_out", "transposed weights"),
    ("kasa_config", "KaSA, which changes the base model"),
    ("layer_replication", "repeated layers"),
    ("lora_bias", "biases"),
    ("megatron_config", "layers of Megatron"),
    ("monteclora_config", "sampling of weights"),
    ("target_parameters", "adapted parameters outside linear layers"),
    ("trainable_token_indices", "trained embeddings"),
    ("use_bdlora", "block-diagonal adapters"),
    ("use_dora", "DoRA"),
    ("use_qalora", "quantisation-aware adapters"),
    ("bias_pattern", "biases"),
];

/// The values of `init_lora_weights` that leave the base as it is: A and B alone make the difference
/// (`peft/tuners/lora/layer.py`).
const BASE_KEEPING_INITS: [&str; 5] = ["gaussian", "eva", "orthogonal", "mica", "true"];

/// Returns what is wrong with options that change the arithmetic and are not supported, or that are not known.
pub(super) fn faults(options: &Map<String, Value>) -> Vec<String> {
    let mut faults: Vec<String> = options
        .iter()
        .filter_map(|(name, value)| option_fault(name, value))
        .collect();
    faults.extend(options.get("init_lora_weights").and_then(init_fault));
    faults
}

fn option_fault(name: &str, value: &Value) -> Option<String> {
    if UNDERSTOOD.contains(&name) || HARMLESS.contains(&name) || is_off(value) {
        return None;
    }
    Some(match REFUSED.iter().find(|(refused, _)| *refused == name) {
        Some((_, what)) => format!("`{name}` is set, expected no value: this LoRA variant is not supported ({what})"),
        None => {
            format!("`{name}` is set, expected no value: this option of PEFT is not known and may change the scores")
        }
    })
}

/// Returns whether a value turns an option off.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// Returns a fault if the initialisation of A and B changed the base as well, so that a trained adapter belongs to
/// another base than the checkpoint.
fn init_fault(value: &Value) -> Option<String> {
    let name = match value {
        Value::Null | Value::Bool(_) => return None,
        Value::String(name) => name.to_lowercase(),
        other => other.to_string(),
    };
    if BASE_KEEPING_INITS.contains(&name.as_str()) {
        return None;
    }
    let convert = match name.as_str() {
        "olora" | "lora_ga" => CONVERT,
        name if name.starts_with("pissa") || name.starts_with("corda") => CONVERT,
        "loftq" => {
            ": LoftQ replaces the weights of the base by quantised ones. Point `model.path` to that base saved as a \
             checkpoint, and set `init_lora_weights` to true, or merge the two with `merge_and_unload`"
        }
        _ => ", which is not known and may change the base",
    };
    Some(format!(
        "`init_lora_weights` is `{name}`, expected true, false, `gaussian`, `eva`, `orthogonal` or `mica`{convert}"
    ))
}

const CONVERT: &str = ": it subtracts the initial adapter from the base model, so this adapter does not fit the checkpoint. \
                       Convert it with PEFT: `model.save_pretrained(FOLDER, \
                       path_initial_model_for_weight_conversion=INITIAL_ADAPTER)`, or save the merged model with \
                       `merge_and_unload` where it was trained and point `model.path` to it";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The fixture lists the keys and defaults of `LoraConfig`; tests/peft/lora_config_keys.py writes it.
    fn peft_defaults() -> Map<String, Value> {
        let text = include_str!("../../../../tests/fixtures/peft/lora_config.json");
        let json: Value = serde_json::from_str(text).unwrap();
        json["keys"].as_object().unwrap().clone()
    }

    #[test]
    fn every_key_of_peft_is_in_one_list() {
        let refused = REFUSED.map(|(name, _)| name);
        let keys = peft_defaults();
        assert!(keys.len() >= 40, "{} keys", keys.len());
        for key in keys.keys() {
            let lists = [&UNDERSTOOD[..], &HARMLESS, &refused];
            let count = lists.iter().filter(|list| list.contains(&key.as_str())).count();
            assert_eq!(count, 1, "{key}");
        }
        assert_eq!(faults(&keys), [""; 0]);
    }

    #[test]
    fn refused_and_unknown_options_are_named() {
        for (name, _) in REFUSED {
            let options = Map::from_iter([(name.to_owned(), json!({"any": 1}))]);
            let found = faults(&options);
            assert!(found[0].starts_with(&format!("`{name}` is set")), "{found:?}");
        }
        let options = json!({"use_next_lora": true, "next_config": {}, "lora_dropout": 0.1});
        let found = faults(options.as_object().unwrap());
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("`use_next_lora` is set"), "{found:?}");
    }

    #[test]
    fn initialisations_that_change_the_base_are_refused() {
        let fault = |value: Value| {
            let options = Map::from_iter([("init_lora_weights".to_owned(), value)]);
            faults(&options).pop()
        };
        for value in [json!(true), json!(false), json!(null), json!("gaussian"), json!("eva")] {
            assert_eq!(fault(value.clone()), None, "{value}");
        }
        for name in ["orthogonal", "mica"] {
            assert_eq!(fault(json!(name)), None, "{name}");
        }
        for name in ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga"] {
            let text = fault(json!(name)).unwrap();
            assert!(
                text.starts_with(&format!("`init_lora_weights` is `{name}`, expected true")),
                "{text}"
            );
            assert!(text.contains("path_initial_model_for_weight_conversion"), "{text}");
        }
        for (name, part) in [("loftq", "quantised"), ("tomorrow", "not known")] {
            let text = fault(json!(name)).unwrap();
            assert!(text.contains(part), "{text}");
        }
    }
}
