//! What the health checks and the metrics say about daemons that have no assignment, no broker or no commits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use moderatord::ops::health::{Health, HealthVerdict, Phase};
use moderatord::ops::metrics;
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

use crate::broker::{Broker, PATIENCE, unique};
use crate::common::process::broker_down;
use crate::daemon::{Daemon, Names, Scripted, Setup, eventually, is_canary, margin};
use crate::flow::{await_committed, comment};

/// Starts a daemon whose own health is good, so that its readiness depends on the stream.
fn start(broker: &Broker, names: &Names, scorer: Scripted) -> Daemon {
    let daemon = Setup::new(broker, names).start(broker, scorer);
    daemon.health.enter(Phase::Serving);
    daemon.health.record_scored(Instant::now());
    daemon
}

/// Returns why a daemon is not ready, or `None` if it is.
fn problem(health: &Health) -> Option<String> {
    match health.ready(Instant::now()) {
        HealthVerdict::Healthy => None,
        HealthVerdict::Unhealthy(reason) => Some(reason),
    }
}

fn assigned(daemon: &Daemon) -> usize {
    daemon.health.work().unwrap().assigned_partitions
}

/// Returns the gauges of a daemon as `/metrics` shows them.
fn gauges(daemon: &Daemon) -> String {
    let (recorder, exporter) = metrics::build().unwrap();
    let work = daemon.health.work().unwrap();
    ::metrics::with_local_recorder(&recorder, || work.report(Instant::now(), SystemTime::now()));
    exporter.render()
}

/// Returns the partitions that have a lag, with the text of its value.
fn lags(daemon: &Daemon) -> Vec<(i32, String)> {
    let text = gauges(daemon);
    let mut lags: Vec<(i32, String)> = text
        .lines()
        .filter_map(|line| {
            let (partition, lag) = line
                .strip_prefix("moderatord_consumer_lag_records{partition=\"")?
                .split_once("\"} ")?;
            Some((partition.parse().unwrap(), lag.to_owned()))
        })
        .collect();
    lags.sort();
    lags
}

fn has_oldest(daemon: &Daemon) -> bool {
    gauges(daemon).contains("\nmoderatord_oldest_unfinished_seconds ")
}

fn no_lag(partitions: &[i32]) -> Vec<(i32, String)> {
    partitions
        .iter()
        .map(|&partition| (partition, "0".to_owned()))
        .collect()
}

#[test]
fn a_daemon_is_ready_once_it_is_assigned_or_a_spare() {
    let broker = Broker::start();
    let names = Names::create(&broker, "ready", 2);
    let values: Vec<Vec<u8>> = (0..40).map(|id| comment(id, "hello")).collect();
    let records = (0..)
        .zip(&values)
        .map(|(id, value)| (id % 2, "k", Some(value.as_slice())));
    broker.produce(&names.comments, records);

    let first = start(&broker, &names, Scripted::by_length());
    let reason = problem(&first.health).unwrap();
    assert!(reason.starts_with("no partition is assigned: waiting for "), "{reason}");
    assert!(lags(&first).is_empty() && !has_oldest(&first));
    eventually("the first is ready", || problem(&first.health).is_none());
    assert_eq!(assigned(&first), 2);
    await_committed(&broker, &names, &[20, 20]);
    eventually("the lag is known", || lags(&first) == no_lag(&[0, 1]));
    assert!(has_oldest(&first));
    assert!(gauges(&first).contains("\nmoderatord_last_commit_timestamp_seconds 1"));
    assert!(gauges(&first).contains("\nmoderatord_brokers_up 1\n"));

    // A partition that another daemon takes over has no lag here.
    let second = start(&broker, &names, Scripted::by_length());
    assert!(problem(&second.health).is_some());
    eventually("the second is ready", || problem(&second.health).is_none());
    eventually("each has one", || (assigned(&first), assigned(&second)) == (1, 1));
    eventually("the other partition has no lag", || lags(&first).len() == 1);
    eventually("the lags are known", || {
        let mut both = lags(&first);
        both.extend(lags(&second));
        both.sort();
        both == no_lag(&[0, 1])
    });

    // There is nothing left for the third, which is ready to take over.
    let third = start(&broker, &names, Scripted::by_length());
    eventually("the spare is ready", || problem(&third.health).is_none());
    for daemon in [&first, &second, &third] {
        eventually("all stay ready", || problem(&daemon.health).is_none());
    }
    let mut counts = [&first, &second, &third].map(assigned);
    counts.sort_unstable();
    assert_eq!(counts, [0, 1, 1]);
    for daemon in [third, second, first] {
        daemon.stop().unwrap();
    }
}

