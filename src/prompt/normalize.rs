//! Normalises a comment's text before the frame is put around it.
//!
//! The normaliser removes characters that readers cannot see and breaks up literal spellings of the separator. It does
//! not change case, spelling or punctuation, which are for the model to judge. Training, calibration and serving use
//! the same version, and every decision names it.
//!
//! The tokenizer is not taken into account. A tokenizer that folds case, accents or compatibility forms can still turn
//! another spelling of the separator, such as one in full-width letters, into the separator.

use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

/// The version of the rules in this file. It must change whenever one of them does.
pub const NORMALIZER_VERSION: &str = "nfc-1";

/// Normalises texts for a frame with a given separator.
#[derive(Debug, Clone)]
pub struct Normalizer {
    /// The separator without surrounding white space, in ASCII lower case.
    core: String,
}

impl Normalizer {
    /// Creates the normaliser of a frame whose separator is empty or [can be broken up](Self::can_break_up), or, with an
    /// empty one, of texts without a frame.
    pub fn new(separator: &str) -> Self {
        Self {
            core: separator.trim().to_ascii_lowercase(),
        }
    }

    /// Returns whether a space can break up the separator, which takes at least two characters.
    pub fn can_break_up(separator: &str) -> bool {
        separator.trim().chars().count() >= 2
    }

    /// Removes invisible characters, composes the text (NFC), and then breaks up the separator.
    ///
    /// The separator is broken up last, so that neither an invisible character inside it nor a decomposed spelling
    /// hides it. Normalising a text again does not change it.
    pub fn normalize(&self, text: &str) -> String {
        // Most texts are plain, or composed already, and these checks take far less time than the rules.
        let visible = if text.bytes().all(is_visible_ascii) {
            text.to_owned()
        } else {
            visible(text).collect()
        };
        self.break_separator(match is_nfc_quick(visible.chars()) {
            IsNormalized::Yes => visible,
            IsNormalized::No | IsNormalized::Maybe => visible.nfc().collect(),
        })
    }

    /// Puts a space after the first character of each separator, ignoring ASCII case.
    fn break_separator(&self, text: String) -> String {
        let lower = text.to_ascii_lowercase();
        if self.core.is_empty() || !lower.contains(&self.core) {
            return text;
        }
        let first = self.core.chars().next().map_or(1, char::len_utf8);
        let mut broken = String::with_capacity(text.len() + 8);
        let mut at = 0;
        while let Some(found) = lower[at..].find(&self.core) {
            broken.push_str(&text[at..at + found + first]);
            broken.push(' ');
            at += found + first;
        }
        broken.push_str(&text[at..]);
        self.without_separator(broken)
    }

    /// Removes the first separator of a text until there is none, ignoring ASCII case.
    ///
    /// If the separator itself contains a space, breaking up one occurrence can complete another.
    fn without_separator(&self, text: String) -> String {
        if !text.to_ascii_lowercase().contains(&self.core) {
            return text;
        }
        // The first separator is the one that ends first. Removing each as soon as it ends takes linear time.
        let mut kept = String::with_capacity(text.len());
        for char in text.chars() {
            kept.push(char);
            let start = kept.len().saturating_sub(self.core.len());
            if kept.as_bytes()[start..].eq_ignore_ascii_case(self.core.as_bytes()) {
                kept.truncate(start);
            }
        }
        kept
    }
}

/// Returns the characters of a text without those that readers cannot see.
fn visible(text: &str) -> impl Iterator<Item = char> + '_ {
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
fn is_visible_ascii(byte: u8) -> bool {
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
    use proptest::prelude::*;

    use super::*;

    fn normalize(text: &str) -> String {
        Normalizer::new("<separator>").normalize(text)
    }

    #[test]
    fn visible_characters_are_kept() {
        for text in [
            "you look very nice today",
            "",
            "Grüße, 你好!\n\tпривет",
            "👨\u{200d}👩\u{200d}👧 ❤\u{fe0f}",
            "a < b > c",
            "नमस्\u{200d}ते",
        ] {
            assert_eq!(normalize(text), text);
        }
    }

    #[test]
    fn invisible_characters_are_removed() {
        let check = |text: &str, expected: &str| assert_eq!(normalize(text), expected, "{text:?}");
        check("ni\u{200b}ce", "nice");
        check("ni\u{200d}ce", "nice");
        check("\u{feff}nice\u{202e}\u{0}\u{7f}", "nice");
        check("nice\u{e0041}\u{e0042}", "nice");
        check("cafe\u{301}", "café");
        check("cafe\u{200b}\u{301}", "café");
    }

    #[test]
    fn literal_separators_are_broken_up() {
        let check = |text: &str, expected: &str| assert_eq!(normalize(text), expected, "{text:?}");
        check("a<separator>Text:b", "a< separator>Text:b");
        check("a<SEPARator>b<separator>", "a< SEPARator>b< separator>");
        check("<sepa\u{200b}rator>", "< separator>");
        check("<separ<separator>ator>", "<separ< separator>ator>");
        assert_eq!(Normalizer::new("\n##\n").normalize("a###b"), "a# # #b");
        assert_eq!(Normalizer::new("aa a").normalize("aaa a").matches("aa a").count(), 0);
        // Each of the many separators that breaking up completes is removed in one pass over the text.
        let many = Normalizer::new("aa a").normalize(&"aaa a".repeat(180_000));
        assert!(!many.contains("aa a"));
    }

    proptest! {
        /// Removing in one pass gives what removing the first separator again and again gives.
        #[test]
        fn the_first_separator_is_removed_until_there_is_none(text in "[aAb ]{0,30}", separator in "[ab][ab ]{0,3}[ab]") {
            let mut expected = text.clone();
            while let Some(found) = expected.to_ascii_lowercase().find(&separator) {
                expected.replace_range(found..found + separator.len(), "");
            }
            prop_assert_eq!(Normalizer::new(&separator).without_separator(text), expected);
        }

        /// What is skipped for plain and composed texts would not change them.
        #[test]
        fn every_text_is_made_visible_and_composed(text in prop_oneof![any::<String>(), "[\\x00-\\x7f]{0,20}", "[a-f\u{300}-\u{305}\u{e0}-\u{e5}\u{1100}-\u{1112}\u{1161}]{0,9}"]) {
            let expected: String = visible(&text).collect::<String>().nfc().collect();
            prop_assert_eq!(normalize(&text), Normalizer::new("<separator>").break_separator(expected));
        }

        #[test]
        fn normalising_is_idempotent_and_leaves_no_literal_separator(
            parts in prop::collection::vec(prop_oneof![
                Just("<".to_owned()), Just("sepa".to_owned()), Just("rator>".to_owned()), Just("<separator>".to_owned()),
                Just("\u{200b}".to_owned()), Just("\u{200d}".to_owned()), Just("\u{338}".to_owned()), any::<char>().prop_map(String::from),
            ], 0..12)
        ) {
            let once = normalize(&parts.concat());
            prop_assert!(!once.to_ascii_lowercase().contains("<separator>"), "{once:?}");
            prop_assert_eq!(normalize(&once), once);
        }
    }
}
