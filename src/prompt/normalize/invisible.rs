//! Removes characters that readers cannot see.

/// Returns the text without the characters that readers cannot see, or `None` if it has none.
pub(super) fn removed(text: &str) -> Option<String> {
    // Most texts are plain, and this check takes far less time than the rule.
    let hides = |char: char| is_invisible(char) || matches!(char, '\u{200c}' | '\u{200d}');
    if text.bytes().all(is_visible_ascii) || !text.contains(hides) {
        return None;
    }
    let visible: String = visible(text).collect();
    (visible != text).then_some(visible)
}

/// Returns the characters of a text without those that readers cannot see.
pub(super) fn visible(text: &str) -> impl Iterator<Item = char> + '_ {
    let mut previous = None;
    let mut chars = text.chars().peekable();
    std::iter::from_fn(move || {
        while let Some(char) = chars.next() {
            let is_visible = match char {
                // Joiners shape emoji and letters of several scripts. Next to ASCII they only serve to hide a word.
                '\u{200c}' | '\u{200d}' => {
                    let joins =
                        |neighbour: Option<char>| neighbour.is_some_and(|c: char| !c.is_ascii() && !is_invisible(c));
                    joins(previous) && joins(chars.peek().copied())
                }
                char => !is_invisible(char),
            };
            if is_visible {
                previous = Some(char);
                return Some(char);
            }
        }
        None
    })
}

/// Returns whether a byte is an ASCII character that is [not invisible](is_invisible).
pub(super) const fn is_visible_ascii(byte: u8) -> bool {
    matches!(byte, b' '..=b'~' | b'\t' | b'\n' | b'\r')
}

/// Returns whether a character is a control character other than white space, or one that is rendered as nothing:
/// Unicode's `Default_Ignorable_Code_Point`, without the variation selectors that choose between text and emoji.
fn is_invisible(char: char) -> bool {
    matches!(char,
        '\u{0}'..='\u{8}' | '\u{b}' | '\u{c}' | '\u{e}'..='\u{1f}' | '\u{7f}'..='\u{9f}'
        | '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
        | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}'
        | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_no_reader_sees_is_removed() {
        let check = |text: &str, expected: &str| assert_eq!(visible(text).collect::<String>(), expected, "{text:?}");
        check("ni\u{200b}ce", "nice");
        check("ni\u{200d}ce", "nice");
        check("\u{feff}nice\u{202e}\u{0}\u{7f}", "nice");
        check("nice\u{e0041}\u{e0042}", "nice");
        for text in [
            "Grüße, 你好!\n\tпривет",
            "👨\u{200d}👩\u{200d}👧 ❤\u{fe0f}",
            "नमस्\u{200d}ते",
        ] {
            check(text, text);
            assert_eq!(removed(text), None);
        }
    }
}
