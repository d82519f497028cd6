//! TLS for a server: certificates from files, which can be read again while it serves.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

use crate::fault::Fault;

/// The files in PEM format.
#[derive(Debug, Clone)]
pub(crate) struct TlsFiles {
    /// The certificate of the server, followed by those of its issuers.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities that issue the certificates of clients; if set, a client needs one.
    pub client_ca: Option<PathBuf>,
}

/// The certificates of a server.
pub(crate) struct Tls {
    files: TlsFiles,
    current: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// Returns a fault that names the file if one cannot be read, or if they do not belong together.
    pub(crate) fn read(files: TlsFiles) -> Result<Self, Fault> {
        let current = RwLock::new(Arc::new(load(&files)?));
        Ok(Self { files, current })
    }

    /// Reads the files again, for connections that begin from now on.
    ///
    /// # Errors
    /// Returns a fault as [`Tls::read`] does. The old certificates then stay in force.
    pub(crate) fn reload(&self) -> Result<(), Fault> {
        let loaded = Arc::new(load(&self.files)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        Ok(())
    }

    /// Returns what accepts connections with the certificates in force.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        TlsAcceptor::from(Arc::clone(&current))
    }
}

fn load(files: &TlsFiles) -> Result<ServerConfig, Fault> {
    let chain = certificates(&files.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| Fault::file(&files.key, format!("expected a private key in PEM format: {error}")))?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| Fault::other(format!("cannot use TLS: {error}")))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path)? {
                let refused = |error| Fault::file(path, format!("expected certificates of authorities: {error}"));
                roots.add(certificate).map_err(refused)?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            let refused = |error| Fault::file(path, format!("expected certificates of authorities: {error}"));
            builder.with_client_cert_verifier(verifier.map_err(refused)?)
        }
    };
    let mismatch = |error| {
        let text = format!("expected the key of {}: {error}", files.certificate.display());
        Fault::file(&files.key, text)
    };
    builder.with_single_cert(chain, key).map_err(mismatch)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Fault> {
    let fault = |reason: String| Fault::file(path, format!("expected certificates in PEM format: {reason}"));
    let found = CertificateDer::pem_file_iter(path).map_err(|error| fault(error.to_string()))?;
    let found: Result<Vec<_>, _> = found.collect();
    let found = found.map_err(|error| fault(error.to_string()))?;
    if found.is_empty() {
        return Err(fault("it has none".to_owned()));
    }
    Ok(found)
}
