//! TLS for [`super::wire`], by rustls: only servers whose certificate is signed by a trusted authority and names the host.

use std::io;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

use crate::error::{Error, Result};

pub(super) use tokio_rustls::TlsConnector;

/// What makes TLS connections that trust the certificates in `ca` (PEM), or those that the system trusts.
///
/// # Errors
/// A user error when there is no certificate in the file; external: the system has none.
pub(super) fn connector(ca: Option<&str>) -> Result<TlsConnector> {
    let roots = match ca {
        Some(path) => from_file(path)?,
        None => from_system()?,
    };
    // Named, because two providers are linked in and rustls would not choose.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::internal("TLS cannot be set up").because(error))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

fn from_file(path: &str) -> Result<RootCertStore> {
    let refused =
        |message: String| Error::user(message).hint("Set tls_ca to a file with certificates in PEM form.");
    let found = CertificateDer::pem_file_iter(path).map_err(|error| {
        refused(format!("the certificates in tls_ca = '{path}' cannot be read")).because(error)
    })?;
    let mut roots = RootCertStore::empty();
    for certificate in found {
        certificate.map_err(rustls_text).and_then(|found| roots.add(found).map_err(rustls_text)).map_err(
            |text| refused(format!("tls_ca = '{path}' holds something that is no certificate: {text}")),
        )?;
    }
    if roots.is_empty() {
        return Err(refused(format!("tls_ca = '{path}' holds no certificate")));
    }
    Ok(roots)
}

fn rustls_text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The system's certificates; those that rustls cannot read are left out.
fn from_system() -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err(Error::external("the system has no certificates to trust")
            .hint("Install the package ca-certificates, or set tls_ca."));
    }
    Ok(roots)
}

/// # Errors
/// See [`fault`]; any other kind from the network.
pub(super) async fn connect(
    connector: &TlsConnector,
    host: &str,
    stream: TcpStream,
) -> io::Result<TlsStream<TcpStream>> {
    let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let name =
        ServerName::try_from(name).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    connector.connect(name, stream).await
}

/// What TLS found wrong, if that is what failed.
pub(super) fn fault(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

/// Whether the server's certificate is what is wrong.
pub(super) fn is_certificate(fault: &rustls::Error) -> bool {
    matches!(fault, rustls::Error::InvalidCertificate(_))
}
