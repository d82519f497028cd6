//! Daemons that join and leave the group, and a broker that becomes unavailable.

use std::time::Duration;

use crate::broker::{Broker, OutputRecord};
use crate::common::process::broker_down;
use crate::daemon::{Names, Scripted, Setup, margin};
use crate::flow::{assert_each_once, await_committed, comment};

fn slow() -> Scripted {
    Scripted::new(|rows| {
        std::thread::sleep(Duration::from_millis(5));
        Ok(rows.iter().map(margin).collect())
    })
}

/// Checks that every record was decided exactly once; or, on a broker without transactions, at least once and in order
/// if duplicates are left out.
fn assert_delivered(broker: &Broker, decisions: &[OutputRecord], counts: &[i64]) {
    if broker.is_apache() {
        return assert_each_once(decisions, &[], counts);
    }
    let mut first = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    for decision in decisions {
        if seen.insert(decision.json()["decision_id"].to_string()) {
            first.push(decision.clone());
        }
    }
    assert_each_once(&first, &[], counts);
}

#[test]
fn daemons_join_and_leave_under_load() {
    let broker = Broker::start();
    let names = Names::create(&broker, "members", 4);
    let count = 6000usize;
    let values: Vec<Vec<u8>> = (0..count).map(|id| comment(id, "hello")).collect();
    let produce = |range: std::ops::Range<usize>| {
        let records = range.map(|id| (i32::try_from(id % 4).unwrap(), "k", Some(values[id].as_slice())));
        broker.produce(&names.comments, records);
    };
    let setup = Setup::new(&broker, &names);
    produce(0..1000);
    let first = setup.start(&broker, slow());
    produce(1000..2000);
    std::thread::sleep(Duration::from_millis(1500));
    let second = setup.start(&broker, slow());
    for begin in (2000..5000).step_by(300) {
        produce(begin..begin + 300);
        std::thread::sleep(Duration::from_millis(250));
    }
    first.stop().unwrap();
    produce(5000..6000);
    let third = setup.start(&broker, slow());
    await_committed(&broker, &names, &[1500; 4]);
    second.stop().unwrap();
    third.stop().unwrap();
    assert_delivered(&broker, &broker.read(&names.decisions), &[1500; 4]);
}

#[test]
fn a_broker_outage_loses_nothing() {
    let broker = Broker::embedded();
    let Broker::Embedded(embedded) = &broker else {
        unreachable!()
    };
    let names = Names::create(&broker, "outage", 2);
    let values: Vec<Vec<u8>> = (0..2000).map(|id| comment(id, "hello")).collect();
    broker.produce(
        &names.comments,
        (0..)
            .zip(&values)
            .map(|(id, value)| (id % 2, "k", Some(value.as_slice()))),
    );
    let daemon = Setup::new(&broker, &names).start(&broker, slow());
    crate::daemon::eventually("some are committed", || {
        broker.committed(&names.group, &names.comments, 2).iter().sum::<i64>() > 100
    });
    broker_down(embedded.cluster(), 1);
    std::thread::sleep(Duration::from_secs(2));
    embedded.cluster().broker_up(1).unwrap();
    await_committed(&broker, &names, &[1000, 1000]);
    daemon.stop().unwrap();
    assert_delivered(&broker, &broker.read(&names.decisions), &[1000, 1000]);
}
