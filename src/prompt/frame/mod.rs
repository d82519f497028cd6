//! The frame around a comment, and the parts of it that no comment can change.
//!
//! Tokens merge across the edges of the frame, so the ids of a prompt are not those of head, text and tail in a row. But
//! most of the frame's ids are the same in every prompt. The frame is cut at the last point of the head, and at the first
//! point of the tail, that no token can cross. What is outside the two cuts is tokenised once. For each text, only what
//! is between them is tokenised: the end of the head, the text, and the beginning of the tail.
//!
//! # Why the ids are those of the whole prompt
//!
//! Let a cut be between two ASCII characters of the frame, in a tokenizer that follows the rules of [`Bpe`]. (For all
//! others, whole prompts are tokenised.) Each step then gives the same result on both sides of the cut as on the whole.
//!
//! - **Added tokens.** None can begin before the cut and end behind it, which [`Crossings`] checks. The search goes from
//!   left to right, so it finds the same tokens before the cut, and begins anew at the cut or before it.
//! - **Normaliser.** No known step moves, joins or changes anything across an ASCII character, and the one behind the
//!   cut is ASCII whatever the text is. A mark at the beginning of the text stays behind the last character of the head.
//! - **Pre-tokeniser.** It splits after single characters, so a cut adds no split within a part and removes none.
//! - **Merges.** Only neighbours merge, those with the lowest rank first. If no pair across the cut can ever merge, then
//!   the two sides have no influence on each other. [`Crossings`] checks this for each pair of the vocabulary: the left
//!   token would have to end as the frame does before the cut, and the right one to begin as it does behind the cut. The
//!   frame is known only up to the text, so a token that reaches into the text counts whatever follows. The spelling of a
//!   token is that of its characters, as far as the characters have tokens and are not
//!   replaced by bytes. Beyond the first one that has none, anything can follow as well.
//!
//! As a safeguard, prompts with a few texts are compared when the frame is cut. Properties in `tests` compare many more.

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use super::bpe::Bpe;
use super::tokenizer::SafeTokenizer;

/// Texts whose prompts must have the same ids with and without cuts: they begin and end with what merges with other
/// frames, or with what a normaliser could join with its neighbours.
const SAMPLES: [&str; 8] = [
    "",
    "a",
    " a fine day ",
    "::[]<>\n\n",
    "\u{301}\u{338}e\u{301}",
    "\u{2581}\u{2581}",
    "\u{1f44d}",
    "<separator>Text:<eos>",
];

/// The text before and after a comment.
pub(super) struct Frame {
    head: String,
    tail: String,
    cuts: Option<Cuts>,
}

/// The parts of a frame that is cut twice.
struct Cuts {
    /// The ids before the first cut, with `<bos>`.
    leading: Vec<u32>,
    /// The length in bytes of the head before the first cut.
    head: usize,
    /// The length in bytes of the tail before the second cut.
    tail: usize,
    /// The ids behind the second cut.
    trailing: Vec<u32>,
}

impl Frame {
    /// Creates a frame and cuts it, if the tokenizer allows it.
    pub(super) fn new(head: String, tail: String, tokenizer: &SafeTokenizer) -> Self {
        let mut frame = Self { head, tail, cuts: None };
        let cuts = tokenizer.bpe().and_then(|bpe| frame.cut(tokenizer, bpe));
        let whole = |text: &str| tokenizer.encode(&frame.around(text)).ok();
        let expected = SAMPLES.map(whole);
        frame.cuts = cuts;
        let found = SAMPLES.map(|text| frame.encode(tokenizer, text).ok());
        if found != expected {
            frame.cuts = None;
        }
        frame
    }

    /// Returns the text before the comment.
    pub(super) fn head(&self) -> &str {
        &self.head
    }

    /// Returns the text after the comment.
    pub(super) fn tail(&self) -> &str {
        &self.tail
    }

    /// Returns the frame around a text.
    pub(super) fn around(&self, text: &str) -> String {
        [&self.head, text, &self.tail].concat()
    }

