//! Compares the ids of a frame that is cut with those of the whole prompt, as the `tokenizers` crate gives them.

use std::collections::HashSet;
use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::super::bpe::tests::difficult_text;
use super::*;

const GEMMA: &str = "tests/fixtures/gemma3/tokenizer.json";
const BUNDLED: &str = "models/moderatord-mini/tokenizer.json";

/// A tokenizer of this project with frames, and with the crate's implementation of it.
struct Subject {
    tokenizer: SafeTokenizer,
    oracle: Tokenizer,
    /// The spellings of all tokens, with spaces.
    tokens: Vec<String>,
    frames: Vec<Frame>,
    /// Frames with control tokens.
    templates: Vec<Frame>,
    /// As transformers uses the tokenizer: it recognises control tokens.
    transformers: Tokenizer,
    control: HashSet<u32>,
}

impl Subject {
    fn new(name: &str, change: impl FnOnce(&mut Value)) -> Self {
        let path = crate::test_files::test_file(name);
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        let bytes = json.to_string().into_bytes();
        let tokenizer = SafeTokenizer::new(&path, &bytes).unwrap();
        let mut oracle = Tokenizer::from_bytes(&bytes).unwrap();
        oracle.set_encode_special_tokens(true);
        let frame = |(head, tail): (&str, &str)| Frame::new(head.to_owned(), tail.to_owned(), &tokenizer);
        let template =
            |(head, tail): (&str, &str)| Frame::with_control_tokens(head, tail.to_owned(), &tokenizer).unwrap();
        let mut transformers = oracle.clone();
        transformers.set_encode_special_tokens(false);
        let control = transformers.get_added_tokens_decoder().into_iter();
        let control = control.filter(|(_, token)| token.special).map(|(id, _)| id).collect();
        let vocabulary = json["model"]["vocab"].as_object().unwrap().keys();
        let added = json["added_tokens"].as_array().unwrap().iter();
        let added = added.map(|token| token["content"].as_str().unwrap().to_owned());
        Self {
            frames: FRAMES.into_iter().map(frame).collect(),
            templates: TEMPLATES.into_iter().map(template).collect(),
            transformers,
            control,
            tokens: vocabulary
                .map(|token| token.replace('\u{2581}', " "))
                .chain(added)
                .collect(),
            tokenizer,
            oracle,
        }
    }

    fn check(&self, text: &str) {
        self.frames.iter().for_each(|frame| self.check_in(frame, text));
    }

    fn check_in(&self, frame: &Frame, text: &str) {
        let found = frame.encode(&self.tokenizer, text).unwrap();
        let expected = self.oracle.encode_fast(frame.around(text), true).unwrap();
        let name = (frame.head(), frame.tail());
        assert_eq!(found, expected.get_ids(), "{text:?} in {name:?}");
    }

    /// Checks that a text has no control tokens in a template, and that the ids are those of transformers unless the text
    /// spells control tokens.
    fn check_in_templates(&self, text: &str) {
        let control =
            |ids: &[u32]| -> Vec<u32> { ids.iter().copied().filter(|id| self.control.contains(id)).collect() };
        for frame in &self.templates {
            let found = frame.encode(&self.tokenizer, text).unwrap();
            let name = (frame.head(), frame.tail());
            let of_frame = control(&frame.encode(&self.tokenizer, "").unwrap());
            assert_eq!(control(&found), of_frame, "{text:?} in {name:?}");
            let as_transformers = self.transformers.encode_fast(frame.around(text), true).unwrap();
            if control(as_transformers.get_ids()) == of_frame {
                assert_eq!(found, as_transformers.get_ids(), "{text:?} in {name:?}");
            }
            // The piece around the text is that of a frame without control tokens.
            let piece = [&frame.piece.head, text, &frame.piece.tail].concat();
            let piece = self.oracle.encode_fast(piece, frame.before.is_none()).unwrap();
            let before = frame.before.as_deref().unwrap_or_default();
            assert_eq!(
                found,
                [before, piece.get_ids(), &frame.after].concat(),
                "{text:?} in {name:?}"
            );
        }
    }

