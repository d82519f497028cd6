//! When scoring fails: a comment's fault, or the device's.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use moderatord::score::{Row, ScoreError, Scorer};
use moderatord::stream::StreamError;

use crate::broker::Broker;
use crate::daemon::{Names, Queued, Scripted, Setup, eventually, margin, prompter};
use crate::flow::{assert_each_once, await_committed, comment};

#[test]
fn a_comment_that_cannot_be_scored_stands_alone() {
    poison_stands_alone("poison", |scorer| scorer);
}

#[test]
fn so_it_does_on_a_device_that_works_by_itself() {
    poison_stands_alone("poison-queued", Queued::new);
}

fn poison_stands_alone<S: Scorer + 'static>(test: &str, scorer: impl Fn(Scripted) -> S) {
    let broker = Broker::start();
    let names = Names::create(&broker, test, 1);
    let poison = "a text that no device can bear";
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

#[test]
fn a_device_that_fails_ends_the_daemon_and_loses_nothing() {
    fault_loses_nothing("device", |scorer| scorer);
}

#[test]
fn so_does_a_device_that_fails_while_the_next_batch_waits_on_it() {
    fault_loses_nothing("device-queued", Queued::new);
}

fn fault_loses_nothing<S: Scorer + 'static>(test: &str, scorer: impl Fn(Scripted) -> S) {
    let broker = Broker::start();
    let names = Names::create(&broker, test, 2);
    let values: Vec<Vec<u8>> = (0..200).map(|id| comment(id, "hello")).collect();
    let records = || {
        (0..)
            .zip(&values)
            .map(|(id, value)| (id % 2, "k", Some(value.as_slice())))
    };
    broker.produce(&names.comments, records());
    let is_well = Arc::new(AtomicBool::new(true));
    let dies = Arc::clone(&is_well);
    let mut scored = 0;
    let script = move |rows: &[Row]| {
        scored += rows.len();
        if scored > 100 {
            dies.store(false, Ordering::Relaxed);
        }
        if dies.load(Ordering::Relaxed) {
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
    assert!(!is_well.load(Ordering::Relaxed));
    // A sound one goes on where the broken one stood.
    let daemon = Setup::new(&broker, &names).start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[100, 100]);
    daemon.stop().unwrap();
    let decisions = broker.read(&names.decisions);
    if broker.is_apache() {
        assert_each_once(&decisions, &[], &[100, 100]);
    } else {
        let mut ids: Vec<_> = decisions
            .iter()
            .map(|decision| decision.json()["decision_id"].to_string())
            .collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 200);
    }
}

/// The first micro-batch is not done before the second was begun, so this ends only if they overlap; and order
/// holds all the same.
#[test]
fn the_next_batch_is_begun_while_a_device_works() {
    let broker = Broker::start();
    let names = Names::create(&broker, "overlap", 1);
    let values: Vec<Vec<u8>> = (0..400).map(|id| comment(id, "hello")).collect();
    broker.produce(
        &names.comments,
        values.iter().map(|value| (0, "k", Some(value.as_slice()))),
    );
    let second = Arc::new(OnceLock::<Arc<AtomicUsize>>::new());
    let begun = Arc::clone(&second);
    let mut is_first = true;
    let scorer = Queued::new(Scripted::new(move |rows| {
        if std::mem::take(&mut is_first) {
            eventually("a second batch is begun", || {
                begun.get().is_some_and(|begun| begun.load(Ordering::Relaxed) >= 2)
            });
        }
        Ok(rows.iter().map(margin).collect())
    }));
    second.set(Arc::clone(&scorer.begun)).unwrap();
    let daemon = Setup::new(&broker, &names).start(&broker, scorer);
    await_committed(&broker, &names, &[400]);
    daemon.stop().unwrap();
    assert_each_once(&broker.read(&names.decisions), &[], &[400]);
}
