//! Finds where sentences end.
//!
//! The rule is made for comments. UAX 29 does not end a sentence before a lower-case letter, with which many comments begin
//! theirs. Here a sentence ends with closing punctuation before white space, with the closing punctuation of a script that has
//! no spaces, and with a line. An abbreviation can end one, too: a window that begins behind it loses nothing, because windows
//! overlap.

/// Punctuation that ends a sentence if white space follows.
const ENDS: [char; 8] = ['.', '!', '?', '…', '‼', '؟', '।', '۔'];

/// Punctuation that ends a sentence whatever follows.
const FULL_WIDTH_ENDS: [char; 4] = ['。', '！', '？', '｡'];

/// Quotes and brackets that still belong to the sentence.
const CLOSERS: [char; 10] = ['"', '\'', ')', ']', '}', '”', '’', '»', '」', '』'];

/// Returns the positions behind each sentence of a text that something follows, in bytes and in ascending order. White space
/// between two sentences follows the position.
pub(super) fn sentence_ends(text: &str) -> Vec<usize> {
    let (mut ends, mut is_at_end, mut is_full_width) = (Vec::new(), false, false);
    for (at, char) in text.char_indices() {
        if ENDS.contains(&char) || FULL_WIDTH_ENDS.contains(&char) {
            is_at_end = true;
            is_full_width = FULL_WIDTH_ENDS.contains(&char);
        } else if !(is_at_end && CLOSERS.contains(&char)) {
            if char == '\n' || is_at_end && (is_full_width || char.is_whitespace()) {
                ends.push(at);
            }
            is_at_end = false;
        }
    }
    ends
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sentences_end_with_punctuation_or_a_line() {
        let check = |text: &str, expected: &[&str]| {
            let ends = sentence_ends(text);
            let mut starts = vec![0];
            starts.extend(&ends);
            let found: Vec<&str> = starts
                .iter()
                .zip(ends.iter().copied().chain([text.len()]))
                .map(|(&start, end)| &text[start..end])
                .collect();
            assert_eq!(found, expected);
        };
        check("", &[""]);
        check("no end", &["no end"]);
        check("one. two three", &["one.", " two three"]);
        check(
            "Really?! (Yes.) \"No.\" ok",
            &["Really?!", " (Yes.)", " \"No.\"", " ok"],
        );
        check("version 1.5 of it.", &["version 1.5 of it."]);
        check("a line\nand another\n", &["a line", "\nand another", "\n"]);
        check("今天很好。我们喜欢！", &["今天很好。", "我们喜欢！"]);
        check("wait... what", &["wait...", " what"]);
    }

    proptest! {
        #[test]
        fn ends_are_boundaries_of_characters_in_ascending_order(text in "[a. !?\n。é👍\"]{0,60}") {
            let ends = sentence_ends(&text);
            prop_assert!(ends.iter().all(|&end| end < text.len() && text.is_char_boundary(end)));
            prop_assert!(ends.is_sorted_by(|one, next| one < next));
        }
    }
}