    /// Returns the parts of the frame that are tokenised for every text.
    fn edges<'a>(&self, frame: &'a Frame) -> Option<(&'a str, &'a str)> {
        let cuts = frame.cuts.as_ref()?;
        Some((&frame.piece.head[cuts.head..], &frame.piece.tail[..cuts.tail]))
    }
}

const DEFAULT: (&str, &str) = (
    "Classify the following text into one of the following classes:[Positive,Negative]<separator>Text:",
    "<separator>Prediction:",
);

/// Frames in which tokens cross the edges in various ways.
const FRAMES: [(&str, &str); 9] = [
    DEFAULT,
    ("Classify:[Positive,Negative]\n#a# a\nText:", "\n#a# a\nPrediction:"),
    ("Is this fine? aa aText:", "aa aPrediction:"),
    // These begin and end with what a normaliser joins with marks, or with spaces that form tokens of several.
    ("Classez ce texte. C\u{e9}r\u{e9}monie\u{301} ", "    Prediction:"),
    ("\u{301}\u{301} e", "e\u{323}\u{301} the answer is:"),
    ("a", "b"),
    ("Text \u{1f44d}\u{200d}", "\u{301}<separator>"),
    ("", ""),
    ("Positive\u{301}\n\n\n", "\n\n\nPositive\u{301}:"),
];

/// Frames with control tokens on both sides, on one side, next to the text, next to each other, and at the ends. All
/// tokenizers of this project have these control tokens.
const TEMPLATES: [(&str, &str); 8] = [
    ("<pad>user\nIs this fine?\n", "<eos>\n<pad>model\n"),
    ("<pad>", "<eos>"),
    (
        "<bos>a<pad><pad> long instructions, with a line break\n\n",
        "  <eos><eos>",
    ),
    ("Classify:[Positive,Negative]\nText:", "\n<eos>\nPrediction: "),
    ("<unk> Text:aa a", " aPrediction:"),
    ("Text<pad>e\u{301}", "\u{301}\u{323}<unk>\u{301}"),
    ("<pad>\u{2581}\u{2581} ", "   <pad>   "),
    ("<pad>t:", "<sepa<eos>r>Text:"),
];

/// The tokenizers of this project, and variants whose tokens cross the edges of the default frame.
static SUBJECTS: LazyLock<Vec<Subject>> = LazyLock::new(|| {
    let added = |json: &mut Value, content: &str, special: bool| {
        let tokens = json["added_tokens"].as_array_mut().unwrap();
        tokens.push(
            json!({"id": 20_000 + tokens.len(), "content": content, "special": special, "normalized": false,
            "lstrip": false, "rstrip": false, "single_word": false}),
        );
    };
    vec![
        Subject::new(GEMMA, |_| {}),
        Subject::new(BUNDLED, |_| {}),
        // Merges that join the end of the head with what follows, and what precedes with the beginning of the tail.
        Subject::new(BUNDLED, |json| {
            for (left, right) in [
                ("t", ":"),
                ("t:", "a"),
                ("t:a", "b"),
                (">", "t"),
                ("e", "<"),
                ("e<", "s"),
                ("<0xE2>", "<"),
            ] {
                let merged = format!("{left}{right}");
                let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
                let id = 30_000 + vocabulary.len();
                vocabulary.entry(merged).or_insert(json!(id));
                let merge = json!([left, right]);
                json["model"]["merges"].as_array_mut().unwrap().insert(0, merge);
            }
        }),
        // Added tokens do the same, one of them special and therefore text.
        Subject::new(BUNDLED, |json| {
            for (content, special) in [("Text:a", false), ("r>Text:ab", true), ("b<sepa", false), ("x<", true)] {
                added(json, content, special);
            }
        }),
        // No point of the frame is safe.
        Subject::new(GEMMA, |json| {
            added(json, &format!("{}!", DEFAULT.0), false);
            added(json, &format!("!{}", DEFAULT.1), false);
        }),
        // The tokenizer is left to the crate.
        Subject::new(GEMMA, |json| json["normalizer"] = json!({"type": "NFC"})),
    ]
});

