//! PEM files -> what rustls serves with.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use crate::{Alpn, Configs};

/// Where everything is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, and behind it those that lead to one that clients know.
    pub cert: PathBuf,
    /// Its private key: PKCS#8, PKCS#1 or SEC1.
    pub key: PathBuf,
    /// Certificates of the authorities whose clients may come; without them every client may.
    pub client_ca: Option<PathBuf>,
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// It cannot be read.
    #[error("{}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It is not PEM, or something in it is cut off.
    #[error("{}: not valid PEM: {error}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: pem::Error,
    },
    /// It is PEM, but of something else.
    #[error("{}: no {wanted} in it; it must have a section `-----BEGIN {section}-----`", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        wanted: &'static str,
        /// How its section begins.
        section: &'static str,
    },
    /// Certificate and key do not belong together, or are of a kind that is not supported.
    #[error("{} with {}: {error}", cert.display(), key.display())]
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong.
        error: rustls::Error,
    },
    /// A certificate of an authority cannot be used.
    #[error("{}: {message}", path.display())]
    ClientCa {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

/// The contents of all files.
pub(crate) struct Contents<'a> {
    files: &'a TlsFiles,
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl TlsFiles {
    pub(crate) fn read(&self) -> Result<Contents<'_>, TlsError> {
        let read = |path: &PathBuf| {
            std::fs::read(path).map_err(|error| TlsError::Read { path: path.clone(), error })
        };
        Ok(Contents {
            files: self,
            cert: read(&self.cert)?,
            key: read(&self.key)?,
            client_ca: self.client_ca.as_ref().map(read).transpose()?,
        })
    }
}

impl Contents<'_> {
    pub(crate) fn configs(&self) -> Result<Configs, TlsError> {
        let TlsFiles { cert: cert_path, key: key_path, .. } = self.files;
        let chain = certificates(cert_path, &self.cert)?;
        let key = private_key(key_path, &self.key)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| self.pair(error))?;
        let builder = match (&self.files.client_ca, &self.client_ca) {
            (Some(path), Some(text)) => {
                let refused = |message: String| TlsError::ClientCa { path: path.clone(), message };
                let mut roots = RootCertStore::empty();
                for certificate in certificates(path, text)? {
                    roots.add(certificate).map_err(|error| refused(error.to_string()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|error| refused(error.to_string()))?)
            }
            _ => builder.with_no_client_auth(),
        };
        let mut http = builder.with_single_cert(chain, key).map_err(|error| self.pair(error))?;
        let mut grpc = http.clone();
        http.alpn_protocols = Alpn::Http.protocols();
        grpc.alpn_protocols = Alpn::Grpc.protocols();
        Ok(Configs { http: Arc::new(http), grpc: Arc::new(grpc) })
    }

    /// What is compared to know whether they changed.
    pub(crate) fn bytes(&self) -> Vec<Vec<u8>> {
        [Some(&self.cert), Some(&self.key), self.client_ca.as_ref()].into_iter().flatten().cloned().collect()
    }

    fn pair(&self, error: rustls::Error) -> TlsError {
        TlsError::Pair { cert: self.files.cert.clone(), key: self.files.key.clone(), error }
    }
}

fn certificates(path: &Path, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
    let all = all.map_err(|error| TlsError::Pem { path: path.to_owned(), error })?;
    if all.is_empty() {
        return Err(TlsError::Missing {
            path: path.to_owned(),
            wanted: "certificate",
            section: "CERTIFICATE",
        });
    }
    Ok(all)
}

fn private_key(path: &Path, text: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(text).map_err(|error| match error {
        pem::Error::NoItemsFound => TlsError::Missing {
            path: path.to_owned(),
            wanted: "private key without a passphrase",
            section: "PRIVATE KEY",
        },
        error => TlsError::Pem { path: path.to_owned(), error },
    })
}
