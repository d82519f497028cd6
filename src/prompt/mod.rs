//! The frame around a comment: text in, token ids out.
//!
//! The whole prompt is tokenised at once, because tokens merge across the frame's edges; what a row
//! shares with the cached prefix is found by comparing ids. A long text is cut into overlapping
//! windows, each a full prompt, so nothing ever cuts the frame and nothing hides behind padding.

mod normalize;
mod tokenizer;
mod window;

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

pub use normalize::{NORMALIZER_VERSION, Normalizer};
pub use tokenizer::SafeTokenizer;

use crate::config::PromptConfig;
use crate::fault::{Fault, Faults};
use crate::hash::content_hash;
use crate::scorer::Row;

/// A comment's rows: one a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// At least one.
    pub rows: Vec<Row>,
    /// The text has more windows than `prompt.max_windows`; those scored are spread over it evenly,
    /// its beginning and its end among them.
    pub truncated: bool,
}

/// Why a text has no prompt. Never quotes the text.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// The tokenizer failed.
    #[error("cannot tokenise a text of {bytes} bytes: {reason}")]
    Tokenizer {
        /// Size of the text.
        bytes: usize,
        /// What the tokenizer said.
        reason: String,
    },
    /// The tokenizer knows an id that the embedding does not.
    #[error("a text of {bytes} bytes has token id {id}, expected less than {vocab_size}")]
    OutsideVocabulary {
        /// Size of the text.
        bytes: usize,
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
}

/// Turns texts into rows; immutable, shared by all threads.
pub struct Prompter {
    tokenizer: SafeTokenizer,
    normalizer: Option<Normalizer>,
    /// Before the comment: instructions, separator, `Text:`.
    head: String,
    /// After the comment: separator, `Prediction:`.
    tail: String,
    /// Token ids of `head` alone: what is cached.
    prefix: Vec<u32>,
    /// Tokens of the frame around an empty comment.
    frame_tokens: usize,
    vocab_size: usize,
    max_window_tokens: usize,
    max_windows: usize,
    /// Ids of the hateful label and the other.
    label_ids: [u32; 2],
    canonical: String,
    content_hash: String,
}

impl Prompter {
    /// Builds the frame and proves that the labels can be read after it.
    ///
    /// # Errors
    /// Everything wrong with the tokenizer file and with the frame in it: a label that is not one
    /// token or merges with the frame, a frame that spells a control token, windows that do not fit
    /// into `max_positions`.
    pub fn new(
        tokenizer_path: &Path,
        tokenizer: &[u8],
        config: &PromptConfig,
        vocab_size: usize,
        max_positions: usize,
    ) -> Result<Self, Faults> {
        let tokenizer = SafeTokenizer::new(tokenizer_path, tokenizer)?;
        let instructions = config.instructions.replace("{labels}", &config.labels.join(","));
        let head = format!("{instructions}{}Text:", config.separator);
        let tail = format!("{}Prediction:", config.separator);
        let canonical = identity(config);
        let mut prompter = Self {
            normalizer: config.normalize.then(|| Normalizer::new(&config.separator)),
            head,
            tail,
            prefix: Vec::new(),
            frame_tokens: 0,
            vocab_size,
            max_window_tokens: config.max_window_tokens,
            max_windows: config.max_windows,
            label_ids: [0; 2],
            content_hash: content_hash(canonical.as_bytes()),
            canonical,
            tokenizer,
        };
        let mut faults = Vec::new();
        if config.normalize && !Normalizer::can_protect(&config.separator) {
            faults.push(Fault::setting(
                "prompt.separator",
                format!(
                    "`{}` has fewer than two visible characters: a comment could forge it",
                    config.separator.escape_debug()
                ),
            ));
        }
        for (key, text) in [
            ("prompt.instructions", &config.instructions),
            ("prompt.separator", &config.separator),
        ] {
            if let Some(token) = prompter.tokenizer.control_token_in(text) {
                faults.push(Fault::setting(
                    key,
                    format!("spells the control token `{token}`, which would be read as plain text"),
                ));
            }
        }
        let hateful = usize::from(config.labels[1] == config.hateful_label);
        for (id, label) in [(0, hateful), (1, 1 - hateful)] {
            match prompter.label_id(tokenizer_path, &config.labels[label]) {
                Ok(found) => prompter.label_ids[id] = found,
                Err(fault) => faults.push(fault),
            }
        }
        let encode = |text: &str| {
            prompter
                .ids(text)
                .map_err(|error| Fault::file(tokenizer_path, error.to_string()))
        };
        match (
            encode(&prompter.head),
            encode(&format!("{}{}", prompter.head, prompter.tail)),
        ) {
            (Ok(prefix), Ok(frame)) => {
                let needed = frame.len() + config.max_window_tokens;
                if needed > max_positions {
                    faults.push(Fault::setting(
                        "prompt.max_window_tokens",
                        format!(
                            "{} tokens and a frame of {} do not fit into the checkpoint's {max_positions} positions",
                            config.max_window_tokens,
                            frame.len()
                        ),
                    ));
                }
                (prompter.prefix, prompter.frame_tokens) = (prefix, frame.len());
            }
            (prefix, frame) => faults.extend([prefix, frame].into_iter().filter_map(Result::err)),
        }
        if faults.is_empty() {
            Ok(prompter)
        } else {
            Err(faults.into())
        }
    }

