//! Turns letters that differ from plain ones only in style into the plain ones.
//!
//! Unicode has copies of the Latin alphabet for mathematics, in full width, in circles and squares, raised and lowered,
//! and as small capitals. They are read like the plain letters and have other tokens. What they stand for is their
//! compatibility decomposition (NFKD, UAX #15) where they have one. Only letters are changed, and digits next to them: signs such as ™, ½ or №
//! and full-width punctuation are not a disguise.

use unicode_normalization::char::decompose_compatible;

/// Makes an emoji of the character before it.
const EMOJI_STYLE: char = '\u{fe0f}';

/// The small capitals that stand for a to z, without q and x, which Unicode did not have for long.
const SMALL_CAPITALS: &str = "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘꞯʀꜱᴛᴜᴠᴡ\u{0}ʏᴢ";

/// Returns the text with plain letters, or `None` if it has no others.
pub(super) fn plain(text: &str) -> Option<String> {
    if !text.contains(|char: char| style(char).is_some()) {
        return None;
    }
    let chars: Vec<char> = text.chars().collect();
    let are_capitals_read = has_words_of_small_capitals(&chars);
    let mut plain = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let word = word_length(&chars[at..]);
        if word == 0 {
            plain.push(chars[at]);
            at += 1;
            continue;
        }
        push_word(&chars[at..at + word], are_capitals_read, &mut plain);
        at += word;
    }
    (plain != text).then_some(plain)
}

/// How a letter differs from the plain one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// For mathematics, in full width, or a ligature of print.
    Font,
    /// In a circle or a square.
    Enclosed,
    /// Raised or lowered. A single one next to plain letters is an abbreviation or a phonetic sign.
    Raised,
    /// A small capital. Phonetic notation has some of them among letters of its own.
    SmallCapital,
    /// A Roman numeral. Alone, it is a number.
    Numeral,
    /// One of the letters of which two make a flag.
    Flag,
}

/// Returns the style of a letter or digit, if it is not plain.
fn style(char: char) -> Option<Style> {
    match char {
        '\0'..='\u{a9}' => None,
        '\u{ff10}'..='\u{ff19}' | '\u{ff21}'..='\u{ff3a}' | '\u{ff41}'..='\u{ff5a}' => Some(Style::Font),
        '\u{fb00}'..='\u{fb06}' | '\u{1d400}'..='\u{1d7ff}' => Some(Style::Font),
        '\u{2100}'..='\u{214f}' => (char.is_alphabetic() && is_letter(char)).then_some(Style::Font),
        '\u{249c}'..='\u{24e9}' | '\u{1f110}'..='\u{1f149}' | '\u{1f150}'..='\u{1f169}' | '\u{1f170}'..='\u{1f189}' => {
            Some(Style::Enclosed)
        }
        '\u{2b0}'..='\u{2b8}' | '\u{2e0}'..='\u{2e4}' | '\u{1d2c}'..='\u{1d6a}' | '\u{1d9b}'..='\u{1dbf}' => {
            Some(Style::Raised)
        }
        '\u{2071}' | '\u{207f}' | '\u{2090}'..='\u{209c}' | '\u{2c7c}' | '\u{2c7d}' | '\u{a7f2}'..='\u{a7f4}' => {
            Some(Style::Raised)
        }
        '\u{2160}'..='\u{217f}' => Some(Style::Numeral),
        '\u{1f1e6}'..='\u{1f1ff}' => Some(Style::Flag),
        '\u{250}'..='\u{2af}' | '\u{1d00}'..='\u{1d2b}' | '\u{a730}'..='\u{a7ff}' => {
            SMALL_CAPITALS.contains(char).then_some(Style::SmallCapital)
        }
        _ => None,
    }
}

/// Adds the plain letters that a character of a style stands for. Returns whether there are any.
fn push_plain(char: char, plain: &mut String) -> bool {
    let before = plain.len();
    let offset = |from: u32| char::from_u32(u32::from('A') + u32::from(char) - from);
    match char {
        '\u{249c}'..='\u{24b5}' => plain.extend(offset(0x249c).map(|char| char.to_ascii_lowercase())),
        '\u{1f110}'..='\u{1f129}' => plain.extend(offset(0x1f110)),
        '\u{1f150}'..='\u{1f169}' => plain.extend(offset(0x1f150)),
        '\u{1f170}'..='\u{1f189}' => plain.extend(offset(0x1f170)),
        '\u{1f1e6}'..='\u{1f1ff}' => plain.extend(offset(0x1f1e6)),
        char => match small_capital(char) {
            Some(letter) => plain.push(letter),
            None => decompose_compatible(char, |char| plain.push(small_capital(char).unwrap_or(char))),
        },
    }
    let found = &plain[before..];
    let is_plain = found.chars().all(|char| char.is_alphanumeric()) && !found.contains(char);
    if !is_plain {
        plain.truncate(before);
    }
    is_plain
}

/// Returns the plain letter that a small capital stands for.
pub(super) fn small_capital(char: char) -> Option<char> {
    if char.is_ascii() {
        return None;
    }
    let place = SMALL_CAPITALS.chars().position(|small| small == char)?;
    Some(char::from(b'a' + u8::try_from(place).ok()?))
}

/// Returns the number of characters of the word that a text begins with: letters and digits of any style.
fn word_length(chars: &[char]) -> usize {
    let belongs = |char: &&char| char.is_alphanumeric() || style(**char).is_some() || **char == EMOJI_STYLE;
    chars.iter().take_while(belongs).count()
}

