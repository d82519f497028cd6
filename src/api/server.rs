//! Starts the API, and stops it without losing a request.

use std::convert::Infallible;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use axum::Router;
use axum::http::Request;
use axum::response::Response;
use axum::routing::{get, post};
use crossbeam_channel::bounded;
use metrics::{counter, gauge};
use tracing::{error, info};

use super::call::{Shared, SharedParts, StatusSources};
use super::error::{ApiError, Kind};
use super::gather::Gatherer;
use super::intake::Intake;
use super::memory::BodyMemory;
use super::openapi::OpenApiDocument;
use super::request::BODY_TIME;
use super::tokens::Callers;
use super::{openai, page, perspective, score, status};
use crate::config::{ApiConfig, CacheConfig, FeedbackTopic, InputConfig, TlsConfig};
use crate::decide::CurrentJudge;
use crate::fault::Faults;
use crate::kafka::feedback::FeedbackWriter;
use crate::ops::http::{ConnectionLimits, ConnectionMetrics, HttpServer, Site, Tls, TlsFiles, connections_within};
use crate::ops::metrics as names;
use crate::prompt::Prompter;
use crate::stream::batch::Limits;
use crate::stream::cache::ScoreCache;
use crate::stream::pipeline::RequestLane;

/// How long a connection may be idle, and how long its handshake, the head of a request, and reading nothing of an answer
/// may take.
const HEAD_TIME: Duration = Duration::from_secs(30);

/// The age at which a connection is closed after the request in progress, so that callers spread over new processes.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(600);

/// The memory for the bodies of a caller's requests, in bodies of the largest size. All callers together may have twice
/// as much.
const BODIES: usize = 32;

/// How often the gauge of waiting comments is set.
const GAUGE_INTERVAL: Duration = Duration::from_millis(100);

/// How long a stop waits for clients to read the last answers.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// The pause between two looks at whether all requests are answered.
const DRAIN_PAUSE: Duration = Duration::from_millis(10);

/// What the API is made of.
pub(crate) struct ApiParts {
    pub config: ApiConfig,
    pub input: InputConfig,
    pub cache: CacheConfig,
    /// The limits of a micro-batch.
    pub batch: Limits,
    pub prompter: Arc<Prompter>,
    pub judge: Arc<CurrentJudge>,
    pub status: StatusSources,
    /// The topic for suggestions, if there is one.
    pub feedback: Option<FeedbackTopic>,
    /// How many files the process may have open.
    pub open_files: u64,
}

/// The certificates and tokens, which are read again on a reload.
pub(crate) struct Credentials {
    callers: Arc<Callers>,
    tls: Option<Arc<Tls>>,
}

/// A running API.
pub(crate) struct ApiServer {
    shared: Shared,
    credentials: Credentials,
    server: Option<HttpServer>,
    gather: Option<JoinHandle<()>>,
}

impl Credentials {
    /// Reads the files that the settings name, unless they turn the API off.
    ///
    /// # Errors
    /// Returns the faults of all files.
    pub fn read(config: &ApiConfig) -> Result<Self, Faults> {
        let mut faults = Faults::default();
        let tokens = config.tokens.as_deref().filter(|_| config.listen.is_some());
        let callers = faults.collect(Callers::read(tokens));
        let tls = config.tls.as_ref().filter(|_| config.listen.is_some());
        let tls = tls.map(files).map(Tls::read).transpose();
        let tls = faults.collect(tls);
        match (callers, tls) {
            (Some(callers), Some(tls)) => Ok(Self {
                callers: Arc::new(callers),
                tls: tls.map(Arc::new),
            }),
            _ => Err(faults),
        }
    }

