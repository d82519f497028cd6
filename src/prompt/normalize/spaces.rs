//! Turns unusual white space into plain spaces.
//!
//! To a reader, a tab, a no-break space or the blank pattern of Braille parts words as a space does. To a tokenizer they are
//! other tokens, and the words next to them may be as well. Line breaks stay where lines are lines of text; a word or
//! two on each of several lines is text that line breaks part instead of spaces.

/// A line with more words than this is a line of text. With a line break after every third word, the bundled model judges
/// as it does without, and with fewer words much worse (`models/recipe/attacks.py` has both).
const SHORT_LINE_WORDS: usize = 2;

/// So many short lines in a row are parted by spaces instead. A title and a greeting are fewer.
const SHORT_LINES: usize = 3;

/// Returns the text with plain spaces, or `None` if it has no other white space that must change.
pub(super) fn plain(text: &str) -> Option<String> {
    let is_unusual = |char: char| char == '\t' || char == '\r' || (!char.is_ascii() && is_space(char));
    if !text.contains(is_unusual) {
        return joined_lines(text);
    }
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    // Whether only tabs and spaces have been seen since the line began: tabs are kept as its indentation.
    let mut is_indentation = true;
    while let Some(char) = chars.next() {
        let space = match char {
            '\r' if chars.peek() == Some(&'\n') => continue,
            '\n' | '\r' | '\u{2028}' | '\u{2029}' => '\n',
            '\t' if is_indentation => '\t',
            char if is_space(char) => ' ',
            char => char,
        };
        is_indentation = space == '\n' || is_indentation && matches!(space, ' ' | '\t');
        plain.push(space);
    }
    // What stood behind the last letter, as between all others, parts nothing.
    if text.ends_with(|char: char| char != '\n' && is_unusual(char)) {
        plain.truncate(plain.trim_end_matches(' ').len());
    }
    let plain = joined_lines(&plain).unwrap_or(plain);
    (plain != text).then_some(plain)
}

/// Returns whether a character is white space, or the Braille pattern without dots, which looks like it.
fn is_space(char: char) -> bool {
    char.is_whitespace() || char == '\u{2800}'
}

/// Replaces the line breaks between [several](SHORT_LINES) short lines by spaces.
fn joined_lines(text: &str) -> Option<String> {
    if text.bytes().filter(|&byte| byte == b'\n').count() + 1 < SHORT_LINES {
        return None;
    }
    let mut joined = None;
    // The short lines so far: their number, and where the first one begins and the last one ends.
    let (mut lines, mut first, mut last) = (0, 0, 0);
    let mut at = 0;
    for line in text.split('\n').map(Some).chain([None]) {
        let is_blank = line.is_some_and(|line| line.trim().is_empty());
        let is_short = line.is_some_and(|line| line.split_whitespace().nth(SHORT_LINE_WORDS).is_none());
        let length = line.map_or(0, str::len);
        if is_short && !is_blank {
            if lines == 0 {
                first = at;
            }
            lines += 1;
            last = at + length;
        } else if !is_blank {
            if lines >= SHORT_LINES {
                let joined = joined.get_or_insert_with(|| text.to_owned());
                joined.replace_range(first..last, &text[first..last].replace(['\n', '\t'], " "));
            }
            lines = 0;
        }
        at += length + 1;
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unusual_white_space_becomes_a_space() {
        let check = |text: &str, expected: &str| assert_eq!(plain(text).as_deref(), Some(expected), "{text:?}");
        for space in "\t\u{a0}\u{1680}\u{2000}\u{2009}\u{200a}\u{202f}\u{205f}\u{2800}\u{3000}".chars() {
            check(&format!("see{space}you"), "see you");
        }
        check("see you\r\nat the garden", "see you\nat the garden");
        check("see you\u{2028}at the garden", "see you\nat the garden");
        check("see\nyou\nat\nthe\ngarden", "see you at the garden");
        check("see\n\nyou at\n\nthe\n\tgarden", "see  you at  the  garden");
        check(
            "this is a line\nsee\nyou\nlater\nand this is one",
            "this is a line\nsee you later\nand this is one",
        );
    }

    #[test]
    fn lines_of_text_are_kept() {
        for text in [
            "see you",
            "see  you\n\nat the garden",
            "Hello all,\n\nthe garden is open today.\nCome and see it!\n",
            "if it rains:\n\twe stay at home",
            "",
            "\n\n\n",
            "one\ntwo",
        ] {
            assert_eq!(plain(text), None, "{text:?}");
        }
    }
}
