//! What identifies a prompt: the canonical form of the settings that shape it, its hash, and the name of the rules by which
//! a text is changed first.

use super::{normalize, window};
use crate::config::{Markup, ModelWindows, Normalize, PromptConfig, Template, WindowCorrection, WindowEdges};
use crate::hash::content_hash;

/// The number of the rules by which settings and a text become rows. It is part of the prompt's hash.
///
/// Format 1 spread the windows of every text over its tokens. Since format 2, those of a text with many more tokens
/// than the windows cover are spread over its bytes.
pub(super) const FORMAT: u32 = 2;

/// The name and version of the rules by which windows begin and end with sentences.
const SENTENCES: &str = "sentences-1";

/// Whether a prompt is a frame around the text, or the text alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IsFramed {
    Yes,
    No,
}

/// Returns the name of the rules by which a text is changed before it is tokenised.
pub(super) fn text_rules(markup: Markup, rules: Normalize) -> String {
    let normalizer = normalize::version(rules).map(str::to_owned);
    let rules: Vec<String> = [markup.version(), normalizer].into_iter().flatten().collect();
    if rules.is_empty() {
        return "none".to_owned();
    }
    rules.join("+")
}

const MARKUPS: [(Markup, &str); 3] = [
    (Markup::None, "\"none\""),
    (Markup::Html, "\"html\""),
    (Markup::Markdown, "\"markdown\""),
];
const NORMALIZERS: [(Normalize, &str); 3] = [
    (Normalize::None, "false"),
    (Normalize::Nfc, "\"nfc\""),
    (Normalize::Full, "\"full\""),
];

/// Returns the settings with which a text is changed by the rules of this name, or `None` if this build does not have
/// these rules.
pub fn settings_of_text_rules(name: &str) -> Option<String> {
    let rules = rules_named(name)?;
    let (_, markup) = MARKUPS.into_iter().find(|(markup, _)| *markup == rules.0)?;
    let (_, normalize) = NORMALIZERS.into_iter().find(|(normalize, _)| *normalize == rules.1)?;
    Some(format!("prompt.normalize = {normalize} and input.markup = {markup}"))
}

fn rules_named(name: &str) -> Option<(Markup, Normalize)> {
    let normalizers = NORMALIZERS.map(|(normalize, _)| normalize);
    let mut all = MARKUPS
        .into_iter()
        .flat_map(|(markup, _)| normalizers.map(|normalize| (markup, normalize)));
    all.find(|&(markup, normalize)| text_rules(markup, normalize) == name)
}

/// Returns the canonical JSON form of the settings that shape a prompt.
pub(super) fn canonical_form(config: &PromptConfig, format: u32, framed: IsFramed) -> String {
    let rules = config.window_rules();
    let mut canonical = serde_json::json!({
        "format": format,
        "labels": config.labels,
        "hateful_label": config.hateful_label,
        "separator": config.separator,
        "max_window_tokens": rules.max_tokens,
        "window_overlap_tokens": window::overlap(rules.max_tokens),
        "max_windows": rules.max_windows,
    });
    // What a model without a file of its own does not have is left out, so that its prompt keeps the hash that it had before
    // there were such files.
    if rules.edges == WindowEdges::Sentences {
        canonical["window_edges"] = SENTENCES.into();
    }
    if !rules.correction.is_none() {
        canonical["window_correction"] = serde_json::json!(rules.correction);
    }
    match &config.template {
        None => canonical["instructions"] = config.instructions.as_str().into(),
        Some(Template { head, tail }) => canonical["template"] = serde_json::json!({ "head": head, "tail": tail }),
    }
    if framed == IsFramed::No {
        canonical["frame"] = "none".into();
    }
    canonical.to_string()
}

impl PromptConfig {
    /// Returns the hash by which decisions refer to the prompt that these settings produce.
    pub fn content_hash(&self) -> String {
        content_hash(canonical_form(self, FORMAT, IsFramed::Yes).as_bytes())
    }

    /// Returns the hash by which decisions of a classification head refer to the settings, which have no frame.
    pub fn unframed_hash(&self) -> String {
        content_hash(canonical_form(self, FORMAT, IsFramed::No).as_bytes())
    }

    /// Returns the hash by which decisions referred to this prompt in format 1.
    pub fn earlier_hash(&self) -> String {
        content_hash(canonical_form(self, 1, IsFramed::Yes).as_bytes())
    }

    /// Returns these settings with the rules that a decision names as its normaliser, or `None` if this build does not
    /// have these rules.
    pub fn with_text_rules(&self, name: &str) -> Option<Self> {
        let (markup, normalize) = rules_named(name)?;
        Some(Self {
            markup,
            normalize,
            ..self.clone()
        })
    }

    /// Reads the settings back from their canonical form. Markup and the normaliser are off in the result, because they
    /// are not part of that form.
    ///
    /// # Errors
    /// Returns an error if `canonical` is not such a form.
    pub fn from_canonical(canonical: &str) -> Result<Self, serde_json::Error> {
        #[derive(serde::Deserialize)]
        struct CanonicalPrompt {
            labels: [String; 2],
            hateful_label: String,
            #[serde(default)]
            instructions: String,
            separator: String,
            template: Option<Template>,
            max_window_tokens: usize,
            max_windows: usize,
            #[serde(default)]
            window_edges: Option<Edges>,
            #[serde(default)]
            window_correction: WindowCorrection,
        }
        #[derive(serde::Deserialize)]
        enum Edges {
            #[serde(rename = "sentences-1")]
            Sentences,
        }
        let found: CanonicalPrompt = serde_json::from_str(canonical)?;
        Ok(Self {
            labels: found.labels,
            hateful_label: found.hateful_label,
            instructions: found.instructions,
            separator: found.separator,
            template: found.template,
            markup: Markup::None,
            normalize: Normalize::None,
            max_window_tokens: Some(found.max_window_tokens),
            max_windows: Some(found.max_windows),
            windows: Some(ModelWindows {
                edges: match found.window_edges {
                    None => WindowEdges::Tokens,
                    Some(Edges::Sentences) => WindowEdges::Sentences,
                },
                correction: found.window_correction,
                ..ModelWindows::default()
            }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_rules_give_their_settings() {
        let check = |name: &str, expected: Option<&str>| {
            assert_eq!(settings_of_text_rules(name).as_deref(), expected, "{name}");
        };
        check(
            "fold-2",
            Some("prompt.normalize = \"full\" and input.markup = \"none\""),
        );
        check("nfc-1", Some("prompt.normalize = \"nfc\" and input.markup = \"none\""));
        check(
            "html-1+nfc-1",
            Some("prompt.normalize = \"nfc\" and input.markup = \"html\""),
        );
        check("none", Some("prompt.normalize = false and input.markup = \"none\""));
        check("fold-1", None);
    }
}