#[test]
fn the_frame_is_cut_where_no_token_crosses() {
    let edges = |index: usize| SUBJECTS[index].edges(&SUBJECTS[index].frames[0]);
    for subject in &SUBJECTS[..2] {
        let (head, tail) = subject.edges(&subject.frames[0]).unwrap();
        assert!(head.len() <= 8 && tail.len() <= 8, "{head:?} {tail:?}");
    }
    assert!(edges(2).unwrap().0.ends_with("t:") && edges(2).unwrap().1.starts_with("<s"));
    assert!(edges(3).unwrap().0.ends_with("r>Text:") && edges(3).unwrap().1.starts_with("<sepa"));
    // Without a safe point, everything is tokenised.
    assert_eq!((edges(4), edges(5)), (Some(DEFAULT), None));
}

#[test]
fn templates_are_cut_within_the_piece_around_the_text() {
    let long = "<pad>instructions that are the same for every comment: ";
    for subject in &SUBJECTS[..2] {
        let frame = Frame::with_control_tokens(long, "\n<eos>\nmodel".to_owned(), &subject.tokenizer).unwrap();
        let (head, tail) = subject.edges(&frame).unwrap();
        assert!(head.len() <= 8 && tail == "\n", "{head:?} {tail:?}");
        let frame = Frame::with_control_tokens("a<pad>", "<eos>b".to_owned(), &subject.tokenizer).unwrap();
        assert_eq!(subject.edges(&frame), Some(("", "")));
    }
}

#[test]
fn tokens_that_cross_the_edges_of_a_piece_have_the_ids_of_the_whole_template() {
    for subject in &SUBJECTS[..4] {
        for text in TEXTS_AT_EDGES {
            subject.check_in_templates(text);
        }
        for token in subject.tokens.iter().step_by(7) {
            subject.check_in_templates(token);
        }
    }
}

const TEXTS_AT_EDGES: [&str; 12] = [
    "",
    " ",
    "\n",
    "  ",
    "a",
    ":ab",
    "ab<sepa",
    "\u{301}",
    "pad>",
    "<eos>",
    "\n<eos>\n<pad>model\n",
    "<pad",
];

/// Texts that continue the head, or precede the tail, with the rest of every token that the frame begins or ends with.
#[test]
fn tokens_that_cross_the_edges_have_the_ids_of_the_whole_prompt() {
    for subject in SUBJECTS.iter() {
        let splits = |token: &'static String| token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        for (left, right) in subject.tokens.iter().flat_map(splits) {
            for frame in &subject.frames {
                if frame.head().to_lowercase().ends_with(&left.to_lowercase()) {
                    subject.check_in(frame, right);
                    subject.check_in(frame, &format!("{right} a fine day {left}"));
                }
                if frame.tail().to_lowercase().starts_with(&right.to_lowercase()) {
                    subject.check_in(frame, left);
                }
            }
        }
    }
}

#[test]
fn only_points_that_something_can_cross_are_excluded() {
    let remaining = |excluded: &[(&str, &str)]| {
        let text = "abcab";
        let mut points = Crossings::new(1..text.len(), |at| (text[..at].to_owned(), text[at..].to_owned()));
        excluded.iter().for_each(|(left, right)| points.exclude(left, right));
        points.remaining()
    };
    assert_eq!(remaining(&[]), [1, 2, 3, 4]);
    assert_eq!(remaining(&[("a", "b")]), [2, 3]);
    // The frame continues with `c`, or with anything.
    assert_eq!(remaining(&[("a", "bc")]), [2, 3]);
    assert_eq!(remaining(&[("a", "bd")]), [1, 2, 3]);
    // The frame begins with `a`, or anything before it.
    assert_eq!(remaining(&[("xa", "b")]), [2, 3, 4]);
    assert_eq!(remaining(&[("ca", "b")]), [2, 3]);
    assert_eq!(remaining(&[("bca", "b"), ("ba", "b")]), [2, 3]);
    assert_eq!(remaining(&[("xabc", "abx"), ("", "a"), ("a", "")]), [1, 2, 4]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ids_equal_those_of_the_whole_prompt(text in difficult_text(&SUBJECTS[0].tokens), other in difficult_text(&SUBJECTS[3].tokens)) {
        for subject in SUBJECTS.iter() {
            for text in [&text, &other] {
                subject.check(text);
                subject.check_in_templates(text);
            }
        }
    }
}
