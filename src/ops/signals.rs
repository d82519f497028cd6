//! Receives SIGTERM, SIGINT and SIGHUP on a thread of its own, from the start of the process on.
//!
//! While the daemon is starting, its main thread may be busy for minutes. A request to stop then ends the process at
//! once, because nothing has been read yet, and a request to reload is kept until the daemon serves.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tracing::info;

use super::process::exit_now;

/// The number of stop signals that are kept: the second one ends a drain, and further ones change nothing.
const KEPT_STOPS: usize = 2;

/// Whether the daemon is starting, which is when a request to stop ends the process.
type IsStarting = Arc<Mutex<bool>>;

/// The signals that the process receives.
pub(crate) struct Signals {
    /// Yields a value for each SIGTERM or SIGINT.
    pub stops: Receiver<()>,
    /// Yields a value after a SIGHUP; several that arrive together count as one.
    pub reloads: Receiver<()>,
    is_starting: IsStarting,
}

impl Signals {
    /// Handles the signals from here on.
    ///
    /// # Errors
    /// Returns an error if the handlers cannot be installed or the thread cannot be started.
    pub(crate) fn listen() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let signals = {
            let _context = runtime.enter();
            [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal)
        };
        let [terminate, interrupt, hangup] = signals;
        let (terminate, interrupt, hangup) = (terminate?, interrupt?, hangup?);
        let (stop, stops) = channel(KEPT_STOPS);
        let (reload, reloads) = channel(1);
        let is_starting = Arc::new(Mutex::new(true));
        let forwarder = SignalForwarder {
            stop,
            reload,
            is_starting: Arc::clone(&is_starting),
        };
        // Not joined: it ends with the process.
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || runtime.block_on(forwarder.run(terminate, interrupt, hangup)))?;
        Ok(Self {
            stops,
            reloads,
            is_starting,
        })
    }

    /// Ends the start: from here on, a request to stop is passed on instead of ending the process.
    pub(crate) fn begin_serving(&self) {
        *self.is_starting.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

struct SignalForwarder {
    stop: Sender<()>,
    reload: Sender<()>,
    is_starting: IsStarting,
}

impl SignalForwarder {
    async fn run(self, mut terminate: Signal, mut interrupt: Signal, mut hangup: Signal) {
        loop {
            // If a channel is full, as many requests as matter are pending already.
            let _ = tokio::select! {
                _ = terminate.recv() => self.stop(),
                _ = interrupt.recv() => self.stop(),
                _ = hangup.recv() => self.reload.try_send(()),
            };
        }
    }

    fn stop(&self) -> Result<(), tokio::sync::mpsc::error::TrySendError<()>> {
        // Locked until the process has ended, so that it cannot begin to serve in between.
        let is_starting = self.is_starting.lock().unwrap_or_else(PoisonError::into_inner);
        if *is_starting {
            info!("stopped by a signal before serving");
            exit_now(0);
        }
        self.stop.try_send(())
    }
}
