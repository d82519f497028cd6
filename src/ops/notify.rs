//! Notifies systemd of changes in the daemon's state, as in sd_notify(3), and feeds its watchdog.
//!
//! Each notification is a datagram to the socket that systemd provides; without a socket, nothing is sent. The watchdog
//! is fed only while [`Health`] reports that the daemon is alive.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::warn;

use super::health::{Health, HealthVerdict};

/// How long a notification may wait for room in the socket of a busy service manager.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// Sends notifications to the service manager, if there is one.
#[derive(Debug, Clone, Default)]
pub struct Notifier {
    address: Option<SocketAddr>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// Creates a notifier from `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`.
    ///
    /// # Errors
    /// Returns an error if the name of the socket is not a valid address.
    pub fn from_environment() -> io::Result<Self> {
        let socket = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
        let is_for_this_process = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC")
            .filter(|&micros| is_for_this_process && micros > 0)
            .map(Duration::from_micros);
        Self::new(socket.as_deref(), watchdog)
    }

    /// Creates a notifier for a socket, whose name is a path or `@` followed by an abstract name.
    ///
    /// `watchdog` is the watchdog's timeout, if the watchdog is enabled.
    ///
    /// # Errors
    /// Returns an error if the name of the socket is not a valid address.
    pub fn new(socket: Option<&OsStr>, watchdog: Option<Duration>) -> io::Result<Self> {
        let address = socket.map(|name| match name.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name),
            None => SocketAddr::from_pathname(name),
        });
        Ok(Self {
            address: address.transpose()?,
            watchdog,
        })
    }

    /// Reports that the daemon serves, either after the start or at the end of a reload.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// Reports what the daemon does before it serves, and gives it at least `within` from now to continue.
    ///
    /// The start timeout of systemd is extended only while such reports follow one another within that time.
    pub fn starting(&self, status: &str, within: Duration) {
        let micros = within.as_micros();
        self.send(&format!("EXTEND_TIMEOUT_USEC={micros}\nSTATUS={}", one_line(status)));
    }

    /// Reports what the daemon does, without a change of its state.
    pub fn status(&self, status: &str) {
        self.send(&format!("STATUS={}", one_line(status)));
    }

    /// Reports that settings are being reloaded, until the next [`Notifier::ready`].
    ///
    /// `monotonic` is the current time of the monotonic clock, which systemd requires.
    pub fn reloading(&self, monotonic: Duration) {
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", monotonic.as_micros()));
    }

    /// Reports that the daemon is draining, and extends the stop timeout of systemd to `within`.
    pub fn stopping(&self, status: &str, within: Duration) {
        let micros = within.as_micros();
        let status = one_line(status);
        self.send(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={micros}\nSTATUS={status}"));
    }

    /// Feeds the watchdog three times per timeout while `health` reports that the daemon is alive.
    ///
    /// Runs until dropped. Returns immediately if the watchdog is not enabled.
    pub async fn feed_watchdog(&self, health: Arc<Health>, now: impl Fn() -> Instant) {
        let Some(timeout) = self.watchdog else { return };
        let mut ticks = tokio::time::interval(timeout / 3);
        loop {
            ticks.tick().await;
            match health.alive(now()) {
                // If the socket has no room, this one is dropped, because the next one follows soon.
                HealthVerdict::Healthy => self.send_within("WATCHDOG=1", Duration::ZERO),
                HealthVerdict::Unhealthy(reason) => warn!(reason, "not feeding the watchdog"),
            }
        }
    }

    fn send(&self, message: &str) {
        self.send_within(message, SEND_TIMEOUT);
    }

    fn send_within(&self, message: &str, timeout: Duration) {
        let Some(address) = &self.address else { return };
        let sent = UnixDatagram::unbound().and_then(|socket| {
            if timeout.is_zero() {
                socket.set_nonblocking(true)?;
            } else {
                socket.set_write_timeout(Some(timeout))?;
            }
            socket.send_to_addr(message.as_bytes(), address)
        });
        if let Err(error) = sent {
            warn!(%error, "cannot notify the service manager");
        }
    }
}

fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::super::health::Phase;
    use super::*;

    fn listen() -> (tempfile::TempDir, UnixDatagram, Notifier) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let notifier = Notifier::new(Some(path.as_os_str()), Some(Duration::from_millis(30))).unwrap();
        (folder, socket, notifier)
    }

    fn receive(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn each_message_is_one_datagram() {
        let (_folder, socket, notifier) = listen();
        notifier.starting("waiting", Duration::from_secs(60));
        notifier.ready("serving\n2 partitions");
        notifier.status("not ready\r");
        notifier.reloading(Duration::from_millis(1500));
        notifier.stopping("draining", Duration::from_secs(2));
        assert_eq!(receive(&socket), "EXTEND_TIMEOUT_USEC=60000000\nSTATUS=waiting");
        assert_eq!(receive(&socket), "READY=1\nSTATUS=serving 2 partitions");
        assert_eq!(receive(&socket), "STATUS=not ready ");
        assert_eq!(receive(&socket), "RELOADING=1\nMONOTONIC_USEC=1500000");
        assert_eq!(
            receive(&socket),
            "STOPPING=1\nEXTEND_TIMEOUT_USEC=2000000\nSTATUS=draining"
        );
    }

    #[test]
    fn a_socket_may_be_abstract_or_missing() {
        let name = format!("moderatord-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        Notifier::new(Some(OsStr::new(&format!("@{name}"))), None)
            .unwrap()
            .ready("serving");
        assert_eq!(receive(&socket), "READY=1\nSTATUS=serving");
        Notifier::new(None, None).unwrap().ready("serving");
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_fed_only_while_batches_are_scored() {
        let (_folder, socket, notifier) = listen();
        socket.set_nonblocking(true).unwrap();
        let health = Arc::new(Health::new(Duration::from_millis(100)));
        health.enter(Phase::Serving);
        let count = || std::iter::from_fn(|| socket.recv(&mut [0; 64]).ok()).count();
        let now = || tokio::time::Instant::now().into_std();
        let (notifier, shared_health) = (notifier.clone(), Arc::clone(&health));
        let task = tokio::spawn(async move { notifier.feed_watchdog(shared_health, now).await });
        tokio::time::sleep(Duration::from_millis(95)).await;
        assert_eq!(count(), 0, "nothing was scored yet");
        health.record_scored(now());
        tokio::time::sleep(Duration::from_millis(95)).await;
        assert!((8..=10).contains(&count()));
        tokio::time::sleep(Duration::from_millis(50)).await;
        count();
        tokio::time::sleep(Duration::from_millis(95)).await;
        assert_eq!(count(), 0, "scoring stalled");
        task.abort();
    }
}
