//! PEFT's names of linear layers, and its rules for matching them.

use std::collections::BTreeMap;

use regex::Regex;

use crate::config::Projection;

/// Selects modules as PEFT does: a list of names matches the ends of module names, and a pattern matches whole names.
pub(super) enum ModuleMatcher {
    All,
    Names(Vec<String>),
    Pattern(Regex),
}

impl ModuleMatcher {
    pub(super) fn matches(&self, module: &str) -> bool {
        match self {
            Self::All => true,
            Self::Names(names) => names
                .iter()
                .any(|name| module == name || module.strip_suffix(name).is_some_and(|head| head.ends_with('.'))),
            Self::Pattern(regex) => regex.is_match(module),
        }
    }
}

/// Returns the value of the first key that matches the end of the module's name, as PEFT's `get_pattern_key` does.
pub(super) fn first_match<T: Copy>(pattern: Option<&BTreeMap<String, T>>, module: &str) -> Option<T> {
    pattern?.iter().find_map(|(key, &value)| {
        // Invalid patterns have been reported before this function is called.
        suffix_pattern(key)
            .is_ok_and(|regex| regex.is_match(module))
            .then_some(value)
    })
}

/// Compiles a pattern that must match a module's whole name or the part after one of its dots.
pub(super) fn suffix_pattern(key: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
}

/// Compiles a pattern that must match the whole name, as with Python's `re.fullmatch`.
pub(super) fn full_pattern(pattern: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!("^(?:{pattern})$"))
}

/// Parses the name of an adapter tensor: `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight` gives
/// (3, Q, 'A').
pub(super) fn parse_tensor_name(name: &str) -> Option<(usize, Projection, char)> {
    let (_, rest) = name.strip_prefix("base_model.model.")?.split_once("layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    let (module, side) = rest.rsplit_once(".lora_")?;
    let projection = Projection::ALL
        .into_iter()
        .find(|projection| projection.path() == module)?;
    let side = match side {
        "A.weight" => 'A',
        "B.weight" => 'B',
        _ => return None,
    };
    Some((layer.parse().ok()?, projection, side))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensor_names_are_parsed() {
        let name = "base_model.model.model.layers.12.mlp.down_proj.lora_B.weight";
        assert_eq!(parse_tensor_name(name), Some((12, Projection::Down, 'B')));
        for other in [
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight",
            "base_model.model.model.layers.x.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            "base_model.model.model.embed_tokens.lora_embedding_A",
        ] {
            assert_eq!(parse_tensor_name(other), None, "{other}");
        }
    }

    #[test]
    fn patterns_match_the_end_of_a_module_name() {
        let module = "model.layers.1.self_attn.v_proj";
        let pattern = |key: &str| BTreeMap::from([(key.to_owned(), 4)]);
        for key in ["v_proj", "self_attn.v_proj", r"layers\.[01]\.self_attn\.v_proj", module] {
            assert_eq!(first_match(Some(&pattern(key)), module), Some(4), "{key}");
        }
        for key in ["proj", "q_proj", "v_proj.weight", "layers.1"] {
            assert_eq!(first_match(Some(&pattern(key)), module), None, "{key}");
        }
    }
}
