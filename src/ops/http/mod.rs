//! Serves `/metrics`, `/healthz` and `/readyz` over HTTP.

mod server;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics::gauge;

use super::health::{Health, HealthVerdict};
use super::metrics::{Exporter, READY};
use super::process_metrics;
pub(crate) use server::{ConnectionLimits, HttpServer};

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
    HttpServer::start(address, router(state), metrics, limits)
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