    /// The rows of one comment's text.
    ///
    /// # Errors
    /// [`PromptError`]; the text is then unscorable, whatever the model.
    pub fn encode(&self, text: &str) -> Result<Prompt, PromptError> {
        let text = match &self.normalizer {
            Some(normalizer) => Cow::Owned(normalizer.normalize(text)),
            None => Cow::Borrowed(text),
        };
        // Most texts fit one window: a byte is at most one token, so short ones need no second look.
        let limit = self.frame_tokens + self.max_window_tokens;
        if text.len() <= self.max_window_tokens.saturating_mul(LONGEST_TOKEN_BYTES) {
            let row = self.row(&text)?;
            if row.tokens.len() <= limit {
                return Ok(Prompt {
                    rows: vec![row],
                    truncated: false,
                });
            }
        }
        let ranges = self
            .tokenizer
            .token_ranges(&text)
            .map_err(|error| tokenizer_error(&text, &error))?;
        let (windows, truncated) = window::cut(&text, &ranges, self.max_window_tokens, self.max_windows);
        let rows = windows
            .into_iter()
            .map(|window| self.row(&text[window]))
            .collect::<Result<_, _>>()?;
        Ok(Prompt { rows, truncated })
    }

    /// Token ids of the cached prefix, `<bos>` first.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// Ids of the hateful label and of the other.
    pub fn label_ids(&self) -> [u32; 2] {
        self.label_ids
    }

    /// Id of `<eos>`, where the vocabulary has one.
    pub fn eos_id(&self) -> Option<u32> {
        self.tokenizer.token_id("<eos>")
    }

    /// What stands before a comment.
    pub fn head(&self) -> &str {
        &self.head
    }

    /// What stands after it.
    pub fn tail(&self) -> &str {
        &self.tail
    }

    /// The prompt around a text, before tokenisation.
    pub fn frame(&self, text: &str) -> String {
        format!("{}{text}{}", self.head, self.tail)
    }

    /// What its hash is of.
    pub fn canonical(&self) -> &str {
        &self.canonical
    }

    /// Hash of everything that shapes the prompt but the normaliser.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }

    /// Version of the normaliser, or `none`.
    pub fn normalizer(&self) -> &'static str {
        if self.normalizer.is_some() {
            NORMALIZER_VERSION
        } else {
            "none"
        }
    }

    fn row(&self, text: &str) -> Result<Row, PromptError> {
        let tokens = self.ids(&self.frame(text))?;
        let common = tokens
            .iter()
            .zip(&self.prefix)
            .take_while(|(token, prefix)| token == prefix)
            .count();
        // At least one token is the row's own: its last position is where the labels are read.
        let shared = common.min(tokens.len() - 1);
        Ok(Row {
            tokens: tokens.into(),
            shared,
        })
    }

    fn ids(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        let ids = self
            .tokenizer
            .encode(text)
            .map_err(|error| tokenizer_error(text, &error))?;
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            None => Ok(ids),
            Some(&id) => Err(PromptError::OutsideVocabulary {
                bytes: text.len(),
                id,
                vocab_size: self.vocab_size,
            }),
        }
    }

    /// The label's id, once it is shown that a model reads it as one token right after the frame.
    fn label_id(&self, path: &Path, label: &str) -> Result<u32, Fault> {
        let id = self.tokenizer.token_id(label);
        let id =
            id.ok_or_else(|| Fault::file(path, format!("the label `{label}` is not one token of the vocabulary")))?;
        for sample in ["", "a comment", "one, two: three."] {
            let prompt = self.frame(sample);
            let ids = |text: &str| self.ids(text).map_err(|error| Fault::file(path, error.to_string()));
            let (mut expected, found) = (ids(&prompt)?, ids(&format!("{prompt}{label}"))?);
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

/// No published Gemma token spells more bytes (runs of spaces are the longest); only decides whether
/// a text is tokenised once or twice.
const LONGEST_TOKEN_BYTES: usize = 128;

fn tokenizer_error(text: &str, error: &tokenizers::Error) -> PromptError {
    PromptError::Tokenizer {
        bytes: text.len(),
        reason: error.to_string(),
    }
}

/// The settings that shape a prompt, in a canonical form.
fn identity(config: &PromptConfig) -> String {
    serde_json::json!({
        "format": 1,
        "labels": config.labels,
        "hateful_label": config.hateful_label,
        "instructions": config.instructions,
        "separator": config.separator,
        "max_window_tokens": config.max_window_tokens,
        "window_overlap_tokens": window::overlap(config.max_window_tokens),
        "max_windows": config.max_windows,
    })
    .to_string()
}

impl PromptConfig {
    /// Hash of the prompt that these settings make, as decisions name it.
    pub fn content_hash(&self) -> String {
        content_hash(identity(self).as_bytes())
    }

    /// The settings from their canonical form; the normaliser, which has a version of its own, is off.
    ///
    /// # Errors
    /// It is none of ours.
    pub fn from_canonical(canonical: &str) -> Result<Self, serde_json::Error> {
        #[derive(serde::Deserialize)]
        struct CanonicalPrompt {
            labels: [String; 2],
            hateful_label: String,
            instructions: String,
            separator: String,
            max_window_tokens: usize,
            max_windows: usize,
        }
        let found: CanonicalPrompt = serde_json::from_str(canonical)?;
        Ok(Self {
            labels: found.labels,
            hateful_label: found.hateful_label,
            instructions: found.instructions,
            separator: found.separator,
            normalize: false,
            max_window_tokens: found.max_window_tokens,
            max_windows: found.max_windows,
        })
    }
}

/// A prompter as the pipeline shares it.
pub type SharedPrompter = Arc<Prompter>;
