//! Judges whether a text is in one of the languages that the model was trained for.
//!
//! Three things count: the script of the letters, the language that whatlang recognises by its trigrams, and the share of tokens that
//! spell single bytes, because the vocabulary has no token for their characters. A language cannot be told from a few words, and
//! slang, names and misspellings look like many languages. Such texts count as within the scope.

use std::ops::Range;

use whatlang::{Lang, Script, detect, detect_script};

use super::english::is_plain_english;
use super::window;
use crate::message::Competence;

/// The fewest letters from which a script is judged: one letter may be a symbol or a smiley.
const LETTERS_OF_SCRIPT: usize = 2;

/// The fewest letters from which a language is judged, about five words.
const LETTERS_OF_LANGUAGE: usize = 24;

/// The confidence of whatlang from which another language makes a text unsure. It is the smallest with which at most about 1 % of the
/// comments of GoEmotions, Surge AI's sample and HateXplain, which are in English, do not count as in scope. Of the sentences in
/// twelve other languages in `tests/fixtures/languages.jsonl`, 92 % do not (`models/recipe/languages.py`).
const UNSURE: f64 = 0.4;

/// The share of tokens that spell single bytes from which a text is unsure.
const BYTE_SHARE: f64 = 0.3;

/// The size of the pieces of a long text that are judged, in bytes. Each is long enough for a reliable judgement.
const PIECE_BYTES: usize = 1024;

/// The largest number of pieces that are judged, which limits what a long text costs.
const MAX_PIECES: usize = 8;

/// Codes of ISO 639-1 with the languages that whatlang can recognise.
const LANGUAGES: [(&str, Lang); 70] = [
    ("af", Lang::Afr),
    ("ak", Lang::Aka),
    ("am", Lang::Amh),
    ("ar", Lang::Ara),
    ("az", Lang::Aze),
    ("be", Lang::Bel),
    ("bg", Lang::Bul),
    ("bn", Lang::Ben),
    ("ca", Lang::Cat),
    ("cs", Lang::Ces),
    ("cy", Lang::Cym),
    ("da", Lang::Dan),
    ("de", Lang::Deu),
    ("el", Lang::Ell),
    ("en", Lang::Eng),
    ("eo", Lang::Epo),
    ("es", Lang::Spa),
    ("et", Lang::Est),
    ("fa", Lang::Pes),
    ("fi", Lang::Fin),
    ("fr", Lang::Fra),
    ("gu", Lang::Guj),
    ("he", Lang::Heb),
    ("hi", Lang::Hin),
    ("hr", Lang::Hrv),
    ("hu", Lang::Hun),
    ("hy", Lang::Hye),
    ("id", Lang::Ind),
    ("it", Lang::Ita),
    ("ja", Lang::Jpn),
    ("jv", Lang::Jav),
    ("ka", Lang::Kat),
    ("km", Lang::Khm),
    ("kn", Lang::Kan),
    ("ko", Lang::Kor),
    ("la", Lang::Lat),
    ("lt", Lang::Lit),
    ("lv", Lang::Lav),
    ("mk", Lang::Mkd),
    ("ml", Lang::Mal),
    ("mr", Lang::Mar),
    ("my", Lang::Mya),
    ("nb", Lang::Nob),
    ("ne", Lang::Nep),
    ("nl", Lang::Nld),
    ("or", Lang::Ori),
    ("pa", Lang::Pan),
    ("pl", Lang::Pol),
    ("pt", Lang::Por),
    ("ro", Lang::Ron),
    ("ru", Lang::Rus),
    ("si", Lang::Sin),
    ("sk", Lang::Slk),
    ("sl", Lang::Slv),
    ("sn", Lang::Sna),
    ("sr", Lang::Srp),
    ("sv", Lang::Swe),
    ("ta", Lang::Tam),
    ("te", Lang::Tel),
    ("th", Lang::Tha),
    ("tk", Lang::Tuk),
    ("tl", Lang::Tgl),
    ("tr", Lang::Tur),
    ("uk", Lang::Ukr),
    ("ur", Lang::Urd),
    ("uz", Lang::Uzb),
    ("vi", Lang::Vie),
    ("yi", Lang::Yid),
    ("zh", Lang::Cmn),
    ("zu", Lang::Zul),
];

/// Recognises the language of a text, from the first KiB of it. Returns its ISO 639-1 code, or `None` if the text is too short
/// or if its language is not clear.
pub fn language(text: &str) -> Option<&'static str> {
    let text = &text[..text.floor_char_boundary(PIECE_BYTES)];
    let code = |language: Lang| {
        LANGUAGES
            .iter()
            .find(|&&(_, known)| known == language)
            .map(|&(code, _)| code)
    };
    if text.chars().filter(|char| char.is_alphabetic()).count() < LETTERS_OF_LANGUAGE {
        return None;
    }
    if is_plain_english(text) {
        return code(Lang::Eng);
    }
    let found = detect(text).filter(whatlang::Info::is_reliable)?;
    code(found.lang())
}

