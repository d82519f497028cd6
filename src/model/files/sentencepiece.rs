//! Converts a `tokenizer.model` of SentencePiece to the content of a `tokenizer.json`, as transformers' `GemmaConverter`
//! does. Checkpoints from KerasHub and from Google's own tools have only the former.
//!
//! The file is a `ModelProto` (`sentencepiece_model.proto`), of which few fields matter here, so the wire format of
//! Protocol Buffers is read directly.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::fault::Fault;

/// The types of pieces (`ModelProto.SentencePiece.Type`).
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// `TrainerSpec.ModelType` of a tokenizer that merges pairs.
const BPE: u64 = 2;

/// User-defined pieces that mark turns, which the converter makes control tokens.
const TURNS: [&str; 2] = ["<start_of_turn>", "<end_of_turn>"];

/// The longest piece, in characters, that is split into merges. The number of splits grows with its square.
const LONGEST_PIECE: usize = 256;

/// One entry of the vocabulary. Its id is its index.
#[derive(Debug, Default)]
struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

/// Returns the content of the `tokenizer.json` with the same tokens and merges.
///
/// # Errors
/// Returns a fault if the file is not a complete model, or not of the kind that Gemma has.
pub(super) fn to_tokenizer_json(path: &Path, bytes: &[u8]) -> Result<Vec<u8>, Fault> {
    let fault = |text: String| Fault::file(path, format!("is not a SentencePiece model of Gemma: {text}"));
    let pieces = read_model(bytes).map_err(fault)?;
    Ok(tokenizer_json(&pieces).map_err(fault)?.to_string().into_bytes())
}

fn read_model(bytes: &[u8]) -> Result<Vec<Piece>, String> {
    let (mut pieces, mut model_type) = (Vec::new(), None);
    // The defaults of the format, which are not those of Gemma.
    let (mut adds_prefix, mut removes_spaces, mut maps_characters) = (1, 1, false);
    for field in Fields(bytes) {
        match field? {
            (1, Wire::Bytes(piece)) => pieces.push(read_piece(piece)?),
            (2, Wire::Bytes(trainer)) => {
                for field in Fields(trainer) {
                    if let (3, Wire::Number(value)) = field? {
                        model_type = Some(value);
                    }
                }
            }
            (3, Wire::Bytes(normalizer)) => {
                for field in Fields(normalizer) {
                    match field? {
                        (2, Wire::Bytes(map)) => maps_characters = !map.is_empty(),
                        (3, Wire::Number(value)) => adds_prefix = value,
                        (4, Wire::Number(value)) => removes_spaces = value,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if model_type != Some(BPE) {
        let found = model_type.map_or_else(|| "missing".to_owned(), |value| value.to_string());
        return Err(format!("`model_type` is {found}, expected {BPE} (BPE)"));
    }
    if (adds_prefix, removes_spaces, maps_characters) != (0, 0, false) {
        return Err("it changes texts before it splits them, expected no normalisation".to_owned());
    }
    Ok(pieces)
}

fn read_piece(bytes: &[u8]) -> Result<Piece, String> {
    let mut piece = Piece {
        kind: 1,
        ..Piece::default()
    };
    for field in Fields(bytes) {
        match field? {
            (1, Wire::Bytes(text)) => {
                piece.text = String::from_utf8(text.to_vec()).map_err(|_| "a piece is not UTF-8".to_owned())?;
            }
            (2, Wire::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (3, Wire::Number(kind)) => piece.kind = kind,
            _ => {}
        }
    }
    Ok(piece)
}

fn tokenizer_json(pieces: &[Piece]) -> Result<Value, String> {
    let mut vocab: HashMap<&str, usize> = HashMap::with_capacity(pieces.len());
    for (id, piece) in pieces.iter().enumerate() {
        if vocab.insert(&piece.text, id).is_some() {
            return Err(format!("it has the piece {:?} twice", piece.text));
        }
    }
    // Gemma's vocabularies have no tab, but a byte that stands for one.
    if !vocab.contains_key("\t")
        && let Some(id) = vocab.remove("<0x09>")
    {
        vocab.insert("\t", id);
    }
    let id = |token: &str| {
        vocab
            .get(token)
            .copied()
            .ok_or_else(|| format!("it has no piece `{token}`"))
    };
    let (bos, _unk) = (id("<bos>")?, id("<unk>")?);
    let merges: Vec<[&str; 2]> = merges(pieces, &vocab).collect();
    let added = pieces
        .iter()
        .enumerate()
        .filter(|(_, piece)| (UNKNOWN..=USER_DEFINED).contains(&piece.kind));
    let added: Vec<Value> = added
        .map(|(id, piece)| {
            let special = matches!(piece.kind, CONTROL | UNKNOWN) || TURNS.contains(&piece.text.as_str());
            json!({
                "id": id, "content": piece.text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            })
        })
        .collect();
    let begin = |type_id: u8| json!({"SpecialToken": {"id": "<bos>", "type_id": type_id}});
    let sequence = |id: &str, type_id: u8| json!({"Sequence": {"id": id, "type_id": type_id}});
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin(0), sequence("A", 0)],
            "pair": [begin(0), sequence("A", 0), begin(1), sequence("B", 1)],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [bos], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": "<unk>",
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges,
        },
    }))
}

/// Returns every pair of pieces that is a piece, in the order in which they merge: by the score of the whole, and then
/// the longer first part first (transformers' `generate_merges`).
fn merges<'a>(pieces: &'a [Piece], vocab: &HashMap<&str, usize>) -> impl Iterator<Item = [&'a str; 2]> {
    let mut merges: Vec<(f32, [&str; 2])> = Vec::with_capacity(2 * pieces.len());
    for piece in pieces {
        let splits = piece.text.char_indices().skip(1).take(LONGEST_PIECE);
        let mut pairs: Vec<([usize; 2], [&str; 2])> = splits
            .filter_map(|(at, _)| {
                let (left, right) = piece.text.split_at(at);
                Some(([*vocab.get(left)?, *vocab.get(right)?], [left, right]))
            })
            .collect();
        pairs.sort_unstable_by_key(|(ids, _)| *ids);
        merges.extend(pairs.into_iter().map(|(_, pair)| (piece.score, pair)));
    }
    let length = |text: &str| text.chars().count();
    merges.sort_by(|(left_score, left), (right_score, right)| {
        let lengths = |pair: &[&str; 2]| Reverse(pair.map(length));
        right_score
            .total_cmp(left_score)
            .then_with(|| lengths(left).cmp(&lengths(right)))
    });
    merges.into_iter().map(|(_, pair)| pair)
}

