//! Limits how much is in flight: records that were read from Kafka and are not yet committed or dropped.
//!
//! Every record holds an [`InFlightGuard`] from the moment it is read until it is dropped, and the consumer stops
//! reading while a limit is reached. This bounds the memory of all stages together, in events and in bytes, however
//! the records are spread over the queues between them.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Counts the records in flight and their bytes, and wakes the reader when there is room for more.
#[derive(Debug)]
pub struct InFlight {
    max_events: usize,
    max_bytes: usize,
    state: Mutex<InFlightState>,
    room: Condvar,
}

#[derive(Debug, Default)]
struct InFlightState {
    events: usize,
    bytes: usize,
    /// How many records have each timestamp, for the age of the oldest.
    timestamps: BTreeMap<i64, usize>,
    /// Since when there has always been a record in flight, if there is one.
    busy_since: Option<Instant>,
}

/// Counts one record as in flight until it is dropped.
#[derive(Debug)]
pub struct InFlightGuard {
    in_flight: Arc<InFlight>,
    bytes: usize,
    timestamp: Option<i64>,
}

impl InFlight {
    /// Creates a counter with its limits.
    ///
    /// The limits can be exceeded by one record, whose size is only known once it is read.
    pub fn new(max_events: usize, max_bytes: usize) -> Self {
        Self {
            max_events,
            max_bytes,
            state: Mutex::default(),
            room: Condvar::new(),
        }
    }

    /// Counts a record that is read at `now` as in flight until the guard is dropped. Never waits; call
    /// [`InFlight::wait_for_room`] first.
    pub fn add(self: &Arc<Self>, bytes: usize, timestamp: Option<i64>, now: Instant) -> InFlightGuard {
        let mut state = self.lock();
        state.busy_since.get_or_insert(now);
        state.events += 1;
        state.bytes += bytes;
        if let Some(timestamp) = timestamp {
            *state.timestamps.entry(timestamp).or_default() += 1;
        }
        InFlightGuard {
            in_flight: Arc::clone(self),
            bytes,
            timestamp,
        }
    }

    /// Waits until another record may be read. Returns false if there is still no room after `timeout`.
    pub fn wait_for_room(&self, timeout: Duration) -> bool {
        let has_no_room = |state: &mut InFlightState| state.events >= self.max_events || state.bytes >= self.max_bytes;
        let waited = self.room.wait_timeout_while(self.lock(), timeout, has_no_room);
        let (_state, result) = waited.unwrap_or_else(PoisonError::into_inner);
        !result.timed_out()
    }

    /// Returns whether at most half of each limit is used, in which case a paused consumer resumes.
    pub fn is_half_empty(&self) -> bool {
        let state = self.lock();
        2 * state.events <= self.max_events && 2 * state.bytes <= self.max_bytes
    }

    /// Returns the number of events in flight and their bytes.
    pub fn totals(&self) -> (usize, usize) {
        let state = self.lock();
        (state.events, state.bytes)
    }

    /// Returns the timestamp of the oldest record in flight, in milliseconds since 1970.
    pub fn oldest_timestamp(&self) -> Option<i64> {
        self.lock().timestamps.keys().next().copied()
    }

    /// Returns since when there has always been a record in flight, or `None` if there is none.
    pub fn busy_since(&self) -> Option<Instant> {
        self.lock().busy_since
    }

    fn lock(&self) -> MutexGuard<'_, InFlightState> {
        // A poisoned state is still consistent: nothing between the changes for one record can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        let mut state = self.in_flight.lock();
        state.events -= 1;
        state.bytes -= self.bytes;
        if state.events == 0 {
            state.busy_since = None;
        }
        if let Some(timestamp) = self.timestamp
            && let Some(count) = state.timestamps.get_mut(&timestamp)
        {
            *count -= 1;
            if *count == 0 {
                state.timestamps.remove(&timestamp);
            }
        }
        drop(state);
        self.in_flight.room.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_record_makes_room() {
        let in_flight = Arc::new(InFlight::new(2, 100));
        let now = Instant::now();
        let check = |room: bool, totals| {
            assert_eq!(in_flight.wait_for_room(Duration::ZERO), room);
            assert_eq!(in_flight.totals(), totals);
        };
        check(true, (0, 0));
        let first = in_flight.add(10, Some(5), now);
        check(true, (1, 10));
        let second = in_flight.add(10, Some(3), now + Duration::from_secs(1));
        check(false, (2, 20));
        assert_eq!(in_flight.oldest_timestamp(), Some(3));
        assert_eq!(in_flight.busy_since(), Some(now));
        drop(second);
        assert_eq!(in_flight.oldest_timestamp(), Some(5));
        assert!(in_flight.is_half_empty());
        let large = in_flight.add(95, None, now);
        drop(first);
        assert_eq!(in_flight.oldest_timestamp(), None);
        check(true, (1, 95));
        assert!(!in_flight.is_half_empty());
        let larger = in_flight.add(5, None, now);
        check(false, (2, 100));
        assert_eq!(in_flight.busy_since(), Some(now));
        drop((large, larger));
        check(true, (0, 0));
        assert_eq!(in_flight.busy_since(), None);
    }

    #[test]
    fn a_waiting_reader_is_woken() {
        let in_flight = Arc::new(InFlight::new(1, 100));
        let guard = in_flight.add(1, None, Instant::now());
        let waiting = Arc::clone(&in_flight);
        let waiter = std::thread::spawn(move || waiting.wait_for_room(Duration::from_secs(60)));
        drop(guard);
        assert!(waiter.join().unwrap());
    }
}
