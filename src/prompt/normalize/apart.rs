//! Joins letters that are set apart: `h a t`, `h.a.t`, or with a line break or an emoji between the letters.
//!
//! A row of single letters is joined if the same separator stands between them. A longer gap in the row, such as three
//! spaces where the letters have one between them, is the gap between two words. Initials, lists of options and
//! short rows stay.

use unicode_normalization::char::is_combining_mark;
use unicode_script::{Script, UnicodeScript};

/// The fewest letters in a row that are joined. `U.S.A.`, `I a m` and `a b c` have three.
const MIN_LETTERS: usize = 4;

/// Acronyms in capitals with a full stop after each letter have up to this many letters.
const MAX_INITIALS: usize = 6;

/// The longest gap within a row, in characters. In a text of which every character is set apart, a comma and a space are
/// five; a run of emoji counts as one.
const MAX_GAP: usize = 8;

/// Returns the text with its letters joined, or `None` if none are set apart.
pub(super) fn joined(text: &str) -> Option<String> {
    if !may_have_rows(text) {
        return None;
    }
    let letters = single_letters(text);
    let mut joined = String::with_capacity(text.len());
    let mut done = 0;
    for row in rows(text, &letters) {
        joined.push_str(&text[done..row[0].start]);
        push_joined(text, row, &mut joined);
        done = row[row.len() - 1].end;
    }
    joined.push_str(&text[done..]);
    (joined != text).then_some(joined)
}

/// Returns whether a text may have as many single letters or digits in a row as can be joined. This is cheap, and most
/// texts have not.
fn may_have_rows(text: &str) -> bool {
    let (mut row, mut length) = (0, 0);
    for char in text.chars().chain([' ']) {
        if char.is_alphanumeric() {
            length += 1;
        } else if length > 0 && !is_combining_mark(char) {
            row = if length == 1 { row + 1 } else { 0 };
            length = 0;
            if row >= MIN_LETTERS {
                return true;
            }
        }
    }
    false
}

/// A letter or digit without another one next to it, with its marks, as a range of bytes.
#[derive(Debug, Clone, Copy)]
struct Single {
    start: usize,
    end: usize,
    char: char,
}

fn single_letters(text: &str) -> Vec<Single> {
    let is_mark = |char: char| is_combining_mark(char) && !is_emoji_style(char);
    let mut singles = Vec::new();
    let mut chars = text.char_indices().peekable();
    let mut is_in_word = false;
    while let Some((start, char)) = chars.next() {
        let mut end = start + char.len_utf8();
        if !is_in_word && is_joinable(char) {
            while let Some((at, mark)) = chars.next_if(|&(_, char)| is_mark(char)) {
                end = at + mark.len_utf8();
            }
            let is_followed = chars.peek().is_some_and(|&(_, next)| next.is_alphanumeric());
            if !is_followed && !is_part_of_contraction(text, start, end) {
                singles.push(Single { start, end, char });
            }
        }
        is_in_word = char.is_alphanumeric() || is_in_word && is_mark(char);
    }
    singles
}

/// Returns whether an apostrophe joins a letter to another one, as in `don't` or `l'été`.
fn is_part_of_contraction(text: &str, start: usize, end: usize) -> bool {
    let is_apostrophe = |char: char| matches!(char, '\'' | '\u{2019}');
    let is_joined = |[apostrophe, letter]: [Option<char>; 2]| {
        apostrophe.is_some_and(is_apostrophe) && letter.is_some_and(char::is_alphanumeric)
    };
    let (mut before, mut after) = (text[..start].chars().rev(), text[end..].chars());
    is_joined([before.next(), before.next()]) || is_joined([after.next(), after.next()])
}

/// Returns whether a letter belongs to a script whose words are set apart letter by letter, or is a digit among them.
fn is_joinable(char: char) -> bool {
    char.is_ascii_alphanumeric()
        || char.is_alphabetic() && matches!(char.script(), Script::Latin | Script::Cyrillic | Script::Greek)
}

fn is_emoji_style(char: char) -> bool {
    matches!(char, '\u{fe0e}' | '\u{fe0f}' | '\u{20e3}')
}

/// What stands between two letters. Runs of emoji and other symbols are one unit, whichever they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Char(char),
    Symbols,
}

