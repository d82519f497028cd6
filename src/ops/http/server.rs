//! Accepts and serves HTTP connections within limits on their number, size and time.
//!
//! Anyone who can reach the port can open connections, so none of them may cost more than a bounded amount of memory,
//! file descriptors and time. The server runs on a thread of its own, so it answers while the main thread loads the
//! model or waits for a broker.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use axum::body::Body as ResponseBody;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::Request;
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use metrics::{Gauge, counter, gauge};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::{oneshot, watch};
use tokio_io_timeout::TimeoutStream;
use tracing::{info, warn};

use super::super::metrics as names;
use super::places::{NoPlace, Places};
use super::tls::Tls;

/// The most connections at a time: far more than the probes and collectors of one daemon open.
const MAX_CONNECTIONS: u64 = 64;

/// The share of the process's file descriptors that connections may use, as a divisor. The others are left for the
/// brokers, the registry and the log.
const FILE_DESCRIPTOR_SHARE: u64 = 8;

/// The maximum size of a request's head, and of a connection's buffer: the smallest that hyper allows.
const MAX_HEAD_BYTES: usize = 8 << 10;

/// The delay after a failed `accept`. Without it, the loop would spin while the process has no file descriptors left.
const ACCEPT_DELAY: Duration = Duration::from_millis(200);

/// The bounds on connections.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectionLimits {
    /// The most connections at a time; others are closed at once.
    pub connections: usize,
    /// The most connections of one client at a time. An address is a client, and so is a /64 network of IPv6.
    pub connections_per_client: usize,
    /// How long a client may take to send the head of a request, including the time that the connection is idle
    /// before it. It also limits the handshake of TLS.
    pub head: Duration,
    /// How long a client may read nothing while an answer waits to be sent.
    pub write: Duration,
    /// The age at which a connection is closed after the request in progress.
    pub lifetime: Duration,
    /// How long the request in progress may take after that.
    pub close: Duration,
}

impl ConnectionLimits {
    /// Returns the limits of a process that may have this many files open.
    pub(crate) fn new(open_files: u64) -> Self {
        let connections = connections_within(open_files, MAX_CONNECTIONS);
        Self {
            connections,
            // Probes and collectors often come from one host.
            connections_per_client: connections,
            head: Duration::from_secs(10),
            write: Duration::from_secs(10),
            lifetime: Duration::from_secs(60),
            close: Duration::from_secs(5),
        }
    }
}

/// Returns how many connections a server may have in a process that may have so many files open: as many as wanted, but
/// no more than its share of the files.
pub(crate) fn connections_within(open_files: u64, wanted: u64) -> usize {
    let share = (open_files / FILE_DESCRIPTOR_SHARE).max(4);
    usize::try_from(wanted.min(share)).unwrap_or(usize::MAX)
}

/// The server that a metric of connections is about.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ConnectionMetrics {
    /// That of metrics and health checks.
    Http,
    /// That of the API.
    Api,
}

/// What a server answers, and how it is reached.
pub(crate) struct Site {
    /// Answers the requests.
    pub router: Router,
    /// Whether requests may have bodies. Otherwise, one that has is answered with 413.
    pub takes_bodies: bool,
    /// The certificates, if connections are encrypted.
    pub tls: Option<Arc<Tls>>,
    pub limits: ConnectionLimits,
    pub metrics: ConnectionMetrics,
}

/// A running server, which stops when it is dropped.
pub(crate) struct HttpServer {
    address: SocketAddr,
    places: Arc<Places>,
    /// Tells connections to end after the request in progress.
    close: watch::Sender<bool>,
    stop: Option<oneshot::Sender<Infallible>>,
    thread: Option<JoinHandle<()>>,
}

