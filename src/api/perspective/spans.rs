//! Divides a comment into sentences, whose scores are the span scores.

use std::ops::Range;

use unicode_segmentation::UnicodeSegmentation;

/// A sentence and its place in the comment, in UTF-16 code units, as the original counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    pub text: String,
    pub place: Range<usize>,
}

/// Returns the sentences of a text (Unicode Standard Annex 29), without the white space around them.
pub(super) fn sentences(text: &str) -> Vec<Span> {
    let mut begin = 0;
    let mut spans = Vec::new();
    for sentence in text.split_sentence_bounds() {
        let trimmed = sentence.trim_start();
        let skipped = utf16_length(&sentence[..sentence.len() - trimmed.len()]);
        let trimmed = trimmed.trim_end();
        let start = begin + skipped;
        if !trimmed.is_empty() {
            spans.push(Span {
                text: trimmed.to_owned(),
                place: start..start + utf16_length(trimmed),
            });
        }
        begin += utf16_length(sentence);
    }
    spans
}

/// Returns the length of a text in UTF-16 code units.
pub(super) fn utf16_length(text: &str) -> usize {
    text.chars().map(char::len_utf16).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_have_their_places_in_utf16() {
        let found = sentences(" What a näme is foo?  Sorry, I like your name.\n");
        let found: Vec<_> = found
            .iter()
            .map(|span| (span.text.as_str(), span.place.clone()))
            .collect();
        assert_eq!(
            found,
            [("What a näme is foo?", 1..20), ("Sorry, I like your name.", 22..46)]
        );
        let places: Vec<_> = sentences("😀 Hello. You are nice.")
            .into_iter()
            .map(|span| span.place)
            .collect();
        assert_eq!(places, [0..9, 10..23]);
        assert_eq!(sentences(" \n"), []);
    }
}
