//! `tokenizer.json`: whatever is accepted turns texts into rows, or returns an error, without a panic.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use moderatord::config::PromptConfig;
use moderatord::prompt::Prompter;
use moderatord_fuzz::{check_faults, check_rows, prompt_config, with_caught_panics};

const VOCAB_SIZE: usize = 64;
const MAX_WINDOWS: usize = 4;
const TEXTS: [&str; 8] = [
    "",
    "a",
    " ",
    "ab ba\u{301} <eos>",
    "<bos><pad>",
    "\u{1f331}\u{fe0f} \u{2581}\u{e9}\u{200d}",
    "\u{fdfa}\u{1e9e}\u{130}\u{3a3}",
    "aB1.\n\u{4f60}\u{597d} b-a\t",
];

fuzz_target!(|data: &[u8]| with_caught_panics(|| check(data)));

fn check(tokenizer: &[u8]) {
    let config = PromptConfig {
        labels: ["P".into(), "N".into()],
        hateful_label: "N".into(),
        instructions: "{labels}".into(),
        separator: "##".into(),
        template: None,
        ..prompt_config(16, MAX_WINDOWS)
    };
    let prompter = match Prompter::new(Path::new("tokenizer.json"), tokenizer, &config, VOCAB_SIZE, 4096) {
        Ok(prompter) => prompter,
        Err(faults) => return check_faults(&faults, tokenizer),
    };
    let long = "ab a \u{e9}".repeat(40);
    for text in TEXTS.into_iter().chain([long.as_str()]) {
        // An error becomes a dead letter.
        if let Ok(prompt) = prompter.encode(text) {
            check_rows(&prompt, prompter.prefix(), MAX_WINDOWS, VOCAB_SIZE);
        }
    }
}
