//! The checkpoint's tokenizer, set up for untrusted text.
//!
//! Neither the file nor the text can cause a panic here: the tokenizers crate panics on some malformed files, when it
//! reads them or when it uses them, and these panics become errors.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::LazyLock;

use aho_corasick::{AhoCorasick, MatchKind};
use regex::Regex;
use serde_json::Value;
use tokenizers::{Model, NormalizedString, Normalizer, PreTokenizedString, PreTokenizer, Tokenizer};
use tracing::info;

use super::bpe::Bpe;
use super::seen::Seen;
use crate::fault::Fault;

/// The control tokens of the Gemma family. They are treated as such even if the file does not mark them.
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

/// What control tokens look like: those of Gemma, and those of other models, which an operator could take from a prompt
/// that was made for another model.
static CONTROL_SPELLING: LazyLock<Regex> = LazyLock::new(|| {
    let patterns = [
        "<(?:pad|eos|bos|unk)>",
        "<(?:start|end)_of_[a-z_]+>",
        r"<\|[^<>|\s]{1,40}\|?>",
        r"<[^<>|\s]{1,40}\|>",
        r"\[/?INST\]",
    ];
    Regex::new(&patterns.join("|")).expect("the patterns are valid")
});

#[cfg(test)]
thread_local! {
    /// How many bytes this thread has tokenised.
    pub(super) static TOKENISED_BYTES: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Texts that a [`Bpe`] must encode as the `tokenizers` crate does before it is used.
const SAMPLES: [&str; 6] = [
    "",
    "a fine day",
    "Two  spaces,\n\n\nthree lines; don't!  <b>x</b>",
    "caf\u{e9} cafe\u{301} \u{fb01}ne \u{ff21}\u{ff22} \u{3a3}\u{3c2} \u{2581}\u{2581} \u{a0}\u{3000}",
    "\u{4eca}\u{5929} \u{1f44d}\u{1f3fd} \u{1f468}\u{200d}\u{1f469} \u{d55c} \u{915}\u{94d}\u{937} \u{10ffff}",
    "<eos> <bos>Positive<unused0><start_of_turn> <0x0A> [@BOS@]",
];

/// A part of a text of the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Text without the spelling of a control token.
    Text(String),
    /// The id of a control token.
    Control(u32),
}

/// A tokenizer that reads the spelling of a control token in a text as plain text.
pub struct SafeTokenizer {
    inner: Tokenizer,
    /// Gives the same ids for less work, if the tokenizer's rules are known.
    bpe: Option<Bpe>,
}

impl SafeTokenizer {
    /// Reads the content of a `tokenizer.json`. `path` is used only to name the file in errors.
    ///
    /// Truncation and padding are turned off even if the file enables them, because truncation could cut the frame.
    ///
    /// # Errors
    /// Returns an error if the file is not a tokenizer, if it tokenises at random, or if it does not begin a text with
    /// exactly one `<bos>`.
    pub fn new(path: &Path, bytes: &[u8]) -> Result<Self, Fault> {
        catch_unwind(AssertUnwindSafe(|| Self::read(path, bytes)))
            .unwrap_or_else(|_| Err(Fault::file(path, "is not a tokenizer: the parser panicked")))
    }

    fn read(path: &Path, bytes: &[u8]) -> Result<Self, Fault> {
        let fault = |text: String| Fault::file(path, text);
        let json = parse(path, bytes)?;
        reject_dropout(path, &json)?;
        let parsed = Tokenizer::from_bytes(bytes);
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
        let mut tokenizer = Self { inner, bpe: None };
        let sample = tokenizer
            .encode("a")
            .map_err(|error| fault(format!("cannot tokenise: {error}")))?;
        if sample.first() != Some(&bos) || sample.iter().filter(|&&id| id == bos).count() != 1 {
            return Err(fault(format!(
                "begins a text with ids {sample:?}, expected one `<bos>` ({bos}) first"
            )));
        }
        tokenizer.bpe = Bpe::read(&json, &tokenizer.inner);
        let differs = |text: &&str| tokenizer.encode(text).ok() != tokenizer.encode_by_crate(text).ok();
        if SAMPLES.iter().any(differs) {
            tokenizer.bpe = None;
        }
        if tokenizer.bpe.is_none() {
            info!(
                path = %path.display(),
                "the tokenizer has rules that the fast encoder does not know: texts are tokenised by the `tokenizers` \
                 library, which takes several times as long"
            );
        }
        Ok(tokenizer)
    }

