//! A comment's margin does not depend on its batch-mates, its place, or what is cached.

use std::cell::RefCell;

use crate::common::{fixture, model_config, prompt_config, reference_cases};
use moderatord::classifier::Classifier;
use moderatord::config::ModelConfig;
use moderatord::model::forward::gemma::PackedRow;
use moderatord::scorer::{Row, Scorer};
use proptest::prelude::*;

/// f32 within 1e-5: the order of additions inside a matrix product may follow the batch's size.
const LIMIT: f32 = 1e-5;

fn classifier(family: &str) -> Classifier {
    Classifier::load(&model_config(family), &prompt_config()).unwrap()
}

/// The served rows of every short reference text, and some of equal length.
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

fn unshared(row: &Row) -> Row {
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
            .map(|&(row, share)| if share { rows[row].clone() } else { unshared(&rows[row]) })
            .collect();
        let margins = classifier.borrow_mut().score(&batch).unwrap();
        prop_assert_eq!(margins.len(), batch.len());
        for (margin, &(row, share)) in margins.iter().zip(&picks) {
            prop_assert!(
                (margin - alone[row]).abs() <= LIMIT,
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

/// A window of 16 over a prefix of more tokens: near its start a row sees part of the cached
/// prefix, by absolute position, and further on none of it.
#[test]
fn windowed_layers_mask_the_cached_prefix_by_position() {
    for family in ["gemma2", "gemma3", "gemma3_linear8"] {
        let classifier = classifier(family);
        let model = classifier.model();
        assert_eq!(model.config().layers[0].window, Some(16));
        // Long enough that every row's last query is beyond the window of the prefix's first key.
        let prefix: Vec<u32> = std::iter::once(2).chain(100..139).collect();
        let cache = model.cache_prefix(&prefix).unwrap();
        let labels = model.unembedding_of(&classifier.prompter().label_ids()).unwrap();
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
                        (found - expected).abs() <= LIMIT,
                        "{family}, {} own after {shared}",
                        own.len()
                    );
                }
            }
        }
    }
}

/// With every layer windowed, a token beyond the reach of all windows together cannot move the
/// answer, and the one just inside can.
#[test]
fn the_window_is_exact() {
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
    let answer = |ids: &[u32]| {
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
        answer(&changed) != answer(&ids)
    };
    // Four layers, each seeing the 15 tokens before.
    let edge = ids.len() - 1 - 4 * 15;
    assert!(changes(edge));
    assert!(!changes(edge - 1));
}
