//! What the stream is doing at one moment, as plain data: whether that makes the daemon ready, and the gauges that
//! show it.
//!
//! A value that is not known has no series. A gauge that kept its last value, or fell to zero, would report that all is
//! well while nothing is being done.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use metrics::gauge;

use super::metrics::{
    ASSIGNED_PARTITIONS, BROKERS_UP, LAG, LAST_COMMIT, OLDEST_UNFINISHED, QUEUE_BYTES, QUEUE_EVENTS, UNKNOWN,
};

/// How long work may wait without a commit. It is three times the longest `kafka.commit_interval`, and far longer than a
/// batch takes.
pub const COMMIT_LIMIT: Duration = Duration::from_secs(15);

/// How long all brokers may be unreachable. A broker that restarts is often back sooner.
pub const OUTAGE_LIMIT: Duration = Duration::from_secs(5);

/// How long a member of the group may take to join it again. Every rebalance takes a moment, and one after a crash lasts
/// until the session of the member that crashed has ended.
pub const REJOIN_LIMIT: Duration = Duration::from_secs(10);

/// How old the client's last report may be. It makes one every second, but only while the consumer is polled.
pub const REPORT_LIMIT: Duration = Duration::from_secs(10);

/// Where this process stands in its consumer group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GroupState {
    /// The group's coordinator is not known or not reachable.
    #[default]
    SeekingCoordinator,
    /// This process waits for its turn in a rebalance.
    Joining,
    /// This process looks up where to read the partitions that were just assigned to it.
    Starting,
    /// This process is a member, and its assignment, which may be empty, is in force.
    Settled,
}

/// What the stream is doing at one moment.
#[derive(Debug, Clone, Default)]
pub struct StreamWork {
    /// The number of partitions that this process owns.
    pub assigned_partitions: usize,
    /// Where this process stands in its group.
    pub group: GroupState,
    /// Since when this process has been joining its group again, after it had been a settled member.
    pub rejoining_since: Option<Instant>,
    /// When the client last reported its state; `None` before the first time.
    pub last_report: Option<Instant>,
    /// The number of brokers that the consumer is connected to; `None` before the first report.
    pub brokers_up: Option<usize>,
    /// Since when no broker has been reachable, if none is.
    pub unreachable_since: Option<Instant>,
    /// The number of records that were read and are not finished.
    pub in_flight_events: usize,
    /// The bytes of these records.
    pub in_flight_bytes: usize,
    /// The number of records that wait to be encoded.
    pub read_events: usize,
    /// The timestamp of the oldest record in flight, in milliseconds since 1970.
    pub oldest_timestamp: Option<i64>,
    /// Since when something has been waiting to be committed and nothing has been; `None` if nothing waits.
    pub uncommitted_since: Option<Instant>,
    /// The time of the last commit.
    pub last_commit: Option<SystemTime>,
    /// The lag of every partition that this process has owned; `None` if it is not known, or no longer owned.
    pub lags: BTreeMap<i32, Option<i64>>,
}

impl StreamWork {
    /// Returns why the stream does not do its work, or `None` if it does: it has an assignment or is a spare member of
    /// its group, reaches the brokers, and commits what it reads.
    pub fn problem(&self, now: Instant) -> Option<String> {
        let exceeded = |start: Option<Instant>, limit| {
            let time = now.saturating_duration_since(start?);
            (time > limit).then_some(time.as_secs())
        };
        if let Some(seconds) = exceeded(self.unreachable_since, OUTAGE_LIMIT) {
            return Some(format!("no broker reachable for {seconds} s"));
        }
        let waits_for = match self.group {
            GroupState::Settled => None,
            // During a rebalance, a member keeps working on the partitions that it has.
            _ if self.assigned_partitions > 0 => None,
            _ if self.rejoining_since.is_some() && exceeded(self.rejoining_since, REJOIN_LIMIT).is_none() => None,
            GroupState::SeekingCoordinator => Some("the coordinator of the consumer group"),
            GroupState::Joining => Some("an assignment by the consumer group"),
            GroupState::Starting => Some("the committed offsets"),
        };
        if let Some(reason) = waits_for {
            return Some(format!("no partition is assigned: waiting for {reason}"));
        }
        if let Some(seconds) = exceeded(self.last_report, REPORT_LIMIT) {
            return Some(format!("the consumer has not been polled for {seconds} s"));
        }
        let seconds = exceeded(self.uncommitted_since, COMMIT_LIMIT)?;
        let what = match self.in_flight_events {
            0 => "an offset waits to be committed".to_owned(),
            1 => "1 record is in flight".to_owned(),
            events => format!("{events} records are in flight"),
        };
        Some(format!("nothing committed for {seconds} s while {what}"))
    }

