//! Cuts a long text into overlapping windows.

use std::ops::Range;

/// Returns the minimum number of tokens that neighbouring windows share: a quarter of a window, so that a phrase that
/// is cut off at the edge of one window is complete in the next.
pub fn overlap(max_tokens: usize) -> usize {
    max_tokens / 4
}

/// Returns the byte ranges of a text's windows, and whether the text needs more than `max_windows`.
///
/// `tokens` are the byte ranges of the text's tokens, in order. A window has at most `max_tokens` of them and is cut at
/// character boundaries. If the text needs more windows than `max_windows`, that many are spread evenly from its first
/// token to its last; a single window covers its beginning.
pub fn cut(text: &str, tokens: &[(usize, usize)], max_tokens: usize, max_windows: usize) -> (Vec<Range<usize>>, bool) {
    if tokens.len() <= max_tokens {
        return (std::iter::once(0..text.len()).collect(), false);
    }
    let last_start = tokens.len() - max_tokens;
    let stride = (max_tokens - overlap(max_tokens)).max(1);
    let needed = last_start.div_ceil(stride) + 1;
    let count = needed.min(max_windows.max(1));
    // Spread evenly, so that the last window ends with the text. Unless windows are left out, the distance between two
    // windows is at most `stride`.
    let start = |window: usize| {
        if count == 1 {
            0
        } else {
            window * last_start / (count - 1)
        }
    };
    let range = |window: usize| {
        let first = start(window);
        let begin = if first == 0 {
            0
        } else {
            text.floor_char_boundary(tokens[first].0)
        };
        let after = first + max_tokens;
        let end = if after == tokens.len() {
            text.len()
        } else {
            text.ceil_char_boundary(tokens[after - 1].1)
        };
        begin..end
    };
    ((0..count).map(range).collect(), needed > count)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn windows_overlap_and_reach_both_ends() {
        let text = "abcdefghijklmnop";
        let tokens: Vec<_> = (0..16).map(|byte| (byte, byte + 1)).collect();
        assert_eq!(cut(text, &tokens, 16, 3), (std::iter::once(0..16).collect(), false));
        assert_eq!(cut(text, &tokens, 8, 9), (vec![0..8, 4..12, 8..16], false));
        assert_eq!(cut(text, &tokens, 4, 3), (vec![0..4, 6..10, 12..16], true));
        assert_eq!(cut(text, &tokens, 4, 1), (std::iter::once(0..4).collect(), true));
    }

    proptest! {
        #[test]
        fn windows_cover_the_text_unless_it_is_truncated(
            chars in prop::collection::vec(prop::sample::select(vec!['a', 'é', '你', '👍']), 1..200),
            max_tokens in 1usize..40,
            max_windows in 1usize..60,
        ) {
            let text: String = chars.iter().collect();
            // One token for each byte: the worst case for character boundaries.
            let tokens: Vec<_> = text.char_indices()
                .flat_map(|(at, char)| (0..char.len_utf8()).map(move |_| (at, at + char.len_utf8())))
                .collect();
            let (windows, truncated) = cut(&text, &tokens, max_tokens, max_windows);
            prop_assert!(windows.len() <= max_windows);
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
