//! A row's margin does not depend on the other rows of the batch, its place among them, or what is cached.

use std::cell::RefCell;

use crate::common::{fixture, model_config, prompt_config, reference_cases};
use moderatord::classifier::Classifier;
use moderatord::classifier::tolerance::BATCH_F32;
use moderatord::config::ModelConfig;
use moderatord::model::forward::gemma::PackedRow;
use moderatord::scorer::{Row, Scorer};
use proptest::prelude::*;

fn classifier(family: &str) -> Classifier {
    Classifier::load(&model_config(family), &prompt_config()).unwrap()
}

/// Returns the rows of every short reference text, and some rows of equal length.
fn rows(classifier: &Classifier) -> Vec<Row> {
    let cases = reference_cases("gemma3")
        .into_iter()
        .filter(|case| case.key != "long")
        .map(|case| case.text);
    let equal = ["nice day", "fine day", "good day", "warm day"].map(str::to_owned);
    let prompter = classifier.prompter();
    cases
        .chain(equal)
        .flat_map(|text| prompter.encode(&text).unwrap().rows)
        .collect()
}

fn without_sharing(row: &Row) -> Row {
    Row {
        shared: 0,
        ..row.clone()
    }
}

fn check(family: &str) {
    let classifier = RefCell::new(classifier(family));
    let rows = rows(&classifier.borrow());
    let alone: Vec<f32> = rows
        .iter()
        .map(|row| classifier.borrow_mut().score(std::slice::from_ref(row)).unwrap()[0])
        .collect();
    let batch = prop::collection::vec((0..rows.len(), any::<bool>()), 1..24);
    let config = ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let result = proptest::test_runner::TestRunner::new(config).run(&batch, |picks| {
        let batch: Vec<Row> = picks
            .iter()
            .map(|&(row, share)| {
                if share {
                    rows[row].clone()
                } else {
                    without_sharing(&rows[row])
                }
            })
            .collect();
        let margins = classifier.borrow_mut().score(&batch).unwrap();
        prop_assert_eq!(margins.len(), batch.len());
        for (margin, &(row, share)) in margins.iter().zip(&picks) {
            prop_assert!(
                (margin - alone[row]).abs() <= BATCH_F32,
                "row {row}, shared {share}: {margin}, {}",
                alone[row]
            );
        }
        Ok(())
    });
    result.unwrap();
}

#[test]
fn margins_do_not_depend_on_the_batch_gemma() {
    check("gemma");
}

#[test]
fn margins_do_not_depend_on_the_batch_gemma2() {
    check("gemma2");
}

#[test]
fn margins_do_not_depend_on_the_batch_gemma3() {
    check("gemma3");
}

/// The window of 16 tokens is shorter than the prefix. The first own tokens of a row see part of the cached prefix,
/// chosen by absolute position, and later ones see none of it.
#[test]
fn windowed_layers_mask_the_cached_prefix_by_position() {
    for family in ["gemma2", "gemma3", "gemma3_linear8"] {
        let classifier = classifier(family);
        let model = classifier.model();
        assert_eq!(model.config().layers[0].window, Some(16));
        // Long enough that every row's last query is beyond the window of the prefix's first key.
        let prefix: Vec<u32> = std::iter::once(2).chain(100..139).collect();
        let cache = model.cache_prefix(&prefix).unwrap();
        let labels = model.unembedding_rows(&classifier.prompter().label_ids()).unwrap();
        for own in [1usize, 2, 15, 16, 17, 40] {
            let own: Vec<u32> = (0..own as u32).map(|index| 200 + 7 * index).collect();
            for shared in [1, 8, 24, 40] {
                let whole = [&prefix[..shared], &own].concat();
                let hidden = model.forward(&[PackedRow { own: &own, shared }], Some(&cache)).unwrap();
                let expected = model.forward(&[PackedRow { own: &whole, shared: 0 }], None).unwrap();
                let logits = |hidden| {
                    model
                        .logits(&hidden, &labels)
                        .unwrap()
                        .flatten_all()
                        .unwrap()
                        .to_vec1::<f32>()
                        .unwrap()
                };
                for (found, expected) in logits(hidden).into_iter().zip(logits(expected)) {
                    assert!(
                        (found - expected).abs() <= BATCH_F32,
                        "{family}, {} own tokens after {shared} shared ones",
                        own.len()
                    );
                }
            }
        }
    }
}

/// If every layer has a window, information reaches as far as all windows together. A token just beyond that does not
/// change the result, and the first one within it does.
#[test]
fn a_window_ends_at_exactly_its_length() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["model.safetensors", "tokenizer.json", "config.json"] {
        std::fs::copy(fixture("gemma2").join(file), folder.path().join(file)).unwrap();
    }
    let path = folder.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["layer_types"] = serde_json::json!(vec!["sliding_attention"; 4]);
    std::fs::write(&path, config.to_string()).unwrap();
    let config = ModelConfig {
        path: Some(folder.path().to_owned()),
        ..model_config("gemma2")
    };
    let classifier = Classifier::load(&config, &prompt_config()).unwrap();
    let hidden = |ids: &[u32]| {
        let hidden = classifier
            .model()
            .forward(&[PackedRow { own: ids, shared: 0 }], None)
            .unwrap();
        hidden.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let ids: Vec<u32> = (0..80).map(|index| 100 + 5 * index).collect();
    let changes = |index: usize| {
        let mut changed = ids.clone();
        changed[index] = 999;
        hidden(&changed) != hidden(&ids)
    };
    // Each of the four layers sees the 15 tokens before a token.
    let first_seen = ids.len() - 1 - 4 * 15;
    assert!(changes(first_seen));
    assert!(!changes(first_seen - 1));
}
