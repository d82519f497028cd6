//! Why a request is not answered with a result, independently of the API that it came by.
//!
//! Each of the APIs writes an [`ApiError`] in its own form. No message quotes a comment or a token.

use std::borrow::Cow;

use axum::http::{HeaderName, StatusCode, header};
use serde_json::Value;

use super::intake::Refused;

/// The seconds after which a caller that was turned away should try again. The texts that wait take less.
const RETRY_AFTER: &str = "1";

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ApiError {
    pub kind: Kind,
    /// A sentence for people: what was found and what was expected.
    pub message: Cow<'static, str>,
    /// The field of the request that is at fault, if it is one.
    pub field: Option<Cow<'static, str>>,
    /// What the form of one of the APIs says about it beyond the message.
    pub detail: Option<Value>,
}

/// What kind of failure it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The request has no token.
    TokenMissing,
    /// The token of the request is not that of a caller.
    TokenUnknown,
    /// The request comes from a place that may not send any.
    Forbidden,
    /// The body is not what the endpoint expects.
    Invalid,
    /// The request asks for something that is not computed here.
    Unsupported,
    /// There is nothing at this path.
    NotFound,
    /// The path has no such method.
    WrongMethod,
    /// The body, or the number of comments in it, is over its limit.
    TooLarge,
    /// The body arrives too slowly.
    SlowBody,
    /// The text cannot be scored; trying again does not help.
    Unscorable,
    /// Too much waits already.
    Busy,
    /// The process is starting, stopping or failing.
    Unavailable,
    /// The deadline has passed.
    TimedOut,
}

impl Kind {
    /// Returns the status code of HTTP.
    pub fn status(self) -> StatusCode {
        match self {
            Self::TokenMissing | Self::TokenUnknown => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::Invalid | Self::Unsupported => StatusCode::BAD_REQUEST,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::WrongMethod => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Self::Unscorable => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Busy => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::TimedOut => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// Returns the headers that belong to the status.
    pub fn headers(self) -> &'static [(HeaderName, &'static str)] {
        const BUSY: [(HeaderName, &str); 1] = [(header::RETRY_AFTER, RETRY_AFTER)];
        const UNAUTHORIZED: [(HeaderName, &str); 1] = [(header::WWW_AUTHENTICATE, "Bearer")];
        // The rest of the body is not read, so the connection cannot be used again.
        const CLOSE: [(HeaderName, &str); 1] = [(header::CONNECTION, "close")];
        match self {
            Self::Busy | Self::Unavailable => &BUSY,
            Self::TokenMissing | Self::TokenUnknown => &UNAUTHORIZED,
            Self::TooLarge | Self::SlowBody => &CLOSE,
            _ => &[],
        }
    }
}

impl ApiError {
    pub fn new(kind: Kind, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            message: message.into(),
            field: None,
            detail: None,
        }
    }

    /// Adds what the form of one of the APIs says beyond the message.
    pub fn with_detail(self, detail: Value) -> Self {
        Self {
            detail: Some(detail),
            ..self
        }
    }

    /// Returns the error of a body that is not what the endpoint expects.
    pub fn invalid(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    /// Names the field that is at fault.
    pub fn at(self, field: impl Into<Cow<'static, str>>) -> Self {
        Self {
            field: Some(field.into()),
            ..self
        }
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::ShareUsed => Self::new(
                Kind::Busy,
                "too many comments wait to be scored, and the share of this caller is used up; try again",
            ),
            Refused::Stopping => Self::new(Kind::Unavailable, "the service is stopping"),
        }
    }
}
