//! Turns a comment's text into rows: the frame around each window of the text, as token ids.
//!
//! A row has the ids of the whole prompt, because tokens can merge across the edges of the frame. Only what a text can
//! change is tokenised for it (`frame`). The tokens that a row shares with the cached prefix are found by comparing ids. A
//! long text is cut into overlapping windows, and each
//! window becomes a complete prompt, so no limit on the length ever cuts the frame.
//!
//! No text can imitate the frame, unless `prompt.normalize` is off: the normaliser breaks up the literal separator, and
//! `imitation` whatever else the tokenizer turns into it. Harmless text next to a hateful passage can lower the margin of
//! the window that contains both.

mod bpe;
mod english;
mod frame;
mod identity;
mod imitation;
mod long;
mod markup;
mod normalize;
mod scope;
mod seen;
mod sentences;
mod tokenizer;
mod window;

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

pub use identity::settings_of_text_rules;
pub use normalize::{NFC_VERSION, NORMALIZER_VERSION};
pub use scope::{Scope, ScopeError, language};

use frame::Frame;
use identity::{FORMAT, IsFramed, canonical_form, text_rules};
use imitation::Imitations;
use long::LONGEST_TOKEN_BYTES;
use normalize::Normalizer;
use tokenizer::SafeTokenizer;

use crate::config::{Markup, Normalize, PromptConfig, Template, WindowRules};
use crate::fault::{Fault, Faults};
use crate::hash::content_hash;
use crate::message::{Competence, TextFacts};
use crate::scorer::Row;

/// The most tokens that completing the characters at both edges of a window adds to it, if a character has at most four
/// tokens, as one without a token of its own does in Gemma's vocabularies.
const EDGE_TOKENS: usize = 6;

/// The rows of one comment, one for each window.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prompt {
    /// The rows in the order of the text; a text has at least one.
    pub rows: Vec<Row>,
    /// Whether the text has more windows than `prompt.max_windows`. The rows then cover windows that are spread evenly
    /// over the text, including its beginning and, if there is more than one, its end.
    pub truncated: bool,
    /// What is subtracted from the largest margin of the rows, because of their number.
    pub correction: f32,
    /// Whether the model can judge the text; `None` if it does not say which languages it was trained for.
    pub competence: Option<Competence>,
}

impl Prompt {
    /// Returns what is known of the text, for [`comment_margin`](crate::scorer::comment_margin).
    pub fn facts(&self) -> TextFacts {
        TextFacts {
            windows: self.rows.len(),
            truncated: self.truncated,
            correction: self.correction,
            competence: self.competence,
        }
    }
}

/// The windows of a text with their rows, and whether the text has more windows than that.
type Windows<'a> = (Vec<(&'a str, Row)>, bool);

/// The reason why a text cannot be turned into rows. The message never quotes the text.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// The tokenizer failed.
    #[error("cannot tokenise a text of {bytes} bytes: {reason}")]
    Tokenizer {
        /// The size of the text.
        bytes: usize,
        /// The tokenizer's error message.
        reason: String,
    },
    /// The tokenizer produced an id for which the model has no embedding.
    #[error("a text of {bytes} bytes has token id {id}, expected less than {vocab_size}")]
    OutsideVocabulary {
        /// The size of the text.
        bytes: usize,
        /// The id that has no embedding.
        id: u32,
        /// The number of embeddings.
        vocab_size: usize,
    },
}

