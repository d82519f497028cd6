//! Outages that a daemon rides out: outputs that topics refuse, topics that go away, brokers that are down for long, and
//! processes that are killed or share a name.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::broker::{Broker, PATIENCE, unique, variable};
use crate::cluster::Cluster;
use crate::daemon::{Names, Scripted, Setup, eventually};
use crate::flow::{assert_each_once, await_committed, comment};
use crate::process::{Process, await_end, judge, produce_slowly, produce_until};

/// Letters that no compression makes much smaller.
fn noise(length: usize, seed: u64) -> String {
    let mut state = seed;
    let letter = || {
        // A linear congruential generator with the constants of Knuth's MMIX.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        char::from(b'a' + u8::try_from((state >> 33) % 26).unwrap())
    };
    std::iter::repeat_with(letter).take(length).collect()
}

/// A stream whose topics refuse some outputs for their size.
struct Refusals {
    count: usize,
    /// One in so many outputs is refused; 0 for none.
    one_in: usize,
    /// The daemon cannot read the limits of the topics.
    hides_limits: bool,
}

impl Refusals {
    /// Runs the stream, and returns how many records of aborted transactions it has left, and how long it took from its
    /// first commit to its last.
    fn run(&self) -> (usize, Duration) {
        let broker = Broker::apache();
        let names = Names::new("refused");
        broker.create_topic(&names.comments, 1);
        let small = [("max.message.bytes", "4000")];
        broker.create_topic_with(&names.decisions, 1, &small);
        broker.create_topic_with(&names.dead_letters, 1, &small);
        let is_refused = |id: usize| self.one_in > 0 && id % self.one_in == 7;
        let value = |id: usize| match is_refused(id) {
            // Not JSON, so that the dead letter holds all of it.
            true => noise(8000 + id % 1000, id as u64).into_bytes(),
            false => comment(id, "hello"),
        };
        let values: Vec<Vec<u8>> = (0..self.count).map(value).collect();
        broker.produce(
            &names.comments,
            values.iter().map(|value| (0, "k", Some(value.as_slice()))),
        );
        let mut setup = Setup::new(&broker, &names);
        setup.hides_limits = self.hides_limits;
        let daemon = setup.start(&broker, Scripted::by_length());
        let committed = || broker.committed(&names.group, &names.comments, 1)[0];
        eventually("some are committed", || committed() > 0);
        let start = Instant::now();
        eventually("all are committed", || committed() == self.count as i64);
        let time = start.elapsed();
        daemon.stop().unwrap();
        let letters = broker.read(&names.dead_letters);
        assert_each_once(&broker.read(&names.decisions), &letters, &[self.count as i64]);
        assert_eq!(letters.len(), (0..self.count).filter(|&id| is_refused(id)).count());
        assert!(letters.iter().all(|letter| letter.value.is_none()));
        let aborted = broker.count_aborted(&names.decisions) + broker.count_aborted(&names.dead_letters);
        (aborted, time)
    }
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn outputs_that_exceed_a_known_limit_abort_no_transaction() {
    let refusals = Refusals {
        count: 4000,
        one_in: 20,
        hides_limits: false,
    };
    assert_eq!(refusals.run().0, 0);
}

/// Without the permission to read the topics' settings, the limit is learnt from the first refusals.
#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn refused_outputs_abort_few_transactions_if_no_limit_is_known() {
    let refusals = Refusals {
        count: 4000,
        one_in: 20,
        hides_limits: true,
    };
    let (aborted, _) = refusals.run();
    assert!(
        (1..4000).contains(&aborted),
        "{aborted} records of aborted transactions"
    );
}

