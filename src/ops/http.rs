//! `/metrics`, `/healthz` and `/readyz`: for the machines that watch, on loopback unless told
//! otherwise.

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

/// What the handlers read.
#[derive(Clone)]
pub struct Outside {
    /// Renders the metrics.
    pub metrics: PrometheusHandle,
    /// Answers the probes.
    pub health: Arc<Health>,
    /// The clock, so that a test can bring its own.
    pub now: fn() -> Instant,
}

/// Serves until `shutdown` resolves.
///
/// # Errors
/// The listener's.
pub async fn serve(
    listener: TcpListener,
    outside: Outside,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(render_metrics))
        .route(
            "/healthz",
            get(|State(outside): State<Outside>| async move { probe(outside.health.alive((outside.now)())) }),
        )
        .route(
            "/readyz",
            get(|State(outside): State<Outside>| async move { probe(outside.health.ready((outside.now)())) }),
        );
    let handle = outside.metrics.clone();
    let server = axum::serve(listener, router.with_state(outside)).with_graceful_shutdown(shutdown);
    tokio::select! {
        served = server.into_future() => served,
        never = keep_up(handle) => match never {},
    }
}

/// Folds the histograms' samples into their buckets, so that memory stays flat when nobody scrapes.
async fn keep_up(metrics: PrometheusHandle) -> Infallible {
    let mut ticks = tokio::time::interval(Duration::from_secs(5));
    loop {
        ticks.tick().await;
        metrics.run_upkeep();
    }
}

async fn render_metrics(State(outside): State<Outside>) -> Response {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        outside.metrics.render(),
    )
        .into_response()
}

fn probe(verdict: HealthVerdict) -> Response {
    match verdict {
        HealthVerdict::Good => (StatusCode::OK, "ok\n").into_response(),
        HealthVerdict::Bad(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::super::health::Phase;
    use super::super::metrics::{EVENTS, install};
    use super::*;

    async fn ask(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn probes_and_metrics_over_the_wire() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let health = Arc::new(Health::new(Duration::from_secs(60)));
        let outside = Outside {
            metrics: install().unwrap(),
            health: Arc::clone(&health),
            now: Instant::now,
        };
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = tokio::spawn(serve(listener, outside, async { drop(stopped.await) }));

        assert!(ask(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        let starting = ask(address, "/readyz").await;
        assert!(
            starting.starts_with("HTTP/1.1 503") && starting.ends_with("starting\n"),
            "{starting}"
        );
        health.enter(Phase::Serving);
        assert!(ask(address, "/readyz").await.ends_with("no batch scored yet\n"));
        health.scored(Instant::now());
        assert!(ask(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        metrics::counter!(EVENTS, "outcome" => "decided").increment(3);
        let metrics = ask(address, "/metrics").await;
        assert!(
            metrics.contains("moderatord_events_total{outcome=\"decided\"} 3"),
            "{metrics}"
        );
        assert!(ask(address, "/nothing").await.starts_with("HTTP/1.1 404"));

        stop.send(()).unwrap();
        server.await.unwrap().unwrap();
    }
}
