//! The checkpoint's tokenizer, made safe for text that strangers wrote.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::fault::Fault;

/// Control tokens of the Gemma family, whatever the file says of them.
const CONTROL: [&str; 8] = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
];

/// A tokenizer under which no text can become a control token.
pub struct SafeTokenizer {
    inner: Tokenizer,
    bos: u32,
}

impl SafeTokenizer {
    /// Reads a `tokenizer.json`; `path` is only named in errors.
    ///
    /// Truncation and padding that the file asks for are turned off: nothing may cut the frame.
    ///
    /// # Errors
    /// The file is no tokenizer, tokenises at random, or does not begin every text with `<bos>`.
    pub fn new(path: &Path, bytes: &[u8]) -> Result<Self, Fault> {
        let fault = |text: String| Fault::file(path, text);
        refuse_random(path, bytes)?;
        // The parser asserts some of what it expects of a file.
        let parsed = catch_unwind(AssertUnwindSafe(|| Tokenizer::from_bytes(bytes)))
            .map_err(|_| fault("is not a tokenizer: the parser gave up".into()))?;
        let mut inner = parsed.map_err(|error| fault(format!("is not a tokenizer: {error}")))?;
        inner
            .with_truncation(None)
            .map_err(|error| fault(format!("cannot turn truncation off: {error}")))?;
        inner.with_padding(None);
        let known = CONTROL.iter().filter(|name| inner.token_to_id(name).is_some());
        let control: Vec<_> = known
            .map(|name| tokenizers::AddedToken::from(*name, true).normalized(false))
            .collect();
        inner
            .add_special_tokens(control)
            .map_err(|error| fault(format!("cannot mark control tokens: {error}")))?;
        inner.set_encode_special_tokens(true);
        let bos = inner
            .token_to_id("<bos>")
            .ok_or_else(|| fault("has no `<bos>` token".into()))?;
        let tokenizer = Self { inner, bos };
        let sample = tokenizer
            .encode("a")
            .map_err(|error| fault(format!("cannot tokenise: {error}")))?;
        if sample.first() != Some(&bos) || sample.iter().filter(|&&id| id == bos).count() != 1 {
            return Err(fault(format!(
                "begins a text with ids {sample:?}, expected one `<bos>` ({bos}) first"
            )));
        }
        Ok(tokenizer)
    }

    /// Token ids of a text, `<bos>` first; special-token spellings in it are plain text.
    ///
    /// # Errors
    /// What the tokenizer says; never the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, tokenizers::Error> {
        Ok(self.inner.encode_fast(text, true)?.get_ids().to_vec())
    }

    /// The byte range that each token of a text covers, without `<bos>`.
    ///
    /// # Errors
    /// What the tokenizer says; never the text.
    pub fn token_ranges(&self, text: &str) -> Result<Vec<(usize, usize)>, tokenizers::Error> {
        Ok(self.inner.encode(text, false)?.get_offsets().to_vec())
    }

    /// The id of a token's exact spelling.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The id of `<bos>`.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// The control token that a text spells, if any.
    pub fn control_token_in(&self, text: &str) -> Option<String> {
        let added = self.inner.get_added_tokens_decoder();
        added
            .into_values()
            .find(|token| token.special && text.contains(&token.content))
            .map(|token| token.content)
    }
}

/// A BPE with dropout gives another answer each time.
fn refuse_random(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    let json: Value = serde_json::from_slice(bytes).map_err(|error| Fault::file(path, format!("not JSON: {error}")))?;
    match json.pointer("/model/dropout") {
        None | Some(Value::Null) => Ok(()),
        Some(value) if value.as_f64() == Some(0.0) => Ok(()),
        Some(value) => Err(Fault::file(
            path,
            format!("`model.dropout` is {value}, expected none: scores would be random"),
        )),
    }
}
