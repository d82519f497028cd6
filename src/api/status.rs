//! `GET /v1/status`: what the service does and what serves, for the page.

use std::time::Instant;

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::Response;
use serde_json::{Value, json};

use super::call::{Call, Dialect, Shared, answer};
use super::error::ApiError;
use super::request::bearer_token;
use super::score::problem;
use crate::ops::health::HealthVerdict;

const DIALECT: Dialect = Dialect {
    endpoint: "status",
    token: |parts| bearer_token(parts).map(str::to_owned),
    error: problem,
};

pub(super) async fn status(State(shared): State<Shared>, request: Request<Body>) -> Response {
    answer(&DIALECT, shared, request, report).await
}

async fn report(call: Call) -> Result<Response, ApiError> {
    let sources = &call.shared.status;
    let judge = sources.judge.get();
    let ready: Value = match sources.health.ready(Instant::now()) {
        HealthVerdict::Healthy => true.into(),
        HealthVerdict::Unhealthy(reason) => reason.into(),
    };
    call.json(&json!({
        "version": env!("CARGO_PKG_VERSION"),
        "ready": ready,
        "model": judge.model,
        "policy": judge.policy.content_hash(),
        "thresholds": judge.policy.thresholds(None),
        "newest_version": sources.newest.describe().await,
        "configuration": sources.configuration,
        "metrics": sources.metrics.render(),
    }))
}
