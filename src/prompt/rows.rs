//! Cuts a normalised text into windows and makes the row of each.

use std::ops::Range;

use super::long::LONGEST_TOKEN_BYTES;
use super::{PromptError, Prompter, Row, tokenizer_error, window};

/// The most tokens that completing the characters at both edges of a window adds to it, if a character has at most four
/// tokens, as one without a token of its own does in Gemma's vocabularies.
const EDGE_TOKENS: usize = 6;

/// The windows of a text with their rows, and whether the text has more windows than that.
pub(super) type Windows<'a> = (Vec<(&'a str, Row)>, bool);

impl Prompter {
    /// Returns the windows of a normalised text with their rows.
    pub(super) fn windows<'a>(&self, text: &'a str) -> Result<Windows<'a>, PromptError> {
        if text.len() > self.spread_bytes() && self.exceeds_windows(text)? {
            return self.windows_spread(text);
        }
        self.windows_whole(text)
    }

    /// Returns the windows of a normalised text, all of which is tokenised.
    pub(super) fn windows_whole<'a>(&self, text: &'a str) -> Result<Windows<'a>, PromptError> {
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

    /// Calls `build` with a number of tokens of the text per window, and returns its result once the `longest` row fits
    /// into `prompt.max_window_tokens`.
    ///
    /// In the frame, a window can have more tokens than its share of the text's tokens: it is extended to complete
    /// characters, and it can merge with the frame differently. Smaller windows are tried then. If they are still too
    /// long at half the size, which takes characters of very many tokens, they are scored as they are.
    pub(super) fn within_limit<T>(
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

    pub(super) fn row(&self, text: &str) -> Result<Row, PromptError> {
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
}
