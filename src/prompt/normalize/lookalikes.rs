//! Folds letters that look like those of another script (UTS #39, confusables) to the script of their word.
//!
//! `gаrden` with a Cyrillic а reads like a Latin word. A word that mixes scripts is folded to the one to which all of
//! its letters can be folded. A word of look-alikes alone, such as `соре`, is folded only in a Latin text, and only if
//! the text has no other word of that script. So words of Russian, Greek or Ukrainian stay, in their own texts
//! and among Latin words.

use std::collections::HashMap;
use std::sync::LazyLock;

use unicode_normalization::char::is_combining_mark;
use unicode_script::{Script, UnicodeScript};
use unicode_security::confusable_detection::skeleton;

use super::styles::small_capital;

/// A shorter word that mixes scripts can be a quantity, such as Δx or μm. It is folded only if a longer one is.
const MIN_LETTERS: usize = 3;

/// Look-alikes that are not in the table of UTS #39, because they are turned or drawn differently, but that are used in
/// place of Latin letters.
const SIMILAR: [(char, char); 7] = [
    ('п', 'n'),
    ('и', 'n'),
    ('я', 'r'),
    ('ь', 'b'),
    ('ѡ', 'w'),
    ('ω', 'w'),
    ('ς', 's'),
];

/// How much a letter looks like another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Likeness {
    /// The two can hardly be told apart.
    Same,
    /// The two differ in size or in a detail.
    Similar,
}

/// The letters of Cyrillic and Greek by the Latin letter that they look like.
static CYRILLIC: LazyLock<HashMap<char, char>> = LazyLock::new(|| by_latin('\u{400}'..='\u{4ff}'));
static GREEK: LazyLock<HashMap<char, char>> = LazyLock::new(|| by_latin('\u{391}'..='\u{3c9}'));

/// Returns the text with its look-alikes folded, or `None` if it has none.
pub(super) fn folded(text: &str) -> Option<String> {
    // Without a Latin letter, nothing is taken for one. This spares texts in the other scripts the rest.
    let is_latin =
        |char: char| char.is_ascii_alphabetic() || char > '\u{7f}' && char < '\u{2b0}' && char.is_alphabetic();
    if !text.contains(is_latin) || !text.contains(can_be_folded) {
        return None;
    }
    let words = words(text);
    let facts = Facts::of(&words);
    let mut folded = String::with_capacity(text.len());
    let mut done = 0;
    for word in words {
        if let Some(letters) = facts.fold(&word) {
            folded.push_str(&text[done..word.start]);
            folded.push_str(&letters);
            done = word.start + word.text.len();
        }
    }
    folded.push_str(&text[done..]);
    (folded != text).then_some(folded)
}

/// Returns whether a character can be a look-alike: a letter that is not Latin, or one of Latin's phonetic extensions.
fn can_be_folded(char: char) -> bool {
    // The blocks of these scripts. Looking the script up takes longer.
    let may_be_folded = matches!(char, '\u{370}'..='\u{58f}' | '\u{13a0}'..='\u{1fff}' | '\u{2c80}'..='\u{2dff}' | '\u{a4d0}'..='\u{abbf}');
    is_phonetic(char) || may_be_folded && char.is_alphabetic() && is_of_folded_script(char.script())
}

/// Returns whether letters of a script are taken for those of another one. Those of other scripts have other shapes, and
/// what UTS #39 finds among them, such as a Thai digit for an o, is not seen in words.
fn is_of_folded_script(script: Script) -> bool {
    matches!(
        script,
        Script::Cyrillic | Script::Greek | Script::Armenian | Script::Cherokee | Script::Coptic | Script::Lisu
    )
}

/// Returns whether a character is a Latin letter for phonetic notation, which no text has among plain ones.
fn is_phonetic(char: char) -> bool {
    matches!(char, '\u{250}'..='\u{2af}' | '\u{1d00}'..='\u{1d2b}')
}

/// A run of letters and marks.
struct Word<'a> {
    start: usize,
    text: &'a str,
    /// The only script of its letters, or `None` if it has several.
    script: Option<Script>,
    letters: usize,
}

fn words(text: &str) -> Vec<Word<'_>> {
    let belongs = |char: char| char.is_alphabetic() || is_combining_mark(char);
    let mut words = Vec::new();
    let mut start = None;
    for (at, char) in text.char_indices().chain([(text.len(), ' ')]) {
        match (start, belongs(char)) {
            (None, true) => start = Some(at),
            (Some(from), false) => {
                words.push(Word::new(from, &text[from..at]));
                start = None;
            }
            _ => {}
        }
    }
    words
}

