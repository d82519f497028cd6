//! Byte-pair encoding by the rules of Gemma's tokenizers, without what the `tokenizers` crate adds to it.
//!
//! That crate keeps track of where each byte of the normalised text came from, and copies the spelling of each token.
//! Rows need only ids. [`Bpe`] gives the same ids for much less work, for tokenizers that keep to these rules:
//!
//! 1. Added tokens are found in the text as it is: the leftmost one, and the longest of those. A special one stays text.
//! 2. Each piece of text between them is normalised character by character, apart from decompositions ([`characters`]).
//! 3. A piece may be split after each occurrence of one character.
//! 4. Each character becomes its token, or the tokens of its bytes, and neighbours are merged ([`merges`]).
//! 5. The same special tokens are put in front of every text.
//!
//! [`Bpe::read`] asks the crate's own tokenizer which rules it follows, and returns `None` for every other rule. Such a
//! tokenizer is left to the crate. Properties in `tests` compare the ids with those of the crate.

mod characters;
mod merges;
#[cfg(test)]
pub(super) mod tests;

use std::collections::HashSet;

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;
use tokenizers::Tokenizer;
use tokenizers::models::ModelWrapper;

use characters::Characters;
use merges::Merges;

/// A tokenizer that follows the rules above.
pub(super) struct Bpe {
    added: Added,
    characters: Characters,
    /// The character after which a piece is split.
    split_after: Option<char>,
    merges: Merges,
    /// The ids in front of every text.
    leading: Vec<u32>,
}

/// The added tokens.
struct Added {
    finder: AhoCorasick,
    contents: Vec<String>,
    /// The id of each added token. `None` if it is special, which makes its spelling plain text.
    ids: Vec<Option<u32>>,
}

impl Bpe {
    /// Reads the rules of a tokenizer. `json` is its file, which is needed for the merges.
    ///
    /// Returns `None` if one of the rules is not known here.
    pub(super) fn read(json: &Value, tokenizer: &Tokenizer) -> Option<Self> {
        let ModelWrapper::BPE(model) = tokenizer.get_model() else {
            return None;
        };
        let is_absent = |affix: &Option<String>| affix.as_ref().is_none_or(String::is_empty);
        let is_plain = model.byte_fallback
            && !model.ignore_merges
            && model.dropout.is_none_or(|dropout| dropout == 0.0)
            && is_absent(&model.continuing_subword_prefix)
            && is_absent(&model.end_of_word_suffix);
        if !is_plain {
            return None;
        }
        Some(Self {
            added: Added::read(tokenizer)?,
            characters: Characters::read(tokenizer.get_normalizer())?,
            split_after: split_after(&serde_json::to_value(tokenizer.get_pre_tokenizer()).ok()?)?,
            merges: Merges::read(json.pointer("/model/merges")?, &model.get_vocab())?,
            leading: leading(&serde_json::to_value(tokenizer.get_post_processor()).ok()?)?,
        })
    }

    /// Returns the ids in front of every text.
    pub(super) fn leading(&self) -> &[u32] {
        &self.leading
    }

    /// Adds the ids of a text, without those in front.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), tokenizers::Error> {
        let mut done = 0;
        for found in self.added.finder.find_iter(text) {
            if let Some(id) = self.added.ids[found.pattern().as_usize()] {
                self.encode_piece(&text[done..found.start()], ids)?;
                ids.push(id);
                done = found.end();
            }
        }
        self.encode_piece(&text[done..], ids)
    }

    fn encode_piece(&self, piece: &str, ids: &mut Vec<u32>) -> Result<(), tokenizers::Error> {
        let piece = self.characters.normalize(piece)?;
        match self.split_after {
            Some(char) => piece
                .split_inclusive(char)
                .for_each(|part| self.merges.encode(part, ids)),
            None => self.merges.encode(&piece, ids),
        }
        Ok(())
    }

    /// Returns the spelling of every added token.
    pub(super) fn added(&self) -> &[String] {
        &self.added.contents
    }

    /// Returns what the normaliser turns a text into.
    ///
    /// # Errors
    /// Returns the normaliser's error, which does not contain the text.
    pub(super) fn normalize(&self, text: &str) -> Result<String, tokenizers::Error> {
        self.characters.normalize(text)
    }

    /// Returns whether the normaliser changes nothing in a text but its spaces.
    pub(super) fn keeps_text(&self) -> bool {
        self.characters.keeps_other() && self.characters.keeps_ascii(|from, to| from == to)
    }

    /// Returns whether the normaliser changes nothing in an ASCII text but its spaces and the case of letters.
    pub(super) fn keeps_ascii_but_for_case(&self) -> bool {
        self.characters.keeps_ascii(str::eq_ignore_ascii_case)
    }

    /// Returns what the normaliser turns a text of ASCII characters into.
    pub(super) fn normalize_ascii(&self, text: &str) -> String {
        self.characters.normalize_ascii(text)
    }

    /// Returns whether each character that an ASCII character is normalised to has a token of its own.
    pub(super) fn has_tokens(&self, char: char) -> bool {
        let normalized = self.normalize_ascii(char.encode_utf8(&mut [0; 4]));
        normalized.chars().all(|char| self.merges.has_token(char))
    }

    /// Returns the ids of every two tokens that merge.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (u32, u32)> {
        self.merges.pairs()
    }
}

impl Added {
    fn read(tokenizer: &Tokenizer) -> Option<Self> {
        let vocabulary = tokenizer.get_added_vocabulary();
        let tokens = vocabulary.get_added_tokens_decoder();
        let is_plain = tokens
            .values()
            .all(|token| !token.normalized && !token.lstrip && !token.rstrip && !token.single_word);
        let distinct: HashSet<_> = tokens.values().map(|token| &token.content).collect();
        if !is_plain || distinct.len() != tokens.len() {
            return None;
        }
        let contents: Vec<String> = tokens.values().map(|token| token.content.clone()).collect();
        let ids = tokens
            .iter()
            .map(|(&id, token)| (!vocabulary.is_special_token(&token.content)).then_some(id))
            .collect();
        let mut builder = AhoCorasick::builder();
        let finder = builder.match_kind(MatchKind::LeftmostLongest).build(&contents).ok()?;
        Some(Self { finder, contents, ids })
    }
}

/// Returns the character after which the pre-tokeniser splits, if it does nothing else.
fn split_after(json: &Value) -> Option<Option<char>> {
    if json.is_null() {
        return Some(None);
    }
    let is_known = json["type"] == "Split" && json["behavior"] == "MergedWithPrevious" && json["invert"] == false;
    let mut chars = json.pointer("/pattern/String")?.as_str()?.chars();
    match (is_known, chars.next(), chars.next()) {
        (true, Some(char), None) => Some(Some(char)),
        _ => None,
    }
}

/// Returns the ids that the post-processor puts in front of a text, if it does nothing else.
fn leading(json: &Value) -> Option<Vec<u32>> {
    if json["type"] != "TemplateProcessing" {
        return None;
    }
    let (text, special) = json["single"].as_array()?.split_last()?;
    if text.pointer("/Sequence/id")? != "A" {
        return None;
    }
    let mut ids = Vec::new();
    for token in special {
        let name = token.pointer("/SpecialToken/id")?.as_str()?;
        let of_token: Vec<u32> = serde_json::from_value(json["special_tokens"].get(name)?.get("ids")?.clone()).ok()?;
        ids.extend(of_token);
    }
    Some(ids)
}
