//! Compares the ids with those of the `tokenizers` crate.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// A tokenizer with the crate's implementation of it.
struct Subject {
    bpe: Bpe,
    oracle: Tokenizer,
    /// The spellings of all tokens, with spaces.
    tokens: Vec<String>,
}

impl Subject {
    /// Reads a tokenizer of this project after a change.
    fn changed(name: &str, change: impl FnOnce(&mut Value)) -> Option<Self> {
        let path = crate::test_files::test_file(name);
        let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        change(&mut json);
        let mut oracle = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
        oracle.set_encode_special_tokens(true);
        let vocabulary = json["model"]["vocab"].as_object().unwrap();
        Some(Self {
            bpe: Bpe::read(&json, &oracle)?,
            tokens: vocabulary.keys().map(|token| token.replace('\u{2581}', " ")).collect(),
            oracle,
        })
    }

    fn check(&self, text: &str) {
        let mut found = self.bpe.leading().to_vec();
        self.bpe.encode(text, &mut found).unwrap();
        let expected = self.oracle.encode_fast(text, true).unwrap();
        assert_eq!(found, expected.get_ids(), "{text:?}");
    }
}

const GEMMA: &str = "tests/fixtures/gemma3/tokenizer.json";
const BUNDLED: &str = "models/moderatord-mini/tokenizer.json";

/// The tokenizers that come with this project, and variants of them that meet every rule.
static SUBJECTS: LazyLock<Vec<Subject>> = LazyLock::new(|| {
    let subjects = [
        Subject::changed(GEMMA, |_| {}),
        Subject::changed(BUNDLED, |_| {}),
        // Splits the text into pieces, of which only some merge as before.
        Subject::changed(GEMMA, |json| json["pre_tokenizer"]["pattern"]["String"] = json!("e")),
        Subject::changed(GEMMA, |json| {
            json["pre_tokenizer"] = json!(null);
            json["normalizer"] = json!({"type": "Sequence", "normalizers": [
                {"type": "NFD"}, {"type": "Lowercase"}, {"type": "NFKD"},
                {"type": "Replace", "pattern": {"String": "a"}, "content": "\u{301}ing"},
                {"type": "Replace", "pattern": {"String": "\u{301}"}, "content": ""},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
            ]});
        }),
        Subject::changed(BUNDLED, |json| {
            // No normaliser at all, and the same token from several pairs.
            json["normalizer"] = json!(null);
            json["pre_tokenizer"] = json!(null);
            let merges = json["model"]["merges"].as_array_mut().unwrap();
            *merges = merges
                .iter()
                .rev()
                .map(|pair| match pair {
                    Value::Array(pair) => json!(format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap())),
                    line => line.clone(),
                })
                .collect();
        }),
        // Added tokens that contain one another and special ones.
        Subject::changed(GEMMA, |json| {
            let added = json["added_tokens"].as_array_mut().unwrap();
            for (id, content, special) in [
                (2000, "<eos", false),
                (2001, "os>x", false),
                (2002, "a<eos><b", true),
                (2003, "ab", false),
                (2004, "abc", true),
                (2005, "bcd", false),
                (2006, "\u{301}", false),
            ] {
                added.push(
                    json!({"id": id, "content": content, "special": special, "normalized": false,
                    "lstrip": false, "rstrip": false, "single_word": false}),
                );
            }
        }),
    ];
    subjects.map(Option::unwrap).into()
});

