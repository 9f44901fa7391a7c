//! TLS between the parts of Holdfast: both sides show a certificate that one authority has signed.

use std::path::Path;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};

use crate::config::{TlsConfigError, certificates, private_key, provider, roots};

/// What is spoken on a connection, by its name in ALPN (RFC 7301): HTTP/2 where both sides can.
pub const H2: &[u8] = b"h2";
const PROTOCOLS: [&[u8]; 2] = [H2, b"http/1.1"];

/// What a part of Holdfast shows to others, and by what it knows them.
#[derive(Debug, Clone)]
pub struct Mutual {
    pub server: Arc<ServerConfig>,
    pub client: Arc<ClientConfig>,
}

impl Mutual {
    /// Loads our certificate chain, its key, and the authority of all certificates.
    ///
    /// # Errors
    /// A file cannot be read, or does not hold what it should.
    pub fn load(cert: &Path, key: &Path, ca: &Path) -> Result<Mutual, TlsConfigError> {
        let identity = |source| TlsConfigError::Identity { path: cert.to_owned(), source };
        let authority = |source: rustls::server::VerifierBuilderError| TlsConfigError::Authority {
            path: ca.to_owned(),
            source: source.into(),
        };
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots(ca)?), provider());
        let protocols: Vec<Vec<u8>> = PROTOCOLS.iter().map(|name| name.to_vec()).collect();
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsConfigError::Setup)?
            .with_client_cert_verifier(verifier.build().map_err(authority)?)
            .with_single_cert(certificates(cert)?, private_key(key)?)
            .map_err(identity)?;
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsConfigError::Setup)?
            .with_root_certificates(roots(ca)?)
            .with_client_auth_cert(certificates(cert)?, private_key(key)?)
            .map_err(identity)?;
        client.resumption = Resumption::disabled();
        server.alpn_protocols.clone_from(&protocols);
        client.alpn_protocols = protocols;
        Ok(Mutual { server: Arc::new(server), client: Arc::new(client) })
    }
}

/// The name that a server's certificate must have: that of the host, or its address.
pub fn server_name(host: &str) -> Option<ServerName<'static>> {
    ServerName::try_from(host.to_owned()).ok()
}