impl Unit {
    fn is_space(self) -> bool {
        matches!(self, Self::Char(' ' | '\n' | '\t'))
    }

    /// Returns whether it can stand between the letters of a word. Brackets, quotes and operators have a meaning there.
    fn parts_letters(self) -> bool {
        match self {
            Self::Symbols => true,
            Self::Char(char) => !"()[]{}<>\"=&@+%^\\".contains(char),
        }
    }
}

/// Returns the units of a gap, or `None` if it is too long or contains a letter.
fn units(gap: &str) -> Option<Vec<Unit>> {
    let mut units = Vec::new();
    for char in gap.chars() {
        if char.is_alphanumeric() && !is_combining_mark(char) && !is_flag(char) {
            return None;
        }
        let unit = if char.is_ascii() {
            Unit::Char(char)
        } else {
            Unit::Symbols
        };
        if unit != Unit::Symbols || units.last() != Some(&unit) {
            units.push(unit);
        }
        if units.len() > MAX_GAP {
            return None;
        }
    }
    Some(units)
}

fn is_flag(char: char) -> bool {
    ('\u{1f1e6}'..='\u{1f1ff}').contains(&char)
}

/// Returns the rows of letters that are joined, in order.
fn rows<'a>(text: &str, letters: &'a [Single]) -> Vec<&'a [Single]> {
    let mut rows = Vec::new();
    let mut rest = letters;
    while rest.len() >= MIN_LETTERS {
        let length = row_length(text, rest);
        let row = &rest[..length];
        if is_set_apart(text, row) {
            rows.push(row);
            rest = &rest[length..];
        } else {
            // The last letter can begin another row, with another separator.
            rest = &rest[(length - 1).max(1)..];
        }
    }
    rows
}

/// Returns how many letters belong to the row that begins with the first one.
fn row_length(text: &str, letters: &[Single]) -> usize {
    let gap = |pair: &[Single]| units(&text[pair[0].end..pair[1].start]);
    let Some(separator) = first_separator(letters.windows(2).map(gap)) else {
        return 1;
    };
    let belongs = |pair: &[Single]| gap(pair).is_some_and(|gap| between(&gap, &separator).is_some());
    1 + letters.windows(2).take_while(|pair| belongs(pair)).count()
}

/// Returns the separator of a row with these gaps, if one of the first gaps is one.
fn first_separator(gaps: impl Iterator<Item = Option<Vec<Unit>>>) -> Option<Vec<Unit>> {
    // A row can begin with words of a letter, such as "I" and "a", but a few gaps suffice.
    gaps.take(MIN_LETTERS)
        .map_while(|gap| gap)
        .find(|gap| is_separator(gap))
}

/// Returns whether units can be what stands between the letters of a word: one unit, or one with a space on both sides.
fn is_separator(units: &[Unit]) -> bool {
    match units {
        [unit] => unit.parts_letters(),
        [Unit::Char(' '), unit, Unit::Char(' ')] => !unit.is_space() && unit.parts_letters(),
        _ => false,
    }
}

/// Returns what remains of a gap without the separators of its row, or `None` if the gap ends the row.
///
/// A text of which each character is set apart has a separator on both sides of each space and punctuation mark.
fn between(gap: &[Unit], separator: &[Unit]) -> Option<String> {
    if gap == separator {
        return Some(String::new());
    }
    let is_single = |unit: &Unit| !unit.is_space() && unit.parts_letters();
    if let (&[unit], [separator]) = (gap, separator)
        && is_single(&unit)
        && is_single(separator)
    {
        return Some(String::new());
    }
    if let &[separator] = separator {
        let is_alternating = gap.len() % 2 == 1 && gap.iter().step_by(2).all(|&unit| unit == separator);
        if is_alternating {
            let chars = gap.iter().skip(1).step_by(2).map(|unit| match unit {
                Unit::Char(char) => *char,
                Unit::Symbols => ' ',
            });
            return Some(chars.collect());
        }
    }
    let rest: Vec<_> = gap.iter().filter(|unit| !separator.contains(unit)).collect();
    let are_words_parted = gap.iter().any(|unit| unit.is_space()) && rest.iter().all(|unit| unit.is_space());
    are_words_parted.then(|| " ".to_owned())
}

