//! What the requests of both methods have in common: the key, the comment, and its languages.

use axum::http::request::Parts;
use serde_json::Value;

use super::error::{self, Cause};
use crate::api::body::{Fields, TextField};
use crate::api::call::Dialect;
use crate::api::error::{ApiError, Kind};
use crate::api::request::bearer_token;
use crate::prompt::language;

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
    if fields.value("/comment").is_some_and(|comment| !comment.is_object()) {
        return Err(ApiError::invalid("expected an object").at("comment"));
    }
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

/// The languages of a comment, as codes such as `en` or `pt-BR`.
pub(super) enum Languages {
    /// Those that the request names, of which there is at least one.
    Requested(Vec<String>),
    /// The one that was recognised, if the text shows one clearly.
    Detected(Option<&'static str>),
}

impl Languages {
    /// Reads the languages that the request names, or else recognises that of the text.
    ///
    /// # Errors
    /// Returns an error if the field is not a list of texts.
    pub(super) fn read(fields: &Fields<'_>, text: &str) -> Result<Self, ApiError> {
        let expected = || ApiError::invalid("expected a list of language codes").at("languages");
        let named = match fields.value("/languages") {
            None => Vec::new(),
            Some(Value::Array(list)) => list
                .iter()
                .map(|language| language.as_str().map(str::to_owned).ok_or_else(expected))
                .collect::<Result<_, _>>()?,
            // As in the original, a list may be written as its only item.
            Some(Value::String(language)) => vec![language.clone()],
            Some(_) => return Err(expected()),
        };
        Ok(if named.is_empty() {
            Self::Detected(language(text))
        } else {
            Self::Requested(named)
        })
    }

    /// Returns whether the request names only languages that are not among `known`.
    pub(super) fn excludes(&self, known: &[String]) -> bool {
        let Self::Requested(named) = self else { return false };
        let is_known = |name: &String| {
            let primary = name.split(['-', '_']).next().unwrap_or_default();
            known.iter().any(|code| code.eq_ignore_ascii_case(primary))
        };
        !named.iter().any(is_known)
    }

    /// Adds the languages to an answer.
    pub(super) fn describe(self, body: &mut Value) {
        match self {
            Self::Requested(named) => body["languages"] = named.into(),
            Self::Detected(Some(found)) => {
                for name in ["languages", "detectedLanguages"] {
                    body[name] = [found].as_slice().into();
                }
            }
            Self::Detected(None) => {}
        }
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
