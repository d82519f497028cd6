//! Cuts a long text into overlapping windows.

use std::ops::Range;

use super::sentences::sentence_ends;
use crate::config::WindowEdges;

/// Returns the minimum number of tokens that neighbouring windows share: a quarter of a window, so that a phrase that
/// is cut off at the edge of one window is complete in the next.
pub fn overlap(max_tokens: usize) -> usize {
    max_tokens / 4
}

/// Returns the number of tokens of the longest text that `max_windows` windows cover with this overlap.
pub fn capacity(max_tokens: usize, max_windows: usize) -> usize {
    max_tokens + max_windows.saturating_sub(1) * stride(max_tokens)
}

/// Returns the byte ranges of a text's windows, and whether the text needs more than `max_windows`.
///
/// `tokens` are the byte ranges of the text's tokens, in order. A window has at most `max_tokens` of them and is cut at
/// character boundaries. If the text needs more windows than `max_windows`, that many are spread evenly from its first
/// token to its last; a single window covers its beginning.
///
/// With [`WindowEdges::Sentences`], a window begins with a sentence that begins within its first tokens, and ends with one that
/// ends within its last tokens. Each edge moves inwards by at most half of the overlap, so there are as many windows as
/// without it, and they still cover the text. Neighbours share at least half of the overlap, unless one begins where a
/// sentence ends in the other.
pub fn cut(
    text: &str,
    tokens: &[(usize, usize)],
    max_tokens: usize,
    max_windows: usize,
    edges: WindowEdges,
) -> (Vec<Range<usize>>, bool) {
    if tokens.len() <= max_tokens {
        return (std::iter::once(0..text.len()).collect(), false);
    }
    let last_start = tokens.len() - max_tokens;
    let needed = last_start.div_ceil(stride(max_tokens)) + 1;
    let count = needed.min(max_windows.max(1));
    // Spread evenly, so that the last window ends with the text. Unless windows are left out, the distance between two
    // windows is at most the stride.
    let starts = match edges {
        WindowEdges::Tokens => Vec::new(),
        WindowEdges::Sentences => sentence_starts(text, tokens),
    };
    let window = |index| {
        let first = spread(index, count, last_start);
        let (first, after) = at_sentences(
            &starts,
            first..first + max_tokens,
            tokens.len(),
            overlap(max_tokens) / 2,
        );
        range(text, tokens, first, after)
    };
    ((0..count).map(window).collect(), needed > count)
}

/// Returns the indices of the tokens with which sentences begin, in ascending order.
fn sentence_starts(text: &str, tokens: &[(usize, usize)]) -> Vec<usize> {
    let index = |end: usize| tokens.partition_point(|token| token.0 < end);
    let mut starts: Vec<usize> = sentence_ends(text).into_iter().map(index).collect();
    starts.dedup();
    starts
}

/// Moves the edges of a window of tokens inwards to where sentences begin, each by at most `most` tokens, and returns its
/// first token and the one behind it. The edges of the text, which has `count` tokens, stay.
fn at_sentences(starts: &[usize], window: Range<usize>, count: usize, most: usize) -> (usize, usize) {
    let (mut first, mut after) = (window.start, window.end);
    let next = starts.partition_point(|&start| start < first);
    if first > 0
        && let Some(&start) = starts.get(next)
        && start <= first + most
    {
        first = start;
    }
    let behind = starts.partition_point(|&start| start <= after);
    if after < count
        && let Some(&start) = behind.checked_sub(1).and_then(|last| starts.get(last))
        && start + most >= after
        && start > first
    {
        after = start;
    }
    (first, after)
}

/// Returns byte ranges of at most `max_bytes` that are spread evenly from a text's first byte to its last, and are cut
/// at character boundaries. Each of them has room for a window.
pub fn slices(text: &str, count: usize, max_bytes: usize) -> Vec<Range<usize>> {
    let last_start = text.len().saturating_sub(max_bytes);
    let slice = |index| {
        let start = spread(index, count, last_start);
        let end = (start + max_bytes).min(text.len());
        text.ceil_char_boundary(start)..text.floor_char_boundary(end)
    };
    (0..count).map(slice).collect()
}

/// Returns the byte range of a window in the slice with this index. `tokens` are the byte ranges of the slice's tokens.
///
/// The window is as far from the beginning of the slice as the slice is from the beginning of the text, so the first
/// window begins with the text and the last one ends with it.
pub fn in_slice(slice: &str, tokens: &[(usize, usize)], max_tokens: usize, index: usize, count: usize) -> Range<usize> {
    match tokens.len().checked_sub(max_tokens) {
        Some(last_start) => {
            let first = spread(index, count, last_start);
            range(slice, tokens, first, first + max_tokens)
        }
        None => 0..slice.len(),
    }
}

/// Returns the distance in tokens between windows that share no more than the overlap.
fn stride(max_tokens: usize) -> usize {
    (max_tokens - overlap(max_tokens)).max(1)
}

/// Returns the position with this index of `count` positions that are spread evenly from 0 to `last`.
fn spread(index: usize, count: usize, last: usize) -> usize {
    if count <= 1 { 0 } else { index * last / (count - 1) }
}