    /// Returns the token ids of a text, with `<bos>` in front.
    ///
    /// # Errors
    /// Returns the tokenizer's error, which does not contain the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, tokenizers::Error> {
        let ids = match &self.bpe {
            Some(bpe) => {
                let mut ids = bpe.leading().to_vec();
                self.encode_part(bpe, text, &mut ids)?;
                ids
            }
            None => self.encode_by_crate(text)?,
        };
        if ids.is_empty() {
            return Err("the tokenizer returns no tokens".into());
        }
        Ok(ids)
    }

    /// Adds the ids of a text, without `<bos>`, as the tokenizer's own `bpe` gives them.
    ///
    /// # Errors
    /// Returns the tokenizer's error, which does not contain the text.
    pub fn encode_part(&self, bpe: &Bpe, text: &str, ids: &mut Vec<u32>) -> Result<(), tokenizers::Error> {
        #[cfg(test)]
        TOKENISED_BYTES.set(TOKENISED_BYTES.get() + text.len());
        guarded(|| bpe.encode(text, ids))
    }

    /// Returns the ids that are put in front of every text: `<bos>`.
    ///
    /// # Errors
    /// Returns the tokenizer's error.
    pub fn leading(&self) -> Result<Vec<u32>, tokenizers::Error> {
        self.encode("")
    }

    /// Adds the ids of a text that does not begin a prompt, and therefore has no `<bos>` in front.
    ///
    /// # Errors
    /// Returns the tokenizer's error, which does not contain the text.
    pub fn encode_inside(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), tokenizers::Error> {
        match &self.bpe {
            Some(bpe) => self.encode_part(bpe, text, ids),
            None => {
                #[cfg(test)]
                TOKENISED_BYTES.set(TOKENISED_BYTES.get() + text.len());
                guarded(|| {
                    ids.extend_from_slice(self.inner.encode_fast(text, false)?.get_ids());
                    Ok(())
                })
            }
        }
    }

    /// Splits a text of the operator at the control tokens that it spells. Control tokens are found as transformers
    /// finds them: together with all other added tokens, the leftmost one, and the longest of those.
    pub fn split_at_control_tokens(&self, text: &str) -> Vec<Part> {
        let added: Vec<_> = self.inner.get_added_tokens_decoder().into_iter().collect();
        let mut builder = AhoCorasick::builder();
        let contents = added.iter().map(|(_, token)| &token.content);
        let Ok(finder) = builder.match_kind(MatchKind::LeftmostLongest).build(contents) else {
            return vec![Part::Text(text.to_owned())];
        };
        let (mut parts, mut done) = (Vec::new(), 0);
        for found in finder.find_iter(text) {
            let (id, token) = &added[found.pattern().as_usize()];
            if token.special {
                parts.push(Part::Text(text[done..found.start()].to_owned()));
                parts.push(Part::Control(*id));
                done = found.end();
            }
        }
        parts.push(Part::Text(text[done..].to_owned()));
        parts
    }

    /// Returns the ids of a text, with `<bos>` in front, as the `tokenizers` crate gives them.
    fn encode_by_crate(&self, text: &str) -> Result<Vec<u32>, tokenizers::Error> {
        #[cfg(test)]
        TOKENISED_BYTES.set(TOKENISED_BYTES.get() + text.len());
        guarded(|| Ok(self.inner.encode_fast(text, true)?.get_ids().to_vec()))
    }

    /// Returns the start and end in bytes of each token of a text, without `<bos>`. They are in order and within the
    /// text.
    ///
    /// # Errors
    /// Returns the tokenizer's error, which does not contain the text.
    pub fn token_ranges(&self, text: &str) -> Result<Vec<(usize, usize)>, tokenizers::Error> {
        #[cfg(test)]
        TOKENISED_BYTES.set(TOKENISED_BYTES.get() + text.len());
        let ranges = guarded(|| Ok(self.inner.encode(text, false)?.get_offsets().to_vec()))?;
        let mut last = (0, 0);
        for &(start, end) in &ranges {
            if start < last.0 || end < last.1.max(start) || end > text.len() {
                return Err("the tokenizer returns tokens out of order".into());
            }
            last = (start, end);
        }
        Ok(ranges)
    }

    /// Returns a text as the tokenizer sees it: after its normaliser and its pre-tokeniser, which can drop characters.
    ///
    /// # Errors
    /// Returns the tokenizer's error, which does not contain the text.
    pub fn seen(&self, text: &str) -> Result<Seen, tokenizers::Error> {
        guarded(|| {
            let mut normalized = NormalizedString::from(text);
            if let Some(normalizer) = self.inner.get_normalizer() {
                normalizer.normalize(&mut normalized)?;
            }
            let mut parts = PreTokenizedString::from(normalized);
            if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut parts)?;
            }
            let mut seen = Seen::default();
            parts.split(|_, part| {
                seen.push(&part, text);
                Ok([part])
            })?;
            Ok(seen)
        })
    }

    /// Returns what gives the same ids for less work, if the tokenizer's rules are known.
    pub fn bpe(&self) -> Option<&Bpe> {
        self.bpe.as_ref()
    }

    /// Returns the spelling of a token of the model.
    pub fn spelling(&self, id: u32) -> Option<String> {
        self.inner.get_model().id_to_token(id)
    }

    /// Returns the id of the token with exactly this spelling.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Returns the spellings in a text that look like those of a control token, but are not those of a token.
    pub fn unknown_control_tokens<'a>(&self, text: &'a str) -> Vec<&'a str> {
        let found = CONTROL_SPELLING.find_iter(text).map(|found| found.as_str());
        found.filter(|spelling| self.token_id(spelling).is_none()).collect()
    }

    /// Returns a control token whose spelling the text contains, if there is one.
    pub fn control_token_in(&self, text: &str) -> Option<String> {
        let added = self.inner.get_added_tokens_decoder();
        added
            .into_values()
            .find(|token| token.special && text.contains(&token.content))
            .map(|token| token.content)
    }
}

