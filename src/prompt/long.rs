//! Chooses the windows of a text that has far more tokens than the windows cover, without tokenising all of it.
//!
//! A text is tokenised as a whole only if the windows might cover it. What a longer text costs depends on the settings
//! and not on its size, apart from the normaliser, which reads all of it once in linear time. The windows of a text
//! that they cover are the same in both cases.

use super::rows::Windows;
use super::{PromptError, Prompter, Row, tokenizer_error, window};

/// An upper bound on the bytes of one token, taken from the published Gemma vocabularies, whose longest tokens are runs
/// of spaces. A text with more bytes than this for each token that the windows cover counts as longer than they are.
pub(super) const LONGEST_TOKEN_BYTES: usize = 128;

/// More bytes than the tokens of a written language have on average: with Gemma's vocabulary, English has between four
/// and five. Only runs of the same character have longer tokens.
const USUAL_TOKEN_BYTES: usize = 16;

/// The sizes of the beginnings of a text that are tokenised to find out whether the text is longer than the windows, in
/// bytes for each token that the windows cover. The second one serves texts whose tokens are unusually long.
const PROBES: [usize; 2] = [USUAL_TOKEN_BYTES, 4 * USUAL_TOKEN_BYTES];

impl Prompter {
    /// Returns the number of bytes above which the windows of a text can be [spread by bytes](Self::windows_spread).
    pub(super) fn spread_bytes(&self) -> usize {
        self.capacity().saturating_mul(USUAL_TOKEN_BYTES)
    }

    /// Returns whether a text evidently has more tokens than the windows cover.
    ///
    /// The last tokens of a text's beginning can change with what follows. A beginning therefore decides only with more
    /// than twice as many tokens as the windows cover.
    pub(super) fn exceeds_windows(&self, text: &str) -> Result<bool, PromptError> {
        let capacity = self.capacity();
        if text.len() > capacity.saturating_mul(LONGEST_TOKEN_BYTES) {
            return Ok(true);
        }
        for token_bytes in PROBES {
            let bytes = capacity.saturating_mul(token_bytes);
            if bytes >= text.len() {
                break;
            }
            let beginning = &text[..text.floor_char_boundary(bytes)];
            let tokens = self.tokenizer.encode(beginning);
            if tokens.map_err(|error| tokenizer_error(beginning.len(), &error))?.len() > 2 * capacity {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns windows, with their rows, that are spread evenly over the bytes of a text.
    ///
    /// Each window is cut from a slice of the text, which is all of the text that is tokenised for it. A window has
    /// fewer than `prompt.max_window_tokens` only if its slice has, which takes unusually long tokens.
    pub(super) fn windows_spread<'a>(&self, text: &'a str) -> Result<Windows<'a>, PromptError> {
        let slices = window::slices(
            text,
            self.window.max_windows,
            self.window.max_tokens * USUAL_TOKEN_BYTES,
        );
        let row = |(index, slice)| {
            let slice = &text[slice];
            let tokens = self.tokenizer.token_ranges(slice);
            let tokens = tokens.map_err(|error| tokenizer_error(slice.len(), &error))?;
            let longest = |(_, row): &(&str, Row)| Some(row.tokens.len());
            self.within_limit(longest, |max_tokens| {
                let window = window::in_slice(slice, &tokens, max_tokens, index, self.window.max_windows);
                Ok((&slice[window.clone()], self.row(&slice[window])?))
            })
        };
        let windows: Result<_, _> = slices.into_iter().enumerate().map(row).collect();
        Ok((windows?, true))
    }

    /// Returns the number of tokens of the longest text that the windows cover.
    fn capacity(&self) -> usize {
        window::capacity(self.window.max_tokens, self.window.max_windows)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::print_stdout, reason = "prints a table of costs")]

    use std::sync::LazyLock;
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::super::Prompt;
    use super::super::normalize::Normalizer;
    use super::super::tokenizer::TOKENISED_BYTES;
    use super::*;
    use crate::config::{Markup, Normalize, PromptConfig};
    use crate::hash::content_hash;

    /// The tokenizers that come with this project: one with Gemma's rules, and one that removes accents.
    const TOKENIZERS: [&str; 2] = [
        "tests/fixtures/gemma3/tokenizer.json",
        "models/moderatord-mini/tokenizer.json",
    ];

