//! Builds a [`Prompter`] from the settings and a tokenizer, and reports every fault of the two.

use std::path::Path;

use super::Prompter;
use super::frame::Frame;
use super::identity::{FORMAT, IsFramed, canonical_form};
use super::imitation::Imitations;
use super::normalize::Normalizer;
use super::tokenizer::{SafeTokenizer, encode_as_transformers};
use crate::config::{Normalize, PromptConfig, Template};
use crate::fault::{Fault, Faults};
use crate::hash::content_hash;

impl Prompter {
    /// Builds the frame and checks that each label is a single token right after it.
    ///
    /// `tokenizer_file` is the content of `tokenizer_path`, which is used only to name the file in errors.
    ///
    /// # Errors
    /// Returns every fault of the tokenizer file, or of the frame with this tokenizer: a label that is not a single
    /// token or that merges with the frame, a frame that spells a control token, or windows that do not fit into
    /// `max_positions`.
    pub fn new(
        tokenizer_path: &Path,
        tokenizer_file: &[u8],
        config: &PromptConfig,
        vocab_size: usize,
        max_positions: usize,
    ) -> Result<Self, Faults> {
        let tokenizer = SafeTokenizer::new(tokenizer_path, tokenizer_file)?;
        let frame = match &config.template {
            None => published_frame(config, &tokenizer),
            Some(template) => template_frame(template, tokenizer_path, tokenizer_file, &tokenizer)?,
        };
        let mut prompter = Self::around(config, tokenizer, vocab_size, Some(frame));
        let mut faults = Faults::default();
        faults.extend(separator_fault(config));
        if config.normalize != Normalize::None {
            let imitations = Imitations::new(&config.separator, &prompter.tokenizer);
            let error = |error| Fault::file(tokenizer_path, format!("cannot tokenise prompt.separator: {error}"));
            prompter.imitations = faults.collect(imitations.map_err(error));
        }
        faults.extend(prompter.control_token_faults(config));
        let hateful = usize::from(config.labels[1] == config.hateful_label);
        for (index, label) in [(0, hateful), (1, 1 - hateful)] {
            let id = faults.collect(prompter.label_id(tokenizer_path, &config.labels[label]));
            prompter.label_ids[index] = id.unwrap_or_default();
        }
        faults.collect(prompter.measure(tokenizer_path, max_positions));
        if faults.is_empty() { Ok(prompter) } else { Err(faults) }
    }

    /// Builds prompts that are the text alone, with `<bos>` in front, for a model with a classification head.
    ///
    /// # Errors
    /// Returns every fault of the tokenizer file, and a fault if there is a template or if windows do not fit into
    /// `max_positions`.
    pub fn without_frame(
        tokenizer_path: &Path,
        tokenizer_file: &[u8],
        config: &PromptConfig,
        vocab_size: usize,
        max_positions: usize,
    ) -> Result<Self, Faults> {
        let tokenizer = SafeTokenizer::new(tokenizer_path, tokenizer_file)?;
        let mut faults = Faults::default();
        if config.template.is_some() {
            let text = "is set, but the model has a classification head, whose prompt is the comment alone";
            faults.push(Fault::setting("prompt.template", text.to_owned()));
        }
        let mut prompter = Self::around(config, tokenizer, vocab_size, None);
        faults.collect(prompter.measure(tokenizer_path, max_positions));
        if faults.is_empty() { Ok(prompter) } else { Err(faults) }
    }

    /// Creates a prompter whose frame has not been measured yet. Without a frame, the prompt is the text alone.
    fn around(config: &PromptConfig, tokenizer: SafeTokenizer, vocab_size: usize, frame: Option<Frame>) -> Self {
        let framed = if frame.is_some() { IsFramed::Yes } else { IsFramed::No };
        let canonical = canonical_form(config, FORMAT, framed);
        let content_hash = content_hash(canonical.as_bytes());
        let separator = match framed {
            IsFramed::Yes => config.separator.as_str(),
            IsFramed::No => "",
        };
        Self {
            markup: config.markup,
            normalizer: Normalizer::new(config.normalize, separator),
            rules: config.normalize,
            imitations: None,
            frame: frame.unwrap_or_else(|| Frame::new(String::new(), String::new(), &tokenizer)),
            prefix: Vec::new(),
            frame_tokens: 0,
            vocab_size,
            window: config.window_rules(),
            scope: None,
            byte_ids: byte_ids(&tokenizer),
            label_ids: [0; 2],
            earlier_hash: match framed {
                IsFramed::Yes => config.earlier_hash(),
                IsFramed::No => content_hash.clone(),
            },
            content_hash,
            canonical,
            tokenizer,
        }
    }

