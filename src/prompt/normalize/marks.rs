//! Removes marks that are piled on letters, and those that are put on every letter.
//!
//! Only the marks of Unicode's general blocks are counted. Vowel signs, tones and points of Thai, Devanagari, Arabic or
//! Hebrew belong to their scripts, and what composes with its letter (NFC), as nearly all accents of Latin, Greek and
//! Cyrillic do, is part of the letter.

use unicode_normalization::UnicodeNormalization;

/// The most general marks that a letter keeps beyond those that compose with it. Languages need one (Yoruba ẹ̀, Navajo
/// ą́), and phonetic notation two.
const MAX_MARKS: usize = 2;

/// With marks on so many letters in a row, they are decoration: no orthography needs that many beyond the ones that
/// compose.
const MARKED_LETTERS: usize = 3;

/// Returns the composed text without such marks, or `None` if it has none. In a text with decorated letters, the marks on
/// short words are decoration as well.
pub(super) fn limited(text: &str) -> Option<String> {
    if !text.contains(is_general_mark) {
        return None;
    }
    let rows = rows(text);
    if !rows.iter().any(|row| row.is_decorated) {
        return None;
    }
    let mut kept = String::with_capacity(text.len());
    let mut done = 0;
    for row in rows {
        kept.push_str(&text[done..row.start]);
        let letters = text[row.start..row.end].nfd().filter(|&char| !is_general_mark(char));
        kept.extend(letters.nfc());
        done = row.end;
    }
    kept.push_str(&text[done..]);
    Some(kept)
}

/// Letters in a row that all have marks beyond those that compose with them, as a range of bytes.
struct Row {
    start: usize,
    end: usize,
    is_decorated: bool,
}

fn rows(text: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut at = 0;
    while at < text.len() {
        let (length, is_decorated) = marked_letters(&text[at..]);
        if length > 0 {
            rows.push(Row {
                start: at,
                end: at + length,
                is_decorated,
            });
        }
        at += length.max(text[at..].chars().next().map_or(1, char::len_utf8));
    }
    rows
}

/// Returns the size of the letters with marks that a text begins with, and whether the marks are decoration.
fn marked_letters(text: &str) -> (usize, bool) {
    let (mut letters, mut piled) = (0_usize, false);
    let mut end = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((_, base)) = chars.next() {
        if is_general_mark(base) && end > 0 {
            break;
        }
        // A mark without a letter counts as one on it.
        let mut marks = usize::from(is_general_mark(base));
        while chars.next_if(|&(_, char)| is_general_mark(char)).is_some() {
            marks += 1;
        }
        if marks == 0 {
            break;
        }
        letters += 1;
        piled |= marks > MAX_MARKS;
        end = chars.peek().map_or(text.len(), |&(at, _)| at);
    }
    (end, piled || letters >= MARKED_LETTERS)
}

/// Returns whether a character is a mark of the blocks Combining Diacritical Marks (with its extensions), Combining
/// Diacritical Marks for Symbols, or Combining Half Marks. The keycap, which makes emoji of digits, is not counted.
pub(super) fn is_general_mark(char: char) -> bool {
    matches!(char, '\u{300}'..='\u{36f}' | '\u{1ab0}'..='\u{1aff}' | '\u{1dc0}'..='\u{1dff}'
        | '\u{20d0}'..='\u{20e2}' | '\u{20e4}'..='\u{20ff}' | '\u{fe20}'..='\u{fe2f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn piled_marks_and_marks_on_every_letter_are_removed() {
        let check = |text: &str, expected: &str| assert_eq!(limited(text).as_deref(), Some(expected), "{text:?}");
        check("se\u{316}\u{317}\u{318}e you", "see you");
        check("s\u{336}e\u{336}e\u{336} you", "see you");
        check("g\u{332}a\u{332}r\u{332}d\u{332}e\u{332}n\u{332}", "garden");
        check("h\u{20dd}a\u{20dd}t\u{20dd}", "hat");
        check("s\u{338}\u{e9}\u{316}\u{317}\u{318}e", "see");
        check("\u{316}\u{317}\u{318}\u{319}see", "see");
    }

    #[test]
    fn marks_of_languages_are_kept() {
        for text in [
            "Tiếng Việt rất đẹp",
            "ẹ̀kọ́ ọ̀rọ̀ ń",
            "ภาษาไทยที่นี่",
            "हिन्दी में क्या है",
            "قُرْآنٌ كَرِيمٌ",
            "שָׁלוֹם",
            "Москва́, за́мок",
            "ė̃ ą́ l̥ d̪̥",
            "1\u{fe0f}\u{20e3}2\u{fe0f}\u{20e3}3\u{fe0f}\u{20e3}",
            "ᾄνθρωπος",
            "a\u{308}",
        ] {
            let composed: String = text.nfc().collect();
            assert_eq!(limited(&composed), None, "{text}");
        }
    }
}
