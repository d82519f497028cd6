//! Waits while something else has to be looked after.

use std::time::{Duration, Instant};

use super::observer::{Observer, now};

/// How long the last comments may take at the end.
const DRAIN: Duration = Duration::from_secs(180);

/// Calls `tend` until a condition holds.
pub fn wait_until(mut tend: impl FnMut(), mut holds: impl FnMut() -> bool) {
    while !holds() {
        tend();
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Calls `tend` for that long.
pub fn wait_for(time: Duration, tend: impl FnMut()) {
    let end = Instant::now() + time;
    wait_until(tend, || Instant::now() >= end);
}

/// Waits until no comment waits for long, so that all groups have balanced their members.
pub fn await_steady(observer: &Observer, tend: impl FnMut()) {
    // Both are generous, because other work may slow the machine down.
    const STEADY: Duration = Duration::from_secs(10);
    const LONG: Duration = Duration::from_secs(5);
    let deadline = Instant::now() + DRAIN;
    let mut since = Instant::now();
    wait_until(tend, || {
        assert!(Instant::now() < deadline, "not steady within {DRAIN:?}");
        let is_late = observer
            .contenders()
            .any(|(contender, _)| observer.oldest_unfinished(contender, now(), now()) > LONG);
        if is_late || observer.comments() == 0 {
            since = Instant::now();
        }
        since.elapsed() >= STEADY
    });
}

/// Waits until all comments that were written have an output of each contender, or until that takes too long.
///
/// `written` is asked every time, because a load that was stopped may still be writing its last comments.
pub fn await_finished(observer: &Observer, written: impl Fn() -> usize, tend: impl FnMut()) {
    let deadline = Instant::now() + DRAIN;
    wait_until(tend, || {
        let is_finished = observer.comments() == written()
            && observer
                .contenders()
                .all(|(contender, _)| observer.unfinished(contender) == 0);
        is_finished || Instant::now() >= deadline
    });
}

/// Calls a function when it is dropped, so that a failed test ends its threads too.
pub struct OnDrop<F: FnMut()>(pub F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
