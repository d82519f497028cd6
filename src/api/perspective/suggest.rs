//! `POST /v1alpha1/comments:suggestscore`: what a user thinks that the score of a comment should be, which becomes
//! feedback for the next training.

use std::time::SystemTime;

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::Response;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::names::read_fields;
use super::request::{SUGGEST, check_context, comment};
use crate::api::body::Fields;
use crate::api::call::{Call, Shared, answer};
use crate::api::error::{ApiError, Kind};
use crate::hash::hex;
use crate::kafka::feedback::NotWritten;

/// What the content id of a comment without one begins with; the hash of its text follows.
const CONTENT_ID: &str = "text-sha256:";

pub(in crate::api) async fn suggest_score(State(shared): State<Shared>, request: Request<Body>) -> Response {
    answer(&SUGGEST, shared, request, suggest).await
}

async fn suggest(call: Call) -> Result<Response, ApiError> {
    let (content_id, record, client_token) = read(&call)?;
    let Some(feedback) = &call.shared.feedback else {
        let message = "suggestions are not taken: topics.feedback is not set";
        // Trying again does not help.
        return Err(ApiError::new(Kind::Unsupported, message));
    };
    let written = feedback.write(&content_id, &record, call.deadline).await;
    written.map_err(|error| {
        let kind = match error {
            NotWritten::TimedOut => Kind::TimedOut,
            NotWritten::Failed(_) => Kind::Unavailable,
        };
        ApiError::new(kind, format!("the suggestion cannot be stored: {error}"))
    })?;
    let mut body = json!({});
    if let Some(token) = client_token {
        body["clientToken"] = token.into();
    }
    call.json(&body)
}

/// Reads a suggestion: the id of its content, its feedback record, and the caller's token for it. The parsed body takes far
/// more memory than its bytes, so it does not outlive this.
fn read(call: &Call) -> Result<(String, String, Option<String>), ApiError> {
    let fields = read_fields(&call.body.bytes)?;
    let comment = comment(&fields, call.shared.input.max_bytes)?;
    check_context(&fields)?;
    let label = suggested(&call.shared, &fields)?;
    let content_id = format!("{CONTENT_ID}{}", hex(&Sha256::digest(comment.text.as_bytes())));
    let record = json!({
        "content_id": content_id,
        "text": comment.text,
        "label": label,
        "source": "user",
        "community_id": fields.optional_text("/communityId")?,
        "labelled_at": humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
    });
    Ok((content_id, record.to_string(), fields.optional_text("/clientToken")?))
}

/// Returns the suggested probability of being hateful.
fn suggested(shared: &Shared, fields: &Fields<'_>) -> Result<f64, ApiError> {
    let expected = || ApiError::invalid("expected a summaryScore for at least one attribute").at("attributeScores");
    let Some(Value::Object(scores)) = fields.value("/attributeScores") else {
        return Err(expected());
    };
    let mut label = None;
    for (name, score) in scores {
        if !shared.config.attributes.contains_key(name) {
            return Err(ApiError::new(
                Kind::Unsupported,
                format!("Unknown requested attribute: {name}"),
            ));
        }
        let place = || format!("attributeScores.{name}.summaryScore.value");
        let value = score.pointer("/summaryScore/value").and_then(Value::as_f64);
        let value = value.filter(|value| (0.0..=1.0).contains(value));
        let value = value.ok_or_else(|| ApiError::invalid("expected a number from 0 to 1").at(place()))?;
        // All attributes are those of one classifier, so they must agree.
        if label.is_some_and(|label| label != value) {
            let message = "expected the same score as that of the other attributes, which are of the same classifier";
            return Err(ApiError::invalid(message).at(place()));
        }
        label = Some(value);
    }
    label.ok_or_else(expected)
}
