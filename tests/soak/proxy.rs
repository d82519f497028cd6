//! A TCP proxy between clients and brokers that can stall and cut their connections, and hold requests of one kind.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicUsize, Ordering};
use std::time::Duration;

/// The number of the request `JoinGroup` in Kafka's protocol.
pub const JOIN_GROUP: u16 = 11;

/// Stands for no request.
const NO_REQUEST: u16 = u16::MAX;

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
    /// Requests with this number are not forwarded, nor are those that follow them in the same connection.
    held: AtomicU16,
    /// How many requests have been held.
    held_count: AtomicUsize,
    is_closed: AtomicBool,
}

/// How soon a change of the mode takes effect.
const TICK: Duration = Duration::from_millis(20);

impl Proxy {
    /// Listens on each of the addresses, separated by commas, and forwards each to the port below it.
    pub fn start(addresses: &str) -> Self {
        let state = Arc::new(State {
            mode: AtomicU8::new(Mode::Forward as u8),
            held: AtomicU16::new(NO_REQUEST),
            held_count: AtomicUsize::new(0),
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

    /// Holds requests with a number until [`Self::release`].
    pub fn hold(&self, request: u16) {
        self.state.held.store(request, Ordering::Relaxed);
    }

    /// Returns how many requests have been held so far.
    pub fn held_count(&self) -> usize {
        self.state.held_count.load(Ordering::Relaxed)
    }

    /// Forwards the requests that are held.
    pub fn release(&self) {
        self.hold(NO_REQUEST);
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

    fn wait_while_held(&self, kinds: &[u16]) {
        let is_held = || kinds.contains(&self.held.load(Ordering::Relaxed));
        if is_held() {
            self.held_count.fetch_add(1, Ordering::Relaxed);
        }
        while is_held() && !self.must_close() {
            std::thread::sleep(TICK);
        }
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
    for (requests, (from, to)) in [(Some(Requests::default()), (client, broker)), (None, reverse)] {
        let state = Arc::clone(state);
        std::thread::spawn(move || {
            copy(&from, &to, requests, &state);
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        });
    }
}

fn copy(mut from: &TcpStream, mut to: &TcpStream, mut requests: Option<Requests>, state: &State) {
    let mut buffer = vec![0; 1 << 16];
    while !state.must_close() {
        if state.is(Mode::Stall) {
            std::thread::sleep(TICK);
            continue;
        }
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                let bytes = &buffer[..length];
                let kinds = requests
                    .as_mut()
                    .map(|requests| requests.kinds(bytes))
                    .unwrap_or_default();
                state.wait_while_held(&kinds);
                while state.is(Mode::Stall) {
                    std::thread::sleep(TICK);
                }
                if state.must_close() || to.write_all(bytes).is_err() {
                    return;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}

/// Finds the requests in the bytes that a client sends. Each begins with its length in four bytes, which does not count
/// them, and the number of its kind in two.
#[derive(Default)]
struct Requests {
    /// The first bytes of the request, as far as they have arrived.
    head: Vec<u8>,
    /// How many bytes of the request follow its head.
    rest: usize,
}

impl Requests {
    /// Returns the numbers of the requests that begin in these bytes.
    fn kinds(&mut self, mut bytes: &[u8]) -> Vec<u16> {
        let mut kinds = Vec::new();
        while !bytes.is_empty() {
            let skipped = self.rest.min(bytes.len());
            self.rest -= skipped;
            bytes = &bytes[skipped..];
            let missing = (6 - self.head.len()).min(bytes.len());
            self.head.extend_from_slice(&bytes[..missing]);
            bytes = &bytes[missing..];
            if let [a, b, c, d, e, f] = self.head[..] {
                kinds.push(u16::from_be_bytes([e, f]));
                self.rest = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap() - 2;
                self.head.clear();
            }
        }
        kinds
    }
}
