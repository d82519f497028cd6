//! PEFT's names of linear layers, and its rules for matching them.

use std::collections::BTreeMap;

use regex::{Regex, RegexBuilder};

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

/// The values of `rank_pattern` or `alpha_pattern`, by the pattern that is their key.
pub(super) struct SuffixPatterns<T>(Vec<(Regex, T)>);

impl<T: Copy> SuffixPatterns<T> {
    /// Compiles the keys once, because they are matched with every module.
    ///
    /// # Errors
    /// Returns a description of each key that is not a supported pattern, or of too many keys.
    pub(super) fn compile(patterns: Option<&BTreeMap<String, T>>, max: usize) -> Result<Self, Vec<String>> {
        let patterns: Vec<_> = patterns.into_iter().flatten().collect();
        if patterns.len() > max {
            return Err(vec![format!("has {} patterns, expected at most {max}", patterns.len())]);
        }
        let (mut compiled, mut errors) = (Vec::new(), Vec::new());
        for (key, &value) in patterns {
            match suffix_pattern(key) {
                Ok(regex) => compiled.push((regex, value)),
                Err(error) => errors.push(format!("has the pattern `{key}`, which is not supported: {error}")),
            }
        }
        if errors.is_empty() {
            Ok(Self(compiled))
        } else {
            Err(errors)
        }
    }

    /// Returns the value of the first key that matches the end of the module's name, as PEFT's `get_pattern_key` does.
    pub(super) fn first_match(&self, module: &str) -> Option<T> {
        self.0
            .iter()
            .find_map(|(regex, value)| regex.is_match(module).then_some(*value))
    }
}

/// The size of a compiled pattern. Names of modules need a few kilobytes, and compiling takes time in proportion.
const MAX_PATTERN_BYTES: usize = 1 << 20;

/// Compiles a pattern that must match a module's whole name or the part after one of its dots.
fn suffix_pattern(key: &str) -> Result<Regex, regex::Error> {
    compile(key, &format!(r"^(?:.*\.)?(?:{key})$"))
}

/// Compiles a pattern that must match the whole name, as with Python's `re.fullmatch`.
pub(super) fn full_pattern(pattern: &str) -> Result<Regex, regex::Error> {
    compile(pattern, &format!("^(?:{pattern})$"))
}

/// Compiles an anchored pattern. The pattern must also be valid by itself: one like `a)|(?:b` would escape the anchors.
fn compile(pattern: &str, anchored: &str) -> Result<Regex, regex::Error> {
    let compile = |pattern| RegexBuilder::new(pattern).size_limit(MAX_PATTERN_BYTES).build();
    compile(pattern)?;
    compile(anchored)
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
        let first_match = |key: &str| {
            let patterns = BTreeMap::from([(key.to_owned(), 4)]);
            SuffixPatterns::compile(Some(&patterns), 1)
                .ok()
                .unwrap()
                .first_match(module)
        };
        for key in ["v_proj", "self_attn.v_proj", r"layers\.[01]\.self_attn\.v_proj", module] {
            assert_eq!(first_match(key), Some(4), "{key}");
        }
        for key in ["proj", "q_proj", "v_proj.weight", "layers.1"] {
            assert_eq!(first_match(key), None, "{key}");
        }
    }

    #[test]
    fn patterns_that_escape_the_anchors_or_are_huge_are_rejected() {
        for pattern in ["x)|(?:model", r"\w{1000}", "q_proj("] {
            assert!(full_pattern(pattern).is_err(), "{pattern}");
            let patterns = BTreeMap::from([(pattern.to_owned(), 4)]);
            let errors = SuffixPatterns::compile(Some(&patterns), 1).err().unwrap();
            assert!(
                errors[0].starts_with(&format!("has the pattern `{pattern}`")),
                "{errors:?}"
            );
        }
        let many = BTreeMap::from(["q_proj", "v_proj"].map(|key| (key.to_owned(), 4)));
        let errors = SuffixPatterns::compile(Some(&many), 1).err().unwrap();
        assert_eq!(errors, ["has 2 patterns, expected at most 1"]);
    }
}