#[test]
fn a_daemon_is_not_ready_while_no_broker_is_reachable() {
    let broker = Broker::embedded();
    let Broker::Embedded(embedded) = &broker else {
        unreachable!()
    };
    let names = Names::create(&broker, "unreachable", 2);
    let daemon = start(&broker, &names, Scripted::by_length());
    eventually("the daemon is ready", || problem(&daemon.health).is_none());
    eventually("the lag is known", || lags(&daemon) == no_lag(&[0, 1]));

    broker_down(embedded.cluster(), 1);
    eventually("the daemon is not ready", || {
        problem(&daemon.health).is_some_and(|reason| reason.starts_with("no broker reachable for "))
    });
    assert!(gauges(&daemon).contains("\nmoderatord_brokers_up 0\n"));
    assert!(lags(&daemon).is_empty(), "the ends of the partitions are not known");
    // A restart would not end the outage.
    assert_eq!(daemon.health.alive(Instant::now()), HealthVerdict::Healthy);
    eventually("the assignment is lost", || assigned(&daemon) == 0);
    assert!(!has_oldest(&daemon));
    assert!(gauges(&daemon).contains("\nmoderatord_assigned_partitions 0\n"));

    embedded.cluster().broker_up(1).unwrap();
    eventually("the daemon is ready again", || problem(&daemon.health).is_none());
    eventually("the lag is known again", || lags(&daemon) == no_lag(&[0, 1]));
    daemon.stop().unwrap();
}

#[test]
fn a_daemon_is_not_ready_while_it_commits_nothing() {
    let broker = Broker::start();
    let names = Names::create(&broker, "uncommitted", 1);
    let is_blocked = Arc::new(AtomicBool::new(true));
    let blocked = Arc::clone(&is_blocked);
    let daemon = start(
        &broker,
        &names,
        Scripted::new(move |rows| {
            if !is_canary(rows) {
                eventually("scoring goes on", || !blocked.load(Ordering::Relaxed));
            }
            Ok(rows.iter().map(margin).collect())
        }),
    );
    eventually("the daemon is ready", || problem(&daemon.health).is_none());
    let value = comment(0, "hello");
    broker.produce(&names.comments, [(0, "k", Some(value.as_slice()))]);
    let mut reason = String::new();
    eventually("the daemon is not ready", || {
        reason = problem(&daemon.health).unwrap_or_default();
        !reason.is_empty()
    });
    assert!(
        reason.starts_with("nothing committed for 1") && reason.ends_with(" s while 1 record is in flight"),
        "{reason}"
    );
    is_blocked.store(false, Ordering::Relaxed);
    await_committed(&broker, &names, &[1]);
    eventually("the daemon is ready again", || problem(&daemon.health).is_none());
    daemon.stop().unwrap();
}

/// Writes a comment in a transaction of its own, whose marker takes an offset too.
fn produce_in_transaction(broker: &Broker, topic: &str, is_committed: bool) {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", broker.address())
        .set("transactional.id", unique("upstream"));
    let producer: BaseProducer = config.create().unwrap();
    producer.init_transactions(PATIENCE).unwrap();
    producer.begin_transaction().unwrap();
    let value = comment(0, "hello");
    producer
        .send(BaseRecord::to(topic).partition(0).key("k").payload(&value))
        .unwrap();
    producer.flush(PATIENCE).unwrap();
    if is_committed {
        producer.commit_transaction(PATIENCE).unwrap();
    } else {
        producer.abort_transaction(PATIENCE).unwrap();
    }
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn the_lag_behind_a_transactional_producer_is_0_at_the_end() {
    let broker = Broker::apache();
    let names = Names::create(&broker, "markers", 1);
    produce_in_transaction(&broker, &names.comments, true);
    let daemon = start(&broker, &names, Scripted::by_length());
    // The record has offset 0, and the marker offset 1.
    await_committed(&broker, &names, &[1]);
    eventually("the lag is 0 behind a committed transaction", || {
        lags(&daemon) == no_lag(&[0])
    });
    produce_in_transaction(&broker, &names.comments, false);
    produce_in_transaction(&broker, &names.comments, true);
    await_committed(&broker, &names, &[5]);
    // The last record that is read has offset 4, and the end is 8.
    produce_in_transaction(&broker, &names.comments, false);
    assert_eq!(broker.end(&names.comments, 0), 8);
    // Longer than a report takes, so that it is about this end.
    let later = Instant::now() + Duration::from_secs(3);
    eventually("the lag is 0 behind an aborted transaction", || {
        Instant::now() > later && lags(&daemon) == no_lag(&[0])
    });
    daemon.stop().unwrap();
    // A daemon that starts behind a record finds only markers and an aborted record.
    let daemon = start(&broker, &names, Scripted::by_length());
    eventually("the lag is 0 after a restart", || lags(&daemon) == no_lag(&[0]));
    daemon.stop().unwrap();
}