/// Returns whether the letters of a row are those of words, and not initials, options or keys.
fn is_set_apart(text: &str, row: &[Single]) -> bool {
    let letters = row.iter().filter(|single| single.char.is_alphabetic()).count();
    if letters < MIN_LETTERS || letters * 2 < row.len() {
        return false;
    }
    let follows =
        |pair: &&[Single]| u32::from(pair[0].char) + 1 == u32::from(pair[1].char) || pair[0].char == pair[1].char;
    let in_order = row.windows(2).filter(follows).count();
    let is_list = in_order * 2 >= row.len();
    let is_word = row.len() > MAX_INITIALS || has_usual_case(row);
    is_word && !is_list && !is_abbreviated(text, row)
}

/// Returns whether the letters of a row are all small or all capitals, apart from the first one.
fn has_usual_case(row: &[Single]) -> bool {
    let mut rest = row[1..]
        .iter()
        .map(|single| single.char)
        .filter(|char| char.is_alphabetic());
    let is_capital = row[1..].iter().any(|single| single.char.is_uppercase());
    rest.all(|char| char.is_uppercase() == is_capital)
}

/// Returns whether a row that punctuation marks part consists of abbreviations: of initials, or of words of two letters such
/// as "e.g.".
fn is_abbreviated(text: &str, row: &[Single]) -> bool {
    let gaps = row.windows(2).map(|pair| &text[pair[0].end..pair[1].start]);
    if !gaps
        .clone()
        .any(|gap| gap.len() == 1 && gap.starts_with(|char: char| char.is_ascii_punctuation()))
    {
        return false;
    }
    let (mut longest, mut length) = (1, 1);
    for gap in gaps {
        length = if gap.contains(char::is_whitespace) {
            1
        } else {
            length + 1
        };
        longest = longest.max(length);
    }
    let are_capitals = row.iter().all(|single| single.char.is_uppercase());
    longest < 3 || are_capitals && longest <= MAX_INITIALS
}

/// Adds the letters of a row, joined to words.
fn push_joined(text: &str, row: &[Single], joined: &mut String) {
    let gap = |pair: &[Single]| units(&text[pair[0].end..pair[1].start]).unwrap_or_default();
    let gaps: Vec<Vec<Unit>> = row.windows(2).map(gap).collect();
    let separator = first_separator(gaps.iter().cloned().map(Some)).unwrap_or_default();
    for (index, single) in row.iter().enumerate() {
        if let Some(before) = index.checked_sub(1) {
            joined.push_str(&between(&gaps[before], &separator).unwrap_or_default());
        }
        joined.push_str(&text[single.start..single.end]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_that_are_set_apart_are_joined() {
        let check = |text: &str, expected: &str| assert_eq!(joined(text).as_deref(), Some(expected), "{text:?}");
        check("the g a r d e n is open", "the garden is open");
        check("g.a.r.d.e.n", "garden");
        check("g-a-r-d-e-n and g_a_t_e", "garden and gate");
        check("g - a - t - e", "gate");
        check("g😀a😃t😀😀e", "gate");
        check("g\u{2764}\u{fe0f}a\u{2764}\u{fe0f}t\u{2764}\u{fe0f}e", "gate");
        check("t h e   g a t e ,   i s n ' t   o p e n .", "the gate, isn't open .");
        check("t😀h😀e😀 😀g😀a😀t😀e", "the gate");
        check("t-h-e g-a-t-e", "the gate");
        check("t h e  g a t e", "the gate");
        check("с а д ы here", "сады here");
        check("é t a\u{323} t", "éta\u{323}t");
        check("g 4 r d e n", "g4rden");
    }

    #[test]
    fn initials_and_lists_stay() {
        for text in [
            "J. R. R. Tolkien and C.S. Lewis",
            "U.S.A. and N.A.T.O. and the N.A.A.C.P.",
            "I a m here",
            "a b c d e f",
            "A B C D, or A) B) C) D)",
            "a, b, c, d",
            "x = y + z - w",
            "x x x x",
            "1 2 3 4 5",
            "f(x) = g(y)",
            "he said \"a\" and \"b\" and \"c\" and \"d\"",
            "I am in a bad mood, e.g. today at 5 p.m.",
            "我 爱 你 们",
            "see you at the garden",
            "",
        ] {
            assert_eq!(joined(text), None, "{text:?}");
        }
    }
}
