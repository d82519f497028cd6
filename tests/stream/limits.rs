//! Limits on records in flight, stalled scorers, and drains.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use moderatord::config::LimitsConfig;

use crate::broker::Broker;
use crate::daemon::{Names, Scripted, Setup, eventually, is_canary, margin};
use crate::flow::{assert_each_once, await_committed, comment};

#[test]
fn a_scorer_that_stalls_longer_than_the_poll_interval_keeps_its_partitions() {
    let broker = Broker::start();
    let names = Names::create(&broker, "stall", 2);
    let values: Vec<Vec<u8>> = (0..600).map(|id| comment(id, "hello")).collect();
    broker.produce(
        &names.comments,
        (0..)
            .zip(&values)
            .map(|(id, value)| (id % 2, "k", Some(value.as_slice()))),
    );
    let mut setup = Setup::new(&broker, &names);
    setup.set("KAFKA__PROPERTIES__MAX_POLL_INTERVAL_MS", "3000");
    setup.limits = LimitsConfig {
        events: 100,
        bytes: 64 << 20,
    };
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let mut stalled = false;
    let daemon = setup.start(
        &broker,
        Scripted::new(move |rows| {
            if is_canary(rows) {
                return Ok(vec![0.0; rows.len()]);
            }
            counted.fetch_add(rows.len(), Ordering::Relaxed);
            if !std::mem::replace(&mut stalled, true) {
                std::thread::sleep(Duration::from_secs(5));
            }
            Ok(rows.iter().map(margin).collect())
        }),
    );
    await_committed(&broker, &names, &[300, 300]);
    daemon.stop().unwrap();
    // If the partitions had been lost, their records would have been scored again.
    assert_eq!(calls.load(Ordering::Relaxed), 600);
    assert_each_once(&broker.read(&names.decisions), &[], &[300, 300]);
}

#[test]
fn a_drain_finishes_what_is_in_flight_and_reads_nothing_more() {
    let broker = Broker::start();
    let names = Names::create(&broker, "drain", 1);
    let values: Vec<Vec<u8>> = (0..2000).map(|id| comment(id, "hello")).collect();
    broker.produce(
        &names.comments,
        values.iter().map(|value| (0, "k", Some(value.as_slice()))),
    );
    let scored = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&scored);
    let mut setup = Setup::new(&broker, &names);
    setup.limits.events = 200;
    let daemon = setup.start(
        &broker,
        Scripted::new(move |rows| {
            if is_canary(rows) {
                return Ok(vec![0.0; rows.len()]);
            }
            std::thread::sleep(Duration::from_millis(10));
            counted.fetch_add(rows.len(), Ordering::Relaxed);
            Ok(rows.iter().map(margin).collect())
        }),
    );
    eventually("some are scored", || scored.load(Ordering::Relaxed) >= 100);
    daemon.stop().unwrap();
    let scored = scored.load(Ordering::Relaxed);
    assert!(scored < 2000, "{scored}");
    // Exactly what was scored is written and committed, on either broker.
    let committed = broker.committed(&names.group, &names.comments, 1)[0];
    assert_eq!(usize::try_from(committed).unwrap(), scored);
    assert_each_once(&broker.read(&names.decisions), &[], &[committed]);
    let daemon = Setup::new(&broker, &names).start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[2000]);
    daemon.stop().unwrap();
    assert_each_once(&broker.read(&names.decisions), &[], &[2000]);
}

#[test]
fn a_drain_that_runs_out_of_time_loses_nothing() {
    let broker = Broker::start();
    let names = Names::create(&broker, "grace", 1);
    let values: Vec<Vec<u8>> = (0..300).map(|id| comment(id, "hello")).collect();
    broker.produce(
        &names.comments,
        values.iter().map(|value| (0, "k", Some(value.as_slice()))),
    );
    let has_started = Arc::new(AtomicBool::new(false));
    let started = Arc::clone(&has_started);
    let mut setup = Setup::new(&broker, &names);
    setup.limits.events = 200;
    let daemon = setup.start(
        &broker,
        Scripted::new(move |rows| {
            started.store(true, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(300));
            Ok(rows.iter().map(margin).collect())
        }),
    );
    eventually("the first batch is being scored", || {
        has_started.load(Ordering::Relaxed)
    });
    let start = Instant::now();
    daemon.pipeline.drain(start + Duration::from_millis(400));
    daemon.pipeline.join().unwrap();
    let daemon = Setup::new(&broker, &names).start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[300]);
    daemon.stop().unwrap();
    let decisions = broker.read(&names.decisions);
    if broker.is_apache() {
        assert_each_once(&decisions, &[], &[300]);
    } else {
        let mut sources: Vec<_> = decisions.iter().map(|decision| decision.source().1).collect();
        sources.sort_unstable();
        sources.dedup();
        assert_eq!(sources, (0..300).collect::<Vec<_>>());
    }
}