/// Returns texts that are difficult for the rules, made of these tokens and of much else.
pub(in crate::prompt) fn difficult_text(tokens: &'static [String]) -> impl Strategy<Value = String> {
    let parts = prop::sample::select(vec![
        " ",
        "  ",
        "     ",
        "\n",
        "\n\n\n",
        "\t",
        "\r\n",
        "\u{a0}",
        "\u{3000}",
        "\u{2581}",
        "\u{2581}\u{2581}\u{2581}",
        "<eos>",
        "<bos>",
        "<unk>",
        "<pad>",
        "<start_of_turn>",
        "<unused0>",
        "[@BOS@]",
        "<mask>",
        "<0xE2>",
        "<0x0A>",
        "<",
        ">",
        "Positive",
        "Negative",
        "positive",
        "abcd",
        "a<eos><bos>x",
        "<eos>x",
        "<separator>",
        "Text:",
        "Prediction:",
        "\u{301}",
        "\u{323}\u{307}",
        "\u{338}",
        "e\u{301}\u{323}",
        "\u{e9}",
        "\u{1ead}",
        "\u{fb01}",
        "\u{ff21}\u{ff42}",
        "\u{b2}",
        "\u{bd}",
        "\u{2026}",
        "\u{3a3}",
        "\u{39f}\u{394}\u{39f}\u{3a3}",
        "\u{130}",
        "\u{1e9e}",
        "\u{212b}",
        "\u{1f44d}\u{1f3fd}",
        "\u{1f468}\u{200d}\u{1f469}\u{200d}\u{1f467}",
        "\u{2764}\u{fe0f}",
        "\u{1f1ea}\u{1f1fa}",
        "\u{4f60}\u{597d}",
        "\u{d55c}\u{ad6d}",
        "\u{1112}\u{1161}\u{11ab}",
        "\u{915}\u{94d}\u{937}",
        "\u{e44}\u{e33}",
        "\u{5d0}\u{5b0}",
        "\u{644}\u{627}",
        "\u{fdfa}",
        "\u{378}",
        "\u{897}",
        "\u{10ffff}",
        "\u{fffd}",
        "\u{0}",
        "\u{200b}",
    ]);
    let part = prop_oneof![
        3 => prop::sample::select(tokens).prop_map(|token| token.clone()),
        2 => parts.prop_map(str::to_owned),
        1 => any::<char>().prop_map(String::from),
        1 => prop::char::range('\u{300}', '\u{36f}').prop_map(String::from),
        1 => prop::char::range('\u{20}', '\u{24f}').prop_map(String::from),
        1 => (any::<char>(), 0usize..40).prop_map(|(char, times)| String::from(char).repeat(times)),
        1 => any::<String>(),
    ];
    prop::collection::vec(part, 0..16).prop_map(|parts| parts.concat())
}

#[test]
fn every_character_has_the_ids_that_the_crate_gives() {
    let chars: Vec<char> = ('\u{0}'..=char::MAX).collect();
    for subject in &SUBJECTS[..2] {
        for chars in chars.chunks(64) {
            subject.check(&chars.iter().map(|char| format!("e{char}\u{301}")).collect::<String>());
        }
    }
}

#[test]
fn long_runs_have_the_ids_that_the_crate_gives() {
    for subject in SUBJECTS.iter() {
        for part in [
            "a",
            " ",
            "\n",
            "e\u{301}",
            "\u{1f44d}",
            "\u{2581}",
            "remembered",
            "<eos>",
            "ab",
            "\u{301}\u{323}",
        ] {
            subject.check(&part.repeat(3000));
        }
    }
}

#[test]
fn other_rules_are_left_to_the_crate() {
    let is_read = |name: &str, change: fn(&mut Value)| Subject::changed(name, change).is_some();
    assert!(is_read(GEMMA, |_| {}));
    let others: [fn(&mut Value); 16] = [
        |json| json["model"]["byte_fallback"] = json!(false),
        |json| json["model"]["ignore_merges"] = json!(true),
        |json| json["model"]["end_of_word_suffix"] = json!("</w>"),
        |json| json["model"]["vocab"]["<0x41>"] = json!(5000),
        |json| drop(json["model"]["vocab"].as_object_mut().unwrap().remove("<0xF0>")),
        |json| json["model"]["vocab"]["another token"] = json!(700),
        |json| json["normalizer"] = json!({"type": "NFC"}),
        |json| json["normalizer"] = json!({"type": "Prepend", "prepend": "\u{2581}"}),
        |json| json["normalizer"]["pattern"] = json!({"Regex": " "}),
        |json| json["normalizer"]["pattern"]["String"] = json!("  "),
        |json| {
            let replace = json["normalizer"].clone();
            json["normalizer"] = json!({"type": "Sequence", "normalizers": [replace, {"type": "NFD"}]});
        },
        |json| json["pre_tokenizer"]["behavior"] = json!("Isolated"),
        |json| json["pre_tokenizer"] = json!({"type": "Whitespace"}),
        |json| json["post_processor"] = json!(null),
        |json| json["added_tokens"][4]["normalized"] = json!(true),
        |json| json["added_tokens"][4]["lstrip"] = json!(true),
    ];
    for (index, change) in others.into_iter().enumerate() {
        // The first change of the vocabulary leaves it valid; it only shows that the ids of bytes are free to choose.
        assert_eq!(is_read(GEMMA, change), index == 3, "change {index}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ids_equal_those_of_the_crate(text in difficult_text(&SUBJECTS[0].tokens), other in difficult_text(&SUBJECTS[1].tokens)) {
        for subject in SUBJECTS.iter() {
            subject.check(&text);
            subject.check(&other);
        }
    }
}