/// The languages that a model was trained for.
#[derive(Debug, Clone, PartialEq)]
pub struct Scope {
    codes: Vec<String>,
    languages: Vec<Lang>,
    /// The scripts in which these languages are written.
    scripts: Vec<Script>,
}

/// Languages of which a model's scope cannot consist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// The code is not one of those that can be recognised.
    #[error("has `{0}`, expected codes of ISO 639-1 such as `en`, of languages that can be recognised: {known}", known = known())]
    Unknown(String),
    /// There are no languages.
    #[error("is empty, expected at least one code of ISO 639-1 such as `en`; or leave it out")]
    Empty,
}

fn known() -> String {
    LANGUAGES.map(|(code, _)| code).join(", ")
}

impl Scope {
    /// Creates the scope of a model for languages that are given by their ISO 639-1 codes.
    ///
    /// # Errors
    /// Returns an error if there are none, or if one cannot be recognised.
    pub fn new(mut codes: Vec<String>) -> Result<Self, ScopeError> {
        codes.sort_unstable();
        codes.dedup();
        if codes.is_empty() {
            return Err(ScopeError::Empty);
        }
        let language = |code: &String| {
            let found = LANGUAGES.iter().find(|(known, _)| known == code);
            found
                .map(|&(_, language)| language)
                .ok_or_else(|| ScopeError::Unknown(code.clone()))
        };
        let languages: Vec<Lang> = codes.iter().map(language).collect::<Result<_, _>>()?;
        let is_written = |script: &&Script| script.langs().iter().any(|language| languages.contains(language));
        Ok(Self {
            scripts: Script::all().iter().filter(is_written).copied().collect(),
            codes,
            languages,
        })
    }

    /// Returns the ISO 639-1 codes of the languages, in alphabetical order.
    pub fn codes(&self) -> &[String] {
        &self.codes
    }

    /// Judges a normalised text, of whose tokens this share spell single bytes.
    ///
    /// Of a text of more than 1 KiB, up to eight pieces of that size are judged, which are spread evenly. The text is out of the
    /// scope if half of them are, and unsure if any of them is not in it.
    pub(super) fn of_text(&self, text: &str, byte_share: f64) -> Competence {
        let count = text.len().div_ceil(PIECE_BYTES).clamp(1, MAX_PIECES);
        let piece = |range: Range<usize>| self.of_piece(&text[range]);
        let pieces: Vec<Competence> = window::slices(text, count, PIECE_BYTES)
            .into_iter()
            .map(piece)
            .collect();
        let outside = pieces.iter().filter(|&&piece| piece == Competence::OutOfScope).count();
        if 2 * outside >= pieces.len() {
            Competence::OutOfScope
        } else if byte_share >= BYTE_SHARE || pieces.iter().any(|&piece| piece != Competence::InScope) {
            Competence::Unsure
        } else {
            Competence::InScope
        }
    }