/// Turns texts into rows. It is immutable and can be shared by all threads.
pub struct Prompter {
    tokenizer: SafeTokenizer,
    markup: Markup,
    normalizer: Normalizer,
    rules: Normalize,
    /// `None` if comments are not normalised.
    imitations: Option<Imitations>,
    /// Before the comment, instructions, separator and `Text:`. After it, separator and `Prediction:`.
    frame: Frame,
    /// The token ids of the head alone, whose keys and values are cached.
    prefix: Vec<u32>,
    /// The number of tokens of the frame around an empty text.
    frame_tokens: usize,
    vocab_size: usize,
    window: WindowRules,
    /// The languages that the model was trained for, if it says so.
    scope: Option<Scope>,
    /// The ids of the tokens that spell single bytes, in ascending order.
    byte_ids: Vec<u32>,
    /// The ids of the hateful label and of the other label.
    label_ids: [u32; 2],
    canonical: String,
    content_hash: String,
    /// The hash that these settings had in format 1.
    earlier_hash: String,
}

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

    /// Judges from now on whether each text is in the scope of the model.
    #[must_use]
    pub fn with_scope(self, scope: Option<Scope>) -> Self {
        Self { scope, ..self }
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

    /// Returns the rows of a comment's text.
    ///
    /// # Errors
    /// Returns an error if the text cannot be tokenised. No model with this tokenizer can score such a text.
    pub fn encode(&self, text: &str) -> Result<Prompt, PromptError> {
        self.encode_normalized(&self.normalize(text))
    }

    /// Returns the text as it is scored. The rows of a comment depend on nothing else of it.
    pub(crate) fn normalize<'a>(&self, text: &'a str) -> Cow<'a, str> {
        // Markup is decoded first, so that it can hide neither invisible characters nor a separator.
        let text = self.markup.decode(text);
        match text {
            Cow::Borrowed(text) => self.normalizer.normalize(text),
            Cow::Owned(text) => Cow::Owned(self.normalizer.normalize(&text).into_owned()),
        }
    }

    /// Returns the rows of a text that [`Prompter::normalize`] has returned.
    ///
    /// # Errors
    /// Fails like [`Prompter::encode`].
    pub(crate) fn encode_normalized(&self, text: &str) -> Result<Prompt, PromptError> {
        let text = self.without_imitations(text)?;
        let (windows, truncated) = self.windows(&text)?;
        let mut prompt = self.prompt(windows, truncated);
        prompt.competence = self.competence(&text, &prompt.rows);
        Ok(prompt)
    }

    fn prompt(&self, windows: Vec<(&str, Row)>, truncated: bool) -> Prompt {
        Prompt {
            correction: self.window.correction.margin(windows.len()),
            rows: windows.into_iter().map(|(_, row)| row).collect(),
            truncated,
            competence: None,
        }
    }

    /// Judges whether a normalised text with these rows is in the scope of the model.
    fn competence(&self, text: &str, rows: &[Row]) -> Option<Competence> {
        let scope = self.scope.as_ref()?;
        let own = rows.iter().flat_map(|row| &row.tokens[row.shared..]);
        let bytes = own.filter(|id| self.byte_ids.binary_search(id).is_ok()).count();
        let frames = self.frame_tokens * rows.len();
        let tokens = rows
            .iter()
            .map(|row| row.tokens.len())
            .sum::<usize>()
            .saturating_sub(frames);
        Some(scope.of_text(text, bytes as f64 / tokens.max(1) as f64))
    }

    /// Returns the prompts of a comment's text, one for each window, before tokenisation and as the rows that are scored.
    ///
    /// # Errors
    /// Fails like [`Prompter::encode`].
    pub fn prompts(&self, text: &str) -> Result<Vec<(String, Row)>, PromptError> {
        let text = self.normalize(text);
        let text = self.without_imitations(&text)?;
        let (windows, _) = self.windows(&text)?;
        let prompt = |(window, row): (&str, Row)| (self.frame(window), row);
        Ok(windows.into_iter().map(prompt).collect())
    }

    /// Returns a normalised text without anything that the tokenizer turns into the separator.
    fn without_imitations<'a>(&self, text: &'a str) -> Result<Cow<'a, str>, PromptError> {
        let Some(imitations) = &self.imitations else {
            return Ok(Cow::Borrowed(text));
        };
        let broken_up = imitations.broken_up(&self.tokenizer, text);
        broken_up.map_err(|error| tokenizer_error(text.len(), &error))
    }

    /// Returns the windows of a normalised text with their rows.
    fn windows<'a>(&self, text: &'a str) -> Result<Windows<'a>, PromptError> {
        if text.len() > self.spread_bytes() && self.exceeds_windows(text)? {
            return self.windows_spread(text);
        }
        self.windows_whole(text)
    }

    /// Returns the windows of a normalised text, all of which is tokenised.
    fn windows_whole<'a>(&self, text: &'a str) -> Result<Windows<'a>, PromptError> {
        // Most texts fit into one window, so the whole prompt is tokenised first. A longer text than this is unlikely
        // to fit, and is cut into windows right away.
        let limit = self.frame_tokens + self.window.max_tokens;
        if text.len() <= self.window.max_tokens.saturating_mul(LONGEST_TOKEN_BYTES) {
            let row = self.row(text)?;
            if row.tokens.len() <= limit {
                return Ok((vec![(text, row)], false));
            }
        }
        let ranges = self
            .tokenizer
            .token_ranges(text)
            .map_err(|error| tokenizer_error(text.len(), &error))?;
        let longest = |(windows, _): &Windows<'_>| windows.iter().map(|(_, row)| row.tokens.len()).max();
        self.within_limit(longest, |max_tokens| {
            let (windows, truncated) =
                window::cut(text, &ranges, max_tokens, self.window.max_windows, self.window.edges);
            let row = |window: Range<usize>| Ok((&text[window.clone()], self.row(&text[window])?));
            Ok((windows.into_iter().map(row).collect::<Result<_, _>>()?, truncated))
        })
    }

    /// Returns what `build` makes of windows with so many tokens of the text, such that the `longest` row has no more
    /// tokens than `prompt.max_window_tokens` allows.
    ///
    /// In the frame, a window can have more tokens than its share of the text's tokens: it is extended to complete
    /// characters, and it can merge with the frame differently. Smaller windows are tried then. If they are still too
    /// long at half the size, which takes characters of very many tokens, they are scored as they are.
    fn within_limit<T>(
        &self,
        longest: impl Fn(&T) -> Option<usize>,
        build: impl Fn(usize) -> Result<T, PromptError>,
    ) -> Result<T, PromptError> {
        let limit = self.frame_tokens + self.window.max_tokens;
        let most_spare = self.window.max_tokens / 2;
        let mut spare_tokens = 0;
        loop {
            let built = build(self.window.max_tokens - spare_tokens)?;
            let excess = longest(&built).unwrap_or_default().saturating_sub(limit);
            if excess == 0 || spare_tokens == most_spare {
                return Ok(built);
            }
            // At least doubled, so that there are few attempts whatever the text.
            let step = excess.max(spare_tokens).max(EDGE_TOKENS);
            spare_tokens = (spare_tokens + step).min(most_spare);
        }
    }

    /// Returns the token ids of the cached prefix, which begin with `<bos>`.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// Returns the maximum number of comment tokens in a window.
    pub fn max_window_tokens(&self) -> usize {
        self.window.max_tokens
    }

    /// Returns the ids of the hateful label and of the other label.
    pub fn label_ids(&self) -> [u32; 2] {
        self.label_ids
    }

    /// Returns the id of `<eos>`, if the vocabulary has one.
    pub fn eos_id(&self) -> Option<u32> {
        self.tokenizer.token_id("<eos>")
    }

    /// Returns the part of the frame before the comment.
    pub fn head(&self) -> &str {
        self.frame.head()
    }

    /// Returns the part of the frame after the comment.
    pub fn tail(&self) -> &str {
        self.frame.tail()
    }

    /// Returns the frame around a text, before tokenisation.
    pub fn frame(&self, text: &str) -> String {
        self.frame.around(text)
    }

    /// Returns the canonical JSON form of the prompt settings, of which [`Prompter::content_hash`] is the hash.
    pub fn canonical(&self) -> &str {
        &self.canonical
    }

    /// Returns the hash of all settings that shape the prompt, except the normaliser.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }

    /// Returns whether a model that was trained with the prompt of this hash can be served with this prompt. The two may
    /// differ in which windows of a very long text they choose.
    pub fn serves(&self, content_hash: &str) -> bool {
        content_hash == self.content_hash || content_hash == self.earlier_hash
    }

    /// Returns the names and versions of the rules by which a text is changed before it is tokenised, such as
    /// `html-1+fold-2`, or `none`.
    pub fn normalizer(&self) -> String {
        text_rules(self.markup, self.rules)
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

    fn row(&self, text: &str) -> Result<Row, PromptError> {
        let bytes = self.head().len() + text.len() + self.tail().len();
        let tokens = self.frame.encode(&self.tokenizer, text);
        let tokens = self.checked(bytes, tokens)?;
        let common = tokens
            .iter()
            .zip(&self.prefix)
            .take_while(|(token, prefix)| token == prefix)
            .count();
        // The labels are read at the last position, so the last token must be the row's own.
        let shared = common.min(tokens.len() - 1);
        Ok(Row {
            tokens: tokens.into(),
            shared,
        })
    }

    /// Returns the ids of a text of this size, after checking that each has an embedding.
    fn checked(&self, bytes: usize, ids: Result<Vec<u32>, tokenizers::Error>) -> Result<Vec<u32>, PromptError> {
        let ids = ids.map_err(|error| tokenizer_error(bytes, &error))?;
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            None => Ok(ids),
            Some(&id) => Err(PromptError::OutsideVocabulary {
                bytes,
                id,
                vocab_size: self.vocab_size,
            }),
        }
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
        let expected = tokenizer::encode_as_transformers(file, &prompts).map_err(error)?;
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

fn tokenizer_error(bytes: usize, error: &tokenizers::Error) -> PromptError {
    PromptError::Tokenizer {
        bytes,
        reason: error.to_string(),
    }
}
