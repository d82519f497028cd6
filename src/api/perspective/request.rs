//! What the requests of both methods have in common: the key, the comment, and its languages.

use axum::http::request::Parts;
use serde_json::Value;

use super::error::{self, Cause};
use crate::api::body::{Fields, TextField};
use crate::api::call::Dialect;
use crate::api::error::{ApiError, Kind};
use crate::api::request::bearer_token;

/// The form of requests and answers of `comments:analyze`.
pub(super) const ANALYZE: Dialect = Dialect {
    endpoint: "analyze",
    token: key,
    error: error::answer,
};

/// The form of requests and answers of `comments:suggestscore`.
pub(super) const SUGGEST: Dialect = Dialect {
    endpoint: "suggestscore",
    ..ANALYZE
};

/// Returns the key of a request: the parameter `key`, the header `X-Goog-Api-Key`, or a bearer token.
fn key(parts: &Parts) -> Option<String> {
    let query = parts.uri.query().unwrap_or_default();
    let parameter = url::form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "key");
    if let Some((_, key)) = parameter {
        return Some(key.into_owned());
    }
    let header = parts
        .headers
        .get("x-goog-api-key")
        .and_then(|value| value.to_str().ok());
    header.or_else(|| bearer_token(parts)).map(str::to_owned)
}

/// Returns the comment's text.
///
/// # Errors
/// Returns an error if it is missing, empty, too long, or not plain text.
pub(super) fn comment(fields: &Fields<'_>, max_bytes: usize) -> Result<TextField, ApiError> {
    let kind = fields.optional_text("/comment/type")?;
    match kind.as_deref() {
        None | Some("PLAIN_TEXT" | "TEXT_TYPE_UNSPECIFIED") => {}
        Some("HTML") => {
            let message = "Currently, only 'PLAIN_TEXT' comments are supported";
            return Err(ApiError::new(Kind::Unsupported, message));
        }
        Some(_) => return Err(ApiError::invalid("Unknown text type")),
    }
    let comment = fields.text("/comment/text")?.unwrap_or_default();
    if comment.text.trim().is_empty() {
        return Err(Cause::CommentEmpty.error("Comment must be non-empty."));
    }
    if comment.text.len() > max_bytes {
        let message = format!(
            "Comment text too long: {} bytes, at most {max_bytes}.",
            comment.text.len()
        );
        return Err(Cause::CommentTooLong.error(message));
    }
    Ok(comment)
}

/// Returns the languages that the request names.
pub(super) fn languages(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let expected = || ApiError::invalid("expected a list of language codes").at("languages");
    match fields.value("/languages") {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => list
            .iter()
            .map(|language| language.as_str().map(str::to_owned).ok_or_else(expected))
            .collect(),
        Some(_) => Err(expected()),
    }
}

/// Checks the context, of which the original makes no use either.
pub(super) fn check_context(fields: &Fields<'_>) -> Result<(), ApiError> {
    let has = |pointer: &str| fields.value(pointer).is_some();
    if has("/context/entries") && has("/context/articleAndParentComment") {
        let message = "Context can have either entries or article_and_parent_comment, but both fields were populated.";
        return Err(ApiError::invalid(message));
    }
    Ok(())
}