    /// Updates the gauges.
    pub fn report(&self, now: Instant, time: SystemTime) {
        gauge!(ASSIGNED_PARTITIONS).set(self.assigned_partitions as f64);
        gauge!(BROKERS_UP).set(self.brokers_up.map_or(UNKNOWN, |count| count as f64));
        gauge!(LAST_COMMIT).set(self.last_commit.map_or(UNKNOWN, seconds));
        gauge!(QUEUE_EVENTS, "queue" => "in_flight").set(self.in_flight_events as f64);
        gauge!(QUEUE_BYTES, "queue" => "in_flight").set(self.in_flight_bytes as f64);
        gauge!(QUEUE_EVENTS, "queue" => "read").set(self.read_events as f64);
        if self.in_flight_events == 0 {
            // The stages update these only when something arrives, and every record in a queue is in flight.
            for queue in ["batch", "commit"] {
                gauge!(QUEUE_EVENTS, "queue" => queue).set(0.0);
                gauge!(QUEUE_BYTES, "queue" => queue).set(0.0);
            }
        }
        let age = self
            .oldest_timestamp
            .map_or(0.0, |oldest| (seconds(time) - oldest as f64 / 1e3).max(0.0));
        gauge!(OLDEST_UNFINISHED).set(if self.assigned_partitions == 0 { UNKNOWN } else { age });
        let is_current = self.is_current(now);
        for (partition, lag) in &self.lags {
            let lag = lag.filter(|_| is_current).map_or(UNKNOWN, |lag| lag as f64);
            gauge!(LAG, "partition" => partition.to_string()).set(lag);
        }
    }

    /// Returns whether the client's last report describes the present: the ends of partitions are not known without a
    /// broker.
    fn is_current(&self, now: Instant) -> bool {
        let within = |start: Option<Instant>, limit| {
            start.is_none_or(|start: Instant| now.saturating_duration_since(start) <= limit)
        };
        within(self.last_report, REPORT_LIMIT) && within(self.unreachable_since, OUTAGE_LIMIT)
    }
}