    fn of_piece(&self, text: &str) -> Competence {
        let letters = text.chars().filter(|char| char.is_alphabetic()).count();
        if letters < LETTERS_OF_SCRIPT {
            return Competence::InScope;
        }
        if let Some(script) = detect_script(text)
            && !self.scripts.contains(&script)
        {
            return Competence::OutOfScope;
        }
        // Recognising a language takes ten times as long as tokenising, so texts that can be judged without it come first.
        if letters < LETTERS_OF_LANGUAGE || self.languages.contains(&Lang::Eng) && is_plain_english(text) {
            return Competence::InScope;
        }
        match detect(text) {
            Some(found) if !self.languages.contains(&found.lang()) => {
                if found.is_reliable() {
                    Competence::OutOfScope
                } else if found.confidence() >= UNSURE {
                    Competence::Unsure
                } else {
                    Competence::InScope
                }
            }
            _ => Competence::InScope,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scope(codes: &[&str]) -> Scope {
        Scope::new(codes.iter().map(|&code| code.to_owned()).collect()).unwrap()
    }

    #[test]
    fn every_code_is_listed_once_and_recognised() {
        assert!(LANGUAGES.is_sorted_by(|one, next| one.0 < next.0));
        let codes: Vec<&str> = LANGUAGES.iter().map(|&(code, _)| code).collect();
        assert_eq!(scope(&codes).languages.len(), LANGUAGES.len());
        let mut languages: Vec<&str> = LANGUAGES.iter().map(|(_, language)| language.code()).collect();
        languages.sort_unstable();
        languages.dedup();
        assert_eq!(languages.len(), LANGUAGES.len());
        let error = Scope::new(vec!["en".into(), "eng".into()]).unwrap_err().to_string();
        assert!(
            error.starts_with("has `eng`, expected codes of ISO 639-1 such as `en`"),
            "{error}"
        );
        assert_eq!(Scope::new(Vec::new()), Err(ScopeError::Empty));
    }

    /// Mild sentences of our own in English and twelve other languages.
    fn sentences() -> Vec<(String, String)> {
        let path = crate::test_files::test_file("tests/fixtures/languages.jsonl");
        let text = std::fs::read_to_string(path).unwrap();
        let line = |line: &str| {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            let field = |name: &str| value[name].as_str().unwrap().to_owned();
            (field("language"), field("text"))
        };
        text.lines().map(line).collect()
    }

    #[test]
    fn english_is_in_the_scope_of_an_english_model_and_other_languages_are_not() {
        let (english, bytes) = (scope(&["en"]), 0.0);
        let (mut others, mut outside) = (0, 0);
        for (language, text) in sentences() {
            let found = english.of_text(&text, bytes);
            if language == "en" {
                assert_eq!(found, Competence::InScope, "{text}");
            } else {
                assert!(!is_plain_english(&text), "{text}");
                others += 1;
                outside += usize::from(found != Competence::InScope);
            }
            let own = scope(&[&language]).of_text(&text, bytes);
            assert_ne!(own, Competence::OutOfScope, "{language}: {text}");
        }
        assert!(others >= 60 && 10 * outside >= 9 * others, "{outside} of {others}");
    }

    #[test]
    fn the_script_decides_with_few_letters_and_the_language_only_with_many() {
        let check = |text: &str, expected| assert_eq!(scope(&["en"]).of_text(text, 0.0), expected, "{text}");
        check("", Competence::InScope);
        check("123 😂😂 !!!", Competence::InScope);
        check("да", Competence::OutOfScope);
        check("天", Competence::InScope);
        check("今天", Competence::OutOfScope);
        check("danke schön", Competence::InScope);
        check(
            "Ich habe heute Morgen Brot gebacken und es schmeckt uns allen sehr gut.",
            Competence::OutOfScope,
        );
        let german = "Ich habe heute Morgen Brot gebacken und es schmeckt uns allen sehr gut.";
        assert_eq!(scope(&["de", "en"]).of_text(german, 0.0), Competence::InScope);
        assert_eq!(scope(&["ru"]).of_text("да", 0.0), Competence::InScope);
    }

    #[test]
    fn the_language_of_a_clear_text_is_recognised() {
        // Short sentences are often not clear, but few are taken for another language.
        let found: Vec<_> = sentences()
            .into_iter()
            .map(|(expected, text)| (language(&text), expected))
            .collect();
        let right = found
            .iter()
            .filter(|(found, expected)| found.is_some_and(|found| found == expected))
            .count();
        let wrong: Vec<_> = found
            .iter()
            .filter(|(found, expected)| found.is_some_and(|found| found != expected))
            .collect();
        assert!(
            2 * right >= found.len() && 20 * wrong.len() <= found.len(),
            "{right} right, wrong: {wrong:?}"
        );
        let german = "Ich habe heute Morgen Brot gebacken und es schmeckt uns allen sehr gut. ".repeat(40);
        assert_eq!(language(&german), Some("de"));
        assert_eq!(language("We walked along the river until it got dark."), Some("en"));
        for short in ["", "danke", "ok", "123 !!!"] {
            assert_eq!(language(short), None, "{short}");
        }
    }

    #[test]
    fn tokens_that_spell_bytes_make_a_text_unsure() {
        let text = "a fine day";
        assert_eq!(scope(&["en"]).of_text(text, 0.29), Competence::InScope);
        assert_eq!(scope(&["en"]).of_text(text, 0.31), Competence::Unsure);
        assert_eq!(scope(&["en"]).of_text("сегодня", 0.31), Competence::OutOfScope);
    }

    #[test]
    fn a_passage_in_another_language_makes_a_long_text_unsure() {
        let english = "We walked along the river until it got dark and then went home for soup. ".repeat(60);
        let german = "Wir sind am Fluss entlang gegangen, bis es dunkel wurde, und dann nach Hause. ".repeat(20);
        let scope = scope(&["en"]);
        assert_eq!(scope.of_text(&english, 0.0), Competence::InScope);
        assert_eq!(scope.of_text(&format!("{english}{german}"), 0.0), Competence::Unsure);
        assert_eq!(scope.of_text(&german.repeat(3), 0.0), Competence::OutOfScope);
    }

    proptest! {
        #[test]
        fn every_text_is_judged_and_always_in_the_same_way(text in any::<String>(), times in 1usize..40, share in 0.0..=1.0f64) {
            let text = text.repeat(times);
            let found = scope(&["en"]).of_text(&text, share);
            prop_assert_eq!(found, scope(&["en"]).of_text(&text, share));
            prop_assert!(share < BYTE_SHARE || found != Competence::InScope);
        }
    }
}
