//! Requests to a server: at random times whatever becomes of earlier ones, or from callers that wait for their answers.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::{JoinSet, LocalSet};

use crate::client::Connection;
use crate::server::Server;
use crate::support::{Random, busy_time, cpu_time, quantile};

/// The most connections: below the limit of moderatord's default settings. If all of them wait for an answer, a step has
/// failed.
const MAX_CONNECTIONS: usize = 1000;

/// The callers that saturate a server.
pub const CALLERS: usize = 64;

/// The requests of a single caller.
const ALONE: usize = 100;

/// How long the last answers of a step may take.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

/// The pause after a step.
const PAUSE: Duration = Duration::from_millis(200);

/// The CPU time per second that other programs may take before a measurement counts as disturbed.
pub const FOREIGN_CORES: f64 = 0.3;

/// The share of answers that may be later than the limit.
const LATE_SHARE: f64 = 0.01;

/// One step of the load: so many requests at a rate per second.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    pub rate: f64,
    pub requests: usize,
    /// The limit of the 99th percentile in milliseconds. The step ends early once it cannot be kept.
    pub limit: f64,
}

/// What became of a step.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// The requests that were answered per second.
    pub rate: f64,
    /// Quantiles of the latency in milliseconds.
    pub p50: f64,
    pub p99: f64,
    /// The CPU seconds of the server for 1,000 requests.
    pub cpu: f64,
    /// The mean number of rows in a pass, if the server counts them.
    pub batch: Option<f64>,
    /// In bytes.
    pub memory: f64,
    /// The requests without an answer, or with an error.
    pub failed: usize,
    /// Whether no request failed and the limit was kept.
    pub is_kept: bool,
    /// Whether other programs took so much CPU time meanwhile that missing the limit says nothing about the server.
    pub is_disturbed: bool,
}

impl Outcome {
    pub fn line(&self) -> String {
        let batch = self.batch.map_or_else(|| "-".to_owned(), |batch| format!("{batch:.1}"));
        format!(
            "{:>8.1} requests/s, p50 {:>6.1} ms, p99 {:>6.1} ms, {:>7.3} CPU s per 1,000, batch {batch}, {:.0} MiB",
            self.rate,
            self.p50,
            self.p99,
            self.cpu,
            self.memory / f64::from(1 << 20)
        )
    }
}

/// The requests that are sent to one server in one round.
pub struct Load<'a> {
    server: &'a Server,
    round: usize,
}

/// What the requests of a step share.
struct Progress {
    address: SocketAddr,
    requests: Arc<Vec<Vec<u8>>>,
    /// The connection that has been idle for the longest time is used first, so that the processes of a server that share
    /// a socket get the same load.
    idle: RefCell<VecDeque<Connection>>,
    open: Cell<usize>,
    failed: Cell<usize>,
    late: Cell<usize>,
    latencies: RefCell<Vec<f64>>,
}

impl<'a> Load<'a> {
    /// All servers get the same texts at the same times in a round.
    pub fn new(server: &'a Server, round: usize) -> Self {
        Self { server, round }
    }

    /// Runs one step.
    pub fn run(&self, step: Step) -> Outcome {
        measured(self.server, async |progress| self.send(progress, step).await)
    }

    /// Sends the requests when they are due.
    async fn send(&self, progress: Rc<Progress>, step: Step) {
        let mut random = Random::new(self.round as u64 + 1);
        // Each round has other texts, with other lengths.
        let first = self.round * 331;
        let allowed = (LATE_SHARE * step.requests as f64) as usize;
        let mut running = JoinSet::new();
        let start = Instant::now();
        let mut due = Duration::ZERO;
        for index in 0..step.requests {
            due += Duration::from_secs_f64(random.exponential() / step.rate);
            tokio::time::sleep_until((start + due).into()).await;
            let is_lost = progress.failed.get() > 0 || progress.late.get() > allowed;
            let has_connection = !progress.idle.borrow().is_empty() || progress.open.get() < MAX_CONNECTIONS;
            if is_lost || !has_connection {
                progress.late.set(step.requests);
                break;
            }
            let progress = Rc::clone(&progress);
            running.spawn_local(async move { progress.ask(first + index, start + due, step.limit).await });
        }
        let drained = tokio::time::timeout(DRAIN_TIMEOUT, async { while running.join_next().await.is_some() {} });
        if drained.await.is_err() {
            progress.failed.set(progress.failed.get() + 1);
        }
    }
}