/// Returns a time as seconds since 1970.
fn seconds(time: SystemTime) -> f64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The stream of a daemon that owns three partitions and has committed everything.
    fn assigned(now: Instant) -> StreamWork {
        StreamWork {
            assigned_partitions: 3,
            group: GroupState::Settled,
            last_report: Some(now),
            brokers_up: Some(1),
            ..StreamWork::default()
        }
    }

    #[test]
    fn a_stream_is_ready_if_it_is_assigned_or_a_spare_and_commits() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let now = after(100);
        let check = |expected: Option<&str>, change: &dyn Fn(&mut StreamWork)| {
            let mut work = assigned(now);
            change(&mut work);
            assert_eq!(work.problem(now).as_deref(), expected, "{work:?}");
        };
        let not_assigned = |work: &mut StreamWork, group| (work.assigned_partitions, work.group) = (0, group);

        check(None, &|_| {});
        // A spare, to which the group has assigned nothing.
        check(None, &|work| not_assigned(work, GroupState::Settled));
        check(
            Some("no partition is assigned: waiting for the coordinator of the consumer group"),
            &|work| not_assigned(work, GroupState::SeekingCoordinator),
        );
        check(
            Some("no partition is assigned: waiting for an assignment by the consumer group"),
            &|work| not_assigned(work, GroupState::Joining),
        );
        check(
            Some("no partition is assigned: waiting for the committed offsets"),
            &|work| {
                not_assigned(work, GroupState::Starting);
            },
        );
        // A member that joins again, such as a spare in every rebalance.
        check(None, &|work| {
            not_assigned(work, GroupState::Joining);
            work.rejoining_since = Some(after(90));
        });
        check(
            Some("no partition is assigned: waiting for an assignment by the consumer group"),
            &|work| {
                not_assigned(work, GroupState::Joining);
                work.rejoining_since = Some(after(89));
            },
        );
        // During a cooperative rebalance, a member keeps working on what it has.
        check(None, &|work| work.group = GroupState::Joining);

        check(None, &|work| work.unreachable_since = Some(after(95)));
        check(Some("no broker reachable for 12 s"), &|work| {
            work.unreachable_since = Some(after(88))
        });
        check(Some("no broker reachable for 12 s"), &|work| {
            not_assigned(work, GroupState::SeekingCoordinator);
            work.unreachable_since = Some(after(88));
        });

        check(None, &|work| work.last_report = Some(after(90)));
        check(Some("the consumer has not been polled for 11 s"), &|work| {
            work.last_report = Some(after(89));
        });

        check(None, &|work| {
            (work.in_flight_events, work.uncommitted_since) = (140, Some(after(85)));
        });
        check(
            Some("nothing committed for 23 s while 140 records are in flight"),
            &|work| {
                (work.in_flight_events, work.uncommitted_since) = (140, Some(after(77)));
            },
        );
        check(
            Some("nothing committed for 16 s while 1 record is in flight"),
            &|work| {
                (work.in_flight_events, work.uncommitted_since) = (1, Some(after(84)));
            },
        );
        check(
            Some("nothing committed for 16 s while an offset waits to be committed"),
            &|work| {
                work.uncommitted_since = Some(after(84));
            },
        );
    }

    #[test]
    fn a_gauge_whose_value_is_unknown_has_no_series() {
        let (recorder, exporter) = super::super::metrics::build().unwrap();
        let start = Instant::now();
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let render = |work: &StreamWork, now| {
            metrics::with_local_recorder(&recorder, || work.report(now, time));
            exporter.render()
        };
        let check = |text: &str, present: &[&str], absent: &[&str]| {
            let has = |name: &&str| text.lines().any(|line| line.starts_with(*name));
            assert!(present.iter().all(has), "{present:?} in {text}");
            assert!(!absent.iter().any(has), "{absent:?} not in {text}");
            assert!(!text.contains("NaN"), "{text}");
        };
        let (first, second) = (
            "moderatord_consumer_lag_records{partition=\"0\"} ",
            "moderatord_consumer_lag_records{partition=\"1\"} ",
        );

        // At the start, before the client's first report.
        check(
            &render(&StreamWork::default(), start),
            &["moderatord_assigned_partitions 0"],
            &[
                "moderatord_oldest_unfinished_seconds ",
                "moderatord_brokers_up ",
                "moderatord_last_commit_timestamp_seconds ",
                "moderatord_consumer_lag_records{",
            ],
        );
        // Two partitions, the second of which has not been fetched from yet.
        let mut work = StreamWork {
            lags: [(0, Some(7)), (1, None)].into(),
            in_flight_events: 2,
            oldest_timestamp: Some(988_000),
            last_commit: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(900)),
            ..assigned(start)
        };
        check(
            &render(&work, start),
            &[
                "moderatord_assigned_partitions 3",
                "moderatord_oldest_unfinished_seconds 12",
                "moderatord_brokers_up 1",
                "moderatord_last_commit_timestamp_seconds 900",
                "moderatord_consumer_lag_records{partition=\"0\"} 7",
            ],
            &[second],
        );
        // The reports are too old.
        check(
            &render(&work, start + Duration::from_secs(11)),
            &["moderatord_brokers_up 1"],
            &[first, second],
        );
        // Everything is finished.
        (work.in_flight_events, work.oldest_timestamp) = (0, None);
        work.lags = [(0, Some(0)), (1, Some(0))].into();
        check(
            &render(&work, start),
            &[
                "moderatord_oldest_unfinished_seconds 0",
                "moderatord_queue_events{queue=\"commit\"} 0",
                "moderatord_queue_bytes{queue=\"batch\"} 0",
                first,
                second,
            ],
            &[],
        );
        // The assignment is lost.
        work.assigned_partitions = 0;
        work.lags = [(0, None), (1, None)].into();
        check(
            &render(&work, start),
            &[
                "moderatord_assigned_partitions 0",
                "moderatord_last_commit_timestamp_seconds 900",
            ],
            &["moderatord_oldest_unfinished_seconds ", first, second],
        );
    }
}
