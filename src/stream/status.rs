//! What the consumer's client reports about its group and its brokers, and the state of the whole stream at one moment.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::Receiver;
use rdkafka::statistics::{Broker, ConsumerGroup, Statistics};

use super::committed::CommittedOffsets;
use super::in_flight::InFlight;
use super::ownership::Ownership;
use super::record::Record;
use crate::ops::work::{GroupState, StreamWork};

/// The latest report of the consumer's client, shared by the thread that polls it and the health checks.
#[derive(Debug, Default)]
pub struct ClientStatus {
    state: Mutex<ClientState>,
}

#[derive(Debug, Default)]
struct ClientState {
    group: GroupState,
    rejoining_since: Option<Instant>,
    last_report: Option<Instant>,
    brokers_up: Option<usize>,
    unreachable_since: Option<Instant>,
    lags: BTreeMap<i32, Option<i64>>,
}

impl ClientStatus {
    /// Records what the client reports at `now`, and the lag of each partition of which it is known.
    pub fn record_report(
        &self,
        statistics: &Statistics,
        lags: impl IntoIterator<Item = (i32, Option<i64>)>,
        now: Instant,
    ) {
        let mut state = self.lock();
        state.last_report = Some(now);
        if let Some(group) = &statistics.cgrp {
            state.enter(group_state(group), now);
        }
        let count = count_up(&statistics.brokers);
        state.brokers_up = Some(count);
        state.unreachable_since = match count {
            0 => state.unreachable_since.or(Some(now)),
            _ => None,
        };
        state.lags.extend(lags);
    }

    /// Records that partitions were assigned at `now`, and that their offsets are being looked up.
    pub fn record_starting(&self, now: Instant) {
        self.lock().enter(GroupState::Starting, now);
    }

    /// Records that these partitions are no longer owned.
    pub fn forget_lags(&self, partitions: &[i32]) {
        self.lock()
            .lags
            .extend(partitions.iter().map(|&partition| (partition, None)));
    }

    fn lock(&self) -> MutexGuard<'_, ClientState> {
        // A poisoned state is still consistent: each field is replaced as a whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientState {
    fn enter(&mut self, group: GroupState, now: Instant) {
        if group == GroupState::Settled {
            self.rejoining_since = None;
        } else if self.group == GroupState::Settled {
            self.rejoining_since = Some(now);
        }
        self.group = group;
    }
}

/// Returns where the client stands in its group, from librdkafka's names of the states.
fn group_state(group: &ConsumerGroup) -> GroupState {
    match (group.state.as_str(), group.join_state.as_str()) {
        ("up", "steady") => GroupState::Settled,
        ("up", "wait-assign-call") => GroupState::Starting,
        ("up", _) => GroupState::Joining,
        _ => GroupState::SeekingCoordinator,
    }
}

/// Counts the brokers to which there is a connection.
///
/// The client has several connections to one broker: one that the settings name, one under the name by which the broker
/// announces itself, and one to it as the coordinator of the group. The first may have an alias as its name, so it
/// counts only if there is no other.
fn count_up(brokers: &HashMap<String, Broker>) -> usize {
    let is_up = |broker: &&Broker| matches!(broker.state.as_str(), "UP" | "REAUTH") && broker.source != "internal";
    let count = |is_configured: bool| {
        let chosen = brokers.values().filter(is_up);
        let names = chosen.filter(|broker| (broker.source == "configured") == is_configured);
        names.map(|broker| &broker.nodename).collect::<BTreeSet<_>>().len()
    };
    match count(false) {
        0 => count(true),
        announced => announced,
    }
}

/// Gathers the state of the stream from what its stages share.
pub struct StreamMonitor {
    pub ownership: Arc<Ownership>,
    pub committed: Arc<CommittedOffsets>,
    pub in_flight: Arc<InFlight>,
    pub client: Arc<ClientStatus>,
    /// The channel to the encode stage, of which only the length is read.
    pub records: Receiver<Record>,
}

