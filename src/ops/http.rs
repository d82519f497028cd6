//! Serves `/metrics`, `/healthz` and `/readyz` over HTTP.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;

use super::health::{Health, HealthVerdict};

/// The state that the request handlers share.
#[derive(Clone)]
pub struct HttpState {
    pub metrics: PrometheusHandle,
    pub health: Arc<Health>,
    /// The clock, which a test can replace.
    pub now: fn() -> Instant,
}

/// Serves requests until `shutdown` resolves.
///
/// # Errors
/// Returns an error if the listener fails.
pub async fn serve(
    listener: TcpListener,
    state: HttpState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(render_metrics))
        .route(
            "/healthz",
            get(|State(state): State<HttpState>| async move { respond(state.health.alive((state.now)())) }),
        )
        .route(
            "/readyz",
            get(|State(state): State<HttpState>| async move { respond(state.health.ready((state.now)())) }),
        );
    let handle = state.metrics.clone();
    let server = axum::serve(listener, router.with_state(state)).with_graceful_shutdown(shutdown);
    tokio::select! {
        served = server.into_future() => served,
        never = run_upkeep(handle) => match never {},
    }
}

/// Moves the samples of histograms into their buckets, so that memory stays bounded if no client reads `/metrics`.
async fn run_upkeep(metrics: PrometheusHandle) -> Infallible {
    let mut ticks = tokio::time::interval(Duration::from_secs(5));
    loop {
        ticks.tick().await;
        metrics.run_upkeep();
    }
}

async fn render_metrics(State(state): State<HttpState>) -> Response {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        state.metrics.render(),
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
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::super::health::Phase;
    use super::super::metrics::{EVENTS, install};
    use super::*;

    async fn request(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        response
    }

    #[tokio::test]
    async fn health_checks_and_metrics_are_served_over_http() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let health = Arc::new(Health::new(Duration::from_secs(60)));
        let state = HttpState {
            metrics: install().unwrap(),
            health: Arc::clone(&health),
            now: Instant::now,
        };
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = tokio::spawn(serve(listener, state, async { drop(stopped.await) }));

        assert!(request(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        let starting = request(address, "/readyz").await;
        assert!(
            starting.starts_with("HTTP/1.1 503") && starting.ends_with("starting\n"),
            "{starting}"
        );
        health.enter(Phase::Serving);
        assert!(request(address, "/readyz").await.ends_with("no batch scored yet\n"));
        health.record_scored(Instant::now());
        assert!(request(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        metrics::counter!(EVENTS, "outcome" => "decided").increment(3);
        let metrics = request(address, "/metrics").await;
        assert!(
            metrics.contains("moderatord_events_total{outcome=\"decided\"} 3"),
            "{metrics}"
        );
        assert!(request(address, "/nothing").await.starts_with("HTTP/1.1 404"));

        stop.send(()).unwrap();
        server.await.unwrap().unwrap();
    }
}
