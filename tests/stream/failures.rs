//! Failures of the scorer, caused by a comment or by the device; and batches that a device works on asynchronously.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use moderatord::scorer::{Row, ScoreError, Scorer};
use moderatord::stream::control::StreamError;
use moderatord::stream::score::Replacement;

use crate::broker::{Broker, PATIENCE};
use crate::daemon::{Names, Queued, Scripted, Setup, eventually, is_canary, judged, margin, prompter};
use crate::flow::{assert_each_once, await_committed, comment};

#[test]
fn only_a_comment_that_cannot_be_scored_becomes_a_dead_letter() {
    check_poison_is_isolated("poison", |scorer| scorer);
}

#[test]
fn only_a_comment_that_cannot_be_scored_becomes_a_dead_letter_on_an_asynchronous_device() {
    check_poison_is_isolated("poison-queued", |scorer| Queued::new(scorer, &Arc::default()));
}

fn check_poison_is_isolated<S: Scorer + 'static>(test: &str, scorer: impl Fn(Scripted) -> S) {
    let broker = Broker::start();
    let names = Names::create(&broker, test, 1);
    let poison = "a text that cannot be scored";
    let values: Vec<Vec<u8>> = (0..60)
        .map(|id| comment(id, if id % 20 == 13 { poison } else { "hello" }))
        .collect();
    broker.produce(
        &names.comments,
        values.iter().map(|value| (0, "k", Some(value.as_slice()))),
    );
    let tokens = prompter(8).encode(poison).unwrap().rows[0].tokens.clone();
    let script = move |rows: &[Row]| match rows.iter().position(|row| row.tokens == tokens) {
        Some(row) => Err(ScoreError::NotFinite { row, margin: f32::NAN }),
        None => Ok(rows.iter().map(margin).collect()),
    };
    let daemon = Setup::new(&broker, &names).start(&broker, scorer(Scripted::new(script)));
    await_committed(&broker, &names, &[60]);
    daemon.stop().unwrap();
    let (decisions, dead_letters) = (broker.read(&names.decisions), broker.read(&names.dead_letters));
    assert_each_once(&decisions, &dead_letters, &[60]);
    let offsets: Vec<i64> = dead_letters.iter().map(|letter| letter.source().1).collect();
    assert_eq!(offsets, [13, 33, 53]);
    for letter in &dead_letters {
        assert_eq!(letter.headers["__connect.errors.exception.class.name"], "unscorable");
        assert_eq!(letter.headers["__connect.errors.stage"], "TRANSFORMATION");
        assert!(!letter.headers["__connect.errors.exception.message"].contains("device"));
    }
}

/// A comment whose first window fails must not leave the margins of its other windows to the comments after it.
#[test]
fn a_failed_window_does_not_shift_the_margins_of_other_comments() {
    let broker = Broker::start();
    let names = Names::create(&broker, "failed-window", 1);
    let long = "a word or two about the garden ".repeat(60);
    let texts: Vec<String> = (0..40)
        .map(|id| {
            if id % 10 == 3 {
                long.clone()
            } else {
                "hello ".repeat(1 + id)
            }
        })
        .collect();
    let values: Vec<Vec<u8>> = texts.iter().enumerate().map(|(id, text)| comment(id, text)).collect();
    broker.produce(
        &names.comments,
        values.iter().map(|value| (0, "k", Some(value.as_slice()))),
    );
    let prompter = prompter(8);
    let windows = prompter.encode(&long).unwrap().rows;
    assert!(windows.len() > 1);
    let failing = windows[0].tokens.clone();
    let script = move |rows: &[Row]| match rows.iter().position(|row| row.tokens == failing) {
        Some(row) => Err(ScoreError::NotFinite { row, margin: f32::NAN }),
        None => Ok(rows.iter().map(margin).collect()),
    };
    let mut setup = Setup::new(&broker, &names);
    setup.max_windows = 8;
    let daemon = setup.start(&broker, Scripted::new(script));
    await_committed(&broker, &names, &[40]);
    daemon.stop().unwrap();
    let (decisions, dead_letters) = (broker.read(&names.decisions), broker.read(&names.dead_letters));
    assert_each_once(&decisions, &dead_letters, &[40]);
    let offsets: Vec<i64> = dead_letters.iter().map(|letter| letter.source().1).collect();
    assert_eq!(offsets, [3, 13, 23, 33]);
    for decision in &decisions {
        let text = &texts[usize::try_from(decision.source().1).unwrap()];
        let expected = f64::from(margin(&prompter.encode(text).unwrap().rows[0]));
        let found = decision.json()["margin"].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-6, "{text}: {found}, expected {expected}");
    }
}

#[test]
fn a_device_fault_ends_the_daemon_and_loses_nothing() {
    check_fault_loses_nothing("device", &Arc::default(), |scorer| scorer);
}

#[test]
fn a_device_fault_with_the_next_batch_begun_loses_nothing() {
    let begun = Arc::default();
    check_fault_loses_nothing("device-queued", &begun, |scorer| Queued::new(scorer, &begun));
}