/// Prints what refusals cost: `cargo test --test stream -- --ignored --nocapture what_refusals_cost`.
#[test]
#[ignore = "prints times, and needs Apache Kafka: tests/kafka/broker"]
fn what_refusals_cost() {
    let run = |one_in, hides_limits| {
        let refusals = Refusals {
            count: 20_000,
            one_in,
            hides_limits,
        };
        let (aborted, time) = refusals.run();
        (aborted, time.as_secs_f64())
    };
    for round in 1..=3 {
        let (_, none) = run(0, false);
        for hides_limits in [false, true] {
            let (aborted, time) = run(20, hides_limits);
            let known = if hides_limits { "not known" } else { "known" };
            println!(
                "round {round}: 5 % refused, limits {known}: {:.2} times as long, {aborted} aborted records",
                time / none
            );
        }
    }
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn outputs_without_a_key_for_a_compacted_topic_become_dead_letters() {
    const COUNT: usize = 400;
    for hides_limits in [false, true] {
        let broker = Broker::apache();
        let names = Names::new("compacted");
        broker.create_topic(&names.comments, 1);
        broker.create_topic_with(&names.decisions, 1, &[("cleanup.policy", "compact")]);
        broker.create_topic(&names.dead_letters, 1);
        let values: Vec<Vec<u8>> = (0..COUNT).map(|id| comment(id, "hello")).collect();
        let keys: Vec<String> = (0..COUNT).map(|id| format!("k{id}")).collect();
        broker.produce_keyed(
            &names.comments,
            values.iter().enumerate().map(|(id, value)| {
                let key = Some(keys[id].as_str()).filter(|_| id % 20 != 7);
                (0, key, Some(value.as_slice()))
            }),
        );
        let mut setup = Setup::new(&broker, &names);
        setup.hides_limits = hides_limits;
        let daemon = setup.start(&broker, Scripted::by_length());
        await_committed(&broker, &names, &[COUNT as i64]);
        daemon.stop().unwrap();
        let letters = broker.read(&names.dead_letters);
        assert_each_once(&broker.read(&names.decisions), &letters, &[COUNT as i64]);
        assert_eq!(letters.len(), COUNT / 20);
        assert!(letters.iter().all(|letter| letter.key.is_some()));
        if !hides_limits {
            assert_eq!(broker.count_aborted(&names.decisions), 0);
        }
    }
}

/// The decisions that were committed before are gone with the topic; everything else must be in the new one.
#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn a_decisions_topic_that_is_deleted_and_created_again_loses_nothing() {
    let broker = Broker::apache();
    let names = Names::create(&broker, "vanishing", 1);
    let values: Vec<Vec<u8>> = (0..200).map(|id| comment(id, "hello")).collect();
    let produce = |range: std::ops::Range<usize>| {
        let records = values[range].iter().map(|value| (0, "k", Some(value.as_slice())));
        broker.produce(&names.comments, records);
    };
    produce(0..100);
    let daemon = Setup::new(&broker, &names).start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[100]);
    broker.delete_topic(&names.decisions);
    produce(100..200);
    // Long enough for the client to give up on the topic.
    std::thread::sleep(Duration::from_secs(8));
    assert!(!daemon.pipeline.is_ending());
    assert_eq!(broker.committed(&names.group, &names.comments, 1), [100]);
    broker.create_deleted_topic(&names.decisions, 1);
    await_committed(&broker, &names, &[200]);
    daemon.stop().unwrap();
    let offsets: Vec<i64> = broker
        .read(&names.decisions)
        .iter()
        .map(|decision| decision.source().1)
        .collect();
    assert_eq!(offsets, (100..200).collect::<Vec<_>>());
}

/// The brokers end the transaction in the meantime, so the producer has to be replaced.
#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn an_outage_longer_than_a_transaction_may_last_loses_nothing() {
    let node = Cluster::start(1);
    let broker = node.broker();
    let names = Names::create(&broker, &unique("long-outage"), 2);
    let values: Vec<Vec<u8>> = (0..2000).map(|id| comment(id, "hello")).collect();
    broker.produce(
        &names.comments,
        (0..)
            .zip(&values)
            .map(|(id, value)| (id % 2, "k", Some(value.as_slice()))),
    );
    let mut setup = Setup::new(&broker, &names);
    setup
        .set("KAFKA__PROPERTIES__TRANSACTION_TIMEOUT_MS", "2000")
        .set("KAFKA__STATIC_MEMBERSHIP", "true");
    setup.limits.events = 100;
    let daemon = setup.start(
        &broker,
        Scripted::new(|rows| {
            std::thread::sleep(Duration::from_millis(2) * u32::try_from(rows.len()).unwrap());
            Ok(rows.iter().map(crate::daemon::margin).collect())
        }),
    );
    eventually("some are committed", || {
        broker.committed(&names.group, &names.comments, 2).iter().sum::<i64>() > 100
    });
    node.command("kill", 1);
    std::thread::sleep(Duration::from_secs(6));
    assert!(!daemon.pipeline.is_ending());
    node.command("restart", 1);
    await_committed(&broker, &names, &[1000, 1000]);
    daemon.stop().unwrap();
    assert_each_once(&broker.read(&names.decisions), &[], &[1000, 1000]);
}

