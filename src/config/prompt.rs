//! Reads the section of the prompt: the published method's settings, a template, or the frame of a published model.

use super::published;
use super::reader::SettingsReader;
use super::{MAX_TOKENS_RANGE, MAX_WINDOWS_RANGE, Markup, Normalize, PromptConfig};

/// The text of a prompt before and after a comment, in which control tokens of the model are spelled out.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct Template {
    /// The text before the comment.
    pub head: String,
    /// The text after the comment.
    pub tail: String,
}

/// The published frames that `prompt.preset` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Preset {
    Agile,
    ShieldGemma,
    CopeA,
}

/// The frame of a prompt, apart from its labels.
struct Frame {
    instructions: String,
    separator: String,
    template: Option<Template>,
}

pub(super) fn prompt(reader: &mut SettingsReader) -> Option<PromptConfig> {
    let presets = [
        ("agile", Preset::Agile),
        ("shieldgemma", Preset::ShieldGemma),
        ("cope-a", Preset::CopeA),
    ];
    let preset = reader.choice("prompt.preset", &presets);
    let labels = labels(reader, preset);
    let hateful_label = hateful_label(reader, preset);
    if let (Some(labels), Some(hateful)) = (&labels, &hateful_label)
        && !labels.contains(hateful)
    {
        let expected = format!("expected one of prompt.labels, \"{}\" or \"{}\"", labels[0], labels[1]);
        reader.fault("prompt.hateful_label", expected);
    }
    let frame = frame(reader, preset, labels.as_ref());
    let markups = [
        ("none", Markup::None),
        ("html", Markup::Html),
        ("markdown", Markup::Markdown),
    ];
    // In the section of events, because it is a property of them; the text that is scored depends on it.
    let markup = reader.choice("input.markup", &markups);
    let rules = [("full", Normalize::Full), ("nfc", Normalize::Nfc)];
    let normalize = reader.choice_or_bool("prompt.normalize", &rules, [Normalize::None, Normalize::Full]);
    let max_window_tokens = reader.integer("prompt.max_window_tokens", MAX_TOKENS_RANGE);
    let max_windows = reader.integer("prompt.max_windows", MAX_WINDOWS_RANGE);
    let frame = frame?;
    Some(PromptConfig {
        labels: labels?,
        hateful_label: hateful_label?,
        instructions: frame.instructions,
        separator: frame.separator,
        template: frame.template,
        markup: markup?,
        normalize: normalize?,
        max_window_tokens,
        max_windows,
        windows: None,
    })
}

/// Reads the two labels, which a preset has its own defaults for.
fn labels(reader: &mut SettingsReader, preset: Option<Preset>) -> Option<[String; 2]> {
    let labels = reader.strings("prompt.labels")?;
    if reader.is_default("prompt.labels")
        && let Some((labels, _)) = published_labels(preset)
    {
        return Some(labels.map(str::to_owned));
    }
    match <[String; 2]>::try_from(labels) {
        Ok([one, other]) if one != other => Some([one, other]),
        _ => {
            reader.fault("prompt.labels", "expected two different labels");
            None
        }
    }
}

fn hateful_label(reader: &mut SettingsReader, preset: Option<Preset>) -> Option<String> {
    let hateful = reader.string("prompt.hateful_label")?;
    match published_labels(preset) {
        Some((_, hateful)) if reader.is_default("prompt.hateful_label") => Some(hateful.to_owned()),
        _ => Some(hateful),
    }
}