impl Progress {
    /// Sends a request on an idle connection or a new one, and notes its latency since it was due.
    async fn ask(&self, index: usize, due: Instant, limit: f64) {
        let idle = self.idle.borrow_mut().pop_front();
        let asked = async {
            let mut connection = match idle {
                Some(connection) => connection,
                None => {
                    self.open.set(self.open.get() + 1);
                    Connection::open(self.address).await?
                }
            };
            let status = connection.ask(&self.requests[index % self.requests.len()]).await?;
            Ok::<_, std::io::Error>((connection, status))
        };
        match asked.await {
            Ok((connection, 200)) => {
                self.idle.borrow_mut().push_back(connection);
                let latency = due.elapsed().as_secs_f64() * 1e3;
                self.latencies.borrow_mut().push(latency);
                if latency > limit {
                    self.late.set(self.late.get() + 1);
                }
            }
            _ => self.failed.set(self.failed.get() + 1),
        }
    }
}

/// Measures one caller that sends a request as soon as it has the answer to the one before.
pub fn one_caller(server: &Server) -> Outcome {
    measured(server, async |progress| {
        for index in 0..ALONE {
            progress.ask(index, Instant::now(), f64::INFINITY).await;
        }
    })
}

/// Measures how much a server answers if so many callers always wait for it.
pub fn saturate(server: &Server, callers: usize, time: Duration) -> Outcome {
    measured(server, async |progress| {
        let mut running = JoinSet::new();
        let (start, next) = (Instant::now(), Rc::new(Cell::new(0)));
        for _ in 0..callers {
            let (progress, next) = (Rc::clone(&progress), Rc::clone(&next));
            running.spawn_local(async move {
                while start.elapsed() < time {
                    let index = next.replace(next.get() + 1);
                    progress.ask(index, Instant::now(), f64::INFINITY).await;
                }
            });
        }
        while running.join_next().await.is_some() {}
    })
}

/// Sends requests, and measures the server meanwhile.
fn measured(server: &Server, send: impl AsyncFnOnce(Rc<Progress>)) -> Outcome {
    let progress = Rc::new(Progress {
        address: server.address,
        requests: Arc::clone(&server.requests),
        idle: RefCell::default(),
        open: Cell::new(0),
        failed: Cell::new(0),
        late: Cell::new(0),
        latencies: RefCell::default(),
    });
    let passes = server.passes();
    let (own, busy) = (cpu_time(), busy_time());
    let (cpu, start) = (server.cpu_time(), Instant::now());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, send(Rc::clone(&progress)));
    let (cpu, elapsed) = (server.cpu_time() - cpu, start.elapsed());
    let foreign = (busy_time() - busy).saturating_sub(cpu_time() - own + cpu);
    let after = server.passes();
    let batch = passes
        .zip(after)
        .map(|(before, after)| (after.rows - before.rows) / (after.passes - before.passes));
    let memory = server.memory();
    let mut latencies = progress.latencies.take();
    latencies.sort_unstable_by(f64::total_cmp);
    let count = latencies.len();
    if count == 0 {
        latencies.push(f64::INFINITY);
    }
    let late = progress.late.get() as f64;
    // Servers close connections of their own accord only after minutes, so each step has its own.
    drop(progress.idle.take());
    std::thread::sleep(PAUSE);
    Outcome {
        rate: count as f64 / elapsed.as_secs_f64(),
        p50: quantile(&latencies, 0.5),
        p99: quantile(&latencies, 0.99),
        cpu: cpu.as_secs_f64() / count as f64 * 1000.0,
        batch,
        memory,
        failed: progress.failed.get(),
        is_kept: progress.failed.get() == 0 && late <= LATE_SHARE * count as f64,
        is_disturbed: foreign.as_secs_f64() > FOREIGN_CORES * elapsed.as_secs_f64(),
    }
}
