//! What all endpoints do with a request before they look at what it says: who sends it, until when it is of use, and
//! reading its body within limits.

use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH};
use axum::http::request::Parts;
use http_body_util::BodyExt;

use super::error::{ApiError, Kind};
use super::memory::{BodyMemory, HeldMemory};
use crate::config::ApiLimits;

/// How long the body of a request may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(10);

/// The header in which a caller says how many seconds it will wait.
const TIMEOUT_HEADER: &str = "request-timeout";

/// The body of a request.
#[derive(Debug)]
pub(super) struct RequestBody {
    pub bytes: Bytes,
    pub memory: HeldMemory,
}

impl RequestBody {
    /// Reads a body.
    ///
    /// Memory is taken as the body arrives, so that a client has to send what it wants to occupy.
    ///
    /// # Errors
    /// Returns an error if the body is larger than `max_bytes`, takes too long, or if there is no memory for it.
    pub async fn read(memory: &BodyMemory, parts: &Parts, body: Body, max_bytes: usize) -> Result<Self, ApiError> {
        let too_large = || {
            let message = format!("the body has more than {max_bytes} bytes (api.limits.body_bytes)");
            ApiError::new(Kind::TooLarge, message)
        };
        if content_length(&parts.headers).is_some_and(|length| length > max_bytes as u64) {
            return Err(too_large());
        }
        let read = async {
            let (mut body, mut bytes, mut memory) = (body, Vec::new(), memory.begin());
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|_| ApiError::invalid("the body ends before its announced length"))?;
                let Ok(piece) = frame.into_data() else { continue };
                if bytes.len() + piece.len() > max_bytes {
                    return Err(too_large());
                }
                if !memory.grow(piece.len()) {
                    let message = "too many requests are being read; try again";
                    return Err(ApiError::new(Kind::Busy, message));
                }
                bytes.extend_from_slice(&piece);
            }
            Ok(Self {
                bytes: bytes.into(),
                memory: memory.hold(),
            })
        };
        match tokio::time::timeout(BODY_TIME, read).await {
            Ok(read) => read,
            Err(_) => {
                let message = format!("the body took more than {} s to arrive", BODY_TIME.as_secs());
                Err(ApiError::new(Kind::SlowBody, message))
            }
        }
    }
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Returns the token in the `Authorization` header.
pub(super) fn bearer_token(parts: &Parts) -> Option<&str> {
    let value = parts.headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Returns until when the caller will wait for the answer: as long as the `Request-Timeout` header says, in seconds, but
/// no longer than the setting.
///
/// # Errors
/// Returns an error if the header is not a positive number.
pub(super) fn deadline(parts: &Parts, limits: &ApiLimits, now: Instant) -> Result<Instant, ApiError> {
    let Some(value) = parts.headers.get(TIMEOUT_HEADER) else {
        return Ok(now + limits.timeout);
    };
    let seconds = value.to_str().ok().and_then(|text| text.trim().parse::<f64>().ok());
    match seconds.filter(|seconds| *seconds > 0.0 && seconds.is_finite()) {
        Some(seconds) => Ok(now
            + limits
                .timeout
                .min(Duration::try_from_secs_f64(seconds).unwrap_or(limits.timeout))),
        None => Err(ApiError::invalid("expected a number of seconds").at("Request-Timeout")),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    fn parts(headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder();
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    async fn read(memory: &BodyMemory, body: Vec<u8>, max_bytes: usize) -> Result<RequestBody, Kind> {
        let read = RequestBody::read(memory, &parts(&[]), Body::from(body), max_bytes).await;
        read.map_err(|error| error.kind)
    }

    #[tokio::test]
    async fn bodies_are_read_within_their_limits() {
        let memory = BodyMemory::new(10);
        let first = read(&memory, vec![b'a'; 6], 8).await.unwrap();
        assert_eq!(first.bytes.len(), 6);
        assert_eq!(read(&memory, vec![b'a'; 9], 8).await.unwrap_err(), Kind::TooLarge);
        // The memory is taken by the first body, until its request is answered.
        assert_eq!(read(&memory, vec![b'a'; 5], 8).await.unwrap_err(), Kind::Busy);
        drop(first);
        assert!(read(&memory, vec![b'a'; 5], 8).await.is_ok());
        let announced = RequestBody::read(&memory, &parts(&[("content-length", "9")]), Body::empty(), 8).await;
        assert_eq!(announced.unwrap_err().kind, Kind::TooLarge);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_never_ends_is_given_up() {
        let endless = futures_util::stream::pending::<Result<Bytes, std::io::Error>>();
        let memory = BodyMemory::new(10);
        let read = RequestBody::read(&memory, &parts(&[]), Body::from_stream(endless), 8).await;
        assert_eq!(read.unwrap_err().kind, Kind::SlowBody);
    }

    #[test]
    fn the_caller_can_only_shorten_the_deadline() {
        let now = Instant::now();
        let limits = ApiLimits {
            connections: 1,
            connections_per_client: 1,
            body_bytes: 1,
            comments: 1,
            waiting: 1,
            timeout: Duration::from_secs(5),
        };
        let time = |value: &str| deadline(&parts(&[(TIMEOUT_HEADER, value)]), &limits, now).map(|until| until - now);
        assert_eq!(deadline(&parts(&[]), &limits, now).unwrap() - now, limits.timeout);
        assert_eq!(time("0.25").unwrap(), Duration::from_millis(250));
        for longer in ["6", "1e300"] {
            assert_eq!(time(longer).unwrap(), limits.timeout);
        }
        for invalid in ["soon", "-1", "0", "inf", "NaN"] {
            assert_eq!(time(invalid).unwrap_err().kind, Kind::Invalid, "{invalid}");
        }
    }

    #[test]
    fn a_token_is_read_from_the_authorization_header() {
        assert_eq!(bearer_token(&parts(&[("authorization", "Bearer abc")])), Some("abc"));
        assert_eq!(bearer_token(&parts(&[("authorization", "bearer  abc")])), Some("abc"));
        for none in [&[][..], &[("authorization", "Basic abc")], &[("authorization", "abc")]] {
            assert_eq!(bearer_token(&parts(none)), None);
        }
    }
}
