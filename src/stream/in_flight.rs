//! How much is in flight: read from Kafka, and not yet committed or dropped.
//!
//! Every record holds a [`Permit`] from the moment it is read until nothing needs it any more; the
//! consumer stops reading while the limits are reached. So the memory of all stages together is
//! bounded in events and bytes, whatever queues lie between them.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The shared count.
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
    /// Records by timestamp, for the age of the oldest.
    timestamps: BTreeMap<i64, usize>,
}

/// One record's share; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    in_flight: Arc<InFlight>,
    bytes: usize,
    timestamp: Option<i64>,
}

impl InFlight {
    /// Nothing in flight, and how much may be. One record more than fits may be: its size is only
    /// known once it is read.
    pub fn new(max_events: usize, max_bytes: usize) -> Self {
        Self {
            max_events,
            max_bytes,
            state: Mutex::default(),
            room: Condvar::new(),
        }
    }

    /// Takes a record's share. Never waits: whoever reads asks for room first.
    pub fn admit(self: &Arc<Self>, bytes: usize, timestamp: Option<i64>) -> Permit {
        let mut state = self.lock();
        state.events += 1;
        state.bytes += bytes;
        if let Some(timestamp) = timestamp {
            *state.timestamps.entry(timestamp).or_default() += 1;
        }
        Permit {
            in_flight: Arc::clone(self),
            bytes,
            timestamp,
        }
    }

    /// Waits until another record may be read; false when there is still no room after `timeout`.
    pub fn wait_for_room(&self, timeout: Duration) -> bool {
        let has_no_room = |state: &mut InFlightState| state.events >= self.max_events || state.bytes >= self.max_bytes;
        let waited = self.room.wait_timeout_while(self.lock(), timeout, has_no_room);
        let (_state, result) = waited.unwrap_or_else(PoisonError::into_inner);
        !result.timed_out()
    }

    /// Whether at most half of what may be in flight is: time to read on after a pause.
    pub fn is_half_empty(&self) -> bool {
        let state = self.lock();
        2 * state.events <= self.max_events && 2 * state.bytes <= self.max_bytes
    }

    /// Events and bytes in flight.
    pub fn load(&self) -> (usize, usize) {
        let state = self.lock();
        (state.events, state.bytes)
    }

    /// Timestamp of the oldest record in flight, in milliseconds since 1970.
    pub fn oldest(&self) -> Option<i64> {
        self.lock().timestamps.keys().next().copied()
    }

    fn lock(&self) -> MutexGuard<'_, InFlightState> {
        // Nothing that can panic runs between the changes of one record.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.in_flight.lock();
        state.events -= 1;
        state.bytes -= self.bytes;
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
    fn what_is_dropped_makes_room() {
        let in_flight = Arc::new(InFlight::new(2, 100));
        let check = |room: bool, load| {
            assert_eq!(in_flight.wait_for_room(Duration::ZERO), room);
            assert_eq!(in_flight.load(), load);
        };
        check(true, (0, 0));
        let first = in_flight.admit(10, Some(5));
        check(true, (1, 10));
        let second = in_flight.admit(10, Some(3));
        check(false, (2, 20));
        assert_eq!(in_flight.oldest(), Some(3));
        drop(second);
        assert_eq!(in_flight.oldest(), Some(5));
        assert!(in_flight.is_half_empty());
        let large = in_flight.admit(95, None);
        drop(first);
        assert_eq!(in_flight.oldest(), None);
        check(true, (1, 95));
        assert!(!in_flight.is_half_empty());
        let larger = in_flight.admit(5, None);
        check(false, (2, 100));
        drop((large, larger));
        check(true, (0, 0));
    }

    #[test]
    fn whoever_waits_is_woken() {
        let in_flight = Arc::new(InFlight::new(1, 100));
        let permit = in_flight.admit(1, None);
        let waiting = Arc::clone(&in_flight);
        let waiter = std::thread::spawn(move || waiting.wait_for_room(Duration::from_secs(60)));
        drop(permit);
        assert!(waiter.join().unwrap());
    }
}
