//! The service manager's side of life: sd_notify(3) and the watchdog.
//!
//! A datagram to the socket that systemd names; nothing is sent where it names none. The watchdog is
//! fed only while [`Health`] says that batches are scored.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::warn;

use super::health::{Health, HealthVerdict};

/// How long a change of state waits for a service manager that is busy.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where to tell the service manager, if there is one.
#[derive(Debug, Clone, Default)]
pub struct Notifier {
    address: Option<SocketAddr>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// From `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`.
    ///
    /// # Errors
    /// The socket's name cannot be an address.
    pub fn from_environment() -> io::Result<Self> {
        let socket = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC")
            .filter(|&micros| ours && micros > 0)
            .map(Duration::from_micros);
        Self::new(socket.as_deref(), watchdog)
    }

    /// For a socket's name as systemd writes it: a path, or `@` and an abstract name.
    ///
    /// # Errors
    /// The name cannot be an address.
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

    /// Warm, joined, taking comments.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// Reloading settings or an adapter; `ready` ends it.
    pub fn reloading(&self, monotonic: Duration) {
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", monotonic.as_micros()));
    }

    /// Draining, for at most so long, which the manager's own stop timeout is extended to.
    pub fn stopping(&self, status: &str, within: Duration) {
        let micros = within.as_micros();
        let status = one_line(status);
        self.send(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={micros}\nSTATUS={status}"));
    }

    /// One line for `systemctl status`.
    pub fn status(&self, status: &str) {
        self.send(&format!("STATUS={}", one_line(status)));
    }

    /// How often the watchdog wants to hear, if it watches.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Feeds the watchdog three times a period for as long as `health` says that work is done.
    ///
    /// Runs until dropped; returns at once where no watchdog watches.
    pub async fn feed_watchdog(&self, health: Arc<Health>, now: impl Fn() -> Instant) {
        let Some(period) = self.watchdog else { return };
        let mut ticks = tokio::time::interval(period / 3);
        loop {
            ticks.tick().await;
            match health.alive(now()) {
                // The next one is soon; waiting for room would hold up more than it is worth.
                HealthVerdict::Good => self.send_within("WATCHDOG=1", Duration::ZERO),
                HealthVerdict::Bad(reason) => warn!(reason, "not feeding the watchdog"),
            }
        }
    }

    fn send(&self, message: &str) {
        self.send_within(message, PATIENCE);
    }

    fn send_within(&self, message: &str, patience: Duration) {
        let Some(address) = &self.address else { return };
        let sent = UnixDatagram::unbound().and_then(|socket| {
            if patience.is_zero() {
                socket.set_nonblocking(true)?;
            } else {
                socket.set_write_timeout(Some(patience))?;
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
        notifier.ready("serving\n2 partitions");
        notifier.reloading(Duration::from_millis(1500));
        notifier.stopping("draining", Duration::from_secs(2));
        assert_eq!(receive(&socket), "READY=1\nSTATUS=serving 2 partitions");
        assert_eq!(receive(&socket), "RELOADING=1\nMONOTONIC_USEC=1500000");
        assert_eq!(
            receive(&socket),
            "STOPPING=1\nEXTEND_TIMEOUT_USEC=2000000\nSTATUS=draining"
        );
    }

    #[test]
    fn an_abstract_socket_and_none_at_all() {
        let name = format!("moderatord-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        Notifier::new(Some(OsStr::new(&format!("@{name}"))), None)
            .unwrap()
            .status("well");
        assert_eq!(receive(&socket), "STATUS=well");
        Notifier::new(None, None).unwrap().status("nobody listens");
    }

    /// The watchdog hears while batches are scored, and nothing once they are not.
    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_fed_by_scored_batches_only() {
        let (_folder, socket, notifier) = listen();
        socket.set_nonblocking(true).unwrap();
        let health = Arc::new(Health::new(Duration::from_millis(100)));
        health.enter(Phase::Serving);
        let count = || std::iter::from_fn(|| socket.recv(&mut [0; 64]).ok()).count();
        let now = || tokio::time::Instant::now().into_std();
        let (feeder, fed) = (notifier.clone(), Arc::clone(&health));
        let task = tokio::spawn(async move { feeder.feed_watchdog(fed, now).await });
        tokio::time::sleep(Duration::from_millis(95)).await;
        assert_eq!(count(), 0, "nothing was scored yet");
        health.scored(now());
        tokio::time::sleep(Duration::from_millis(95)).await;
        assert!((8..=10).contains(&count()));
        tokio::time::sleep(Duration::from_millis(50)).await;
        count();
        tokio::time::sleep(Duration::from_millis(95)).await;
        assert_eq!(count(), 0, "scoring stalled");
        task.abort();
    }
}
