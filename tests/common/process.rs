//! Starting processes beside an embedded broker.
//!
//! A broker of librdkafka that goes down closes its listener and binds the same port again at once, and ends the test
//! process if it cannot. Between its fork and its `exec` a child holds a copy of the listener, which keeps the port
//! taken, so no process may be started in that moment.

use std::process::{Child, Command, Output, Stdio};
use std::sync::{PoisonError, RwLock};

use rdkafka::ClientContext;
use rdkafka::mocking::MockCluster;

/// Read by those who start a process, written by those who take a broker down. It guards no value, so a test that
/// panicked while holding it does not matter.
static STARTING: RwLock<()> = RwLock::new(());

/// Starts processes in a way that does not disturb [`broker_down`].
pub trait Start {
    /// As [`Command::spawn`]. `spawn` returns after the child's `exec`.
    fn start(&mut self) -> std::io::Result<Child>;

    /// As [`Command::output`], with nothing to read and everything it writes captured.
    fn finish(&mut self) -> std::io::Result<Output>;
}

impl Start for Command {
    fn start(&mut self) -> std::io::Result<Child> {
        let _guard = STARTING.read().unwrap_or_else(PoisonError::into_inner);
        self.spawn()
    }

    fn finish(&mut self) -> std::io::Result<Output> {
        self.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.start()?.wait_with_output()
    }
}

/// Sends a signal, such as `TERM`, to a process.
pub fn send_signal(process: u32, name: &str) {
    let kill = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(process.to_string())
        .finish()
        .unwrap();
    assert!(kill.status.success(), "{name}: {kill:?}");
}

/// Closes a broker's listener and its connections.
pub fn broker_down<C: ClientContext>(cluster: &MockCluster<'_, C>, broker: i32) {
    let _guard = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    cluster.broker_down(broker).unwrap();
}
