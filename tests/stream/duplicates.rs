//! Identical comments, which are scored once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use moderatord::scorer::{Row, ScoreError};
use moderatord::stream::control::StreamError;
use moderatord::stream::score::Replacement;
use serde_json::{Value, json};

use crate::broker::{Broker, OutputRecord, PATIENCE};
use crate::daemon::{Names, Scripted, Setup, is_canary, judged, margin, prompter};
use crate::flow::{assert_each_once, await_committed, comment};

/// Writes comments to all partitions in turn.
fn produce(broker: &Broker, names: &Names, partitions: i32, values: &[Vec<u8>]) {
    let records = (0..).zip(values);
    broker.produce(
        &names.comments,
        records.map(|(id, value)| (id % partitions, "k", Some(value.as_slice()))),
    );
}

/// Returns what an output says about its comment, apart from when.
fn content(output: &OutputRecord) -> Value {
    let Some(reason) = output.headers.get("__connect.errors.exception.class.name") else {
        let mut decision = output.json();
        for varying in ["decision_id", "scored_at", "source"] {
            decision.as_object_mut().unwrap().remove(varying);
        }
        return decision;
    };
    json!({ "reason": reason, "message": output.headers["__connect.errors.exception.message"] })
}

/// With a cache of any size, every output is the one without a cache.
#[test]
fn the_cache_changes_no_output() {
    let broker = Broker::start();
    let poison = "a text that cannot be scored";
    let long = "a word or two about the garden ".repeat(60);
    let texts: Vec<String> = (0..12)
        .map(|number| "hello ".repeat(1 + number))
        .chain([long.clone(), format!("{long}{long}"), poison.to_owned(), String::new()])
        .collect();
    let events: Vec<Vec<u8>> = (0..400usize)
        .map(|id| {
            // Three texts are frequent, and the others are rare.
            let text = &texts[if id.is_multiple_of(5) {
                id / 5 % texts.len()
            } else {
                id % 3
            }];
            let op = if id % 17 == 5 { "delete" } else { "edit" };
            let community = if id.is_multiple_of(3) { "garden" } else { "kitchen" };
            let event = json!({
                "event_id": format!("e{id}"), "content_id": format!("c{id}"), "op": op, "community_id": community,
                "text": text,
            });
            serde_json::to_vec(&event).unwrap()
        })
        .collect();
    let failing = prompter(8).encode(poison).unwrap().rows[0].tokens.clone();
    let run = |max_texts: usize| {
        let names = Names::create(&broker, "cached", 2);
        produce(&broker, &names, 2, &events);
        let (failing, rows_scored) = (failing.clone(), Arc::new(AtomicUsize::new(0)));
        let scored = Arc::clone(&rows_scored);
        let script = move |rows: &[Row]| match rows.iter().position(|row| row.tokens == failing) {
            Some(row) => Err(ScoreError::NotFinite { row, margin: f32::NAN }),
            None => {
                if !is_canary(rows) {
                    scored.fetch_add(rows.len(), Ordering::Relaxed);
                }
                Ok(rows.iter().map(margin).collect())
            }
        };
        let mut setup = Setup::new(&broker, &names);
        setup.cache_entries = max_texts;
        setup.max_windows = 8;
        let daemon = setup.start(&broker, Scripted::new(script));
        await_committed(&broker, &names, &[200, 200]);
        daemon.stop().unwrap();
        let (decisions, dead_letters) = (broker.read(&names.decisions), broker.read(&names.dead_letters));
        assert_each_once(&decisions, &dead_letters, &[200, 200]);
        let outputs = decisions.iter().chain(&dead_letters);
        let outputs: BTreeMap<(i32, i64), Value> = outputs.map(|output| (output.source(), content(output))).collect();
        (outputs, rows_scored.load(Ordering::Relaxed))
    };
    let (expected, all_rows) = run(0);
    assert!(expected.values().any(|output| output["reason"] == "unscorable"));
    assert!(
        expected
            .values()
            .any(|output| output["truncated"] == true || output["windows"] == 8)
    );
    for max_texts in [1, 4, 1000] {
        let (outputs, rows) = run(max_texts);
        assert_eq!(outputs, expected, "with {max_texts} texts");
        assert!(
            rows < all_rows,
            "with {max_texts} texts: {rows} of {all_rows} rows scored"
        );
        if max_texts == 1000 {
            let mut prompts = BTreeSet::new();
            let prompter = prompter(8);
            for text in texts.iter().filter(|text| *text != poison) {
                prompts.extend(prompter.encode(text).unwrap().rows.into_iter().map(|row| row.tokens));
            }
            // Windows of different texts can be equal, and each text is scored once.
            assert!(
                rows <= 2 * prompts.len(),
                "{rows} rows of {} different ones",
                prompts.len()
            );
        }
    }
}

