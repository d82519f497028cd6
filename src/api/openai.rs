//! `POST /v1/moderations`: OpenAI's moderation API.
//!
//! <https://platform.openai.com/docs/api-reference/moderations>. Each result also has the whole decision, under
//! `decision`, which OpenAI's clients pass on.

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::Response;
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::body::{Fields, TextField};
use super::call::{Call, Dialect, Shared, answer, json};
use super::error::{ApiError, Kind};
use super::request::bearer_token;
use crate::config::CLASSIFIER;
use crate::message::{Action, Decision};

const DIALECT: Dialect = Dialect {
    endpoint: "moderations",
    token: |parts| bearer_token(parts).map(str::to_owned),
    error: error_object,
};

/// The message for a request without a key. Clients show it, so it begins as the original does.
const NO_KEY: &str =
    "You didn't provide an API key. Send the token of a caller as `Authorization: Bearer TOKEN` (api.tokens).";

/// The answer of the endpoint.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Moderation {
    /// A random id of the answer.
    id: String,
    /// The name of the model, made of the hashes by which decisions identify it.
    model: String,
    /// The result for each text, in their order.
    results: Vec<ModerationResult>,
}

/// The result for a text.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ModerationResult {
    /// Whether the comment is reviewed or blocked: for its probability, or because the model cannot judge it.
    flagged: bool,
    /// Whether the probability of each category reaches the threshold of a review.
    #[schema(value_type = BTreeMap<String, bool>)]
    categories: Map<String, Value>,
    /// The probability of each category.
    #[schema(value_type = BTreeMap<String, f64>)]
    category_scores: Map<String, Value>,
    /// What each category was judged by: always `text`.
    #[schema(value_type = BTreeMap<String, Vec<String>>)]
    category_applied_input_types: Map<String, Value>,
    /// The whole decision.
    decision: Decision,
}

/// Describes a request, as [`inputs`] reads it.
pub(super) fn described_request() -> Value {
    let text = json!({"type": "string"});
    let part = json!({
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": text},
        "required": ["type", "text"],
    });
    json!({
        "type": "object",
        "properties": {
            "input": {
                "description": "A text; or several, each with a result of its own; or the parts of one text.",
                "anyOf": [text, {"type": "array", "items": text}, {"type": "array", "items": part}],
            },
            "community_id": {"type": ["string", "null"], "description": "The community, which selects the thresholds."},
            "model": {"description": "Ignored: there is one model."},
        },
        "required": ["input"],
    })
}

/// Moderates texts, in the form of OpenAI's moderation API.
#[utoipa::path(
    post,
    path = "/v1/moderations",
    responses((status = 200, body = Moderation, description = "The result for each text."))
)]
pub(super) async fn moderations(State(shared): State<Shared>, request: Request<Body>) -> Response {
    answer(&DIALECT, shared, request, moderate).await
}

async fn moderate(call: Call) -> Result<Response, ApiError> {
    let (texts, community) = read(&call)?;
    let decisions = call.decide(texts, community).await?;
    let model = decisions
        .first()
        .and_then(|decision| decision.scoring.as_ref())
        .map_or_else(String::new, |scoring| {
            model_name(&scoring.model.base, &scoring.model.adapter)
        });
    let result = |decision| result(&call.shared, decision);
    let moderation = Moderation {
        id: format!("modr-{:032x}", rand::random::<u128>()),
        model,
        results: decisions.into_iter().map(result).collect(),
    };
    call.json(&moderation)
}

/// Reads the texts of a request, and their community. The parsed body takes far more memory than its bytes, so it does not
/// outlive this.
fn read(call: &Call) -> Result<(Vec<TextField>, Option<String>), ApiError> {
    let fields = Fields::read(&call.body.bytes)?;
    let texts = inputs(&fields, &call.shared)?;
    let max_bytes = call.shared.input.max_bytes;
    if let Some(bytes) = texts
        .iter()
        .map(|text| text.text.len())
        .find(|&bytes| bytes > max_bytes)
    {
        let message = format!("a text has {bytes} bytes, expected at most {max_bytes} (input.max_bytes)");
        return Err(ApiError::invalid(message).at("input"));
    }
    Ok((texts, fields.optional_text("/community_id")?))
}

/// Returns the texts of the input: one for a text or a list of parts, and one for each text of a list of texts.
fn inputs(fields: &Fields<'_>, shared: &Shared) -> Result<Vec<TextField>, ApiError> {
    let expected = "expected a text, a list of texts, or a list of parts of the type `text`";
    let unexpected = || ApiError::invalid(expected).at("input");
    let input = fields.value("/input").ok_or_else(unexpected)?;
    let Value::Array(list) = input else {
        return Ok(vec![fields.text("/input")?.ok_or_else(unexpected)?]);
    };
    shared.check_count(list.len())?;
    let Some(first) = list.first() else {
        return Err(unexpected());
    };
    if first.is_string() {
        return fields.texts("/input", None);
    }
    for (index, part) in list.iter().enumerate() {
        let place = format!("input[{index}]");
        match part.get("type").and_then(Value::as_str) {
            Some("text") => {}
            Some("image_url") => {
                let message = "images are not scored here, only texts";
                return Err(ApiError::new(Kind::Unsupported, message).at(format!("{place}.image_url")));
            }
            _ => return Err(unexpected().at(place)),
        }
    }
    let mut whole = TextField::default();
    let parts = fields.texts("/input", Some("text"))?;
    parts.into_iter().for_each(|part| whole.append(part));
    Ok(vec![whole])
}

fn result(shared: &Shared, decision: Decision) -> ModerationResult {
    let scoring = decision.scoring.as_ref();
    let probability = scoring.map_or(0.0, |scoring| scoring.probability);
    // A comment may be flagged for other reasons as well, such as its language.
    let is_likely =
        scoring.is_some_and(|scoring| probability >= scoring.thresholds.review.min(scoring.thresholds.block));
    // There is one classifier, so that every category has its result.
    let names = || std::iter::once(CLASSIFIER).chain(shared.config.categories.keys().map(String::as_str));
    let map = |value: Value| names().map(|name| (name.to_owned(), value.clone())).collect();
    ModerationResult {
        flagged: matches!(decision.action, Action::Review | Action::Block),
        categories: map(is_likely.into()),
        category_scores: map(probability.into()),
        category_applied_input_types: map(json!(["text"])),
        decision,
    }
}

/// Returns a name for the model that its base and adapter determine.
fn model_name(base: &str, adapter: &str) -> String {
    let short = |hash: &str| hash.trim_start_matches("sha256:").chars().take(12).collect::<String>();
    match adapter {
        "none" => format!("moderatord-{}", short(base)),
        adapter => format!("moderatord-{}-{}", short(base), short(adapter)),
    }
}

/// Returns OpenAI's form of an error.
fn error_object(error: &ApiError) -> Response {
    let (kind, code) = match error.kind {
        Kind::TokenUnknown => ("invalid_request_error", Some("invalid_api_key")),
        Kind::Unsupported => ("invalid_request_error", Some("unsupported_value")),
        Kind::Busy => ("requests", Some("rate_limit_exceeded")),
        Kind::Unavailable | Kind::TimedOut => ("server_error", None),
        _ => ("invalid_request_error", None),
    };
    let message = match error.kind {
        Kind::TokenMissing => NO_KEY,
        _ => &error.message,
    };
    let body = json!({
        "error": {"message": message, "type": kind, "param": error.field, "code": code},
    });
    let mut answer = json(&body);
    *answer.status_mut() = error.kind.status();
    answer
}