/// Checks that a device fault loses nothing. On an asynchronous device, the fault occurs once the next batch has begun.
fn check_fault_loses_nothing<S: Scorer + 'static>(
    test: &str,
    begun: &Arc<AtomicUsize>,
    scorer: impl Fn(Scripted) -> S,
) {
    let broker = Broker::start();
    let names = Names::create(&broker, test, 2);
    let values: Vec<Vec<u8>> = (0..400).map(|id| comment(id, "hello")).collect();
    let records = || {
        (0..)
            .zip(&values)
            .map(|(id, value)| (id % 2, "k", Some(value.as_slice())))
    };
    broker.produce(&names.comments, records());
    let is_healthy = Arc::new(AtomicBool::new(true));
    let (healthy, begun) = (Arc::clone(&is_healthy), Arc::clone(begun));
    let (mut scored, mut batches) = (0, 0);
    let script = move |rows: &[Row]| {
        if !is_canary(rows) {
            scored += rows.len();
            batches += 1;
        }
        if scored > 100 && healthy.swap(false, Ordering::Relaxed) && begun.load(Ordering::Relaxed) > 0 {
            eventually("the next batch is begun", || begun.load(Ordering::Relaxed) > batches);
        }
        if healthy.load(Ordering::Relaxed) {
            Ok(rows.iter().map(margin).collect())
        } else {
            Err(ScoreError::Failed {
                rows: rows.len(),
                reason: "the device fell off the bus".into(),
            })
        }
    };
    let daemon = Setup::new(&broker, &names).start(&broker, scorer(Scripted::new(script)));
    let error = daemon.pipeline.join().unwrap_err();
    assert!(
        matches!(&error, StreamError::Device(reason) if reason.contains("fell off the bus")),
        "{error}"
    );
    assert!(!is_healthy.load(Ordering::Relaxed));
    // A daemon with a working device resumes where the first one stopped.
    let daemon = Setup::new(&broker, &names).start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[200, 200]);
    daemon.stop().unwrap();
    let decisions = broker.read(&names.decisions);
    if broker.is_apache() {
        assert_each_once(&decisions, &[], &[200, 200]);
    } else {
        let mut ids: Vec<_> = decisions
            .iter()
            .map(|decision| decision.json()["decision_id"].to_string())
            .collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 400);
    }
}

/// The first micro-batch does not finish until the second has begun, so this test passes only if they overlap. Outputs
/// must still be in order.
#[test]
fn the_next_batch_is_begun_while_a_device_works() {
    let broker = Broker::start();
    let names = Names::create(&broker, "overlap", 1);
    produce(&broker, &names, 0..400);
    let begun = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&begun);
    let script = first_waits_for("the second is begun", move || counted.load(Ordering::Relaxed) >= 2);
    let daemon = Setup::new(&broker, &names).start(&broker, Queued::new(script, &begun));
    await_committed(&broker, &names, &[400]);
    daemon.stop().unwrap();
    assert_each_once(&broker.read(&names.decisions), &[], &[400]);
}

/// The first micro-batch does not finish until the replacement arrives, and is still decided by the old model.
#[test]
fn a_swap_waits_for_the_batch_that_a_device_works_on() {
    let broker = Broker::start();
    let names = Names::create(&broker, "swap-queued", 1);
    // A single batch: if another followed, the stage would wait for the first one before checking for a replacement.
    produce(&broker, &names, 0..10);
    let (begun, has_arrived) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let arrived = Arc::clone(&has_arrived);
    let script = first_waits_for("the replacement has arrived", move || arrived.load(Ordering::Relaxed));
    let (swap, swaps) = crossbeam_channel::bounded(0);
    let scorer = Queued::new(script, &begun);
    let daemon = Setup::new(&broker, &names)
        .start_with_swap(&broker, scorer, swaps)
        .unwrap();
    eventually("a batch is begun", || begun.load(Ordering::Relaxed) >= 1);
    let replacement = Replacement {
        scorer: Box::new(Queued::new(Scripted::by_length(), &Arc::default())),
        canary: prompter(8).encode("hello").unwrap().rows,
        judged: judged("another"),
    };
    assert!(swap.send_timeout(replacement, PATIENCE).is_ok());
    has_arrived.store(true, Ordering::Relaxed);
    produce(&broker, &names, 10..400);
    await_committed(&broker, &names, &[400]);
    daemon.stop().unwrap();
    let decisions = broker.read(&names.decisions);
    assert_each_once(&decisions, &[], &[400]);
    let mut bases: Vec<String> = decisions
        .iter()
        .map(|decision| decision.json()["model"]["base"].as_str().unwrap().to_owned())
        .collect();
    bases.dedup();
    assert_eq!(bases, ["scripted", "another"]);
}

/// Writes comments to the first partition.
fn produce(broker: &Broker, names: &Names, ids: Range<usize>) {
    let values: Vec<Vec<u8>> = ids.map(|id| comment(id, "hello")).collect();
    broker.produce(
        &names.comments,
        values.iter().map(|value| (0, "k", Some(value.as_slice()))),
    );
}

/// Scores by length, but waits in the first batch until a condition holds.
fn first_waits_for(what: &'static str, holds: impl Fn() -> bool + Send + 'static) -> Scripted {
    let mut is_first = true;
    Scripted::new(move |rows| {
        if !is_canary(rows) && std::mem::take(&mut is_first) {
            eventually(what, &holds);
        }
        Ok(rows.iter().map(margin).collect())
    })
}
