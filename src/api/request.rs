//! What all endpoints do with a request before they look at what it says: who sends it, until when it is of use, and
//! reading its body within limits.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH, HOST, ORIGIN};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue};
use http_body_util::BodyExt;

use super::error::{ApiError, Kind};
use super::memory::{GrowingMemory, HeldMemory};
use crate::config::ApiLimits;

/// How long the body of a request may take to arrive.
pub(super) const BODY_TIME: Duration = Duration::from_secs(10);

/// How much is read of a body that is refused.
const MAX_DISCARDED: usize = 64 << 20;

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
    pub async fn read(
        mut memory: GrowingMemory,
        parts: &Parts,
        body: &mut Body,
        max_bytes: usize,
    ) -> Result<Self, ApiError> {
        let too_large = || {
            let message = format!("the body has more than {max_bytes} bytes (api.limits.body_bytes)");
            ApiError::new(Kind::TooLarge, message)
        };
        if content_length(&parts.headers).is_some_and(|length| length > max_bytes as u64) {
            return Err(too_large());
        }
        let read = async {
            let mut bytes = Vec::new();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|_| ApiError::invalid("the body ends before its announced length"))?;
                let Ok(piece) = frame.into_data() else { continue };
                if bytes.len() + piece.len() > max_bytes {
                    return Err(too_large());
                }
                if !memory.grow(piece.len()) {
                    let message =
                        "too many requests are being read, and the share of this caller is used up; try again";
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

/// Reads what is left of a body and forgets it, within limits on its size and time.
pub(super) async fn discard(body: &mut Body) {
    let discard = async {
        let mut left = MAX_DISCARDED;
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(BODY_TIME, discard).await;
}

/// Checks that a request comes from a program, or from our own page. Without tokens, whatever a browser on this host opens
/// could otherwise send requests, and read the answers under a name of its own that leads here (DNS rebinding).
///
/// # Errors
/// Returns an error if the request is for another host than this one, or comes from a page of another one.
pub(super) fn check_origin(headers: &HeaderMap) -> Result<(), ApiError> {
    let text = |name| {
        headers
            .get(name)
            .map(|value: &HeaderValue| value.to_str().unwrap_or_default())
    };
    let host = text(HOST).unwrap_or_default();
    let name = host
        .rsplit_once(':')
        .filter(|(_, port)| !port.ends_with(']'))
        .map_or(host, |(name, _)| name);
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let is_local = name.eq_ignore_ascii_case("localhost")
        || name
            .parse::<IpAddr>()
            .is_ok_and(|address| address.to_canonical().is_loopback());
    let origin = text(ORIGIN).map(|origin| origin.split_once("://").map_or(origin, |(_, host)| host));
    if is_local && origin.is_none_or(|origin| origin.eq_ignore_ascii_case(host)) {
        return Ok(());
    }
    let message = "expected a request of this host's own programs; set api.tokens to serve others";
    Err(ApiError::new(Kind::Forbidden, message))
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

    use super::super::memory::BodyMemory;
    use super::*;

    fn parts(headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder();
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    async fn read(memory: &BodyMemory, body: Vec<u8>, max_bytes: usize) -> Result<RequestBody, Kind> {
        let read = RequestBody::read(
            memory.begin(&"forum".into()),
            &parts(&[]),
            &mut Body::from(body),
            max_bytes,
        )
        .await;
        read.map_err(|error| error.kind)
    }

    #[test]
    fn without_tokens_only_programs_of_this_host_are_served() {
        let check = |headers: &[(&str, &str)]| check_origin(&parts(headers).headers).map_err(|error| error.kind);
        for host in [
            "localhost",
            "localhost:8080",
            "127.0.0.1:8080",
            "[::1]",
            "[::1]:8080",
            "127.1.2.3",
        ] {
            assert_eq!(check(&[("host", host)]), Ok(()), "{host}");
        }
        assert_eq!(
            check(&[("host", "localhost:80"), ("origin", "http://localhost:80")]),
            Ok(())
        );
        for headers in [
            &[("host", "page.example:8080")][..],
            &[],
            &[("host", "localhost:80"), ("origin", "http://page.example")],
            &[("host", "localhost:80"), ("origin", "null")],
        ] {
            assert_eq!(check(headers), Err(Kind::Forbidden), "{headers:?}");
        }
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
        let announced = RequestBody::read(
            memory.begin(&"forum".into()),
            &parts(&[("content-length", "9")]),
            &mut Body::empty(),
            8,
        )
        .await;
        assert_eq!(announced.unwrap_err().kind, Kind::TooLarge);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_never_ends_is_given_up() {
        let endless = futures_util::stream::pending::<Result<Bytes, std::io::Error>>();
        let memory = BodyMemory::new(10);
        let read = RequestBody::read(
            memory.begin(&"forum".into()),
            &parts(&[]),
            &mut Body::from_stream(endless),
            8,
        )
        .await;
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
