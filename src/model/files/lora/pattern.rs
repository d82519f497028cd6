//! PEFT's rules for matching the names of modules (`check_target_module_exists` and `get_pattern_key`).

use fancy_regex::{Regex, RegexBuilder};

/// Selects modules: a list of names matches the ends of module names, and a pattern matches whole names.
pub(super) enum ModuleMatcher {
    All,
    Names(Vec<String>),
    Pattern(Regex),
}

impl ModuleMatcher {
    /// # Errors
    /// Returns a description of a pattern that takes too long.
    pub(super) fn matches(&self, module: &str) -> Result<bool, String> {
        match self {
            Self::All => Ok(true),
            Self::Names(names) => Ok(names.iter().any(|name| ends_with(module, name))),
            Self::Pattern(regex) => is_match(regex, module),
        }
    }
}

/// Returns whether a name in a list selects a module: it is the whole name, or the part after one of its dots.
pub(super) fn ends_with(module: &str, name: &str) -> bool {
    module == name || module.strip_suffix(name).is_some_and(|head| head.ends_with('.'))
}

/// The layers that `layers_to_transform` selects.
pub(super) struct LayerFilter {
    layers: Vec<usize>,
    /// What finds the number of a layer in a module's name, one for each of `layers_pattern`.
    patterns: Vec<Regex>,
}

impl LayerFilter {
    /// # Errors
    /// Returns a description of a pattern that is not supported.
    pub(super) fn new(layers: Vec<usize>, patterns: &[String]) -> Result<Self, String> {
        let number = |pattern: &String| {
            // As in PEFT, an alternative of the pattern is an alternative of the whole.
            compile(pattern, &format!(r"^(?:(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.)"))
                .map_err(|error| format!("`layers_pattern` has `{pattern}`, which is not supported: {error}"))
        };
        let patterns = if patterns.is_empty() {
            let any = compile("", r"^.*?\.[^.]*\.(?P<idx>\d+)\.");
            vec![any.map_err(|error| error.to_string())?]
        } else {
            patterns.iter().map(number).collect::<Result<_, _>>()?
        };
        Ok(Self { layers, patterns })
    }

    /// # Errors
    /// Returns a description of a pattern that takes too long.
    pub(super) fn matches(&self, module: &str) -> Result<bool, String> {
        for regex in &self.patterns {
            if let Some(captures) = regex.captures(module).map_err(|error| too_slow(regex, &error))? {
                let number = captures
                    .name("idx")
                    .and_then(|number| number.as_str().parse::<usize>().ok());
                return Ok(number.is_some_and(|layer| self.layers.contains(&layer)));
            }
        }
        Ok(false)
    }
}

/// The values of `rank_pattern` or `alpha_pattern`, by the pattern that is their key, in the order of the file.
pub(super) struct SuffixPatterns<T>(Vec<(String, Regex, T)>);

impl<T: Copy> SuffixPatterns<T> {
    /// Compiles the keys once, because they are matched with every module.
    ///
    /// # Errors
    /// Returns a description of each key that is not a supported pattern, or of too many keys.
    pub(super) fn compile(patterns: &[(String, T)], max: usize) -> Result<Self, Vec<String>> {
        if patterns.len() > max {
            return Err(vec![format!("has {} patterns, expected at most {max}", patterns.len())]);
        }
        let (mut compiled, mut errors) = (Vec::new(), Vec::new());
        for (key, value) in patterns {
            match suffix_pattern(key) {
                Ok(regex) => compiled.push((key.clone(), regex, *value)),
                Err(error) => errors.push(format!("has the pattern `{key}`, which is not supported: {error}")),
            }
        }
        if errors.is_empty() {
            Ok(Self(compiled))
        } else {
            Err(errors)
        }
    }

