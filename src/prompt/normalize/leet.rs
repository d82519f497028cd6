//! Turns digits and signs that stand for letters in words into these letters.
//!
//! A single digit with letters on both sides, as in `g4rden`, seldom belongs to a word otherwise, and not to one with
//! names for machines such as `b2b`, `mp3` or `log4j` have their own shapes. Digits at the edges of words, as in `4ll`, are
//! read only in a text that has such a word as well.

/// The shortest word that is read on its own, and the fewest of its characters that are letters.
const MIN_WORD: usize = 4;
const MIN_WORD_LETTERS: usize = 3;

/// Returns the text with digits and signs in words read as letters, or `None` if it has none.
pub(super) fn spelled(text: &str) -> Option<String> {
    if !may_have_any(text) {
        return None;
    }
    let words = words(text);
    let certain = words.iter().filter(|word| word.is_certain()).count();
    if certain == 0 {
        return None;
    }
    let likely = words.iter().filter(|word| word.is_likely()).count();
    let is_disguised = likely >= 2;
    let mut spelled = String::with_capacity(text.len());
    let mut done = 0;
    for word in words {
        if word.is_certain() || is_disguised && word.is_likely() {
            spelled.push_str(&text[done..word.start]);
            word.push_spelled(&mut spelled);
            done = word.start + word.text.len();
        }
    }
    spelled.push_str(&text[done..]);
    (spelled != text).then_some(spelled)
}

/// Returns whether a text has a digit or a sign with letters on both sides. This is cheap, and most texts have none.
fn may_have_any(text: &str) -> bool {
    let mut before = false;
    let mut is_between = false;
    for byte in text.bytes() {
        if byte.is_ascii_alphabetic() || !byte.is_ascii() {
            if is_between {
                return true;
            }
            before = true;
        } else {
            let stands_for_one = byte.is_ascii_digit() || matches!(byte, b'@' | b'$' | b'!' | b'|');
            is_between = (before || is_between) && stands_for_one;
            before = false;
        }
    }
    false
}

/// Returns the letter that a digit or sign stands for.
fn letter(char: char) -> Option<char> {
    Some(match char {
        '0' => 'o',
        '1' | '!' | '|' => 'i',
        '3' | '€' => 'e',
        '4' | '@' => 'a',
        '5' | '$' => 's',
        '7' => 't',
        '8' => 'b',
        '9' => 'g',
        _ => return None,
    })
}

/// A run of letters, digits and signs that stand for letters.
struct Word<'a> {
    start: usize,
    text: &'a str,
    is_hashtag: bool,
}

/// Returns the words that may have digits or signs for letters. Addresses and names of users are left out.
fn words(text: &str) -> Vec<Word<'_>> {
    let mut words = Vec::new();
    let mut start = 0;
    let ends_part = |char: char| char.is_whitespace() || "<>\"(),;".contains(char);
    for part in text.split_inclusive(ends_part) {
        let host = part
            .split_once('@')
            .map(|(_, host)| host.trim_end_matches(|char: char| !char.is_alphanumeric()));
        let is_address = part.starts_with("www.")
            || part.contains(['/', '\\', '_', '='])
            || host.is_some_and(|host| host.contains('.'));
        if !is_address {
            push_words(part, start, &mut words);
        }
        start += part.len();
    }
    words
}

fn push_words<'a>(part: &'a str, start: usize, words: &mut Vec<Word<'a>>) {
    let belongs = |char: char| char.is_alphanumeric() || letter(char).is_some();
    let mut from = None;
    for (at, char) in part.char_indices().chain([(part.len(), ' ')]) {
        match (from, belongs(char)) {
            (None, true) => from = Some(at),
            (Some(begin), false) => {
                // Exclamation marks and bars at the edges are punctuation.
                let word = &part[begin..at];
                let text = word.trim_matches(['!', '|']);
                let trimmed = word.len() - word.trim_start_matches(['!', '|']).len();
                let start = start + begin + trimmed;
                if text.contains(|char| letter(char).is_some()) && text.contains(char::is_alphabetic) {
                    let is_hashtag = part[..begin].ends_with('#');
                    words.push(Word {
                        start,
                        text,
                        is_hashtag,
                    });
                }
                from = None;
            }
            _ => {}
        }
    }
}

