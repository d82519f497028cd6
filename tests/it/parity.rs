//! The engine against recorded values of the reference implementations.
//!
//! `tests/fixtures/*/expected.*` were computed by Hugging Face transformers and PEFT in f32, one
//! text at a time. Limits are those that the reference's own f32-against-f64 differences justify;
//! the common mistakes (another GELU, window, scale, rope base) are one to four orders above them.

use std::collections::BTreeMap;

use crate::common::{fixture, model_config, prompt_config, reference_cases};
use candle_core::{Device, Tensor};
use moderatord::classifier::Classifier;
use moderatord::model::forward::gemma::PackedRow;
use moderatord::model::forward::linear::LoraMode;

const FAMILIES: [&str; 4] = ["gemma", "gemma2", "gemma3", "gemma3_linear8"];
const ADAPTERS: [Option<&str>; 3] = [None, Some("lora_qv"), Some("lora_all_rslora")];

fn classifier(family: &str, adapter: Option<&str>, mode: LoraMode) -> Classifier {
    let mut model = model_config(family);
    model.adapter = adapter.map(|adapter| fixture(family).join(adapter));
    Classifier::load_with(&model, &prompt_config(), mode).unwrap()
}

/// Largest differences over a set of cases: any logit, label logit, probability.
#[derive(Default)]
struct Differences {
    logit: f32,
    probability: f64,
}

impl Differences {
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

/// Whole-vocabulary logits at the last position of given ids, unpacked and without a cached prefix.
fn vocabulary_logits(classifier: &Classifier, tokens: &[u32]) -> Vec<f32> {
    let model = classifier.model();
    let hidden = model.forward(&[PackedRow { own: tokens, shared: 0 }], None).unwrap();
    let ids: Vec<u32> = (0..model.config().vocab_size as u32).collect();
    model
        .logits(&hidden, &model.unembedding_of(&ids).unwrap())
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

/// The parity table: every family, plain and with both adapters, merged and unmerged.
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
                assert!(
                    short.logit <= 3e-5 && short.probability <= 1e-5,
                    "{family} {adapter:?} {mode:?}"
                );
                assert!(
                    long.logit <= 1e-4 && long.probability <= 2e-5,
                    "{family} {adapter:?} {mode:?}: long"
                );
            }
        }
    }
}

/// What is served: text in, prompt, cached prefix, packed rows, label logits out.
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
            let (logit_limit, probability_limit) = if case.key == "long" { (1e-4, 2e-5) } else { (3e-5, 1e-5) };
            for (found, expected) in [(hateful, expected_hateful), (other, expected_other)] {
                assert!(
                    (f64::from(found) - expected).abs() <= logit_limit,
                    "{family} {}: {found} {expected}",
                    case.key
                );
            }
            let probability = 1.0 / (1.0 + (f64::from(other) - f64::from(hateful)).exp());
            assert!(
                (probability - case.served_probability()).abs() <= probability_limit,
                "{family} {}",
                case.key
            );
        }
    }
}

/// The case `boundary` merges with the frame on both sides: fewer ids of the prefix are shared, and
/// the score is still the reference's.
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
    assert!((f64::from(hateful) - expected_hateful).abs() < 3e-5);
    assert!((f64::from(other) - expected_other).abs() < 3e-5);
}

/// The published method's own adapter layout (one B for all heads), written as PEFT: needs
/// `rank_pattern` and `alpha_pattern`.
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
            (probability - expected).abs() < 1e-5,
            "{key}: {probability}, expected {expected}"
        );
    }
}