    /// Returns the value of the first key that matches the end of the module's name.
    ///
    /// # Errors
    /// Returns a description of a pattern that takes too long.
    pub(super) fn first_match(&self, module: &str) -> Result<Option<T>, String> {
        for (_, regex, value) in &self.0 {
            if is_match(regex, module)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    /// Returns the keys that match none of these modules.
    ///
    /// # Errors
    /// Returns a description of a pattern that takes too long.
    pub(super) fn without_match(&self, modules: &[String]) -> Result<Vec<&str>, String> {
        let mut unmatched = Vec::new();
        'keys: for (key, regex, _) in &self.0 {
            for module in modules {
                if is_match(regex, module)? {
                    continue 'keys;
                }
            }
            unmatched.push(key.as_str());
        }
        Ok(unmatched)
    }
}

/// The size of a compiled pattern. Names of modules need a few kilobytes, and compiling takes time in proportion.
const MAX_PATTERN_BYTES: usize = 1 << 20;

/// The most steps back that matching one name may take. Names have less than a hundred characters.
const MAX_BACKTRACKING: usize = 20_000;

/// Compiles a pattern that must match a module's whole name or the part after one of its dots.
fn suffix_pattern(key: &str) -> Result<Regex, Box<fancy_regex::Error>> {
    compile(key, &format!(r"^(?:.*\.)?(?:{key})$"))
}

/// Compiles a pattern that must match the whole name, as with Python's `re.fullmatch`.
pub(super) fn full_pattern(pattern: &str) -> Result<Regex, Box<fancy_regex::Error>> {
    compile(pattern, &format!("^(?:{pattern})$"))
}

/// Compiles an anchored pattern. The pattern must also be valid by itself: one like `a)|(?:b` would escape the anchors.
fn compile(pattern: &str, anchored: &str) -> Result<Regex, Box<fancy_regex::Error>> {
    let compile = |pattern| {
        RegexBuilder::new(pattern)
            .delegate_size_limit(MAX_PATTERN_BYTES)
            .backtrack_limit(MAX_BACKTRACKING)
            .build()
            .map_err(Box::new)
    };
    compile(pattern)?;
    let regex = compile(anchored)?;
    // Most patterns that take too many steps take them on any name.
    match regex.is_match("model.language_model.layers.0.self_attn.q_proj") {
        Ok(_) => Ok(regex),
        Err(error) => Err(Box::new(error)),
    }
}

fn is_match(regex: &Regex, module: &str) -> Result<bool, String> {
    regex.is_match(module).map_err(|error| too_slow(regex, &error))
}

fn too_slow(regex: &Regex, error: &fancy_regex::Error) -> String {
    format!("the pattern `{}` is not supported: {error}", regex.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &str = "model.layers.1.self_attn.v_proj";

    #[test]
    fn patterns_match_the_end_of_a_module_name() {
        let first_match = |key: &str| {
            let patterns = [(key.to_owned(), 4)];
            SuffixPatterns::compile(&patterns, 1)
                .ok()
                .unwrap()
                .first_match(MODULE)
                .unwrap()
        };
        for key in [
            "v_proj",
            "self_attn.v_proj",
            r"layers\.[01]\.self_attn\.v_proj",
            MODULE,
            r"(?!.*vision).*v_proj",
            "q_proj|v_proj",
        ] {
            assert_eq!(first_match(key), Some(4), "{key}");
        }
        for key in ["proj", "q_proj", "v_proj.weight", "layers.1", r"(?!.*v_proj).*"] {
            assert_eq!(first_match(key), None, "{key}");
        }
    }

    #[test]
    fn the_first_pattern_of_the_file_counts() {
        let patterns = [("v_proj".to_owned(), 4), (".*".to_owned(), 8), (MODULE.to_owned(), 2)];
        let compiled = SuffixPatterns::compile(&patterns, 3).ok().unwrap();
        assert_eq!(compiled.first_match(MODULE), Ok(Some(4)));
        assert_eq!(compiled.first_match("model.layers.1.mlp.up_proj"), Ok(Some(8)));
        let unmatched = compiled.without_match(&["lm_head".to_owned()]);
        assert_eq!(unmatched, Ok(vec!["v_proj", MODULE]));
    }

    /// The cases are those of PEFT's `check_target_module_exists`.
    #[test]
    fn layers_are_selected_by_the_first_number_in_a_name() {
        let check = |patterns: &[&str], module: &str, expected: bool| {
            let patterns: Vec<String> = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
            let filter = LayerFilter::new(vec![1, 3], &patterns).unwrap();
            assert_eq!(filter.matches(module), Ok(expected), "{patterns:?} {module}");
        };
        check(&[], MODULE, true);
        check(&["layers"], MODULE, true);
        check(&["h", "layers"], MODULE, true);
        check(&["h"], MODULE, false);
        check(&["l.*s"], MODULE, true);
        check(&[], "model.layers.2.self_attn.v_proj", false);
        check(&["layers"], "layers.1.self_attn.v_proj", true);
        // Without a pattern, PEFT needs a name before the list of layers.
        check(&[], "layers.1.self_attn.v_proj", false);
        check(&[], "model.language_model.layers.3.mlp.up_proj", true);
    }

    #[test]
    fn patterns_that_escape_the_anchors_are_huge_or_slow_are_rejected() {
        for pattern in ["x)|(?:model", r"\w{1000}{1000}", "q_proj(", r"(?=(.*.*)*x)(.*)*\1y"] {
            assert!(full_pattern(pattern).is_err(), "{pattern}");
            let patterns = [(pattern.to_owned(), 4)];
            let errors = SuffixPatterns::compile(&patterns, 1).err().unwrap();
            assert!(
                errors[0].starts_with(&format!("has the pattern `{pattern}`")),
                "{errors:?}"
            );
        }
        let many = ["q_proj", "v_proj"].map(|key| (key.to_owned(), 4));
        let errors = SuffixPatterns::compile(&many, 1).err().unwrap();
        assert_eq!(errors, ["has 2 patterns, expected at most 1"]);
    }
}
