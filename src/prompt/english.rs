//! Recognises plain English by its most frequent words, for a small part of what recognising a language costs.

/// The longest of the words below, in bytes.
const LONGEST: usize = 9;

/// Frequent words of English that are not frequent in another language, in alphabetical order.
const ENGLISH: [&str; 61] = [
    "about",
    "and",
    "because",
    "been",
    "being",
    "can't",
    "could",
    "did",
    "does",
    "doesn't",
    "doing",
    "don't",
    "ever",
    "from",
    "get",
    "going",
    "got",
    "he",
    "his",
    "how",
    "i'm",
    "isn't",
    "it's",
    "know",
    "make",
    "makes",
    "my",
    "need",
    "never",
    "only",
    "our",
    "out",
    "people",
    "really",
    "right",
    "say",
    "she",
    "should",
    "someone",
    "something",
    "than",
    "that",
    "the",
    "their",
    "them",
    "there",
    "they",
    "think",
    "this",
    "up",
    "what",
    "when",
    "where",
    "which",
    "who",
    "why",
    "with",
    "would",
    "you",
    "you're",
    "your",
];

/// Frequent words of English that are also words of other languages, in alphabetical order.
const SHARED: [&str; 38] = [
    "a", "all", "am", "an", "are", "as", "at", "be", "but", "by", "can", "do", "for", "good", "had", "has", "have",
    "him", "i", "if", "in", "is", "it", "just", "like", "me", "no", "now", "of", "on", "one", "or", "so", "time", "to",
    "us", "was", "we",
];

/// Returns whether a text is English beyond doubt: if at least 30 % of its words are frequent in English and two of them in no
/// other language, or if half of them are and one of them is.
///
/// A text that is not may still be English. Of comments in English, this recognises three of four or more (GoEmotions,
/// Surge AI's sample, HateXplain and Measuring Hate Speech), and no sentence of `tests/fixtures/languages.jsonl` in
/// another language.
pub(super) fn is_plain_english(text: &str) -> bool {
    let (mut words, mut frequent, mut english) = (0, 0, 0);
    for word in text.split(|char: char| !(char.is_alphanumeric() || is_apostrophe(char))) {
        if word.is_empty() {
            continue;
        }
        words += 1;
        let mut buffer = [0; LONGEST];
        let Some(word) = lower_case(word, &mut buffer) else {
            continue;
        };
        if ENGLISH.binary_search(&word).is_ok() {
            english += 1;
            frequent += 1;
        } else if SHARED.binary_search(&word).is_ok() {
            frequent += 1;
        }
    }
    english >= 2 && 10 * frequent >= 3 * words || english >= 1 && 2 * frequent >= words
}

fn is_apostrophe(char: char) -> bool {
    matches!(char, '\'' | '\u{2019}')
}

/// Returns a word in lower case and with a plain apostrophe, or `None` if it is none of the words above.
fn lower_case<'a>(word: &str, buffer: &'a mut [u8; LONGEST]) -> Option<&'a str> {
    let mut length = 0;
    for char in word.chars() {
        let plain = if is_apostrophe(char) {
            '\''
        } else {
            char.to_ascii_lowercase()
        };
        *buffer.get_mut(length)? = u8::try_from(plain).ok().filter(u8::is_ascii)?;
        length += 1;
    }
    std::str::from_utf8(&buffer[..length]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_can_be_searched() {
        let words = || ENGLISH.iter().chain(&SHARED);
        assert!(ENGLISH.is_sorted() && SHARED.is_sorted());
        assert!(ENGLISH.iter().all(|word| !SHARED.contains(word)));
        assert_eq!(words().map(|word| word.len()).max(), Some(LONGEST));
    }

    #[test]
    fn plain_english_is_recognised_and_borrowed_words_are_not_enough() {
        for text in [
            "See you at the garden, they said.",
            "I DON\u{2019}T KNOW WHAT YOU MEAN",
            "what about this, and where is it from?",
            "why?",
        ] {
            assert!(is_plain_english(text), "{text}");
        }
        for text in [
            "",
            "garden river walk bread",
            "Assisti the voice no domingo, a melhor",
            "Ik was so blij, want het is een mooi huis",
            "Das war in der Not so, an allem was wir haben",
            "Han var i skolen for at l\u{e6}re om det",
        ] {
            assert!(!is_plain_english(text), "{text}");
        }
    }
}
