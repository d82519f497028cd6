//! Serves `/metrics`, `/healthz` and `/readyz` over HTTP. Its server is also that of the API.

mod tls;
mod places;
mod server;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics::gauge;

use super::health::{Health, HealthVerdict};
use super::metrics::{Exporter, READY};
use super::process_metrics;
pub(crate) use server::{ConnectionLimits, ConnectionMetrics, HttpServer, Site, connections_within};
pub(crate) use tls::{Tls, TlsFiles};

/// How often the samples of histograms are moved into their buckets.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// The state that the request handlers share.
#[derive(Clone)]
pub(crate) struct HttpState {
    pub metrics: Exporter,
    pub health: Arc<Health>,
    /// The clock, which a test can replace.
    pub now: fn() -> Instant,
}

/// Listens on an address, and answers requests until the server is dropped.
///
/// # Errors
/// Returns an error if the address cannot be listened on.
pub(crate) fn start(address: SocketAddr, state: HttpState, limits: ConnectionLimits) -> io::Result<HttpServer> {
    let metrics = state.metrics.clone();
    HttpServer::start("http", address, site(router(state), limits), run_upkeep(metrics))
}

/// Returns the site of probes and collectors, none of which sends a body.
fn site(router: Router, limits: ConnectionLimits) -> Site {
    Site {
        router,
        takes_bodies: false,
        tls: None,
        limits,
        metrics: ConnectionMetrics::Http,
    }
}

/// Moves the samples of histograms into their buckets, so that memory stays bounded if no client reads `/metrics`.
async fn run_upkeep(metrics: Exporter) -> Infallible {
    let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        ticks.tick().await;
        metrics.run_upkeep();
    }
}

fn router(state: HttpState) -> Router {
    Router::new()
        .route("/metrics", get(render_metrics))
        .route(
            "/healthz",
            get(|State(state): State<HttpState>| async move { respond(state.health.alive((state.now)())) }),
        )
        .route(
            "/readyz",
            get(|State(state): State<HttpState>| async move { respond(state.health.ready((state.now)())) }),
        )
        .with_state(state)
}

async fn render_metrics(State(state): State<HttpState>) -> Response {
    // Updated here, not by a thread of the stream, so that the values are right even if that thread is blocked.
    let now = (state.now)();
    let is_ready = state.health.ready(now) == HealthVerdict::Healthy;
    gauge!(READY).set(f64::from(u8::from(is_ready)));
    if let Some(work) = state.health.work() {
        work.report(now, SystemTime::now());
    }
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        state.metrics.render() + &process_metrics::render(),
    )
        .into_response()
}

fn respond(verdict: HealthVerdict) -> Response {
    match verdict {
        HealthVerdict::Healthy => (StatusCode::OK, "ok\n").into_response(),
        HealthVerdict::Unhealthy(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests;