    /// Tokenises the frame alone and checks that the longest window fits into it.
    fn measure(&mut self, tokenizer_path: &Path, max_positions: usize) -> Result<(), Faults> {
        let mut faults = Faults::default();
        let checked = |ids| {
            let ids = self.checked(self.frame("").len(), ids);
            ids.map_err(|error| Fault::file(tokenizer_path, error.to_string()))
        };
        let prefix = faults.collect(checked(self.frame.encode_head(&self.tokenizer)));
        let frame = faults.collect(checked(self.frame.encode(&self.tokenizer, "")));
        if let (Some(prefix), Some(frame)) = (prefix, frame) {
            if frame.len() + self.window.max_tokens > max_positions {
                faults.push(Fault::setting(
                    "prompt.max_window_tokens",
                    format!(
                        "{} tokens and a frame of {} do not fit into the checkpoint's {max_positions} positions",
                        self.window.max_tokens,
                        frame.len()
                    ),
                ));
            }
            (self.prefix, self.frame_tokens) = (prefix, frame.len());
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }

    /// Returns a fault for each part of the published method's frame that spells a control token.
    fn control_token_faults(&self, config: &PromptConfig) -> Vec<Fault> {
        let parts = [
            ("prompt.instructions", &config.instructions),
            ("prompt.separator", &config.separator),
        ];
        let fault = |(key, text): (&str, &String)| {
            let token = self.tokenizer.control_token_in(text)?;
            let text = format!(
                "spells the control token `{token}`, which would be read as plain text; only prompt.template can have \
                 control tokens"
            );
            Some(Fault::setting(key, text))
        };
        let parts = parts.into_iter().filter(|_| config.template.is_none());
        parts.filter_map(fault).collect()
    }

    /// Returns the label's id, after checking that the label is a single token even right after the frame.
    fn label_id(&self, path: &Path, label: &str) -> Result<u32, Fault> {
        let Some(id) = self.tokenizer.token_id(label) else {
            let text = format!("the label `{label}` is not one token of the vocabulary");
            return Err(Fault::file(path, text));
        };
        for sample in ["", "a comment", "one, two: three."] {
            let ids = |answer: &str| {
                let ids = self.frame.encode_with_answer(&self.tokenizer, sample, answer);
                let ids = self.checked(self.frame(sample).len() + answer.len(), ids);
                ids.map_err(|error| Fault::file(path, error.to_string()))
            };
            let (mut expected, found) = (ids("")?, ids(label)?);
            let frame_end = expected.len();
            expected.push(id);
            if found != expected {
                let from = frame_end.min(found.len()).saturating_sub(1);
                return Err(Fault::file(
                    path,
                    format!(
                        "the label `{label}` after the frame becomes ids {:?}, expected the frame's last id and [{id}]",
                        &found[from..]
                    ),
                ));
            }
        }
        Ok(id)
    }
}

/// Returns the ids of the tokens that spell single bytes, in ascending order.
fn byte_ids(tokenizer: &SafeTokenizer) -> Vec<u32> {
    let id = |byte: u8| tokenizer.token_id(&format!("<0x{byte:02X}>"));
    let mut ids: Vec<u32> = (0..=u8::MAX).filter_map(id).collect();
    ids.sort_unstable();
    ids
}

/// Returns the frame of the published method.
fn published_frame(config: &PromptConfig, tokenizer: &SafeTokenizer) -> Frame {
    let instructions = config.instructions.replace("{labels}", &config.labels.join(","));
    Frame::new(
        format!("{instructions}{}Text:", config.separator),
        format!("{}Prediction:", config.separator),
        tokenizer,
    )
}

/// Returns the frame of a template, after checking that the tokenizer knows all of its control tokens and that its ids
/// are those of transformers for the whole prompt.
fn template_frame(template: &Template, path: &Path, file: &[u8], tokenizer: &SafeTokenizer) -> Result<Frame, Faults> {
    let mut faults = Faults::default();
    for text in [&template.head, &template.tail] {
        for token in tokenizer.unknown_control_tokens(text) {
            let text = format!(
                "spells the control token `{token}`, which {} does not have",
                path.display()
            );
            faults.push(Fault::setting("prompt.template", text));
        }
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    let error = |error: tokenizers::Error| Fault::file(path, format!("cannot tokenise prompt.template: {error}"));
    let frame = Frame::with_control_tokens(&template.head, template.tail.clone(), tokenizer).map_err(error)?;
    if frame.has_control_tokens() {
        let prompts: Vec<String> = Frame::samples().map(|text| frame.around(text)).collect();
        let expected = encode_as_transformers(file, &prompts).map_err(error)?;
        let found: Result<Vec<_>, _> = Frame::samples().map(|text| frame.encode(tokenizer, text)).collect();
        if found.map_err(error)? != expected {
            let text = format!(
                "{} reads text next to a control token differently, so that the parts of this prompt have other ids \
                 than the whole; expected a tokenizer that splits a text at its control tokens and does nothing else there",
                path.display()
            );
            return Err(Fault::setting("prompt.template", text).into());
        }
    }
    Ok(frame)
}

/// Returns a fault if the normaliser cannot break up the separator's spelling in comments.
fn separator_fault(config: &PromptConfig) -> Option<Fault> {
    let has_separator = config.template.is_none() || !config.separator.is_empty();
    (config.normalize != Normalize::None && has_separator && !Normalizer::can_break_up(&config.separator)).then(|| {
        Fault::setting(
            "prompt.separator",
            format!(
                "`{}` has fewer than two visible characters, so its spelling in a comment cannot be broken up",
                config.separator.escape_debug()
            ),
        )
    })
}
