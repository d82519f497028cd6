//! `POST /v1/score`: one comment or many in the comment format, and their decisions.

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, Request, header};
use axum::response::Response;
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::call::{Call, Dialect, Shared, answer, json};
use super::error::ApiError;
use super::request::bearer_token;
use crate::json::BYTE_ORDER_MARK;
use crate::message::{Comment, Decision};
use crate::stream::decode::decode;

/// The form of errors: problem details (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Problem<'a> {
    /// The meaning of the status.
    title: &'a str,
    /// The status of the answer.
    status: u16,
    /// What was found, and what was expected. Never quotes a comment.
    detail: &'a str,
    /// The JSON pointer to the comment of a list that is at fault, if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<&'a str>,
}

const DIALECT: Dialect = Dialect {
    endpoint: "score",
    token: |parts| bearer_token(parts).map(str::to_owned),
    error: problem,
};

/// Returns the answer for an error of our own endpoints.
pub(super) fn problem(error: &ApiError) -> Response {
    let status = error.kind.status();
    let problem = Problem {
        title: status.canonical_reason().unwrap_or_default(),
        status: status.as_u16(),
        detail: &error.message,
        field: error.field.as_deref(),
    };
    let mut answer = json(&problem);
    *answer.status_mut() = status;
    let form = HeaderValue::from_static("application/problem+json");
    answer.headers_mut().insert(header::CONTENT_TYPE, form);
    answer
}

/// Scores one comment, or a list of comments.
#[utoipa::path(
    post,
    path = "/v1/score",
    responses((status = 200, body = Decision, description = "The decision on the comment, or the decisions in their order."))
)]
pub(super) async fn score(State(shared): State<Shared>, request: Request<Body>) -> Response {
    answer(&DIALECT, shared, request, score_comments).await
}

async fn score_comments(call: Call) -> Result<Response, ApiError> {
    let (comments, is_list) = comments(&call)?;
    let decisions = call.decide_comments(&comments).await?;
    match &decisions[..] {
        [decision] if !is_list => call.json(decision),
        decisions => call.json(&decisions),
    }
}

/// Reads the comments of a request, and returns whether they are a list.
fn comments(call: &Call) -> Result<(Vec<Comment>, bool), ApiError> {
    let bytes = &call.body.bytes[..];
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    let is_list = bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[');
    let decode = |bytes: &[u8]| decode(bytes, &[], &call.shared.input.fields, call.shared.input.max_bytes);
    if !is_list {
        let comment = decode(bytes).map_err(|error| ApiError::invalid(error.to_string()))?;
        return Ok((vec![comment], false));
    }
    let list: Vec<&RawValue> = serde_json::from_slice(bytes).map_err(|error| {
        let message = format!(
            "the body is not a list of comments at line {}, column {}",
            error.line(),
            error.column()
        );
        ApiError::invalid(message)
    })?;
    call.shared.check_count(list.len())?;
    let decode = |(index, raw): (usize, &&RawValue)| {
        decode(raw.get().as_bytes()).map_err(|error| ApiError::invalid(error.to_string()).at(place(index)))
    };
    let comments: Result<Vec<_>, _> = list.iter().enumerate().map(decode).collect();
    Ok((comments?, true))
}

/// Returns the JSON pointer to a comment in a list.
fn place(index: usize) -> String {
    format!("/{index}")
}