/// Without static membership, the group would wait for the session of the killed process, which is longer here than this
/// test waits for anything.
#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn a_process_that_is_killed_and_restarted_does_not_wait_for_its_session() {
    let broker = Broker::apache();
    let names = Names::create(&broker, "static", 4);
    let folder = tempfile::tempdir().unwrap();
    let session = [
        ("KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", "300000"),
        ("KAFKA__PROPERTIES__HEARTBEAT_INTERVAL_MS", "300"),
    ];
    let is_written = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            produce_slowly(&names.comments, 0..2000, 4, Duration::from_millis(200), 100);
            is_written.store(true, Ordering::Relaxed);
        });
        for _ in 0..2 {
            let process = Process::start_with(folder.path(), &names, "one", &session);
            let before: i64 = broker.committed(&names.group, &names.comments, 4).iter().sum();
            eventually("more is committed", || {
                broker.committed(&names.group, &names.comments, 4).iter().sum::<i64>() > before
            });
            process.signal("KILL");
        }
        let mut process = Process::start_with(folder.path(), &names, "one", &session);
        eventually("everything is written", || is_written.load(Ordering::Relaxed));
        await_end(&broker, &names, 4, 2000);
        process.signal("TERM");
        assert_eq!(process.wait(), Some(0), "{}", process.log());
    });
    let verdict = judge(&variable("BROKERS"), &names);
    assert_eq!(verdict["ok"], true, "{verdict}");
}

/// One of them ends and names the other, which goes on; they do not take turns for ever.
#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn of_two_processes_with_the_same_name_one_ends_and_names_the_other() {
    for is_static in ["true", "false"] {
        let broker = Broker::apache();
        let names = Names::create(&broker, "twins", 2);
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let settings = [("KAFKA__STATIC_MEMBERSHIP", is_static)];
        let mut verdict = None;
        let has_ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Only a process that has something to commit notices the other.
            let written = scope.spawn(|| produce_until(&has_ended, &names.comments, 2));
            let mut twins = folders
                .each_ref()
                .map(|folder| Process::start_with(folder.path(), &names, "twin", &settings));
            let deadline = Instant::now() + PATIENCE;
            let ended = loop {
                if let Some(ended) = (0..2).find(|&index| !twins[index].is_running()) {
                    break ended;
                } else if Instant::now() >= deadline {
                    has_ended.store(true, Ordering::Relaxed);
                    panic!("both run:\n{}\n{}", twins[0].log(), twins[1].log());
                }
                std::thread::sleep(Duration::from_millis(20));
            };
            has_ended.store(true, Ordering::Relaxed);
            assert_eq!(twins[ended].wait(), Some(78), "{}", twins[ended].log());
            let log = twins[ended].log();
            // A static member's id begins with its name, and any other's with that of its client.
            let member = if is_static == "true" {
                "twin-"
            } else {
                "moderatord-twin-"
            };
            let message = format!("another process runs with the same kafka.instance (member {member}");
            assert!(log.contains(&message), "{log}");
            await_end(&broker, &names, 2, i64::try_from(written.join().unwrap()).unwrap());
            let other = &mut twins[1 - ended];
            assert!(other.is_running(), "{}", other.log());
            other.signal("TERM");
            assert_eq!(other.wait(), Some(0), "{}", other.log());
            verdict = Some(judge(&variable("BROKERS"), &names));
        });
        assert_eq!(verdict.as_ref().unwrap()["ok"], true, "{verdict:?}");
    }
}
