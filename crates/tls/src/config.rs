//! Certificates, keys and verification, with the modes that libpq names (manual, "SSL Support").

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use thiserror::Error;

use crate::certificate;

/// The only protocol that PostgreSQL speaks inside TLS; direct TLS must name it.
const ALPN: &[u8] = b"postgresql";

#[derive(Debug, Error)]
pub enum TlsConfigError {
    #[error("`{path}` cannot be read as {what}")]
    File { path: PathBuf, what: &'static str, source: rustls::pki_types::pem::Error },
    #[error("`{path}` holds no certificate")]
    Empty { path: PathBuf },
    #[error("`{path}` and its key do not make a server identity")]
    Identity { path: PathBuf, source: rustls::Error },
    #[error("`{path}` cannot serve as a certificate authority")]
    Authority { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
    #[error(
        "`verify-ca` and `verify-full` need a root certificate: none was given and the system has none"
    )]
    NoRoots,
}

/// How a server's identity is checked, as libpq's `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SslMode {
    /// Never TLS.
    Disable,
    /// TLS if the server offers it, unchecked.
    Prefer,
    /// TLS or nothing, unchecked.
    Require,
    /// TLS, and a certificate that a known authority signed.
    VerifyCa,
    /// The same, and the certificate names the host.
    VerifyFull,
}

impl SslMode {
    pub const NAMES: [&'static str; 5] =
        ["disable", "prefer", "require", "verify-ca", "verify-full"];

    pub fn from_name(name: &str) -> Option<SslMode> {
        Some(match name {
            "disable" => SslMode::Disable,
            "prefer" => SslMode::Prefer,
            "require" => SslMode::Require,
            "verify-ca" => SslMode::VerifyCa,
            "verify-full" => SslMode::VerifyFull,
            _ => return None,
        })
    }
}

/// How TLS begins, as libpq's `sslnegotiation`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SslNegotiation {
    /// An SSLRequest asks for it.
    #[default]
    Postgres,
    /// At once, a round trip earlier. Servers from 17 on.
    Direct,
}

impl SslNegotiation {
    pub const NAMES: [&'static str; 2] = ["postgres", "direct"];

    pub fn from_name(name: &str) -> Option<SslNegotiation> {
        match name {
            "postgres" => Some(SslNegotiation::Postgres),
            "direct" => Some(SslNegotiation::Direct),
            _ => None,
        }
    }
}

/// Whether a client must show a certificate, as `clientcert` in pg_hba.conf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCert {
    /// Checked if shown.
    Optional,
    /// Must be shown, and be signed by the authority.
    VerifyCa,
    /// The same, and its common name is the user.
    VerifyFull,
}

/// What the proxy shows to its clients.
#[derive(Debug, Clone)]
pub struct ServerTls {
    pub(crate) config: Arc<ServerConfig>,
    /// The `tls-server-end-point` hash of our certificate, if its signature has one.
    pub end_point: Option<Vec<u8>>,
    pub client_cert: ClientCert,
}

impl ServerTls {
    /// Loads the certificate chain, its key, and the authority of client certificates.
    ///
    /// # Errors
    /// A file cannot be read, or does not hold what it should.
    pub fn load(
        cert: &Path,
        key: &Path,
        client_ca: Option<&Path>,
        client_cert: ClientCert,
    ) -> Result<ServerTls, TlsConfigError> {
        let chain = certificates(cert)?;
        let key = private_key(key)?;
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(TlsConfigError::Setup)?;
        let builder = match client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let roots = Arc::new(roots(path)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
                let verifier = match client_cert {
                    ClientCert::Optional => verifier.allow_unauthenticated(),
                    ClientCert::VerifyCa | ClientCert::VerifyFull => verifier,
                };
                let verifier = verifier.build().map_err(|source| TlsConfigError::Authority {
                    path: path.to_owned(),
                    source: source.into(),
                })?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let end_point = chain.first().and_then(|cert| certificate::end_point_hash(cert));
        let mut config = builder
            .with_single_cert(chain, key)
            .map_err(|source| TlsConfigError::Identity { path: cert.to_owned(), source })?;
        // PostgreSQL gives no tickets and libpq resumes nothing; their keys could not be handed over either.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.enable_secret_extraction = true;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(ServerTls { config: Arc::new(config), end_point, client_cert })
    }
}

/// How the proxy connects to servers.
#[derive(Debug, Clone)]
pub struct ClientTls {
    pub(crate) config: Arc<ClientConfig>,
    pub mode: SslMode,
    pub negotiation: SslNegotiation,
}

impl ClientTls {
    /// Sets up `mode` with the given authority, or the system's, and a client identity if there is one.
    ///
    /// # Errors
    /// A file cannot be read or does not hold what it should, or there is no authority to verify by.
    pub fn load(
        mode: SslMode,
        root: Option<&Path>,
        identity: Option<(&Path, &Path)>,
    ) -> Result<ClientTls, TlsConfigError> {
        let verifier = verifier(mode, root)?;
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(TlsConfigError::Setup)?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => builder
                .with_client_auth_cert(certificates(cert)?, private_key(key)?)
                .map_err(|source| TlsConfigError::Identity { path: cert.to_owned(), source })?,
        };
        config.resumption = Resumption::disabled();
        config.enable_secret_extraction = true;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(ClientTls { config: Arc::new(config), mode, negotiation: SslNegotiation::default() })
    }
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsConfigError> {
    let file =
        |source| TlsConfigError::File { path: path.to_owned(), what: "certificates", source };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(file)?.collect();
    let chain = chain.map_err(file)?;
    if chain.is_empty() {
        return Err(TlsConfigError::Empty { path: path.to_owned() });
    }
    Ok(chain)
}

pub(crate) fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsConfigError> {
    PrivateKeyDer::from_pem_file(path).map_err(|source| TlsConfigError::File {
        path: path.to_owned(),
        what: "a private key",
        source,
    })
}

pub(crate) fn roots(path: &Path) -> Result<RootCertStore, TlsConfigError> {
    let mut store = RootCertStore::empty();
    for cert in certificates(path)? {
        store.add(cert).map_err(|source| TlsConfigError::Authority {
            path: path.to_owned(),
            source: source.into(),
        })?;
    }
    Ok(store)
}

fn verifier(mode: SslMode, root: Option<&Path>) -> Result<Arc<Verifier>, TlsConfigError> {
    let inner = if mode < SslMode::VerifyCa {
        None
    } else {
        let store = match root {
            Some(path) => roots(path)?,
            None => {
                let mut store = RootCertStore::empty();
                store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                store
            }
        };
        let builder = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider());
        Some(builder.build().map_err(|_| TlsConfigError::NoRoots)?)
    };
    Ok(Arc::new(Verifier { inner, mode, provider: provider() }))
}

/// Checks as much of a server's identity as the mode asks for.
#[derive(Debug)]
struct Verifier {
    inner: Option<Arc<WebPkiServerVerifier>>,
    mode: SslMode,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(inner) = &self.inner else { return Ok(ServerCertVerified::assertion()) };
        match inner.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
            // webpki looks at the name last, so a wrong name means that the chain held.
            Err(rustls::Error::InvalidCertificate(
                rustls::CertificateError::NotValidForName
                | rustls::CertificateError::NotValidForNameContext { .. },
            )) if self.mode == SslMode::VerifyCa => Ok(ServerCertVerified::assertion()),
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
