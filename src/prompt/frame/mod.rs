//! The frame around a comment, and the parts of it that no comment can change.
//!
//! Tokens merge across the edges of the frame, so the ids of a prompt are not those of head, text and tail in a row. But
//! most of the frame's ids are the same in every prompt. The frame is cut at the last point of the head, and at the first
//! point of the tail, that no token can cross, or else at the edge of the frame. What is outside the two cuts is tokenised once. For each text, only what
//! is between them is tokenised: the end of the head, the text, and the beginning of the tail.
//!
//! # Control tokens
//!
//! A frame of the operator can spell control tokens. Like transformers, a tokenizer finds these before anything else, and
//! reads the pieces between them one by one. Here, the pieces before the last control token in front of the comment, and
//! behind the first one after it, are tokenised once. Only the piece that contains the comment is tokenised for each
//! text, with all spellings of control tokens as text. No text can therefore become a control token, and none can
//! end its piece.
//!
//! # Why the ids are those of the whole prompt
//!
//! In the following, the frame is the piece of it around the text. Let a cut be between two ASCII characters of the frame, in a tokenizer that follows the rules of [`Bpe`]. (For all
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
use super::tokenizer::{Part, SafeTokenizer};

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
    /// The piece that contains the comment.
    piece: Piece,
    /// The ids before that piece, with `<bos>`. `None` if the prompt begins with that piece.
    before: Option<Vec<u32>>,
    /// The ids behind the piece.
    after: Vec<u32>,
    cuts: Option<Cuts>,
}

/// The text before and after a comment, without control tokens.
struct Piece {
    head: String,
    tail: String,
}

/// The parts of a piece that is cut twice.
struct Cuts {
    /// The ids before the first cut, with `<bos>` and all that is before the piece.
    leading: Vec<u32>,
    /// The length in bytes of the piece's head before the first cut.
    head: usize,
    /// The length in bytes of the piece's tail before the second cut.
    tail: usize,
    /// The ids behind the second cut, with all that is behind the piece.
    trailing: Vec<u32>,
}

impl Frame {
    /// Creates a frame in which all spellings of control tokens are text, and cuts it, if the tokenizer allows it.
    pub(super) fn new(head: String, tail: String, tokenizer: &SafeTokenizer) -> Self {
        let piece = Piece {
            head: head.clone(),
            tail: tail.clone(),
        };
        let frame = Self {
            head,
            tail,
            piece,
            before: None,
            after: Vec::new(),
            cuts: None,
        };
        frame.with_cuts(tokenizer)
    }

    /// Creates a frame whose spellings of control tokens are those tokens, and cuts it, if the tokenizer allows it.
    ///
    /// A `<bos>` at the beginning is the one that every prompt begins with.
    ///
    /// # Errors
    /// Returns the tokenizer's error.
    pub(super) fn with_control_tokens(
        head: &str,
        tail: String,
        tokenizer: &SafeTokenizer,
    ) -> Result<Self, tokenizers::Error> {
        let head = head.strip_prefix("<bos>").unwrap_or(head).to_owned();
        let (before, piece_head) = ids_before_last_text(tokenizer, &head)?;
        let (piece_tail, after) = ids_after_first_text(tokenizer, &tail)?;
        let frame = Self {
            head,
            tail,
            piece: Piece {
                head: piece_head,
                tail: piece_tail,
            },
            before,
            after,
            cuts: None,
        };
        Ok(frame.with_cuts(tokenizer))
    }

    fn with_cuts(mut self, tokenizer: &SafeTokenizer) -> Self {
        let expected = SAMPLES.map(|text| self.encode(tokenizer, text).ok());
        self.cuts = tokenizer.bpe().and_then(|bpe| self.cut(tokenizer, bpe));
        let found = SAMPLES.map(|text| self.encode(tokenizer, text).ok());
        if found != expected {
            self.cuts = None;
        }
        self
    }

    /// Returns whether the frame has control tokens.
    pub(super) fn has_control_tokens(&self) -> bool {
        self.before.is_some() || !self.after.is_empty()
    }