    /// Reads the files again.
    ///
    /// # Errors
    /// Returns the faults of all files. What a faulty file had before stays in force.
    pub fn reload(&self) -> Result<(), Faults> {
        let mut faults = Faults::default();
        faults.collect(self.callers.reload());
        if let Some(tls) = &self.tls {
            faults.collect(tls.reload());
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }
}

fn files(config: &TlsConfig) -> TlsFiles {
    TlsFiles {
        certificate: config.certificate.clone(),
        key: config.key.clone(),
        client_ca: config.client_ca.clone(),
    }
}

impl ApiServer {
    /// Listens on the address of the settings and answers requests from here on. Also returns what the scorer needs to
    /// answer them.
    ///
    /// # Errors
    /// Returns an error if the address cannot be listened on, or if a thread cannot be started.
    pub fn start(parts: ApiParts, credentials: Credentials) -> anyhow::Result<(Self, RequestLane)> {
        let ApiParts {
            config,
            input,
            cache,
            batch,
            prompter,
            judge,
            status,
            feedback,
            open_files,
        } = parts;
        let timeout = config.limits.timeout;
        let feedback = feedback.as_ref().map(|topic| FeedbackWriter::new(topic, timeout));
        let feedback = feedback.transpose();
        let feedback = feedback.map_err(|reason| anyhow!("cannot write to topics.feedback: {reason}"))?;
        let address = config.listen.context("api.listen is not set")?;
        let cache = Arc::new(ScoreCache::new(cache.entries, Arc::clone(&judge)));
        let (intake, submissions) = Intake::new(config.limits.waiting);
        // A micro-batch is handed over only when the scorer waits for one, so that until then it fills up.
        let (ready, batches) = bounded(0);
        let gatherer = Gatherer {
            prompter,
            judge,
            cache: Arc::clone(&cache),
            limits: batch,
            submissions,
            batches: ready,
        };
        let gather = std::thread::Builder::new()
            .name("gather".to_owned())
            .spawn(move || gatherer.run())
            .context("cannot start a thread")?;
        let lane = RequestLane {
            batches,
            share: config.share,
            cache,
        };
        let limits = ConnectionLimits {
            connections: connections_within(open_files, config.limits.connections as u64),
            connections_per_client: config.limits.connections_per_client,
            head: HEAD_TIME,
            write: HEAD_TIME,
            lifetime: CONNECTION_LIFETIME,
            close: BODY_TIME + config.limits.timeout,
        };
        let shared = Shared::new(SharedParts {
            bodies: BodyMemory::new(BODIES.saturating_mul(config.limits.body_bytes)),
            input,
            intake,
            status,
            feedback,
            callers: Arc::clone(&credentials.callers),
            config,
        });
        let site = Site {
            router: router(shared.clone()),
            takes_bodies: true,
            tls: credentials.tls.clone(),
            limits,
            metrics: ConnectionMetrics::Api,
        };
        let upkeep = report(shared.clone());
        let server = HttpServer::start("api", address, site, upkeep)
            .with_context(|| format!("cannot listen on {address} (api.listen)"))?;
        info!(address = %server.address(), tls = credentials.tls.is_some(), "listening for requests to score comments");
        let api = Self {
            shared,
            credentials,
            server: Some(server),
            gather: Some(gather),
        };
        Ok((api, lane))
    }

    /// Reads the tokens and certificates again. If a file has a fault, what it had before stays in force.
    pub fn reload(&self) -> bool {
        match self.credentials.reload() {
            Ok(()) => true,
            Err(faults) => {
                for fault in faults {
                    error!(%fault, "cannot read the tokens or certificates again; the old ones stay in force");
                }
                false
            }
        }
    }

    /// Takes no more comments and connections, and waits until the comments that were taken are answered.
    pub async fn drain(&self) {
        self.shared.intake.stop();
        let Some(server) = &self.server else { return };
        server.close();
        while self.shared.intake.waiting() > 0 {
            tokio::time::sleep(DRAIN_PAUSE).await;
        }
        // The last answers may still be on their way out. Clients that are slow to read them are not waited for.
        let deadline = Instant::now() + LAST_ANSWERS;
        while server.open_connections() > 0 && Instant::now() < deadline {
            tokio::time::sleep(DRAIN_PAUSE).await;
        }
    }

    /// Hands no more texts to the scorer, which ends if it has no other work.
    pub fn close(&self) {
        self.shared.intake.stop();
        self.shared.intake.close();
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        // Closes the connections, and with them all that could hand in texts.
        drop(self.server.take());
        self.close();
        if let Some(gather) = self.gather.take() {
            // A panic of the thread has been logged already.
            drop(gather.join());
        }
    }
}

fn router(shared: Shared) -> Router {
    let description = OpenApiDocument::new(&shared.config, &shared.input.fields);
    Router::new()
        .route("/v1/score", post(score::score))
        .route("/v1/moderations", post(openai::moderations))
        .route("/v1alpha1/comments:analyze", post(perspective::analyze))
        .route("/v1alpha1/comments:suggestscore", post(perspective::suggest_score))
        // Some clients encode the colon.
        .route("/v1alpha1/comments%3Aanalyze", post(perspective::analyze))
        .route("/v1alpha1/comments%3Asuggestscore", post(perspective::suggest_score))
        .route("/$discovery/rest", get(perspective::discovery))
        .route("/openapi.json", get(async move || description.answer()))
        .route("/v1/status", get(status::status))
        .route("/", get(page::html))
        .route("/page.css", get(page::css))
        .route("/page.js", get(page::script))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .with_state(shared)
}

async fn not_found(request: Request<axum::body::Body>) -> Response {
    let path = request.uri().path();
    let message = format!("there is no endpoint `{path}`");
    problem(path, &ApiError::new(Kind::NotFound, message))
}

async fn wrong_method(request: Request<axum::body::Body>) -> Response {
    let error = ApiError::new(Kind::WrongMethod, "the endpoint has no such method");
    problem(request.uri().path(), &error)
}

/// Writes an error in the form of the API that a path seems to belong to.
fn problem(path: &str, error: &ApiError) -> Response {
    if path.starts_with("/v1alpha1/") {
        perspective::problem(error)
    } else {
        score::problem(error)
    }
}

/// Sets the gauge of waiting comments.
async fn report(shared: Shared) -> Infallible {
    counter!(names::API_DROPPED).increment(0);
    let mut ticks = tokio::time::interval(GAUGE_INTERVAL);
    loop {
        ticks.tick().await;
        gauge!(names::API_WAITING).set(shared.intake.waiting() as f64);
    }
}
