//! Requests to the hub, and what its answers mean.

use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::ring;
use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::{Hub, HubError, Progress, Reference};

/// How often a request that fails for a reason that may pass is sent again.
pub(super) const RETRIES: u32 = 5;

/// How long a connection may take, and how long the hub may be silent.
const CONNECT: Duration = Duration::from_secs(20);
const SILENCE: Duration = Duration::from_secs(60);

/// What the hub knows about a revision.
#[derive(Deserialize)]
pub(super) struct ModelInfo {
    /// The commit.
    pub sha: String,
    pub siblings: Vec<RemoteFile>,
}

/// A file of a repository.
#[derive(Deserialize)]
pub(super) struct RemoteFile {
    #[serde(rename = "rfilename")]
    pub name: String,
    pub size: Option<u64>,
    /// The hash of a small file in Git.
    #[serde(rename = "blobId")]
    pub blob_id: Option<String>,
    pub lfs: Option<LargeFile>,
}

/// What the hub knows about a file in Git LFS, whose hash is its etag.
#[derive(Deserialize)]
pub(super) struct LargeFile {
    pub sha256: String,
    pub size: u64,
}

/// Sends requests with the token, again if that may help.
pub(super) struct Client<'a> {
    hub: &'a Hub,
    agent: Agent,
}

impl<'a> Client<'a> {
    pub(super) fn new(hub: &'a Hub) -> Self {
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()))
            .build();
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // The token is for the hub alone. Files are on another host, which gets a signed address.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .accept_encoding("identity")
            .user_agent(concat!("moderatord/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .tls_config(tls)
            .build();
        Self {
            hub,
            agent: config.into(),
        }
    }

    /// Asks for the commit and the files of a revision.
    pub(super) fn model_info(
        &self,
        reference: &Reference,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<ModelInfo, HubError> {
        let revision = reference.revision.replace('/', "%2F");
        let url = format!(
            "{}/api/models/{}/revision/{revision}?blobs=true",
            self.hub.endpoint, reference.id
        );
        let mut attempt = 0;
        loop {
            let read = self.get(&url, 0, reference, progress)?.body_mut().read_json();
            match read {
                Ok(info) => return Ok(info),
                Err(error) => self.pause(&mut attempt, None, &format!("{url}: {error}"), progress)?,
            }
        }
    }

    /// Returns the answer to a request for a file from an offset on: 200, 206 or 416.
    pub(super) fn get(
        &self,
        url: &str,
        offset: u64,
        reference: &Reference,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Response<Body>, HubError> {
        let mut attempt = 0;
        loop {
            let mut request = self.agent.get(url);
            if let Some(token) = &self.hub.token {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if offset > 0 {
                request = request.header("Range", format!("bytes={offset}-"));
            }
            let (reason, after) = match request.call() {
                Ok(response) => match response.status() {
                    StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                        return Ok(response);
                    }
                    status if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() => {
                        (format!("{url}: the hub answers {status}"), retry_after(&response))
                    }
                    _ => return Err(self.explain(url, &response, reference)),
                },
                Err(error) => (format!("{url}: {error}"), None),
            };
            self.pause(&mut attempt, after, &reason, progress)?;
        }
    }

    /// Waits before the next attempt, or returns an error if there were enough.
    pub(super) fn pause(
        &self,
        attempt: &mut u32,
        after: Option<Duration>,
        reason: &str,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), HubError> {
        if *attempt == RETRIES {
            return Err(HubError::Failed(format!("{reason}, after {} attempts", RETRIES + 1)));
        }
        // Without advice from the hub: 1, 2, 4, .. seconds.
        let pause = after
            .unwrap_or(Duration::from_secs(1 << *attempt))
            .min(self.hub.longest_pause);
        *attempt += 1;
        progress(Progress::Retry { reason, pause });
        std::thread::sleep(pause);
        Ok(())
    }

    /// Explains a response that retrying cannot change.
    fn explain(&self, url: &str, response: &Response<Body>, reference: &Reference) -> HubError {
        let endpoint = &self.hub.endpoint;
        let page = format!("{endpoint}/{}", reference.id);
        let code = response
            .headers()
            .get("X-Error-Code")
            .and_then(|code| code.to_str().ok());
        let status = response.status();
        let text = match (status.as_u16(), code) {
            (401, _) if self.hub.token.is_none() => format!(
                "{reference}: the hub answers {status}, because the repository is gated or private, or does not exist. \
                 Accept the licence at {page}, create a token at {endpoint}/settings/tokens, and set HF_TOKEN, or \
                 HF_TOKEN_PATH to a file with the token"
            ),
            (401, _) => format!(
                "{reference}: the hub answers {status}: the token is not valid, or may not read this repository. Accept \
                 the licence at {page}, and check the token at {endpoint}/settings/tokens"
            ),
            (403, _) => format!(
                "{reference}: the hub answers {status}: the token's owner has no access. Accept the licence at {page} \
                 (access may have to be granted), and let the token read gated repositories"
            ),
            (404, Some("RevisionNotFound")) => format!(
                "{reference}: the repository has no revision `{}`; {page}/refs lists its branches and tags",
                reference.revision
            ),
            (404, _) => format!("{reference}: the hub answers {status} to {url}; check the name at {page}"),
            _ => format!("{reference}: the hub answers {status} to {url}"),
        };
        HubError::Refused(text)
    }
}

/// Returns how long the hub asks to wait.
fn retry_after(response: &Response<Body>) -> Option<Duration> {
    let seconds = response
        .headers()
        .get("Retry-After")?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()?;
    Some(Duration::from_secs(seconds))
}