/// Returns the ids of texts as transformers gives them: a spelled control token is that token. `file` is the content of
/// a `tokenizer.json`.
///
/// # Errors
/// Returns the tokenizer's error.
pub fn encode_as_transformers(file: &[u8], texts: &[String]) -> Result<Vec<Vec<u32>>, tokenizers::Error> {
    guarded(|| {
        let mut tokenizer = Tokenizer::from_bytes(file)?;
        tokenizer.with_truncation(None)?;
        tokenizer.with_padding(None);
        let encode = |text: &String| Ok(tokenizer.encode_fast(text.as_str(), true)?.get_ids().to_vec());
        texts.iter().map(encode).collect()
    })
}

/// Runs the tokenizer, and returns an error if it panics.
fn guarded<T>(run: impl FnOnce() -> Result<T, tokenizers::Error>) -> Result<T, tokenizers::Error> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err("the tokenizer panicked".into()))
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Value, Fault> {
    serde_json::from_slice(bytes).map_err(|error| Fault::file(path, format!("is not JSON: {error}")))
}

/// Returns a fault if the tokenizer uses BPE dropout, with which the same text gets different tokens each time.
fn reject_dropout(path: &Path, json: &Value) -> Result<(), Fault> {
    match json.pointer("/model/dropout") {
        None | Some(Value::Null) => Ok(()),
        Some(value) if value.as_f64() == Some(0.0) => Ok(()),
        Some(value) => Err(Fault::file(
            path,
            format!("`model.dropout` is {value}, expected none, because scores would be random"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Reads the reference tokenizer after a change.
    fn changed(change: impl FnOnce(&mut Value)) -> Result<SafeTokenizer, Fault> {
        let path = crate::test_files::test_file("tests/fixtures/gemma3/tokenizer.json");
        let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        SafeTokenizer::new(&path, json.to_string().as_bytes())
    }

    #[test]
    fn ranges_that_are_not_in_order_are_rejected() {
        let ranges =
            |tokenizer: &SafeTokenizer| tokenizer.token_ranges("a fine day").map_err(|error| error.to_string());
        assert!(!ranges(&changed(|_| {}).unwrap()).unwrap().is_empty());
        // The text is repeated, so that the range of a later token comes before that of an earlier one.
        let repeating = changed(|json| {
            let single = json["post_processor"]["single"].as_array_mut().unwrap();
            single.push(json!({"Sequence": {"id": "A", "type_id": 0}}));
        });
        assert_eq!(
            ranges(&repeating.unwrap()),
            Err("the tokenizer returns tokens out of order".to_owned())
        );
    }

    #[test]
    fn a_panic_of_the_library_becomes_an_error() {
        let fault = changed(|json| json["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0})).err();
        assert!(
            fault
                .unwrap()
                .to_string()
                .ends_with("cannot tokenise: the tokenizer panicked")
        );
    }
}
