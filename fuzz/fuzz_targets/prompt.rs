//! The prompt: any text becomes complete prompts of a bounded length that cover it and contain no control token.

#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use moderatord::config::{Normalize, PromptConfig};
use moderatord::prompt::Prompter;
use moderatord_fuzz::{check_rows, prompt_config};
use tokenizers::Tokenizer;

/// Byte fallback and the normaliser of published Gemma checkpoints.
const REFERENCE: &[u8] = include_bytes!("../../tests/fixtures/gemma3/tokenizer.json");
/// Folds case, accents and compatibility forms.
const BUNDLED: &[u8] = moderatord::model::files::bundled::TOKENIZER;

/// Longer than any input.
const WHOLE: usize = 1 << 20;
const VOCAB_SIZE: usize = 1 << 14;
/// Texts that are repeated stay below this size.
const MAX_TEXT_BYTES: usize = 1 << 11;

/// One tokenizer and frame.
struct Subject {
    config: PromptConfig,
    prompter: Prompter,
    /// The same frame with a window for the whole text.
    whole: Prompter,
    /// Turns ids back into text; `None` if the tokenizer does not keep the text.
    decoder: Option<Tokenizer>,
    control: Vec<u32>,
    frame_tokens: usize,
}

impl Subject {
    fn new(tokenizer: &[u8], keeps_text: bool, config: PromptConfig) -> Self {
        let prompter = |config: &PromptConfig| {
            Prompter::new(Path::new("tokenizer.json"), tokenizer, config, VOCAB_SIZE, 2 * WHOLE).expect("a valid frame")
        };
        let decoder = Tokenizer::from_bytes(tokenizer).expect("a valid tokenizer");
        let special = decoder.get_added_tokens_decoder();
        let whole = PromptConfig {
            max_window_tokens: Some(WHOLE),
            ..config.clone()
        };
        let mut subject = Self {
            prompter: prompter(&config),
            whole: prompter(&whole),
            control: special
                .iter()
                .filter(|(_, token)| token.special)
                .map(|(&id, _)| id)
                .collect(),
            decoder: keeps_text.then_some(decoder),
            frame_tokens: 0,
            config,
        };
        subject.frame_tokens = subject.prompter.encode("").expect("an empty text").rows[0].tokens.len();
        subject
    }

    /// Returns the text of a window, in which a space and its stand-in look the same.
    fn window(&self, tokens: &[u32]) -> Option<String> {
        let decoder = self.decoder.as_ref()?;
        let text = decoder.decode(tokens, false).expect("known ids");
        let head = format!("<bos>{}", self.prompter.head());
        let window = text
            .strip_prefix(&head)
            .and_then(|rest| rest.strip_suffix(self.prompter.tail()));
        Some(
            window
                .unwrap_or_else(|| panic!("no complete frame in {text:?}"))
                .to_owned(),
        )
    }
}

static SUBJECTS: LazyLock<[Subject; 5]> = LazyLock::new(|| {
    let other_separator = |separator: &str, max_windows| PromptConfig {
        separator: separator.to_owned(),
        // Breaking these separators up sets letters apart, which the full rules would join if they were applied again.
        normalize: Normalize::Nfc,
        ..prompt_config(16, max_windows)
    };
    let raw = PromptConfig {
        normalize: Normalize::None,
        ..prompt_config(16, 1024)
    };
    [
        Subject::new(REFERENCE, true, prompt_config(16, 1024)),
        Subject::new(REFERENCE, true, raw),
        Subject::new(REFERENCE, true, other_separator("\n#a# a\n", 3)),
        Subject::new(REFERENCE, true, other_separator("aa a", 1024)),
        Subject::new(BUNDLED, false, prompt_config(32, 8)),
    ]
});

fuzz_target!(|data: &[u8]| {
    let Some((&[subject, times], text)) = data.split_first_chunk() else {
        return;
    };
    let subject = &SUBJECTS[usize::from(subject) % SUBJECTS.len()];
    let text = String::from_utf8_lossy(text);
    let times = usize::from(times).min(MAX_TEXT_BYTES / text.len().max(1)).max(1);
    check(subject, &text.repeat(times));
});

fn check(subject: &Subject, text: &str) {
    let config = &subject.config;
    let prompt = subject.prompter.encode(text).expect("the vocabulary has every byte");
    check_rows(
        &prompt,
        subject.prompter.prefix(),
        config.window_rules().max_windows,
        VOCAB_SIZE,
    );
    for row in &prompt.rows {
        assert!(subject.control.contains(&row.tokens[0]), "no <bos>");
        assert!(
            !row.tokens[1..].iter().any(|id| subject.control.contains(id)),
            "a control token"
        );
        // Compatibility forms can have more tokens than any window.
        let factor = if subject.decoder.is_some() { 1 } else { 2 };
        let limit = subject.frame_tokens + factor * config.window_rules().max_tokens;
        assert!(
            row.tokens.len() <= limit,
            "{} tokens, expected at most {limit}",
            row.tokens.len()
        );
    }
    let whole = subject.whole.encode(text).expect("it was encoded above");
    assert!(whole.rows.len() == 1 && !whole.truncated);
    let Some(normalized) = subject.window(&whole.rows[0].tokens) else {
        return;
    };
    let spaced = text.replace('\u{2581}', " ");
    if config.normalize != Normalize::None {
        // With the stand-in for a space, the text differs from the one that was normalised.
        if !text.contains('\u{2581}') {
            let again = subject.whole.encode(&normalized).expect("it was encoded above");
            assert_eq!(again, whole, "normalising again changes {normalized:?}");
            let core = config.separator.trim();
            assert!(
                !normalized.to_ascii_lowercase().contains(core),
                "{normalized:?} contains the separator"
            );
        }
    } else {
        assert_eq!(normalized, spaced);
    }
    let windows: Vec<String> = prompt
        .rows
        .iter()
        .filter_map(|row| subject.window(&row.tokens))
        .collect();
    check_cover(&normalized, &windows, prompt.truncated);
}

/// Checks that windows begin and end with the text, and have no gaps between them unless some are left out.
fn check_cover(text: &str, windows: &[String], truncated: bool) {
    assert!(
        text.starts_with(&windows[0]),
        "the first window does not begin the text"
    );
    let last = &windows[windows.len() - 1];
    assert!(
        text.ends_with(last) || (truncated && windows.len() == 1),
        "the last window does not end the text"
    );
    if truncated {
        return;
    }
    let mut covered = windows[0].len();
    for window in &windows[1..] {
        // The latest place without a gap: if it is not the real one, the check is only weaker.
        let end = (covered + window.len()).min(text.len());
        let end = text.floor_char_boundary(end);
        let start = text[..end]
            .rfind(window.as_str())
            .expect("the window is part of the text");
        assert!(start <= covered, "a gap between windows");
        covered = covered.max(start + window.len());
    }
    assert_eq!(covered, text.len(), "the windows do not cover the text");
}