    fn prompter(tokenizer: &str, max_window_tokens: usize, max_windows: usize) -> Prompter {
        let path = crate::test_files::test_file(tokenizer);
        let config = PromptConfig {
            labels: ["Positive".into(), "Negative".into()],
            hateful_label: "Negative".into(),
            instructions: "Classify the following text into one of the following classes:[{labels}]".into(),
            separator: "<separator>".into(),
            template: None,
            markup: Markup::None,
            normalize: Normalize::Nfc,
            max_window_tokens: Some(max_window_tokens),
            max_windows: Some(max_windows),
            windows: None,
        };
        Prompter::new(&path, &std::fs::read(&path).unwrap(), &config, 16_384, 8192).unwrap()
    }

    /// Returns texts of about this many bytes, each of another kind, with the names of the kinds.
    fn kinds(bytes: usize) -> Vec<(&'static str, String)> {
        let repeated = |name, part: &str| (name, part.repeat(bytes / part.len()));
        let mut state = 1_u32;
        let base64 = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"[(state >> 26) as usize])
        });
        vec![
            repeated("words", "this is a fine day and we all like it. "),
            repeated("one letter", "a"),
            repeated("one word", "remembered"),
            ("base64", base64.take(bytes).collect()),
            repeated("spaces", " "),
            repeated("newlines", "\n"),
            repeated("emoji", "👍😀"),
            repeated("joined emoji", "👨\u{200d}👩\u{200d}👧"),
            repeated("Chinese", "今天天气很好我们都喜欢"),
            repeated("letters and marks", "e\u{323}\u{307}"),
            repeated("marks", "\u{301}\u{323}"),
            repeated("Hangul letters", "\u{1112}\u{1161}\u{11ab}"),
            repeated("separators", "<separator>"),
            repeated("control tokens", "<eos>"),
            repeated("invisible", "\u{200b}"),
        ]
    }

    fn encode_whole(prompter: &Prompter, text: &str) -> Prompt {
        let (windows, truncated) = prompter.windows_whole(text).unwrap();
        prompter.prompt(windows, truncated)
    }

    fn tokenised_bytes(prompter: &Prompter, text: &str) -> (Prompt, usize) {
        TOKENISED_BYTES.set(0);
        let prompt = prompter.encode(text).unwrap();
        (prompt, TOKENISED_BYTES.get())
    }

    #[test]
    fn the_cost_of_a_text_does_not_grow_with_its_size() {
        for tokenizer in TOKENIZERS {
            let prompter = prompter(tokenizer, 512, 8);
            let capacity = prompter.capacity();
            assert_eq!(capacity, 3200);
            let frames = 8 * prompter.frame("").len();
            // Each slice is tokenised once. The window in it is tokenised once more, in its frame, and again if it has too
            // many tokens there and has to become smaller.
            let spread = 3 * 8 * 512 * USUAL_TOKEN_BYTES + 2 * frames;
            for (name, text) in kinds(900_000) {
                let (prompt, bytes) = tokenised_bytes(&prompter, &text);
                assert!(bytes <= spread, "{tokenizer}: {name}: {bytes} bytes");
                assert_eq!(prompt.rows.len(), if name == "invisible" { 1 } else { 8 }, "{name}");
                assert_eq!(prompt.truncated, name != "invisible", "{name}");
            }
            for (name, text) in kinds(400_000) {
                let (_, bytes) = tokenised_bytes(&prompter, &text);
                let is_sparse = name.contains("marks") && tokenizer.contains("mini");
                let bound = if is_sparse {
                    capacity * (2 * LONGEST_TOKEN_BYTES + PROBES.iter().sum::<usize>())
                } else {
                    capacity * PROBES[0] + spread
                };
                assert!(bytes <= bound, "{tokenizer}: {name}: {bytes} bytes");
            }
        }
    }

    #[test]
    fn a_prompt_of_the_earlier_format_is_served() {
        let prompter = prompter(TOKENIZERS[0], 512, 8);
        let earlier = prompter.canonical().replace("\"format\":2", "\"format\":1");
        let earlier = content_hash(earlier.as_bytes());
        assert_ne!(earlier, prompter.content_hash());
        assert!(prompter.serves(&earlier) && prompter.serves(prompter.content_hash()));
        assert!(!prompter.serves(self::prompter(TOKENIZERS[0], 512, 7).content_hash()));
    }

    #[test]
    fn windows_of_a_very_long_text_reach_both_ends() {
        for tokenizer in TOKENIZERS {
            let prompter = prompter(tokenizer, 64, 4);
            let padding = "this is a fine day and we all like it. ".repeat(2000);
            let changed = |text: &str| {
                let (plain, other) = (prompter.encode(&padding).unwrap(), prompter.encode(text).unwrap());
                assert!(plain.truncated && other.truncated);
                let rows = plain.rows.iter().zip(&other.rows);
                rows.map(|(plain, other)| plain.tokens != other.tokens)
                    .collect::<Vec<_>>()
            };
            let ending = format!("{}and that was all.", &padding[..padding.len() - 17]);
            assert_eq!(changed(&ending), [false, false, false, true]);
            let beginning = format!("it{}", &padding[2..]);
            assert_ne!(beginning, padding);
            assert_eq!(changed(&beginning), [true, false, false, false]);
        }
    }

    /// Each tokenizer with several small windows, so that short texts are long for them.
    static SMALL_WINDOWS: LazyLock<Vec<Prompter>> = LazyLock::new(|| {
        let settings = [(16, 1), (16, 4), (30, 2), (47, 3)];
        let all = TOKENIZERS
            .into_iter()
            .flat_map(|name| settings.map(|setting| (name, setting)));
        all.map(|(name, (tokens, windows))| prompter(name, tokens, windows))
            .collect()
    });

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

        /// Windows that cover their text are the same whether or not part of it is looked at first.
        #[test]
        fn a_text_that_the_windows_cover_is_cut_as_before(
            parts in prop::collection::vec((prop_oneof![
                any::<String>(),
                prop::sample::select(vec![
                    "this is a fine day. ", "remembered", "     ", "\n\n\n\n", "👍", "\u{301}\u{323}", "你好", "a",
                    "<separator>", "\u{200b}", "interestinginteresting",
                ]).prop_map(str::to_owned),
            ], 0usize..400), 0..6),
        ) {
            let text: String = parts.iter().map(|(part, times)| part.repeat(*times)).collect();
            let normalized = Normalizer::new(Normalize::Nfc, "<separator>").normalize(&text);
            for prompter in SMALL_WINDOWS.iter() {
                let (whole, found) = (encode_whole(prompter, &normalized), prompter.encode(&text).unwrap());
                let longest = prompter.capacity() * LONGEST_TOKEN_BYTES;
                if normalized.len() <= prompter.spread_bytes() || !whole.truncated && normalized.len() <= longest {
                    prop_assert_eq!(found, whole);
                } else {
                    prop_assert!(found.truncated);
                    prop_assert_eq!(found.rows.len(), prompter.window.max_windows);
                }
            }
        }
    }

    /// Prints what long texts cost, in multiples of what tokenising them as a whole costs.
    #[test]
    #[ignore = "measures time"]
    fn costs_of_long_texts() {
        for (tokenizer, bytes) in TOKENIZERS
            .into_iter()
            .flat_map(|name| [(name, 900_000), (name, 400_000)])
        {
            let prompter = prompter(tokenizer, 512, 8);
            let normalizer = Normalizer::new(Normalize::Nfc, "<separator>");
            println!("\n{tokenizer}, {bytes} bytes, 8 windows of 512 tokens");
            println!(
                "{:<20}{:>12}{:>12}{:>14}{:>12}",
                "text", "normalise", "encode", "whole text", "4 x 1/4"
            );
            for (name, text) in kinds(bytes) {
                let normalized = normalizer.normalize(&text);
                let quarter = &normalized[..normalized.floor_char_boundary(normalized.len() / 4)];
                let whole = fastest(|| encode_whole(&prompter, &normalized));
                let ratio = |time: Duration| time.as_secs_f64() / whole.as_secs_f64();
                println!(
                    "{name:<20}{:>12.3}{:>12.3}{:>14.3}{:>12.3}",
                    ratio(fastest(|| normalizer.normalize(&text))),
                    ratio(fastest(|| prompter.encode(&text).unwrap())),
                    ratio(whole),
                    ratio(fastest(|| encode_whole(&prompter, quarter))) * 4.0,
                );
            }
        }
    }

    fn fastest<T>(work: impl Fn() -> T) -> Duration {
        let time = |_| {
            let start = Instant::now();
            std::hint::black_box(work());
            start.elapsed()
        };
        (0..3).map(time).min().unwrap()
    }
}
