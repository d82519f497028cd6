//! Reports to the service manager and the log when the daemon becomes ready, and when it no longer is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::health::{Health, HealthVerdict};
use super::notify::Notifier;

/// The shortest time between two reports of the same state, whose text may contain a time that grows.
const REPEAT_INTERVAL: Duration = Duration::from_secs(1);

/// How much time each report before the daemon is ready requests from the service manager. It is enough for the longest
/// steps without reports of their own: loading the model, and warming it up.
pub const START_EXTENSION: Duration = Duration::from_secs(600);

/// The daemon's state as it was last reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Announced {
    /// Nothing was reported yet.
    Nothing,
    /// The daemon waits to become ready for the first time.
    Waiting,
    Ready,
    /// The daemon was ready, and no longer is.
    NotReady,
}

/// Follows the readiness of the daemon.
pub struct Announcer {
    notifier: Notifier,
    health: Arc<Health>,
    announced: Announced,
    last_report: Option<Instant>,
}

impl Announcer {
    /// Creates an announcer for a daemon that is about to join its group.
    pub fn new(notifier: Notifier, health: Arc<Health>) -> Self {
        Self {
            notifier,
            health,
            announced: Announced::Nothing,
            last_report: None,
        }
    }

    /// Returns whether the daemon has been ready, so that the service manager counts it as started.
    pub fn has_been_ready(&self) -> bool {
        matches!(self.announced, Announced::Ready | Announced::NotReady)
    }

    /// Reports the state if it has changed. Called several times a second.
    ///
    /// The service manager is asked for more time to start only while the daemon is alive. An outage of Kafka can then
    /// last for any time, but a daemon that hangs is ended.
    pub fn update(&mut self, now: Instant) {
        match self.health.ready(now) {
            HealthVerdict::Healthy => self.report_ready(),
            HealthVerdict::Unhealthy(reason) => self.report_problem(&reason, now),
        }
    }

    fn report_ready(&mut self) {
        match self.announced {
            Announced::Ready => return,
            Announced::NotReady => {
                self.notifier.status("serving");
                info!("ready again");
            }
            Announced::Nothing | Announced::Waiting => {
                self.notifier.ready("serving");
                info!("ready");
            }
        }
        self.announced = Announced::Ready;
    }

    fn report_problem(&mut self, reason: &str, now: Instant) {
        let next = if self.has_been_ready() {
            Announced::NotReady
        } else {
            Announced::Waiting
        };
        let has_changed = self.announced != next;
        let is_due = |last: Instant| now.saturating_duration_since(last) >= REPEAT_INTERVAL;
        if !has_changed && !self.last_report.is_none_or(is_due) {
            return;
        }
        self.last_report = Some(now);
        self.announced = next;
        if next == Announced::NotReady {
            self.notifier.status(&format!("not ready: {reason}"));
            if has_changed {
                warn!(reason, "no longer ready");
            }
            return;
        }
        match self.health.alive(now) {
            HealthVerdict::Healthy => self.notifier.starting(reason, START_EXTENSION),
            HealthVerdict::Unhealthy(_) => self.notifier.status(reason),
        }
        if has_changed {
            info!(reason, "not ready yet");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::sync::Mutex;

    use super::super::health::Phase;
    use super::super::work::{GroupState, StreamWork};
    use super::*;

    #[test]
    fn ready_is_reported_once_joined_and_problems_as_the_status() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        let notifier = Notifier::new(Some(path.as_os_str()), None).unwrap();
        let (health, start) = (Arc::new(Health::new(Duration::from_secs(60))), Instant::now());
        let work = Arc::new(Mutex::new(StreamWork::default()));
        let shared_work = Arc::clone(&work);
        health.watch(move || shared_work.lock().unwrap().clone());
        health.enter(Phase::Serving);
        health.record_scored(start);
        let mut announcer = Announcer::new(notifier, health);
        let mut check = |millis, expected: &[&str]| {
            announcer.update(start + Duration::from_millis(millis));
            let receive = || {
                let mut buffer = [0; 512];
                let length = socket.recv(&mut buffer).ok()?;
                Some(String::from_utf8(buffer[..length].to_vec()).unwrap())
            };
            let received: Vec<String> = std::iter::from_fn(receive).collect();
            assert_eq!(received, expected, "after {millis} ms");
            announcer.has_been_ready()
        };
        let waiting = "EXTEND_TIMEOUT_USEC=600000000\nSTATUS=no partition is assigned: waiting for the coordinator of \
                       the consumer group";
        assert!(!check(0, &[waiting]));
        check(900, &[]);
        check(1000, &[waiting]);
        work.lock().unwrap().group = GroupState::Settled;
        assert!(check(1050, &["READY=1\nSTATUS=serving"]));
        check(3000, &[]);
        work.lock().unwrap().unreachable_since = Some(start + Duration::from_millis(3000));
        check(8000, &[]);
        check(9100, &["STATUS=not ready: no broker reachable for 6 s"]);
        check(9500, &[]);
        assert!(check(10_100, &["STATUS=not ready: no broker reachable for 7 s"]));
        work.lock().unwrap().unreachable_since = None;
        check(10_200, &["STATUS=serving"]);
        check(10_300, &[]);
        // A daemon that no longer scores is not alive. It has been ready, so there is no start to extend.
        check(70_000, &["STATUS=not ready: no batch scored for 70 s"]);
    }

    #[test]
    fn a_start_is_not_extended_while_nothing_is_scored() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::new(Some(path.as_os_str()), None).unwrap();
        let (health, start) = (Arc::new(Health::new(Duration::from_secs(60))), Instant::now());
        health.enter(Phase::Serving);
        health.record_scored(start);
        Announcer::new(notifier, health).update(start + Duration::from_secs(61));
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"STATUS=no batch scored for 61 s");
    }
}