impl StreamMonitor {
    /// Returns what the stream is doing.
    pub fn work(&self) -> StreamWork {
        let (in_flight_events, in_flight_bytes) = self.in_flight.totals();
        let last_commit = self.committed.last_commit();
        let waiting = [self.in_flight.busy_since(), self.committed.pending_since()];
        let waiting_since = waiting.into_iter().flatten().min();
        let client = self.client.lock();
        StreamWork {
            assigned_partitions: self.ownership.partitions().len(),
            group: client.group,
            rejoining_since: client.rejoining_since,
            last_report: client.last_report,
            brokers_up: client.brokers_up,
            unreachable_since: client.unreachable_since,
            in_flight_events,
            in_flight_bytes,
            read_events: self.records.len(),
            oldest_timestamp: self.in_flight.oldest_timestamp(),
            uncommitted_since: waiting_since.map(|since| last_commit.map_or(since, |(last, _)| since.max(last))),
            last_commit: last_commit.map(|(_, time)| time),
            lags: client.lags.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn broker(nodename: &str, source: &str, state: &str) -> (String, Broker) {
        let broker = Broker {
            nodename: nodename.into(),
            source: source.into(),
            state: state.into(),
            ..Broker::default()
        };
        (format!("{nodename}/{source}"), broker)
    }

    #[test]
    fn each_broker_with_a_connection_counts_once() {
        let check = |expected, brokers: &[(&str, &str, &str)]| {
            let brokers = brokers.iter().map(|&(name, source, state)| broker(name, source, state));
            assert_eq!(count_up(&brokers.collect()), expected);
        };
        check(0, &[]);
        check(
            0,
            &[("kafka:9092", "configured", "TRY_CONNECT"), ("", "logical", "INIT")],
        );
        check(0, &[(":0", "internal", "UP"), ("kafka:9092", "configured", "DOWN")]);
        check(1, &[("kafka:9092", "configured", "UP")]);
        check(
            1,
            &[
                ("kafka:9092", "configured", "UP"),
                ("one:9092", "learned", "UP"),
                ("one:9092", "logical", "UP"),
            ],
        );
        check(
            2,
            &[
                ("one:9092", "learned", "UP"),
                ("two:9092", "logical", "REAUTH"),
                ("three:9092", "learned", "INIT"),
            ],
        );
    }

    #[test]
    fn a_member_is_settled_only_while_its_assignment_is_in_force() {
        let check = |state: &str, join_state: &str, expected| {
            let group = ConsumerGroup {
                state: state.into(),
                join_state: join_state.into(),
                ..ConsumerGroup::default()
            };
            assert_eq!(group_state(&group), expected, "{state} {join_state}");
        };
        check("init", "init", GroupState::SeekingCoordinator);
        check("wait-broker-transport", "steady", GroupState::SeekingCoordinator);
        check("up", "init", GroupState::Joining);
        check("up", "wait-sync", GroupState::Joining);
        check("up", "wait-assign-call", GroupState::Starting);
        check("up", "steady", GroupState::Settled);
    }

    #[test]
    fn only_a_member_that_had_settled_joins_again() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut state = ClientState::default();
        let mut check = |group, seconds, expected| {
            state.enter(group, at(seconds));
            assert_eq!(state.rejoining_since, expected, "{group:?}");
        };
        check(GroupState::SeekingCoordinator, 0, None);
        check(GroupState::Joining, 1, None);
        check(GroupState::Settled, 2, None);
        check(GroupState::Joining, 3, Some(at(3)));
        check(GroupState::Starting, 4, Some(at(3)));
        check(GroupState::Settled, 5, None);
    }

    #[test]
    fn an_outage_begins_with_the_first_report_without_a_broker() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let status = ClientStatus::default();
        let report = |state, seconds| {
            let statistics = Statistics {
                brokers: [broker("one:9092", "learned", state)].into(),
                ..Statistics::default()
            };
            status.record_report(&statistics, [], at(seconds));
            status.lock().unreachable_since
        };
        assert_eq!(report("CONNECT", 1), Some(at(1)));
        assert_eq!(report("UP", 2), None);
        assert_eq!(report("DOWN", 3), Some(at(3)));
        assert_eq!(report("TRY_CONNECT", 9), Some(at(3)));
        assert_eq!(report("UP", 10), None);
    }
}