    /// Returns the token ids of the frame around a text, with `<bos>` in front.
    ///
    /// # Errors
    /// Returns the tokenizer's error, which does not contain the text.
    pub(super) fn encode(&self, tokenizer: &SafeTokenizer, text: &str) -> Result<Vec<u32>, tokenizers::Error> {
        let (Some(cuts), Some(bpe)) = (&self.cuts, tokenizer.bpe()) else {
            return tokenizer.encode(&self.around(text));
        };
        let between = [&self.head[cuts.head..], text, &self.tail[..cuts.tail]].concat();
        // English has at least three bytes a token, so this is rarely too little.
        let mut ids = Vec::with_capacity(cuts.leading.len() + between.len() / 2 + cuts.trailing.len());
        ids.extend_from_slice(&cuts.leading);
        tokenizer.encode_part(bpe, &between, &mut ids)?;
        ids.extend_from_slice(&cuts.trailing);
        Ok(ids)
    }

    /// Returns the last cut of the head and the first one of the tail, if there are both.
    fn cut(&self, tokenizer: &SafeTokenizer, bpe: &Bpe) -> Option<Cuts> {
        let is_known = |byte: &u8| byte.is_ascii() && bpe.has_tokens(char::from(*byte));
        let unknown = self.head.len() - self.head.bytes().rev().take_while(is_known).count();
        let head = unknown + safe_points(tokenizer, bpe, &self.head[unknown..]).pop()?;
        let known = self.tail.bytes().take_while(is_known).count();
        let tail = *safe_points(tokenizer, bpe, &self.tail[..known]).first()?;
        let mut trailing = Vec::new();
        tokenizer.encode_part(bpe, &self.tail[tail..], &mut trailing).ok()?;
        Some(Cuts {
            leading: tokenizer.encode(&self.head[..head]).ok()?,
            head,
            tail,
            trailing,
        })
    }
}

/// Returns the points of a text, in order, that no token crosses whatever is before and after the text. Each character of
/// the text is ASCII and has a token.
fn safe_points(tokenizer: &SafeTokenizer, bpe: &Bpe, text: &str) -> Vec<usize> {
    let parts = |at: usize| (bpe.normalize_ascii(&text[..at]), bpe.normalize_ascii(&text[at..]));
    let mut in_text = Crossings::new(1..text.len(), |at| (text[..at].to_owned(), text[at..].to_owned()));
    for token in bpe.added() {
        token
            .char_indices()
            .for_each(|(at, _)| in_text.exclude(&token[..at], &token[at..]));
    }
    let mut normalized = Crossings::new(in_text.remaining(), parts);
    for (left, right) in bpe.pairs() {
        match (tokenizer.spelling(left), tokenizer.spelling(right)) {
            (Some(left), Some(right)) => normalized.exclude(&left, &right),
            _ => return Vec::new(),
        }
    }
    normalized.remaining()
}

/// The points of a known text that nothing crosses.
struct Crossings {
    /// Each point with the text before and after it. `None` if something crosses it.
    points: Vec<Option<(usize, String, String)>>,
    /// The indices of the points between two characters.
    between: HashMap<(char, char), Vec<usize>>,
}

impl Crossings {
    /// Creates the points at which `split` gives two parts that are not empty.
    fn new(points: impl IntoIterator<Item = usize>, split: impl Fn(usize) -> (String, String)) -> Self {
        let (mut kept, mut between) = (Vec::new(), HashMap::<_, Vec<usize>>::new());
        for at in points {
            let (before, after) = split(at);
            if let (Some(last), Some(first)) = (before.chars().next_back(), after.chars().next()) {
                between.entry((last, first)).or_default().push(kept.len());
                kept.push(Some((at, before, after)));
            }
        }
        Self { points: kept, between }
    }

    /// Excludes the points that can have this text to their left and this text to their right. Before and after the known
    /// text, there can be anything.
    fn exclude(&mut self, left: &str, right: &str) {
        let (Some(last), Some(first)) = (left.chars().next_back(), right.chars().next()) else {
            return;
        };
        for &index in self.between.get(&(last, first)).into_iter().flatten() {
            let crosses = |(_, before, after): &mut (usize, String, String)| {
                (before.ends_with(left) || left.ends_with(before.as_str()))
                    && (after.starts_with(right) || right.starts_with(after.as_str()))
            };
            self.points[index].take_if(crosses);
        }
    }

    /// Returns the points that are left, in order.
    fn remaining(self) -> Vec<usize> {
        self.points.into_iter().flatten().map(|(at, ..)| at).collect()
    }
}