/// Returns the labels of a preset and the one that means a violation, unless they are the defaults of the settings.
fn published_labels(preset: Option<Preset>) -> Option<([&'static str; 2], &'static str)> {
    match preset? {
        Preset::Agile => None,
        Preset::ShieldGemma => Some((["Yes", "No"], "Yes")),
        Preset::CopeA => Some((["0", "1"], "1")),
    }
}

fn frame(reader: &mut SettingsReader, preset: Option<Preset>, labels: Option<&[String; 2]>) -> Option<Frame> {
    let template = reader.optional_string("prompt.template");
    let policy = reader.optional_string("prompt.policy");
    let instructions = reader.string("prompt.instructions");
    let separator = reader.string("prompt.separator");
    let preset = preset?;
    if preset == Preset::Agile && template.is_none() {
        reject_if_set(
            reader,
            &["prompt.policy"],
            "only the presets \"shieldgemma\" and \"cope-a\" have a policy",
        );
        return Some(Frame {
            instructions: instructions?,
            separator: separator?,
            template: None,
        });
    }
    let is_separator_set = !reader.is_default("prompt.separator");
    reject_if_set(
        reader,
        &["prompt.instructions"],
        "is not part of this prompt, which is set as a whole",
    );
    if preset != Preset::Agile {
        let reason = "is not part of this prompt, which is set as a whole";
        reject_if_set(reader, &["prompt.separator"], reason);
    }
    let (template, separator) = match (template, preset) {
        (Some(text), Preset::Agile) => {
            let template = parse(reader, &text, labels?, policy.as_deref())?;
            (template, if is_separator_set { separator? } else { String::new() })
        }
        (Some(_), _) => {
            reader.fault("prompt.preset", "prompt.template is set too, expected one of the two");
            return None;
        }
        (None, Preset::ShieldGemma) => {
            let guideline = shieldgemma_guideline(reader, policy.as_deref())?;
            (published::shieldgemma(&guideline), String::new())
        }
        (None, Preset::CopeA) => {
            let Some(policy) = policy else {
                let expected =
                    "not set, expected the text of the policy, with the headings of the model card's template";
                reader.fault("prompt.policy", expected);
                return None;
            };
            (published::cope_a(&policy), published::COPE_A_SEPARATOR.to_owned())
        }
        (None, Preset::Agile) => unreachable!("this frame was returned above"),
    };
    if !template.head.contains(&separator) && !template.tail.contains(&separator) {
        reader.fault("prompt.separator", "expected a part of prompt.template");
        return None;
    }
    Some(Frame {
        instructions: String::new(),
        separator,
        template: Some(template),
    })
}

fn reject_if_set(reader: &mut SettingsReader, keys: &[&str], reason: &str) {
    for key in keys {
        if reader.is_set(key) && !reader.is_default(key) {
            reader.fault(key, reason);
        }
    }
}

/// Returns the guideline that `prompt.policy` names, or that it contains.
fn shieldgemma_guideline(reader: &mut SettingsReader, policy: Option<&str>) -> Option<String> {
    let policy = policy.unwrap_or("hate");
    if let Some((_, guideline)) = published::SHIELDGEMMA_GUIDELINES
        .iter()
        .find(|(name, _)| *name == policy)
    {
        return Some((*guideline).to_owned());
    }
    if policy.contains(char::is_whitespace) {
        return Some(policy.to_owned());
    }
    let names = published::SHIELDGEMMA_GUIDELINES.map(|(name, _)| format!("\"{name}\""));
    reader.fault(
        "prompt.policy",
        format!("expected {}, or the text of another guideline", names.join(", ")),
    );
    None
}

/// Splits a template at `{text}`, and replaces `{labels}` and `{policy}`. Braces around anything but a name are text.
fn parse(reader: &mut SettingsReader, text: &str, labels: &[String; 2], policy: Option<&str>) -> Option<Template> {
    let key = "prompt.template";
    let (mut parts, mut rest) = (vec![String::new()], text);
    let (mut is_valid, mut has_policy) = (true, false);
    while let Some((before, name, after)) = next_placeholder(rest) {
        let part = parts.last_mut().expect("it begins with one part");
        part.push_str(before);
        match name {
            "text" => parts.push(String::new()),
            "labels" => part.push_str(&labels.join(",")),
            "policy" => {
                part.push_str(policy.unwrap_or_default());
                has_policy = true;
            }
            _ => {
                let expected = "expected {text}, {labels} or {policy}";
                reader.fault(key, format!("unknown placeholder {{{name}}}, {expected}"));
                is_valid = false;
            }
        }
        rest = after;
    }
    if has_policy != policy.is_some() {
        let expected = match has_policy {
            true => "not set, expected the text for {policy} in prompt.template",
            false => "prompt.template has no {policy} for it",
        };
        reader.fault("prompt.policy", expected);
        is_valid = false;
    }
    parts.last_mut().expect("it begins with one part").push_str(rest);
    match <[String; 2]>::try_from(parts) {
        Ok([head, tail]) => is_valid.then_some(Template { head, tail }),
        Err(parts) => {
            let times = parts.len() - 1;
            reader.fault(
                key,
                format!("has {{text}} {times} times, expected it once, where the comment stands"),
            );
            None
        }
    }
}

/// Returns the text before the next placeholder, its name, and the text behind it.
fn next_placeholder(text: &str) -> Option<(&str, &str, &str)> {
    for (at, _) in text.match_indices('{') {
        let (name, after) = text[at + 1..].split_once('}')?;
        if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') {
            return Some((&text[..at], name, after));
        }
    }
    None
}
