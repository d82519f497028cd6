//! The model agrees with the recorded values of the reference implementations.
//!
//! `tests/fixtures/*/expected.*` were computed by Hugging Face transformers and PEFT in f32, one text at a time.
//! `classifier::tolerance` explains the bounds.

use std::collections::BTreeMap;

use crate::common::{Case, fixture, model_config, prompt_config, reference_cases};
use candle_core::{Device, Tensor};
use moderatord::classifier::Classifier;
use moderatord::classifier::tolerance::{REFERENCE_LONG_F32, REFERENCE_SHORT_F32, ReferenceTolerance};
use moderatord::model::forward::gemma::PackedRow;
use moderatord::model::forward::linear::LoraMode;

const FAMILIES: [&str; 4] = ["gemma", "gemma2", "gemma3", "gemma3_linear8"];
const ADAPTERS: [Option<&str>; 3] = [None, Some("lora_qv"), Some("lora_all_rslora")];

fn classifier(family: &str, adapter: Option<&str>, mode: LoraMode) -> Classifier {
    let mut model = model_config(family);
    model.adapter = adapter.map(|adapter| fixture(family).join(adapter));
    Classifier::load_with(&model, &prompt_config(), mode).unwrap()
}

/// The largest differences over a set of cases: of any logit, and of the probability.
#[derive(Default)]
struct Differences {
    logit: f32,
    probability: f64,
}

impl Differences {
    fn are_within(&self, tolerance: ReferenceTolerance) -> bool {
        self.logit <= tolerance.logit && self.probability <= tolerance.probability
    }

    fn add(&mut self, found: &[f32], expected: &[f32], labels: [u32; 2]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            self.logit = self.logit.max((found - expected).abs());
        }
        let probability = |logits: &[f32]| {
            let margin = f64::from(logits[labels[0] as usize]) - f64::from(logits[labels[1] as usize]);
            1.0 / (1.0 + (-margin).exp())
        };
        self.probability = self.probability.max((probability(found) - probability(expected)).abs());
    }
}

fn tolerance(case: &Case) -> ReferenceTolerance {
    if case.key == "long" {
        REFERENCE_LONG_F32
    } else {
        REFERENCE_SHORT_F32
    }
}