/// Returns the byte range of the tokens from `first` to before `after`, widened to character boundaries.
fn range(text: &str, tokens: &[(usize, usize)], first: usize, after: usize) -> Range<usize> {
    let begin = if first == 0 {
        0
    } else {
        text.floor_char_boundary(tokens[first].0)
    };
    let end = if after == tokens.len() {
        text.len()
    } else {
        text.ceil_char_boundary(tokens[after - 1].1)
    };
    begin..end
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use WindowEdges::{Sentences, Tokens};

    use super::*;

    #[test]
    fn windows_overlap_and_reach_both_ends() {
        let text = "abcdefghijklmnop";
        let tokens: Vec<_> = (0..16).map(|byte| (byte, byte + 1)).collect();
        assert_eq!(
            cut(text, &tokens, 16, 3, Tokens),
            (std::iter::once(0..16).collect(), false)
        );
        assert_eq!(cut(text, &tokens, 8, 9, Tokens), (vec![0..8, 4..12, 8..16], false));
        assert_eq!(cut(text, &tokens, 4, 3, Tokens), (vec![0..4, 6..10, 12..16], true));
        assert_eq!(
            cut(text, &tokens, 4, 1, Tokens),
            (std::iter::once(0..4).collect(), true)
        );
    }

    #[test]
    fn the_capacity_is_what_the_windows_cover() {
        for (max_tokens, max_windows) in [(1, 1), (2, 9), (16, 1), (16, 3), (512, 8), (30, 4)] {
            let capacity = capacity(max_tokens, max_windows);
            let is_truncated = |tokens: usize| {
                let ranges: Vec<_> = (0..tokens).map(|byte| (byte, byte + 1)).collect();
                cut(&"a".repeat(tokens), &ranges, max_tokens, max_windows, Tokens).1
            };
            assert!(!is_truncated(capacity) && is_truncated(capacity + 1), "{capacity}");
        }
    }

    #[test]
    fn windows_begin_and_end_with_sentences_that_are_near() {
        let text = "aaaaaaaaaaa bb. cc. dddddddddddddd. eeeeeee";
        let tokens: Vec<_> = (0..text.len()).map(|byte| (byte, byte + 1)).collect();
        let windows = |edges| {
            let (windows, _) = cut(text, &tokens, 16, 9, edges);
            windows.into_iter().map(|window| &text[window]).collect::<Vec<_>>()
        };
        assert_eq!(
            windows(Tokens),
            [
                "aaaaaaaaaaa bb. ",
                "aa bb. cc. ddddd",
                ". dddddddddddddd",
                "ddddddd. eeeeeee"
            ]
        );
        // An edge moves by at most two tokens here, and those of the text stay.
        assert_eq!(
            windows(Sentences),
            [
                "aaaaaaaaaaa bb.",
                "aa bb. cc. ddddd",
                " dddddddddddddd",
                "ddddddd. eeeeeee"
            ]
        );
    }

    proptest! {
        #[test]
        fn slices_reach_both_ends_and_hold_the_windows_of_a_short_text(
            chars in prop::collection::vec(prop::sample::select(vec!['a', 'é', '你', '👍']), 1..200),
            count in 1usize..9,
            max_bytes in 4usize..400,
        ) {
            let text: String = chars.iter().collect();
            let slices = slices(&text, count, max_bytes);
            prop_assert_eq!(slices.len(), count);
            let mut last = 0;
            for slice in &slices {
                prop_assert!(slice.len() <= max_bytes && slice.start >= last);
                prop_assert!(text.get(slice.clone()).is_some(), "{slice:?} splits a character");
                last = slice.start;
            }
            prop_assert_eq!(slices[0].start, 0);
            prop_assert!(count == 1 || slices[count - 1].end == text.len());
            // A text that is one slice has the windows that it has when it is cut by its tokens.
            let tokens: Vec<_> = text.char_indices().map(|(at, char)| (at, at + char.len_utf8())).collect();
            let (windows, truncated) = cut(&text, &tokens, 5, count, Tokens);
            if truncated && text.len() <= max_bytes {
                let found: Vec<_> = (0..count).map(|index| in_slice(&text, &tokens, 5, index, count)).collect();
                prop_assert_eq!(found, windows);
            }
        }

        #[test]
        fn windows_cover_the_text_unless_it_is_truncated(
            chars in prop::collection::vec(prop::sample::select(vec!['a', 'é', '你', '👍', ' ', '.', '\n']), 1..200),
            max_tokens in 1usize..40,
            max_windows in 1usize..60,
            edges in prop::sample::select(vec![Tokens, Sentences]),
        ) {
            let text: String = chars.iter().collect();
            // One token for each byte: the worst case for character boundaries.
            let tokens: Vec<_> = text.char_indices()
                .flat_map(|(at, char)| (0..char.len_utf8()).map(move |_| (at, at + char.len_utf8())))
                .collect();
            let (windows, truncated) = cut(&text, &tokens, max_tokens, max_windows, edges);
            prop_assert!(windows.len() <= max_windows);
            prop_assert_eq!(&windows, &cut(&text, &tokens, max_tokens, max_windows, edges).0);
            // Completing a character adds the other tokens of that character, of which there are at most three, at each edge.
            let count = |window: &Range<usize>| tokens.iter().filter(|token| window.contains(&token.0)).count();
            prop_assert!(windows.iter().all(|window| count(window) <= max_tokens + 6));
            let mut covered = 0;
            for window in &windows {
                prop_assert!(text.get(window.clone()).is_some(), "{window:?} splits a character");
                prop_assert!(truncated || window.start <= covered, "a gap before {window:?}");
                covered = covered.max(window.end);
            }
            prop_assert_eq!(windows[0].start, 0);
            if windows.len() > 1 || !truncated {
                prop_assert_eq!(covered, text.len());
            }
        }
    }
}