/// Returns whether a word has nothing but plain letters and letters of a style.
fn is_plain_word(word: &[char]) -> bool {
    let is_plain = |&char: &char| char.is_ascii_alphanumeric() || style(char).is_some() || char == EMOJI_STYLE;
    word.iter().all(is_plain)
}

/// Returns whether a text has a word with several small capitals. A single one among plain letters can be a phonetic sign,
/// as in `ɪt`.
fn has_words_of_small_capitals(chars: &[char]) -> bool {
    let is_small = |char: &&char| style(**char) == Some(Style::SmallCapital);
    let mut words = chars.chunk_by(|&a, &b| word_length(&[a]) == word_length(&[b]));
    words.any(|word| word.iter().filter(is_small).count() > 1 && is_plain_word(word))
}

/// Adds a word with plain letters.
fn push_word(word: &[char], are_capitals_read: bool, plain: &mut String) {
    let is_small = word.iter().any(char::is_ascii_lowercase);
    let are_small_capitals_read = is_plain_word(word) && (are_capitals_read || word.len() == 1);
    for (index, &char) in word.iter().enumerate() {
        let neighbour = |index: Option<usize>| index.and_then(|index| word.get(index)).copied();
        let (before, after) = (neighbour(index.checked_sub(1)), neighbour(Some(index + 1)));
        let is_next_to = |is_one: &dyn Fn(char) -> bool| before.is_some_and(is_one) || after.is_some_and(is_one);
        let is_latin = |char: char| char.is_ascii_alphabetic() || (style(char).is_some() && !char.is_numeric());
        let is_read = match style(char) {
            None => false,
            // In East Asian texts, these digits are usual. In mathematical style they are not.
            Some(Style::Font) if ('\u{ff10}'..='\u{ff19}').contains(&char) => is_next_to(&is_latin),
            // The information sign, and other letters that an emoji shows.
            Some(Style::Font | Style::Enclosed) if after == Some(EMOJI_STYLE) => {
                let beyond = neighbour(Some(index + 2));
                before.is_some_and(|char| is_latin(char) || char == EMOJI_STYLE && index > 1)
                    || beyond.is_some_and(is_latin)
            }
            Some(Style::Font | Style::Enclosed) => true,
            Some(Style::Raised) => {
                let is_raised = |char: char| style(char) == Some(Style::Raised);
                is_next_to(&is_raised) || !is_next_to(&|char: char| char.is_alphanumeric())
            }
            Some(Style::SmallCapital) => are_small_capitals_read,
            Some(Style::Numeral) => is_next_to(&|char: char| char.is_ascii_alphabetic()),
            Some(Style::Flag) => !is_next_to(&|char: char| style(char) == Some(Style::Flag)),
        };
        let before = plain.len();
        let was_read = is_read && push_plain(char, plain);
        // Letters in squares are capitals, also in the middle of a word.
        if was_read && style(char) == Some(Style::Enclosed) && is_small {
            plain[before..].make_ascii_lowercase();
        }
        // What made an emoji of a letter goes with it.
        let is_remainder = char == EMOJI_STYLE && plain.ends_with(|char: char| char.is_ascii_alphabetic());
        if !was_read && !is_remainder {
            plain.push(char);
        }
    }
}

/// Returns whether a letterlike symbol stands for a single letter.
fn is_letter(symbol: char) -> bool {
    let (mut letters, mut all) = (0, 0);
    decompose_compatible(symbol, |char| {
        all += 1;
        letters += usize::from(char.is_ascii_alphabetic());
    });
    (letters, all) == (1, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_of_other_styles_become_plain() {
        let check = |text: &str, expected: &str| assert_eq!(plain(text).as_deref(), Some(expected), "{text:?}");
        check("𝐬𝐞𝐞 𝑦𝑜𝑢 𝓁𝒶𝓉ℯ𝓇", "see you later");
        check("𝕤𝕖𝕖 𝖞𝖔𝖚 𝚕𝚊𝚝𝚎𝚛 𝟏𝟐", "see you later 12");
        check("ｓｅｅ ｙｏｕ！", "see you！");
        check("ｍｐ３", "mp3");
        check("ⓢⓔⓔ ⒴⒪⒰ 🅛🅐🅣🅔🅡", "see you LATER");
        check("🄶🄰🅁🄳🄴🄽 🅶🅰🆁🅳🅴🅽", "GARDEN GARDEN");
        check("🅶🅰\u{fe0f}🆁🅳🅴🅽", "GARDEN");
        check("g🅰\u{fe0f}rden", "garden");
        check("ˢᵉᵉ ʸᵒᵘ ˡᵃᵗᵉʳ", "see you later");
        check("ꜱᴇᴇ ʏᴏᴜ ʟᴀᴛᴇʀ", "see you later");
        check("sᴇᴇ Yᴏᴜ", "see You");
        check("ﬁne o\u{fb03}ce", "fine office");
        check("ⅼater", "later");
        check("🇸 🇪 🇪", "S E E");
        check("ʰ ᵃ ᵗ", "h a t");
    }

    #[test]
    fn what_is_no_plain_letter_stays() {
        for text in [
            "tʰ kʷ ɪt̪ ɪŋɡlɪʃ",
            "1ª nº ™ № ½ ² ℃ ℅",
            "第１章、２０２４年！",
            "ⅣⅤ",
            "🇫🇷🇩🇪",
            "🅰\u{fe0f} ℹ\u{fe0f} Ⓜ\u{fe0f}",
            "ｱｲｳ ﷺ",
            "Mᵐ",
            "naïve Łódź",
        ] {
            assert_eq!(plain(text), None, "{text:?}");
        }
    }
}
