//! A TCP proxy between clients and brokers that can stall and cut their connections.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

/// What the proxy does with connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    Forward,
    /// Keeps connections open, and forwards nothing.
    Stall,
    /// Closes all connections, and every new one at once.
    Cut,
}

/// Listens on the proxy addresses of a cluster, and forwards to its nodes.
pub struct Proxy {
    state: Arc<State>,
}

struct State {
    mode: AtomicU8,
    is_closed: AtomicBool,
}

/// How soon a change of the mode takes effect.
const TICK: Duration = Duration::from_millis(20);

impl Proxy {
    /// Listens on each of the addresses, separated by commas, and forwards each to the port below it.
    pub fn start(addresses: &str) -> Self {
        let state = Arc::new(State {
            mode: AtomicU8::new(Mode::Forward as u8),
            is_closed: AtomicBool::new(false),
        });
        for address in addresses.split(',') {
            let listener = TcpListener::bind(address).unwrap();
            listener.set_nonblocking(true).unwrap();
            let mut broker = listener.local_addr().unwrap();
            broker.set_port(broker.port() - 1);
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                while !state.is_closed.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((client, _)) if !state.is(Mode::Cut) => {
                            // A node that is down refuses the connection, and so does the proxy, by closing its own.
                            if let Ok(broker) = TcpStream::connect(broker) {
                                forward(client, broker, &state);
                            }
                        }
                        Ok(_) => {}
                        Err(_) => std::thread::sleep(TICK),
                    }
                }
            });
        }
        Self { state }
    }

    pub fn set(&self, mode: Mode) {
        self.state.mode.store(mode as u8, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.is_closed.store(true, Ordering::Relaxed);
    }
}

impl State {
    fn is(&self, mode: Mode) -> bool {
        self.mode.load(Ordering::Relaxed) == mode as u8
    }

    fn must_close(&self) -> bool {
        self.is(Mode::Cut) || self.is_closed.load(Ordering::Relaxed)
    }
}

/// Forwards in both directions, each in a thread of its own, until one side closes the connection.
fn forward(client: TcpStream, broker: TcpStream, state: &Arc<State>) {
    for stream in [&client, &broker] {
        stream.set_nonblocking(false).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(TICK)).unwrap();
    }
    let reverse = (broker.try_clone().unwrap(), client.try_clone().unwrap());
    for (from, to) in [(client, broker), reverse] {
        let state = Arc::clone(state);
        std::thread::spawn(move || {
            copy(&from, &to, &state);
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        });
    }
}

fn copy(mut from: &TcpStream, mut to: &TcpStream, state: &State) {
    let mut buffer = vec![0; 1 << 16];
    while !state.must_close() {
        if state.is(Mode::Stall) {
            std::thread::sleep(TICK);
            continue;
        }
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                while state.is(Mode::Stall) {
                    std::thread::sleep(TICK);
                }
                if state.must_close() || to.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}
