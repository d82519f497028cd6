//! A text as a tokenizer sees it, with the places that it comes from.

use std::ops::Range;

use tokenizers::NormalizedString;
use tokenizers::normalizer::Range as Positions;

/// A text as the tokenizer sees it, and where each of its characters comes from.
#[derive(Default)]
pub struct Seen {
    text: String,
    /// For each character, in order, where it begins and the range of bytes of the text that it comes from.
    origins: Vec<(usize, Range<usize>)>,
}

impl Seen {
    /// Returns the text as it is seen.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Returns the range of bytes from which the character at this byte of what is seen comes.
    pub fn origin(&self, at: usize) -> Range<usize> {
        let index = self.origins.partition_point(|(start, _)| *start <= at);
        let (_, origin) = &self.origins[index.saturating_sub(1)];
        origin.clone()
    }

    /// Returns what is seen of a range of bytes of the text.
    pub fn of(&self, range: Range<usize>) -> String {
        let is_within = |origin: &Range<usize>| range.start <= origin.start && origin.end <= range.end;
        let chars = self.text.chars().zip(&self.origins);
        chars
            .filter(|(_, (_, origin))| is_within(origin))
            .map(|(char, _)| char)
            .collect()
    }

    /// Adds a part of a text, as it is seen.
    pub fn push(&mut self, part: &NormalizedString, text: &str) {
        let (shift, _) = part.offsets_original();
        for (at, char) in part.get().char_indices() {
            let origin = part.convert_offsets(Positions::Normalized(at..at + char.len_utf8()));
            // What comes from nowhere, such as a space in front of a text, belongs to what is before it.
            let origin = origin.map_or_else(
                || self.origins.last().map_or(shift..shift, |(_, last)| last.end..last.end),
                |origin| origin.start + shift..origin.end + shift,
            );
            let origin = text.floor_char_boundary(origin.start)..text.ceil_char_boundary(origin.end);
            self.origins.push((self.text.len(), origin));
            self.text.push(char);
        }
    }
}