    /// Returns texts around which the ids of the frame must be those of the whole prompt, as transformers gives them.
    pub(super) fn samples() -> impl Iterator<Item = &'static str> {
        SAMPLES.into_iter().filter(|text| !text.contains("<eos>"))
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
            let mut ids = self.encode_piece(tokenizer, &[&self.piece.head, text, &self.piece.tail].concat())?;
            ids.extend_from_slice(&self.after);
            return Ok(ids);
        };
        let between = [&self.piece.head[cuts.head..], text, &self.piece.tail[..cuts.tail]].concat();
        // English has at least three bytes a token, so this is rarely too little.
        let mut ids = Vec::with_capacity(cuts.leading.len() + between.len() / 2 + cuts.trailing.len());
        ids.extend_from_slice(&cuts.leading);
        tokenizer.encode_part(bpe, &between, &mut ids)?;
        ids.extend_from_slice(&cuts.trailing);
        Ok(ids)
    }

    /// Returns the token ids of the head alone, with `<bos>` in front.
    ///
    /// # Errors
    /// Returns the tokenizer's error.
    pub(super) fn encode_head(&self, tokenizer: &SafeTokenizer) -> Result<Vec<u32>, tokenizers::Error> {
        self.encode_piece(tokenizer, &self.piece.head)
    }

    /// Returns the token ids of the frame around a text, with more text behind it, in which the spelling of a control
    /// token is text.
    ///
    /// # Errors
    /// Returns the tokenizer's error, which does not contain the text.
    pub(super) fn encode_with_answer(
        &self,
        tokenizer: &SafeTokenizer,
        text: &str,
        answer: &str,
    ) -> Result<Vec<u32>, tokenizers::Error> {
        // The answer belongs to the last piece, which may be the one that contains the comment.
        let mut parts = match self.after.is_empty() {
            true => vec![Part::Text(self.piece.tail.clone())],
            false => tokenizer.split_at_control_tokens(&self.tail),
        };
        if let Some(Part::Text(last)) = parts.last_mut() {
            last.push_str(answer);
        }
        let mut parts = parts.into_iter();
        let first = match parts.next() {
            Some(Part::Text(first)) => first,
            _ => String::new(),
        };
        let mut ids = self.encode_piece(tokenizer, &[&self.piece.head, text, &first].concat())?;
        encode_parts(tokenizer, parts.as_slice(), &mut ids)?;
        Ok(ids)
    }

    /// Returns the ids of all that is before the piece, and of the piece with this text.
    fn encode_piece(&self, tokenizer: &SafeTokenizer, piece: &str) -> Result<Vec<u32>, tokenizers::Error> {
        let Some(before) = &self.before else {
            return tokenizer.encode(piece);
        };
        let mut ids = before.clone();
        tokenizer.encode_inside(piece, &mut ids)?;
        Ok(ids)
    }

    /// Returns the last cut of the head and the first one of the tail.
    fn cut(&self, tokenizer: &SafeTokenizer, bpe: &Bpe) -> Option<Cuts> {
        let Piece {
            head: piece_head,
            tail: piece_tail,
        } = &self.piece;
        let is_known = |byte: &u8| byte.is_ascii() && bpe.has_tokens(char::from(*byte));
        let unknown = piece_head.len() - piece_head.bytes().rev().take_while(is_known).count();
        let last = safe_points(tokenizer, bpe, &piece_head[unknown..]).pop();
        let known = piece_tail.bytes().take_while(is_known).count();
        let first = safe_points(tokenizer, bpe, &piece_tail[..known]).first().copied();
        // The edges of the piece are always safe.
        let head = last.map_or(0, |last| unknown + last);
        let tail = first.unwrap_or(piece_tail.len());
        let mut trailing = Vec::new();
        tokenizer.encode_part(bpe, &piece_tail[tail..], &mut trailing).ok()?;
        trailing.extend_from_slice(&self.after);
        Some(Cuts {
            leading: self.encode_piece(tokenizer, &piece_head[..head]).ok()?,
            head,
            tail,
            trailing,
        })
    }
}

/// Returns the ids of a head up to its last control token, with `<bos>` in front, and the text behind that token. There
/// are no ids if it has no control token.
fn ids_before_last_text(
    tokenizer: &SafeTokenizer,
    head: &str,
) -> Result<(Option<Vec<u32>>, String), tokenizers::Error> {
    let mut parts = tokenizer.split_at_control_tokens(head);
    let Some(Part::Text(last)) = parts.pop() else {
        return Ok((None, head.to_owned()));
    };
    if parts.is_empty() {
        return Ok((None, last));
    }
    let mut ids = tokenizer.leading()?;
    encode_parts(tokenizer, &parts, &mut ids)?;
    Ok((Some(ids), last))
}

/// Returns the text of a tail before its first control token, and the ids of the rest.
fn ids_after_first_text(tokenizer: &SafeTokenizer, tail: &str) -> Result<(String, Vec<u32>), tokenizers::Error> {
    let mut parts = tokenizer.split_at_control_tokens(tail).into_iter();
    let Some(Part::Text(first)) = parts.next() else {
        return Ok((tail.to_owned(), Vec::new()));
    };
    let mut ids = Vec::new();
    encode_parts(tokenizer, parts.as_slice(), &mut ids)?;
    Ok((first, ids))
}

fn encode_parts(tokenizer: &SafeTokenizer, parts: &[Part], ids: &mut Vec<u32>) -> Result<(), tokenizers::Error> {
    for part in parts {
        match part {
            Part::Text(text) => tokenizer.encode_inside(text, ids)?,
            Part::Control(id) => ids.push(*id),
        }
    }
    Ok(())
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