/// Every decision has the margin of the model that it names, whenever the swap happens.
#[test]
fn a_swap_leaves_no_margin_of_the_model_before() {
    let broker = Broker::start();
    let names = Names::create(&broker, "cache-swap", 2);
    let values: Vec<Vec<u8>> = (0..200).map(|id| comment(id, &"hello ".repeat(1 + id % 7))).collect();
    let (swap, swaps) = crossbeam_channel::bounded(0);
    let mut setup = Setup::new(&broker, &names);
    setup.cache_entries = 1000;
    let daemon = setup.start_with_swap(&broker, Scripted::by_length(), swaps).unwrap();
    produce(&broker, &names, 2, &values);
    await_committed(&broker, &names, &[100, 100]);
    let models = ["second", "third"];
    for (swapped, base) in (1..).zip(models) {
        // These comments are read before, during and after the swap.
        produce(&broker, &names, 2, &values);
        let offset = swapped as f32;
        let scorer = Scripted::new(move |rows| Ok(rows.iter().map(|row| margin(row) + offset).collect()));
        let replacement = Replacement {
            scorer: Box::new(scorer),
            canary: prompter(8).encode("hello").unwrap().rows,
            judged: judged(base),
        };
        assert!(swap.send_timeout(replacement, PATIENCE).is_ok());
        produce(&broker, &names, 2, &values);
        let count = 100 * (1 + 2 * swapped);
        await_committed(&broker, &names, &[count, count]);
    }
    daemon.stop().unwrap();
    let decisions = broker.read(&names.decisions);
    assert_each_once(&decisions, &[], &[500, 500]);
    let mut bases = BTreeSet::new();
    for decision in &decisions {
        let (partition, offset) = decision.source();
        let id = usize::try_from(2 * offset + i64::from(partition)).unwrap() % 200;
        let decision = decision.json();
        let base = decision["model"]["base"].as_str().unwrap().to_owned();
        let swaps = models
            .iter()
            .position(|model| *model == base)
            .map_or(0.0, |index| 1.0 + index as f32);
        let row = &prompter(8).encode(&"hello ".repeat(1 + id % 7)).unwrap().rows[0];
        let found = decision["margin"].as_f64().unwrap();
        assert!((found - f64::from(margin(row) + swaps)).abs() < 1e-6, "{base}: {found}");
        bases.insert(base);
    }
    assert_eq!(bases.len(), 3);
}

#[test]
fn a_device_fault_in_a_flood_loses_nothing() {
    let broker = Broker::start();
    let names = Names::create(&broker, "cache-device", 2);
    let text = |id: usize| {
        if id.is_multiple_of(10) {
            format!("hello {id}")
        } else {
            "hello".to_owned()
        }
    };
    let values: Vec<Vec<u8>> = (0..400).map(|id| comment(id, &text(id))).collect();
    produce(&broker, &names, 2, &values);
    let mut setup = Setup::new(&broker, &names);
    setup.cache_entries = 1000;
    let has_failed = Arc::new(AtomicBool::new(false));
    let failed = Arc::clone(&has_failed);
    let daemon = setup.start(
        &broker,
        Scripted::new(move |rows| {
            if !is_canary(rows) {
                failed.store(true, Ordering::Relaxed);
            }
            if failed.load(Ordering::Relaxed) {
                let reason = "the device fell off the bus".into();
                return Err(ScoreError::Failed {
                    rows: rows.len(),
                    reason,
                });
            }
            Ok(rows.iter().map(margin).collect())
        }),
    );
    let error = daemon.pipeline.join().unwrap_err();
    assert!(matches!(&error, StreamError::Device(_)), "{error}");
    let daemon = setup.start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[200, 200]);
    daemon.stop().unwrap();
    assert_each_once(&broker.read(&names.decisions), &[], &[200, 200]);
}

/// Partitions move to another daemon while comments wait for one in another partition.
#[test]
fn a_rebalance_in_a_flood_loses_nothing() {
    let broker = Broker::start();
    let names = Names::create(&broker, "cache-rebalance", 4);
    let values: Vec<Vec<u8>> = (0..2000).map(|id| comment(id, &"hello ".repeat(1 + id % 40))).collect();
    let mut setup = Setup::new(&broker, &names);
    setup.cache_entries = 8;
    let slow = || {
        Scripted::new(|rows| {
            std::thread::sleep(Duration::from_millis(20));
            Ok(rows.iter().map(margin).collect())
        })
    };
    let first = setup.start(&broker, slow());
    produce(&broker, &names, 4, &values[..1000]);
    let second = setup.start(&broker, slow());
    produce(&broker, &names, 4, &values[1000..]);
    await_committed(&broker, &names, &[500; 4]);
    first.stop().unwrap();
    second.stop().unwrap();
    let decisions = broker.read(&names.decisions);
    if broker.is_apache() {
        assert_each_once(&decisions, &[], &[500; 4]);
    }
    let sources: BTreeSet<(i32, i64)> = decisions.iter().map(OutputRecord::source).collect();
    assert_eq!(sources.len(), 2000);
}
