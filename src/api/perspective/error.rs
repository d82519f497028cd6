//! Errors in the form of Google's APIs, with the details of the Perspective API.

use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};

use super::request::Languages;
use crate::api::call::json as json_answer;
use crate::api::error::{ApiError, Kind};

/// The type of the details of an error.
const DETAIL: &str = "type.googleapis.com/google.commentanalyzer.v1alpha1.Error";

/// The message for a request without a key, as in all of Google's APIs.
const NO_KEY: &str = "Method doesn't allow unregistered callers (callers without established identity). \
                      Please use API Key or other form of API consumer identity to call this API.";

/// The code of a language that is not known (BCP 47).
const UNDETERMINED: &str = "und";

/// Causes that the original names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    CommentEmpty,
    CommentTooLong,
    NoRequestedAttributes,
    LanguageNotSupportedByAttribute,
    InvalidRequest,
}

impl Cause {
    fn name(self) -> &'static str {
        match self {
            Self::CommentEmpty => "COMMENT_EMPTY",
            Self::CommentTooLong => "COMMENT_TOO_LONG",
            Self::NoRequestedAttributes => "NO_REQUESTED_ATTRIBUTES",
            Self::LanguageNotSupportedByAttribute => "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE",
            Self::InvalidRequest => "INVALID_REQUEST",
        }
    }

    /// Returns the error with this cause.
    pub(super) fn error(self, message: impl Into<String>) -> ApiError {
        let detail = json!({"@type": DETAIL, "errorType": self.name()});
        ApiError::invalid(message.into()).with_detail(detail)
    }
}

/// Returns the error of an attribute that does not support the languages of a comment: those that the request names, or
/// the one that was recognised.
pub(super) fn language_not_supported(attribute: &str, languages: &Languages) -> ApiError {
    let (name, languages) = match languages {
        Languages::Requested(requested) => ("requestedLanguages", requested.clone()),
        Languages::Detected(found) => ("detectedLanguages", vec![found.unwrap_or(UNDETERMINED).to_owned()]),
    };
    let message = format!(
        "Attribute {attribute} does not support request languages: {}",
        languages.join(", ")
    );
    let detail = json!({
        "@type": DETAIL,
        "errorType": Cause::LanguageNotSupportedByAttribute.name(),
        "languageNotSupportedByAttributeError": {name: languages, "attribute": attribute},
    });
    ApiError::new(Kind::Unsupported, message).with_detail(detail)
}

/// Returns Google's form of an error.
pub(in crate::api) fn answer(error: &ApiError) -> Response {
    let (code, status) = match error.kind {
        // Google answers a wrong key with 400, and clients recognise it by the reason.
        Kind::TokenUnknown => (StatusCode::BAD_REQUEST, "INVALID_ARGUMENT"),
        Kind::TokenMissing => (StatusCode::FORBIDDEN, "PERMISSION_DENIED"),
        Kind::Busy => (error.kind.status(), "RESOURCE_EXHAUSTED"),
        Kind::Unavailable => (error.kind.status(), "UNAVAILABLE"),
        Kind::TimedOut => (error.kind.status(), "DEADLINE_EXCEEDED"),
        Kind::Forbidden => (error.kind.status(), "PERMISSION_DENIED"),
        Kind::NotFound => (error.kind.status(), "NOT_FOUND"),
        kind => (kind.status(), "INVALID_ARGUMENT"),
    };
    let (message, details) = match (error.kind, &error.detail) {
        (Kind::TokenMissing, _) => (NO_KEY.to_owned(), Value::Null),
        (Kind::TokenUnknown, _) => (
            "API key not valid. Please pass a valid API key.".to_owned(),
            json!([{
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": "API_KEY_INVALID",
                "domain": "googleapis.com",
                "metadata": {"service": "commentanalyzer.googleapis.com"},
            }]),
        ),
        (_, Some(detail)) => (error.message.to_string(), json!([detail])),
        (Kind::Invalid | Kind::Unsupported, None) => {
            let detail = json!({"@type": DETAIL, "errorType": Cause::InvalidRequest.name()});
            (with_field(error), json!([detail]))
        }
        (_, None) => (error.message.to_string(), Value::Null),
    };
    let mut body = json!({"error": {"code": code.as_u16(), "message": message, "status": status}});
    if !details.is_null() {
        body["error"]["details"] = details;
    }
    let mut answer = json_answer(&body);
    *answer.status_mut() = code;
    answer
}

fn with_field(error: &ApiError) -> String {
    match &error.field {
        Some(field) => format!("{field}: {}", error.message),
        None => error.message.to_string(),
    }
}
