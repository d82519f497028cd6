//! How PEFT names and matches the layers of a model.

use std::collections::BTreeMap;

use regex::Regex;

use crate::config::Projection;

/// How PEFT matches module names: a list by suffix, a string by a full match.
pub(super) enum Matcher {
    All,
    Names(Vec<String>),
    Pattern(Regex),
}

impl Matcher {
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

/// PEFT's `get_pattern_key`: the first key that matches the end of the module's name.
pub(super) fn lookup<T: Copy>(pattern: Option<&BTreeMap<String, T>>, module: &str) -> Option<T> {
    pattern?.iter().find_map(|(key, &value)| {
        // Patterns that cannot be read were reported before any is looked up.
        suffix_pattern(key)
            .is_ok_and(|regex| regex.is_match(module))
            .then_some(value)
    })
}

pub(super) fn suffix_pattern(key: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
}

/// A pattern that the whole name must match, as Python's `re.fullmatch`.
pub(super) fn full_pattern(pattern: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!("^(?:{pattern})$"))
}

/// `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight` to (3, Q, 'A').
pub(super) fn parse_name(name: &str) -> Option<(usize, Projection, char)> {
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
    fn names_are_parsed_by_module() {
        let name = "base_model.model.model.layers.12.mlp.down_proj.lora_B.weight";
        assert_eq!(parse_name(name), Some((12, Projection::Down, 'B')));
        for other in [
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight",
            "base_model.model.model.layers.x.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            "base_model.model.model.embed_tokens.lora_embedding_A",
        ] {
            assert_eq!(parse_name(other), None, "{other}");
        }
    }

    #[test]
    fn patterns_match_the_end_of_a_module_name() {
        let module = "model.layers.1.self_attn.v_proj";
        let pattern = |key: &str| BTreeMap::from([(key.to_owned(), 4)]);
        for key in ["v_proj", "self_attn.v_proj", r"layers\.[01]\.self_attn\.v_proj", module] {
            assert_eq!(lookup(Some(&pattern(key)), module), Some(4), "{key}");
        }
        for key in ["proj", "q_proj", "v_proj.weight", "layers.1"] {
            assert_eq!(lookup(Some(&pattern(key)), module), None, "{key}");
        }
    }
}