impl<'a> Word<'a> {
    fn new(start: usize, text: &'a str) -> Self {
        let mut scripts = text.chars().filter(|char| char.is_alphabetic()).map(script_of);
        let first = scripts.next().unwrap_or(Script::Common);
        Self {
            start,
            text,
            script: scripts.all(|script| script == first).then_some(first),
            letters: text.chars().filter(|char| char.is_alphabetic()).count(),
        }
    }

    /// Returns the word in the letters of a script, or `None` if one of them looks like none of that script.
    fn folded_to(&self, script: Script, least: Likeness) -> Option<String> {
        self.text.chars().map(|char| in_script(char, script, least)).collect()
    }
}

fn script_of(char: char) -> Script {
    if char.is_ascii() { Script::Latin } else { char.script() }
}

/// What decides about each word of a text.
struct Facts {
    /// The script of most letters of words that are genuine, among Latin, Cyrillic and Greek.
    main: Script,
    /// Whether it has a Latin letter, without which a word of look-alikes is not suspect.
    has_latin: bool,
    /// Whether a word of several letters mixes scripts, so that other words can be suspected too.
    is_disguised: bool,
    /// The scripts with a word that cannot be folded to Latin.
    genuine: Vec<Script>,
}

impl Facts {
    fn of(words: &[Word<'_>]) -> Self {
        let mut letters = [(Script::Latin, 0), (Script::Cyrillic, 0), (Script::Greek, 0)];
        for word in words {
            let Some(own) = word.script else { continue };
            if own == Script::Latin || word.folded_to(Script::Latin, Likeness::Similar).is_none() {
                for (_, count) in letters.iter_mut().filter(|(script, _)| *script == own) {
                    *count += word.letters;
                }
            }
        }
        // The first of those that are equal, so that a text without a main script counts as Latin.
        let main = letters.iter().rev().max_by_key(|(_, count)| *count);
        let mut facts = Self {
            main: main.map_or(Script::Latin, |(script, _)| *script),
            has_latin: words
                .iter()
                .any(|word| word.text.chars().any(|char| script_of(char) == Script::Latin)),
            is_disguised: false,
            genuine: Vec::new(),
        };
        let is_mixed = |word: &&Word<'_>| word.script.is_none() && word.letters >= MIN_LETTERS;
        facts.is_disguised = words
            .iter()
            .filter(is_mixed)
            .any(|word| facts.fold_mixed(word).is_some());
        for word in words {
            if let Some(script) = word.script
                && is_of_folded_script(script)
                && !facts.genuine.contains(&script)
                && word.folded_to(Script::Latin, facts.least()).is_none()
            {
                facts.genuine.push(script);
            }
        }
        facts
    }

    /// Returns how alike the letters of a word in one script must be. In a text that is disguised, less will do.
    fn least(&self) -> Likeness {
        if self.is_disguised {
            Likeness::Similar
        } else {
            Likeness::Same
        }
    }

    /// Returns the word as it is read, if it has look-alikes.
    fn fold(&self, word: &Word<'_>) -> Option<String> {
        let folded = match word.script {
            Some(Script::Latin) if word.text.contains(is_phonetic) => {
                let folded = word.folded_to(Script::Latin, Likeness::Same)?;
                folded.is_ascii().then_some(folded)
            }
            Some(script) if is_of_folded_script(script) => {
                let is_suspect = self.has_latin && self.main == Script::Latin && !self.genuine.contains(&script);
                let is_long = word.letters > 1 || self.is_disguised;
                (is_suspect && is_long).then(|| word.folded_to(Script::Latin, self.least()))?
            }
            Some(_) => None,
            None => (word.letters >= MIN_LETTERS || self.is_disguised).then(|| self.fold_mixed(word))?,
        };
        folded.filter(|folded| folded != word.text)
    }

    /// Returns a word of several scripts in the letters of one of them: that of the text, if possible.
    fn fold_mixed(&self, word: &Word<'_>) -> Option<String> {
        let mut scripts = vec![self.main, Script::Latin, Script::Cyrillic, Script::Greek];
        // A few look-alikes do not turn a word to their script, unless the text is in that script.
        let letters = |script| word.text.chars().filter(|&char| script_of(char) == script).count();
        scripts.retain(|&script| letters(script) > 0 && (script == self.main || letters(script) * 2 >= word.letters));
        scripts
            .into_iter()
            .find_map(|script| word.folded_to(script, Likeness::Similar))
    }
}

/// Returns the letter of a script that a character is or looks like. Marks belong to every script.
fn in_script(char: char, script: Script, least: Likeness) -> Option<char> {
    let own = script_of(char);
    if is_combining_mark(char) || own == script && !is_phonetic(char) {
        return Some(char);
    }
    let latin = if own == Script::Latin && !is_phonetic(char) {
        Some(char)
    } else {
        let (latin, likeness) = latin(char)?;
        (least == Likeness::Similar || likeness == Likeness::Same).then_some(latin)
    };
    match script {
        Script::Latin => latin,
        Script::Cyrillic => CYRILLIC.get(&latin?).copied(),
        Script::Greek => GREEK.get(&latin?).copied(),
        _ => None,
    }
}

/// What the letters of Greek, Cyrillic and Armenian look like. To look them up in the table of UTS #39 takes much longer.
static LATIN: LazyLock<Vec<Option<(char, Likeness)>>> = LazyLock::new(|| USUAL.map(look_up).collect());

const USUAL: std::ops::RangeInclusive<char> = '\u{370}'..='\u{58f}';

/// Returns the plain Latin letter that a letter looks like, of the same case.
fn latin(char: char) -> Option<(char, Likeness)> {
    match USUAL.contains(&char) {
        true => LATIN[(u32::from(char) - u32::from(*USUAL.start())) as usize],
        false => look_up(char),
    }
}

fn look_up(char: char) -> Option<(char, Likeness)> {
    let found = by_skeleton(char).or_else(|| {
        let (_, latin) = SIMILAR
            .into_iter()
            .find(|&(similar, _)| char.to_lowercase().eq([similar]))?;
        Some((latin, Likeness::Similar))
    });
    // Small letters that have the shape of a capital, such as к.
    let found = found.or_else(|| {
        let mut capital = char.to_uppercase();
        match (capital.next()?, capital.next()) {
            (capital, None) if capital != char => Some((by_skeleton(capital)?.0, Likeness::Similar)),
            _ => None,
        }
    });
    let (latin, likeness) = found?;
    let latin = match (latin, char.is_uppercase()) {
        // The skeleton of a capital I is a small l.
        ('l', true) => 'I',
        (latin, true) => latin.to_ascii_uppercase(),
        (latin, false) => latin.to_ascii_lowercase(),
    };
    Some((latin, likeness))
}

/// Returns the plain letter to which UTS #39 maps a letter.
fn by_skeleton(char: char) -> Option<(char, Likeness)> {
    let mut text = [0; 4];
    let mut likeness = Likeness::Same;
    let mut letters = skeleton(char.encode_utf8(&mut text)).filter(|&char| {
        let is_mark = is_combining_mark(char);
        if is_mark {
            likeness = Likeness::Similar;
        }
        !is_mark
    });
    let found = match (letters.next()?, letters.next(), letters.next()) {
        (letter, None, None) => letter,
        ('r', Some('n'), None) => 'm',
        _ => return None,
    };
    drop(letters);
    match small_capital(found) {
        Some(letter) => Some((letter, Likeness::Similar)),
        None => (found.is_ascii_alphabetic() && found != char).then_some((found, likeness)),
    }
}

/// Returns the letters of a range by the Latin letter that they look like. Those that are the same come first.
fn by_latin(range: std::ops::RangeInclusive<char>) -> HashMap<char, char> {
    let mut letters = HashMap::new();
    for least in [Likeness::Same, Likeness::Similar] {
        for char in range.clone().filter(|char| char.is_alphabetic()) {
            if let Some((latin, _)) = latin(char).filter(|&(_, likeness)| likeness == least) {
                letters.entry(latin).or_insert(char);
            }
        }
    }
    letters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn look_alikes_are_folded_to_the_script_of_their_word() {
        let check = |text: &str, expected: &str| assert_eq!(folded(text).as_deref(), Some(expected), "{text:?}");
        check("the gаrdеn is оpen", "the garden is open");
        check("the gαrdεη is οpen", "the garden is open");
        check("ѕее уоu in the gаrdеn", "see you in the garden");
        check("see you in the соре", "see you in the cope");
        check("GАRDЕN, НОМЕ", "GARDEN, HOME");
        check("In Іndia", "In India");
        check("the ɡarden", "the garden");
        check("the gаrden is тне home", "the garden is the home");
        // To Cyrillic and Greek.
        check("очень xoрошo было в саду", "очень хорошо было в саду");
        check("καλημέρα στoν κήπo", "καλημέρα στον κήπο");
    }

    #[test]
    fn words_of_other_scripts_stay() {
        for text in [
            "he said нет and хорошо",
            "ухо and море are Russian words",
            "рос и сор",
            "соре",
            "Δx = 5 μm, λx, πr",
            "the gardдn",
            "the γ ray and the α particle",
            "ɪŋɡlɪʃ",
            "SQLщик",
            "私はJavaが好きです",
            "Ελλάδα και Κύπρος in Greece",
            "Україна, її сад",
            "Պարտեզ means garden",
            "ı, ł and ø in Łódź",
        ] {
            assert_eq!(folded(text), None, "{text:?}");
        }
    }
}
