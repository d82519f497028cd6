//! Puts text whose direction is overridden into the order in which a reader sees it.
//!
//! Between U+202E (right-to-left override) and its end, letters of any script are shown from right to left, so that a
//! text that is stored backwards is read forwards; U+202D does the same to scripts that run from right to left. The rules
//! are a part of the Unicode Bidirectional Algorithm (UAX #9, X1 to X8 and L4): an override ends at U+202C, at the end of
//! the isolate around it, or with its paragraph.

use unicode_normalization::char::is_combining_mark;
use unicode_script::{Script, UnicodeScript};

/// The most overrides and embeddings within one another that count. Deeper ones are ignored, as UAX #9 does from 125 on;
/// a lower limit keeps the time linear.
const MAX_DEPTH: usize = 16;

const LEFT_TO_RIGHT: char = '\u{202d}';
const RIGHT_TO_LEFT: char = '\u{202e}';

/// What began a part of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Override,
    Embedding,
    Isolate,
}

/// A part of the text between a control character and its end.
struct Level {
    kind: Kind,
    is_right_to_left: bool,
    text: String,
}

/// Returns the text with its overrides applied and without their control characters, or `None` if it has none.
pub(super) fn applied(text: &str) -> Option<String> {
    if !text.contains([LEFT_TO_RIGHT, RIGHT_TO_LEFT]) {
        return None;
    }
    let mut levels = Levels {
        seen: String::with_capacity(text.len()),
        open: Vec::new(),
        ignored: 0,
    };
    for char in text.chars() {
        match char {
            LEFT_TO_RIGHT => levels.open(Kind::Override, false),
            RIGHT_TO_LEFT => levels.open(Kind::Override, true),
            '\u{202a}' | '\u{202b}' => levels.open(Kind::Embedding, false),
            '\u{2066}'..='\u{2068}' => levels.open(Kind::Isolate, false),
            '\u{202c}' => levels.close(),
            '\u{2069}' => levels.close_isolate(),
            '\n' | '\r' | '\u{2029}' => {
                levels.close_all();
                levels.push(char);
            }
            char => levels.push(char),
        }
    }
    levels.close_all();
    Some(levels.seen)
}

/// The text that is already in order, and the parts that have begun and not ended.
struct Levels {
    seen: String,
    open: Vec<Level>,
    /// How many parts began beyond the limit.
    ignored: usize,
}

impl Levels {
    fn push(&mut self, char: char) {
        self.open
            .last_mut()
            .map_or(&mut self.seen, |level| &mut level.text)
            .push(char);
    }

    fn open(&mut self, kind: Kind, is_right_to_left: bool) {
        if self.open.len() == MAX_DEPTH {
            self.ignored += 1;
            return;
        }
        self.open.push(Level {
            kind,
            is_right_to_left,
            text: String::new(),
        });
    }

    /// Ends the innermost part, unless it is an isolate, which only its own character ends.
    fn close(&mut self) {
        if self.ignored > 0 {
            self.ignored -= 1;
        } else if self.open.last().is_some_and(|level| level.kind != Kind::Isolate) {
            self.close_last();
        }
    }

    fn close_isolate(&mut self) {
        if self.ignored > 0 {
            self.ignored -= 1;
        } else if let Some(at) = self.open.iter().rposition(|level| level.kind == Kind::Isolate) {
            while self.open.len() > at {
                self.close_last();
            }
        }
    }

    fn close_all(&mut self) {
        self.ignored = 0;
        while !self.open.is_empty() {
            self.close_last();
        }
    }

    /// Adds the innermost part to the one around it, in the order of that one.
    fn close_last(&mut self) {
        let Some(level) = self.open.pop() else { return };
        let around = self.open.last_mut();
        let is_right_to_left_around = around.as_ref().is_some_and(|around| around.is_right_to_left);
        let mut is_turned = level.is_right_to_left != is_right_to_left_around;
        // A right-to-left script is read as it is stored under the one override, and backwards under the other.
        if level.kind == Kind::Override && runs_right_to_left(&level.text) {
            is_turned = !is_turned;
        }
        let text = if is_turned { reversed(&level.text) } else { level.text };
        around.map_or(&mut self.seen, |around| &mut around.text).push_str(&text);
    }
}

/// Returns the characters in reverse order, with each mark behind its letter, and brackets that are mirrored (L4).
fn reversed(text: &str) -> String {
    let mut reversed = String::with_capacity(text.len());
    let mut end = text.len();
    for (at, char) in text.char_indices().rev() {
        if is_combining_mark(char) && at > 0 {
            continue;
        }
        let mut mirrored = [0; 4];
        reversed.push_str(mirror(char).encode_utf8(&mut mirrored));
        reversed.push_str(&text[at + char.len_utf8()..end]);
        end = at;
    }
    reversed
}

fn mirror(char: char) -> char {
    match char {
        '(' => ')',
        ')' => '(',
        '[' => ']',
        ']' => '[',
        '{' => '}',
        '}' => '{',
        '<' => '>',
        '>' => '<',
        '«' => '»',
        '»' => '«',
        char => char,
    }
}

/// Returns whether most letters of a text belong to scripts that are written from right to left.
fn runs_right_to_left(text: &str) -> bool {
    let (mut right_to_left, mut others) = (0_usize, 0_usize);
    for char in text.chars().filter(|char| char.is_alphabetic()) {
        match char.script() {
            Script::Arabic
            | Script::Hebrew
            | Script::Syriac
            | Script::Thaana
            | Script::Nko
            | Script::Samaritan
            | Script::Mandaic
            | Script::Adlam
            | Script::Hanifi_Rohingya => right_to_left += 1,
            _ => others += 1,
        }
    }
    right_to_left > others
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overridden_text_is_put_into_the_order_that_a_reader_sees() {
        let check = |text: &str, expected: &str| assert_eq!(applied(text).as_deref(), Some(expected), "{text:?}");
        check("\u{202e}nedrag eht\u{202c}", "the garden");
        check("see \u{202e}uoy\u{202c} later", "see you later");
        check("see \u{202e}uoy", "see you");
        check("\u{202e}uoy\nlater", "you\nlater");
        check("\u{202d}see you\u{202c} later", "see you later");
        // Marks stay behind their letters, and brackets are mirrored.
        check("\u{202e}(e\u{301}fac) ta\u{202c}", "at (cafe\u{301})");
        // Parts in another direction within an override.
        check("\u{202e}retal \u{202d}see\u{202c} ew\u{202c}!", "we see later!");
        check("\u{202e}uoy \u{202e}ees\u{202c} ew", "we see you");
        check("\u{202e}ew \u{2066}see\u{2069}", "see we");
        check("\u{2067}\u{202e}uoy\u{2069} later", "you later");
    }

    #[test]
    fn scripts_that_run_from_right_to_left_are_read_as_they_are() {
        assert_eq!(applied("\u{202e}שלום\u{202c}").as_deref(), Some("שלום"));
        assert_eq!(applied("\u{202d}םולש\u{202c}").as_deref(), Some("שלום"));
        assert_eq!(applied("שלום you"), None);
        assert_eq!(applied("\u{2067}שלום\u{2069}"), None);
    }

    #[test]
    fn many_overrides_take_linear_time() {
        let text = [
            "\u{202e}a\u{202d}".repeat(100_000),
            "b".repeat(100_000),
            "\u{202c}".repeat(200_000),
        ]
        .concat();
        let seen = applied(&text).unwrap();
        assert_eq!(seen.len(), 200_000);
    }
}