impl Word<'_> {
    /// Returns whether the word is spelt with digits or signs whatever the rest of the text is.
    fn is_certain(&self) -> bool {
        let chars: Vec<char> = self.text.chars().collect();
        let letters = chars.iter().filter(|char| char.is_alphabetic()).count();
        let [first, .., last] = chars.as_slice() else {
            return false;
        };
        let is_inside = first.is_alphabetic() && last.is_alphabetic();
        let after_last = chars.iter().rev().take_while(|char| char.is_alphabetic()).count();
        // The plural of a name, as in `mp3s`, and names such as `log4j`.
        let is_name = after_last == 1 && matches!(last.to_ascii_lowercase(), 's' | 'j' | 'x');
        is_inside
            && !self.is_hashtag
            && chars.len() >= MIN_WORD
            && letters >= MIN_WORD_LETTERS
            && !is_name
            && has_usual_case(&chars)
            && !chars.iter().all(char::is_ascii_hexdigit)
            && chars
                .chunk_by(|a, b| a.is_alphabetic() == b.is_alphabetic())
                .all(is_part_of_certain_word)
    }

    /// Returns whether the word is spelt with digits or signs if others of the text are.
    fn is_likely(&self) -> bool {
        let is_readable = |char: char| char.is_alphabetic() || letter(char).is_some();
        let letters = self.text.chars().filter(|char| char.is_alphabetic()).count();
        // Of the digits, most are between letters or at an edge with letters around: a number with a unit is not a word.
        letters * 3 >= self.text.chars().count()
            && self.text.chars().all(is_readable)
            && !is_number_with_unit(self.text)
            && !(self.text.starts_with('@') && self.text[1..].chars().all(char::is_alphabetic))
    }

    fn push_spelled(&self, spelled: &mut String) {
        let are_capitals = self
            .text
            .chars()
            .filter(|char| char.is_alphabetic())
            .all(char::is_uppercase)
            && self.text.chars().filter(|char| char.is_alphabetic()).count() > 1;
        let spell = |char: char| match letter(char) {
            Some(letter) if are_capitals => letter.to_ascii_uppercase(),
            Some(letter) => letter,
            None => char,
        };
        spelled.extend(self.text.chars().map(spell));
    }
}

/// Returns whether letters, or what is between them, can belong to a word: one digit or sign, or the same one twice.
fn is_part_of_certain_word(part: &[char]) -> bool {
    match part {
        // The others have other uses: `7` is a letter of Arabic in Latin script, `8` and `9` sound like words, and `!` ends a
        // sentence.
        [one] | [one, _] if "01345@$".contains(*one) => part.iter().all(|char| char == one),
        part => part[0].is_alphabetic(),
    }
}

/// Returns whether a word is in lower case, possibly with a capital at its beginning. In capitals, it can be a name.
fn has_usual_case(chars: &[char]) -> bool {
    let mut letters = chars.iter().filter(|char| char.is_alphabetic());
    letters.next();
    letters.all(|char| !char.is_uppercase())
}

/// Returns whether a word is a number with a unit, an ordinal or a time of day, such as `5k`, `7th` or `10am`.
fn is_number_with_unit(word: &str) -> bool {
    let unit = word.trim_start_matches(|char: char| char.is_ascii_digit());
    let number = &word[..word.len() - unit.len()];
    let ordinal = match number.as_bytes() {
        [.., b'1', b'1' | b'2' | b'3'] => "th",
        [.., b'1'] => "st",
        [.., b'2'] => "nd",
        [.., b'3'] => "rd",
        _ => "th",
    };
    !number.is_empty()
        && (unit == ordinal || number.len() > 1 && unit.len() <= 2 || matches!(unit, "k" | "am" | "pm" | "x" | "d"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_and_signs_in_words_are_read_as_letters() {
        let check = |text: &str, expected: &str| assert_eq!(spelled(text).as_deref(), Some(expected), "{text:?}");
        check("the g4rden", "the garden");
        check("G4RDEN g00se", "GARDEN goose");
        check("a gr@ss, a pa$$port", "a grass, a passport");
        check("th3 g4rden 0f 4ll 7he p30pl3", "the garden of all the people");
        check("g4rden, 5th of May, 10am, 4k", "garden, 5th of May, 10am, 4k");
        check("g4rd3n! th3s3!", "garden! these!");
    }

    #[test]
    fn names_and_numbers_stay() {
        for text in [
            "b2b, mp3, mp3s, covid19, 4ever, k8s, i18n, log4j, neo4j, h2o, R2D2, C3PO",
            "the 1st and the 22nd at 10am, 5k, 3d, 4x4s",
            "write to jo@example.org or @garden, see https://x.org/a1bcd or www.g4rden.org",
            "sha1 c0ffee f00d 2b 5e7a",
            "iPhone4S PS4Pro",
            "it costs $5 or 5$, wow!great",
            "gr8 m8",
            "#clips4sale, yer7amo",
            "snake_c4se a=b4se",
            "",
        ] {
            assert_eq!(spelled(text), None, "{text:?}");
        }
    }
}
