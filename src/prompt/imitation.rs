//! Breaks up what a tokenizer turns into the frame's separator.
//!
//! A tokenizer can fold case, accents or compatibility forms, as that of the bundled model does: it reads `＜ｓｅｐａｒａｔｏｒ＞` as
//! `<separator>`. So the separator is searched for in the text as the tokenizer sees it, after its own normaliser and
//! pre-tokeniser, and each place where it is found is broken up in the text itself. Whatever the spelling, no row then has
//! the separator's ids in its text.
//!
//! Gemma's own tokenizers only write another character for a space. With them, the
//! [literal separator](super::normalize) is all there is to find, and nothing is done here.

use std::borrow::Cow;

use super::seen::Seen;
use super::tokenizer::SafeTokenizer;

/// What stands for a space in the vocabularies of SentencePiece.
const SPACES: [char; 2] = [' ', '\u{2581}'];

/// Finds and breaks up imitations of a separator.
pub(super) struct Imitations {
    /// The separator as the tokenizer sees it, without spaces around it. Empty if there is nothing to find.
    target: String,
    /// Whether the tokenizer sees nothing else in an ASCII text than the literal separator, in any case.
    is_literal_in_ascii: bool,
}

impl Imitations {
    /// Reads how a tokenizer sees a separator. An empty one is never found.
    ///
    /// # Errors
    /// Returns the tokenizer's error.
    pub(super) fn new(separator: &str, tokenizer: &SafeTokenizer) -> Result<Self, tokenizers::Error> {
        let core = separator.trim();
        let has_space = core.contains(SPACES);
        let is_literal = tokenizer.bpe().is_some_and(|bpe| bpe.keeps_text()) && !has_space;
        if core.is_empty() || is_literal {
            return Ok(Self {
                target: String::new(),
                is_literal_in_ascii: true,
            });
        }
        // Letters around it, because a tokenizer can treat the beginning of a text differently.
        let seen = tokenizer.seen(&format!("a{core}a"))?;
        Ok(Self {
            target: seen.of(1..1 + core.len()).trim_matches(SPACES).to_owned(),
            is_literal_in_ascii: !has_space && tokenizer.bpe().is_some_and(|bpe| bpe.keeps_ascii_but_for_case()),
        })
    }

    /// Returns the text with a space in each part that the tokenizer turns into the separator, or without that part if a
    /// space does not help. Literal separators must have been broken up before.
    ///
    /// # Errors
    /// Returns the tokenizer's error, or one if nothing keeps the tokenizer from seeing the separator.
    pub(super) fn broken_up<'a>(
        &self,
        tokenizer: &SafeTokenizer,
        text: &'a str,
    ) -> Result<Cow<'a, str>, tokenizers::Error> {
        if self.target.is_empty() || self.is_literal_in_ascii && text.is_ascii() {
            return Ok(Cow::Borrowed(text));
        }
        // Faster than to record where each character comes from, and few texts have anything to break up.
        if let Some(bpe) = tokenizer.bpe()
            && !bpe.normalize(text)?.contains(&self.target)
        {
            return Ok(Cow::Borrowed(text));
        }
        let mut text = Cow::Borrowed(text);
        for change in [Self::parted, Self::cut_out, Self::without_first_characters] {
            let seen = tokenizer.seen(&text)?;
            if !seen.text().contains(&self.target) {
                return Ok(text);
            }
            text = Cow::Owned(change(self, &text, &seen));
        }
        if tokenizer.seen(&text)?.text().contains(&self.target) {
            return Err("the separator of the prompt cannot be broken up".into());
        }
        Ok(text)
    }

    /// Returns the text with a space behind the first character of each separator.
    fn parted(&self, text: &str, seen: &Seen) -> String {
        let mut parted = String::with_capacity(text.len() + 8);
        let mut done = 0;
        for at in self.places(seen) {
            let end = seen.origin(at).end;
            if end > done {
                parted.push_str(&text[done..end]);
                parted.push(' ');
                done = end;
            }
        }
        parted.push_str(&text[done..]);
        parted
    }

    /// Returns the text with a space instead of each separator. This helps if the tokenizer drops spaces, or if a single character
    /// becomes the whole separator.
    fn cut_out(&self, text: &str, seen: &Seen) -> String {
        let mut kept = String::with_capacity(text.len());
        let mut done = 0;
        for at in self.places(seen) {
            let (start, end) = (seen.origin(at).start, seen.origin(at + self.target.len() - 1).end);
            kept.push_str(&text[done..start.max(done)]);
            kept.push(' ');
            done = end.max(done);
        }
        kept.push_str(&text[done..]);
        kept
    }

    /// Returns the text with a space instead of all that becomes the separator's first character.
    fn without_first_characters(&self, text: &str, seen: &Seen) -> String {
        let Some(first) = self.target.chars().next() else {
            return text.to_owned();
        };
        let mut kept = String::with_capacity(text.len());
        let mut done = 0;
        for (at, _) in seen.text().match_indices(first) {
            let origin = seen.origin(at);
            if origin.start >= done {
                kept.push_str(&text[done..origin.start]);
                kept.push(' ');
                done = origin.end;
            }
        }
        kept.push_str(&text[done..]);
        kept
    }

    /// Returns where the tokenizer sees the separator, also where one begins within another.
    fn places(&self, seen: &Seen) -> Vec<usize> {
        let first = self.target.chars().next().map_or(1, char::len_utf8);
        let (mut places, mut at) = (Vec::new(), 0);
        while let Some(found) = seen.text()[at..].find(&self.target) {
            places.push(at + found);
            at += found + first;
        }
        places
    }
}