/// The value of a field in the wire format.
enum Wire<'a> {
    Number(u64),
    Fixed32(u32),
    Bytes(&'a [u8]),
    Fixed64,
}

/// Iterates over the fields of a message, each with its number. Ends after an error.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn number(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(length).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Wire<'a>)> {
        let key = self.number()?;
        let value = match key & 7 {
            0 => Wire::Number(self.number()?),
            1 => {
                self.take(8)?;
                Wire::Fixed64
            }
            2 => {
                let length = self.number()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Wire::Fixed32(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            _ => return None,
        };
        Some((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Wire<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        match self.field() {
            Some(field) => Some(Ok(field)),
            None => {
                self.0 = &[];
                Some(Err("it is cut off or damaged".to_owned()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> Vec<u8> {
        std::fs::read(crate::test_files::test_file("tests/fixtures/gemma3").join(name)).unwrap()
    }

    /// transformers made the one from the other.
    #[test]
    fn a_converted_tokenizer_equals_that_of_transformers() {
        let converted = to_tokenizer_json(Path::new("tokenizer.model"), &fixture("tokenizer.model")).unwrap();
        let converted: Value = serde_json::from_slice(&converted).unwrap();
        let expected: Value = serde_json::from_slice(&fixture("tokenizer.json")).unwrap();
        for (key, expected) in expected.as_object().unwrap() {
            assert!(converted[key] == *expected, "{key}");
        }
    }

    #[test]
    fn damaged_and_other_models_are_refused() {
        let convert = |bytes: &[u8]| to_tokenizer_json(Path::new("tokenizer.model"), bytes);
        let bytes = fixture("tokenizer.model");
        // Whatever is cut off is an error or leaves out something that is required.
        for length in (0..bytes.len()).step_by(101) {
            assert!(convert(&bytes[..length]).is_err(), "{length}");
        }
        for at in (0..bytes.len()).step_by(53) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x3c;
            let _ = convert(&damaged);
        }
        let fault = convert(b"\x12\x02\x18\x01").unwrap_err().to_string();
        assert!(fault.contains("`model_type` is 1, expected 2 (BPE)"), "{fault}");
    }
}
