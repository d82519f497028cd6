//! Turns a comment's text into rows: the frame around each window of the text, as token ids.
//!
//! A row has the ids of the whole prompt, because tokens can merge across the edges of the frame. Only what a text can
//! change is tokenised for it (`frame`). The tokens that a row shares with the cached prefix are found by comparing ids. A
//! long text is cut into overlapping windows, and each window becomes a complete prompt, so no limit on the length ever
//! cuts the frame (`rows`).
//!
//! No text can imitate the frame, unless `prompt.normalize` is off: the normaliser breaks up the literal separator, and
//! `imitation` whatever else the tokenizer turns into it. Harmless text next to a hateful passage can lower the margin of
//! the window that contains both.

mod bpe;
mod build;
mod english;
mod frame;
mod identity;
mod imitation;
mod long;
mod markup;
mod normalize;
mod rows;
mod scope;
mod seen;
mod sentences;
mod tokenizer;
mod window;

use std::borrow::Cow;

pub use identity::settings_of_text_rules;
pub use normalize::{NFC_VERSION, NORMALIZER_VERSION};
pub use scope::{Scope, ScopeError, language};

use frame::Frame;
use identity::text_rules;
use imitation::Imitations;
use normalize::Normalizer;
use tokenizer::SafeTokenizer;

use crate::config::{Markup, Normalize, WindowRules};
use crate::message::{Competence, TextFacts};
use crate::scorer::Row;

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
    /// Judges from now on whether each text is in the scope of the model.
    #[must_use]
    pub fn with_scope(self, scope: Option<Scope>) -> Self {
        Self { scope, ..self }
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
}

fn tokenizer_error(bytes: usize, error: &tokenizers::Error) -> PromptError {
    PromptError::Tokenizer {
        bytes,
        reason: error.to_string(),
    }
}