/// Returns the logits of the whole vocabulary after the given ids, which are scored alone and without a cached prefix.
fn vocabulary_logits(classifier: &Classifier, tokens: &[u32]) -> Vec<f32> {
    let model = classifier.model();
    let hidden = model.forward(&[PackedRow { own: tokens, shared: 0 }], None).unwrap();
    let ids: Vec<u32> = (0..model.config().vocab_size as u32).collect();
    model
        .logits(&hidden, &model.unembedding_rows(&ids).unwrap())
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn reference_logits(family: &str) -> BTreeMap<String, Tensor> {
    candle_core::safetensors::load(fixture(family).join("expected.safetensors"), &Device::Cpu)
        .unwrap()
        .into_iter()
        .collect()
}

/// Compares every family, without and with each adapter, merged and unmerged, and prints a table of the differences.
#[test]
fn parity_table() {
    println!(
        "{:<16}{:<18}{:<10}{:>12}{:>12}{:>14}{:>14}",
        "base", "adapter", "mode", "logit", "prob", "long: logit", "long: prob"
    );
    for family in FAMILIES {
        let cases = reference_cases(family);
        let recorded = reference_logits(family);
        for adapter in ADAPTERS {
            for mode in [LoraMode::Merged, LoraMode::Unmerged] {
                let classifier = classifier(family, adapter, mode);
                let labels = classifier.prompter().label_ids();
                let (mut short, mut long) = (Differences::default(), Differences::default());
                for (index, case) in cases.iter().enumerate() {
                    let name = adapter.map_or(format!("{index:02}.logits"), |name| format!("{index:02}.{name}.logits"));
                    let expected: Vec<f32> = recorded[&name].flatten_all().unwrap().to_vec1().unwrap();
                    let found = vocabulary_logits(&classifier, &case.token_ids);
                    let differences = if case.key == "long" { &mut long } else { &mut short };
                    differences.add(&found, &expected, labels);
                }
                println!(
                    "{family:<16}{:<18}{:<10}{:>12.1e}{:>12.1e}{:>14.1e}{:>14.1e}",
                    adapter.unwrap_or("none"),
                    format!("{mode:?}"),
                    short.logit,
                    short.probability,
                    long.logit,
                    long.probability
                );
                assert!(short.are_within(REFERENCE_SHORT_F32), "{family} {adapter:?} {mode:?}");
                assert!(
                    long.are_within(REFERENCE_LONG_F32),
                    "{family} {adapter:?} {mode:?}: long"
                );
            }
        }
    }
}

/// Scores the texts the way they are served: with the frame, the cached prefix, and all rows packed together.
#[test]
fn served_scores_equal_the_reference() {
    for family in FAMILIES {
        let cases = reference_cases(family);
        let classifier = classifier(family, None, LoraMode::Merged);
        let prompter = classifier.prompter();
        let mut rows = Vec::new();
        for case in &cases {
            assert_eq!(prompter.frame(&case.text), case.prompt, "{}", case.key);
            let prompt = prompter.encode(&case.text).unwrap();
            assert_eq!(prompt.rows.len(), 1, "{}", case.key);
            assert_eq!(*prompt.rows[0].tokens, *case.served_ids(), "{}", case.key);
            rows.extend(prompt.rows);
        }
        assert!(rows.iter().any(|row| row.shared == prompter.prefix().len()));
        let logits = classifier.label_logits(&rows).unwrap();
        for (case, [hateful, other]) in cases.iter().zip(logits) {
            let [expected_other, expected_hateful] = case.served_logits();
            let tolerance = tolerance(case);
            for (found, expected) in [(hateful, expected_hateful), (other, expected_other)] {
                assert!(
                    (f64::from(found) - expected).abs() <= f64::from(tolerance.logit),
                    "{family} {}: {found} {expected}",
                    case.key
                );
            }
            let probability = 1.0 / (1.0 + (f64::from(other) - f64::from(hateful)).exp());
            assert!(
                (probability - case.served_probability()).abs() <= tolerance.probability,
                "{family} {}",
                case.key
            );
        }
    }
}

/// The text of the case `boundary` merges with the frame on both sides. Its row shares fewer ids of the prefix, and its
/// score still equals the reference.
#[test]
fn tokens_that_merge_with_the_frame_shorten_the_shared_prefix() {
    let classifier = classifier("gemma3", None, LoraMode::Merged);
    let prompter = classifier.prompter();
    let case = reference_cases("gemma3")
        .into_iter()
        .find(|case| case.key == "boundary")
        .unwrap();
    let row = prompter.encode(&case.text).unwrap().rows.remove(0);
    assert!(
        row.shared < prompter.prefix().len(),
        "{} of {}",
        row.shared,
        prompter.prefix().len()
    );
    let [hateful, other] = classifier.label_logits(std::slice::from_ref(&row)).unwrap()[0];
    let [expected_other, expected_hateful] = case.served_logits();
    let limit = f64::from(tolerance(&case).logit);
    assert!((f64::from(hateful) - expected_hateful).abs() < limit);
    assert!((f64::from(other) - expected_other).abs() < limit);
}

/// The adapter of the published method has one B for all heads. Written for PEFT, this layout needs `rank_pattern` and
/// `alpha_pattern`.
#[test]
fn an_adapter_with_rank_and_alpha_patterns_equals_its_keras_original() {
    let trace = std::fs::read_to_string(fixture("gemma/keras_seed/trace.json")).unwrap();
    let trace: serde_json::Value = serde_json::from_str(&trace).unwrap();
    let classifier = classifier("gemma", Some("keras_seed/peft_equivalent"), LoraMode::Unmerged);
    let expected = crate::common::keras_probabilities(&trace);
    assert!(expected.len() >= 8);
    for (key, ids, expected) in expected {
        let found = vocabulary_logits(&classifier, &ids);
        let [hateful, other] = classifier.prompter().label_ids();
        let probability = 1.0 / (1.0 + (f64::from(found[other as usize]) - f64::from(found[hateful as usize])).exp());
        assert!(
            (probability - expected).abs() < REFERENCE_SHORT_F32.probability,
            "{key}: {probability}, expected {expected}"
        );
    }
}
