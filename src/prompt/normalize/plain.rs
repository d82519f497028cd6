//! Recognises in one pass over the bytes the texts that no rule changes, which most texts are.

use super::invisible::is_visible_ascii;

/// With so many lines, they are looked at one by one.
const LINES: usize = 3;

// What matters about a byte.
const LETTER: u8 = 0;
const DIGIT: u8 = 1;
/// A sign that can stand for a letter.
const SIGN: u8 = 2;
const OTHER: u8 = 3;
/// Not ASCII, not visible, or white space that becomes a space.
const SPECIAL: u8 = 4;

/// The class of each byte.
static CLASSES: [u8; 256] = {
    let mut classes = [SPECIAL; 256];
    let mut byte = 0_u8;
    while byte < 128 {
        classes[byte as usize] = match byte {
            b'\t' | b'\r' => SPECIAL,
            b'0'..=b'9' => DIGIT,
            b'@' | b'$' | b'!' | b'|' => SIGN,
            byte if byte.is_ascii_alphabetic() => LETTER,
            byte if is_visible_ascii(byte) => OTHER,
            _ => SPECIAL,
        };
        byte += 1;
    }
    classes
};

/// What is known after a part of the text, as one number, so that a table gives the next state.
#[derive(Clone, Copy)]
struct State {
    /// The number of single letters or digits in a row, before the present word.
    singles: u8,
    /// The length of the present word: 0, 1, or 2 for more.
    length: u8,
    /// Whether the last character is a letter (1), or a digit or sign with nothing but those since a letter (2).
    spelled: u8,
}

/// So many single letters in a row are looked at more closely.
const SINGLES: u8 = 4;

const STATES: usize = 9 * SINGLES as usize;

/// The state of a text that a rule might change.
const NOT_PLAIN: usize = STATES;

static NEXT: [[u8; 8]; STATES + 1] = {
    let mut next = [[NOT_PLAIN as u8; 8]; STATES + 1];
    let mut state = 0;
    while state < STATES {
        let mut class = LETTER;
        while class < SPECIAL {
            next[state][class as usize] = State::from_number(state).after(class);
            class += 1;
        }
        state += 1;
    }
    next
};

impl State {
    const fn from_number(number: usize) -> Self {
        Self {
            singles: (number / 9) as u8,
            length: (number / 3 % 3) as u8,
            spelled: (number % 3) as u8,
        }
    }

    /// Returns the number of the state after a byte of this class.
    const fn after(self, class: u8) -> u8 {
        if class == LETTER && self.spelled == 2 {
            return NOT_PLAIN as u8;
        }
        let spelled = match class {
            LETTER => 1,
            DIGIT | SIGN if self.spelled > 0 => 2,
            _ => 0,
        };
        let (singles, length) = match (class, self.length) {
            (LETTER | DIGIT, 0) => (self.singles, 1),
            (LETTER | DIGIT, _) => (0, 2),
            (_, 1) => (self.singles + 1, 0),
            (_, _) => (self.singles, 0),
        };
        if singles == SINGLES {
            return NOT_PLAIN as u8;
        }
        singles * 9 + length * 3 + spelled
    }
}

/// Returns whether a text is of ASCII characters, without anything that a rule could change. Other texts may come through
/// unchanged as well.
pub(super) fn is_plain(text: &str) -> bool {
    let class = |byte: u8| usize::from(CLASSES[usize::from(byte)]);
    let next = |state: usize, byte: u8| usize::from(NEXT[state][class(byte)]);
    // The end of the text ends its last word.
    let state = text.bytes().chain([b' ']).fold(0, next);
    state != NOT_PLAIN && text.bytes().filter(|&byte| byte == b'\n').count() + 1 < LINES
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{RULES, apply};
    use super::*;

    #[test]
    fn plain_english_is_plain() {
        assert!(is_plain(
            "See you at the garden, it's open from 9 to 17 on the 22nd!\nBring a friend (or two)."
        ));
        for text in ["s\te", "caf\u{e9}", "g4rden", "g a t e", "a\nb\nc", "a\0b", "a\r\nb"] {
            assert!(!is_plain(text), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_rule_changes_a_plain_text(text in "([a-cA-C]{0,3}[ .,'0-9@$!|<>\n-]{0,2}){0,12}") {
            if is_plain(&text) {
                let (found, is_changed) = apply(&RULES, text.as_str().into());
                prop_assert_eq!((found.as_ref(), is_changed), (text.as_str(), false));
            }
        }
    }
}