impl HttpServer {
    /// Listens on an address, and answers requests from here on. `upkeep` runs beside it.
    ///
    /// # Errors
    /// Returns an error if the address cannot be listened on, or the thread cannot be started.
    pub(crate) fn start(
        name: &str,
        address: SocketAddr,
        site: Site,
        upkeep: impl Future<Output = Infallible> + Send + 'static,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind(address))?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let (close, closing) = watch::channel(false);
        let places = Places::new(site.limits.connections, site.limits.connections_per_client);
        let accepting = Accepting {
            site: Arc::new(site),
            places: Arc::clone(&places),
            closing,
        };
        let serve = move || serve(&runtime, listener, accepting, upkeep, stopped);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(serve)?;
        Ok(Self {
            address,
            places,
            close,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Accepts no more connections, closes those that are idle, and the others after the request in progress.
    pub(crate) fn close(&self) {
        self.close.send_replace(true);
    }

    /// Returns how many connections are open.
    pub(crate) fn open_connections(&self) -> usize {
        self.places.open()
    }

    /// Returns the address that the server listens on.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been logged already.
            drop(thread.join());
        }
    }
}

/// What the connections of a server share.
#[derive(Clone)]
struct Accepting {
    site: Arc<Site>,
    places: Arc<Places>,
    /// Becomes true once connections are to end.
    closing: watch::Receiver<bool>,
}

/// Serves until `stopped` resolves.
fn serve(
    runtime: &Runtime,
    listener: TcpListener,
    accepting: Accepting,
    upkeep: impl Future<Output = Infallible>,
    stopped: oneshot::Receiver<Infallible>,
) {
    runtime.block_on(async {
        tokio::select! {
            // The sender sends nothing; it is dropped.
            _ = stopped => {}
            never = accept_all(listener, accepting) => match never {},
            never = upkeep => match never {},
        }
    });
}

async fn accept_all(listener: TcpListener, accepting: Accepting) -> Infallible {
    let metrics = accepting.site.metrics;
    metrics.open().set(0.0);
    let mut closing = accepting.closing.clone();
    loop {
        let (stream, address) = tokio::select! {
            accepted = accept(metrics, async || listener.accept().await) => accepted,
            _ = closing.wait_for(|&is_closing| is_closing) => break,
        };
        let place = match accepting.places.take(address.ip()) {
            Ok(place) => place,
            Err(NoPlace::Full) => {
                metrics.count("refused");
                continue;
            }
            Err(NoPlace::FullForClient) => {
                metrics.count("refused_client");
                continue;
            }
        };
        metrics.open().set(accepting.places.open() as f64);
        let accepting = accepting.clone();
        tokio::spawn(async move {
            metrics.count(connect(stream, &accepting).await);
            drop(place);
            metrics.open().set(accepting.places.open() as f64);
        });
    }
    // Whoever connects from here on is told at once that nothing listens.
    drop(listener);
    std::future::pending().await
}

/// Returns the next connection. Waits after each failure, and logs only the first of several in a row.
async fn accept<T>(metrics: ConnectionMetrics, mut next: impl AsyncFnMut() -> io::Result<T>) -> T {
    let mut failures = 0u64;
    loop {
        match next().await {
            Ok(stream) => {
                if failures > 0 {
                    info!(failures, "HTTP connections can be accepted again");
                }
                return stream;
            }
            Err(error) => {
                if failures == 0 {
                    warn!(%error, "cannot accept an HTTP connection, trying again");
                }
                failures += 1;
                metrics.count("accept_failed");
                tokio::time::sleep(ACCEPT_DELAY).await;
            }
        }
    }
}

/// Serves one connection, after the handshake if it is encrypted. Returns how it ended.
async fn connect(stream: TcpStream, accepting: &Accepting) -> &'static str {
    let site = &accepting.site;
    // An answer is one write, which must not wait for the acknowledgement of the one before.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(site.limits.write));
    let stream = Box::pin(stream);
    let Some(tls) = &site.tls else {
        return serve_connection(stream, accepting).await;
    };
    match tokio::time::timeout(site.limits.head, tls.acceptor().accept(stream)).await {
        Ok(Ok(stream)) => serve_connection(stream, accepting).await,
        Ok(Err(_)) => "invalid",
        Err(_) => "timed_out",
    }
}

/// Serves the requests of one connection. Returns how it ended.
async fn serve_connection(stream: impl AsyncRead + AsyncWrite + Unpin, accepting: &Accepting) -> &'static str {
    let site = &accepting.site;
    let (limits, takes_bodies) = (site.limits, site.takes_bodies);
    let mut closing = accepting.closing.clone();
    let router = TowerToHyperService::new(site.router.clone());
    let service = service_fn(move |request| answer(router.clone(), request, takes_bodies));
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_header_size(MAX_HEAD_BYTES)
        .max_buf_size(MAX_HEAD_BYTES);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let last_request = async {
        tokio::select! {
            () = tokio::time::sleep(limits.lifetime) => {}
            _ = closing.wait_for(|&is_closing| is_closing) => {}
        }
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = last_request => {
            connection.as_mut().graceful_shutdown();
            let Ok(ended) = tokio::time::timeout(limits.close, connection).await else {
                return "timed_out";
            };
            ended
        }
    };
    match ended {
        Ok(()) => "completed",
        Err(error) if error.is_timeout() => "timed_out",
        Err(error) if error.is_parse() => "invalid",
        Err(_) => "failed",
    }
}

/// Answers one request. If the site has no use for a body, none is read.
async fn answer(
    router: TowerToHyperService<Router>,
    request: Request<Incoming>,
    takes_bodies: bool,
) -> Result<Response<ResponseBody>, Infallible> {
    if takes_bodies || request.body().is_end_stream() {
        return router.call(request).await;
    }
    let answer = (
        StatusCode::PAYLOAD_TOO_LARGE,
        [(header::CONNECTION, "close")],
        "expected a request without a body\n",
    );
    Ok(answer.into_response())
}

impl ConnectionMetrics {
    fn count(self, result: &'static str) {
        match self {
            Self::Http => counter!(names::HTTP_CONNECTIONS, "result" => result),
            Self::Api => counter!(names::API_CONNECTIONS, "result" => result),
        }
        .increment(1);
    }

    fn open(self) -> Gauge {
        match self {
            Self::Http => gauge!(names::HTTP_OPEN_CONNECTIONS),
            Self::Api => gauge!(names::API_OPEN_CONNECTIONS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_failed_accept_is_repeated_after_a_delay() {
        let started = tokio::time::Instant::now();
        let mut left = 3;
        let accepted = accept(ConnectionMetrics::Http, async || {
            if left == 0 {
                return Ok("a connection");
            }
            left -= 1;
            // EMFILE, too many open files.
            Err(io::Error::from_raw_os_error(24))
        });
        assert_eq!(accepted.await, "a connection");
        assert_eq!(started.elapsed(), 3 * ACCEPT_DELAY);
    }
}
