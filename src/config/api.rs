//! The section `api`: scoring over HTTP.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::reader::SettingsReader;

/// The name of the classifier that the top-level sections of the settings describe.
pub const CLASSIFIER: &str = "hateful";

/// Scoring over HTTP.
#[derive(Debug, Clone)]
pub struct ApiConfig {
    /// The address to listen on; `None` turns the API off.
    pub listen: Option<SocketAddr>,
    /// The file with the tokens of the callers; without one, only connections from this host are served.
    pub tokens: Option<PathBuf>,
    /// The files for TLS; without them, connections are not encrypted.
    pub tls: Option<TlsConfig>,
    /// The share of the device for requests while the stream has work as well, between 0 and 1.
    pub share: f64,
    /// The limits on what callers can make the daemon hold and do.
    pub limits: ApiLimits,
    /// Each category of OpenAI's moderation API with the classifier whose result it is.
    pub categories: BTreeMap<String, String>,
    /// Each attribute of the Perspective API with the classifier whose probability it is.
    pub attributes: BTreeMap<String, String>,
}

/// The files for TLS, all in PEM format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// The certificate of the server, followed by those of its issuers.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities that issue the certificates of clients; if set, a client needs one.
    pub client_ca: Option<PathBuf>,
}

/// The limits on what callers can make the daemon hold and do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApiLimits {
    /// The maximum number of connections; others are closed at once.
    pub connections: usize,
    /// The maximum number of connections of one client: of an address, or of a /64 network of IPv6.
    pub connections_per_client: usize,
    /// The maximum size of the body of a request in bytes.
    pub body_bytes: usize,
    /// The maximum number of comments in one request.
    pub comments: usize,
    /// The maximum number of comments that wait to be scored; further ones are turned away.
    pub waiting: usize,
    /// How long a request may take from its last byte to its answer; a caller can ask for less.
    pub timeout: Duration,
}

/// Reads the section.
pub(super) fn api(reader: &mut SettingsReader) -> Option<ApiConfig> {
    let listen = listen(reader);
    let tokens = reader.optional_path("api.tokens");
    let tls = tls(reader);
    let share = reader.number("api.share", 0.05..=0.95);
    let connections = reader.integer("api.limits.connections", 1..=100_000);
    let connections_per_client = reader.integer("api.limits.connections_per_client", 1..=100_000);
    let body_bytes = reader.integer("api.limits.body_bytes", 1024..=64 << 20);
    let comments = reader.integer("api.limits.comments", 1..=10_000);
    let waiting = reader.integer("api.limits.waiting", 1..=1_000_000);
    let timeout = reader.duration(
        "api.limits.timeout",
        Duration::from_millis(10)..=Duration::from_secs(300),
    );
    let categories = classifiers(reader, "api.openai");
    let attributes = classifiers(reader, "api.perspective");
    if let (Some(comments), Some(waiting)) = (comments, waiting)
        && waiting < comments
    {
        reader.fault(
            "api.limits.waiting",
            format!("expected at least api.limits.comments ({comments})"),
        );
        return None;
    }
    let config = ApiConfig {
        listen: listen?,
        tokens,
        tls: tls?,
        share: share?,
        limits: ApiLimits {
            connections: connections?,
            connections_per_client: connections_per_client?,
            body_bytes: body_bytes?,
            comments: comments?,
            waiting: waiting?,
            timeout: timeout?,
        },
        categories: categories?,
        attributes: attributes?,
    };
    let is_open = config.tokens.is_none() && config.listen.is_some_and(|address| !address.ip().is_loopback());
    if is_open {
        let expected =
            "expected an address of this host only, such as \"127.0.0.1:8080\", because api.tokens is not set";
        reader.fault("api.listen", expected);
        return None;
    }
    Some(config)
}

/// Reads the address; the outer option is `None` if it is faulty.
fn listen(reader: &mut SettingsReader) -> Option<Option<SocketAddr>> {
    let Some(listen) = reader.optional_string("api.listen") else {
        return Some(None);
    };
    if let Ok(address) = listen.parse() {
        return Some(Some(address));
    }
    reader.fault("api.listen", "expected an address and port such as \"127.0.0.1:8080\"");
    None
}

/// Reads the files for TLS; the outer option is `None` if some are missing.
fn tls(reader: &mut SettingsReader) -> Option<Option<TlsConfig>> {
    let [certificate, key, client_ca] =
        ["api.tls.certificate", "api.tls.key", "api.tls.client_ca"].map(|key| reader.optional_path(key));
    match (certificate, key, client_ca) {
        (None, None, None) => Some(None),
        (Some(certificate), Some(key), client_ca) => Some(Some(TlsConfig {
            certificate,
            key,
            client_ca,
        })),
        (None, ..) => {
            reader.fault(
                "api.tls.certificate",
                "expected a file, because another setting of api.tls is set",
            );
            None
        }
        (_, None, _) => {
            reader.fault(
                "api.tls.key",
                "expected a file, because another setting of api.tls is set",
            );
            None
        }
    }
}

/// Reads a table from the names of another API to those of classifiers.
fn classifiers(reader: &mut SettingsReader, key: &str) -> Option<BTreeMap<String, String>> {
    let mut names = BTreeMap::new();
    let mut is_valid = true;
    for (name, found) in reader.entries(key) {
        match found.scalar() {
            Some(classifier) if classifier == CLASSIFIER => {
                names.insert(name, classifier);
            }
            // Takes back a name of the defaults.
            Some(classifier) if classifier.is_empty() => {}
            _ => {
                let expected =
                    format!("expected the name of a classifier, which is \"{CLASSIFIER}\", or \"\" for none");
                reader.reject(&found, expected);
                is_valid = false;
            }
        }
    }
    is_valid.then_some(names)
}
