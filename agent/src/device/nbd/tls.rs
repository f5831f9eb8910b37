//! TLS for the NBD export over TCP: who is served is who has a certificate of the operator's authority.
//!
//! The folder is laid out as those that qemu and nbdkit read: `ca-cert.pem`, `server-cert.pem` and `server-key.pem`, and
//! `ca-crl.pem` where certificates were revoked. Both sides show a certificate. The server's is for the client to judge; a
//! client's must be signed by an authority in `ca-cert.pem`, for the use by clients if it names any use, in its time and
//! not revoked. Names in it mean nothing.
//!
//! The files are read when the server starts. There is no resumption: each connection shows its certificate anew. Keys
//! that both sides know beforehand (PSK) are not there, since rustls has none.
//!
//! Retained per connection: what one read brings of encrypted bytes, at most 64 KiB of encrypted replies, and a record
//! of 16 KiB; in the handshake, one message of at most 64 KiB.

use crate::secret::{Exposure, exposure};
use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

const AUTHORITIES: &str = "ca-cert.pem";
const REVOKED: &str = "ca-crl.pem";
const CERTIFICATE: &str = "server-cert.pem";
const KEY: &str = "server-key.pem";

/// How many encrypted bytes one read of the socket brings. rustls alone would ask for 4 KiB at a time.
const READ_BYTES: usize = 64 << 10;

/// Certificates that TLS cannot be served with.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file is not what its name says.
    #[error("{path} holds no {what} in PEM form", path = path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
        /// What should be there.
        what: &'static str,
        /// What the parser met.
        source: pem::Error,
    },
    /// Others than the owner may read or replace the key.
    #[error("the key {path} {exposure}", path = path.display())]
    Exposed {
        /// The key's file.
        path: PathBuf,
        /// Who may do what.
        exposure: Exposure,
    },
    /// A certificate of an authority makes no sense.
    #[error("{path} holds a certificate that cannot be used", path = path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: rustls::Error,
    },
    /// The authorities and the list of revoked certificates cannot be used.
    #[error("cannot judge clients by {path}", path = folder.display())]
    Verifier {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with them.
        source: VerifierBuilderError,
    },
    /// The server's certificate and key cannot be used, for one because they do not belong together.
    #[error("cannot use the certificate and key of the server in {path}", path = folder.display())]
    Certificate {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with them.
        source: rustls::Error,
    },
}

/// What a server over TCP needs to speak TLS. Clones share it.
#[derive(Clone)]
pub struct Tls(TlsAcceptor);

/// A socket of type `S` that encrypts.
pub(super) type Encrypted<S> = TlsStream<BufReader<S>>;

impl Tls {
    /// Reads the certificates and the key in a folder; see the module.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(folder: &Path) -> Result<Self, TlsError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let authorities = authorities(&folder.join(AUTHORITIES))?;
        let unusable = |source| TlsError::Verifier { folder: folder.to_owned(), source };
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(authorities), provider.clone())
            .with_crls(revoked(&folder.join(REVOKED))?)
            .build()
            .map_err(unusable)?;
        let chain = certificates(&folder.join(CERTIFICATE))?;
        let key = key(&folder.join(KEY))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13, &TLS12])
            .expect("the provider has suites for both versions")
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|source| TlsError::Certificate { folder: folder.to_owned(), source })?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    /// Takes a client's handshake. Whatever the socket brings first has to be that.
    pub(super) async fn accept<S>(&self, socket: S) -> io::Result<Encrypted<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.0.accept(BufReader::with_capacity(READ_BYTES, socket)).await
    }
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        store.add(certificate).map_err(|source| TlsError::Authority { path: path.to_owned(), source })?;
    }
    Ok(store)
}

/// The certificates of a file, of which there is at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path, &mut open(path)?)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let none = |source| TlsError::NotPem { path: path.to_owned(), what: "certificate", source };
    let found = found.map_err(none)?;
    if found.is_empty() { Err(none(pem::Error::NoItemsFound)) } else { Ok(found) }
}

/// The lists of revoked certificates, if there are any.
fn revoked(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        opened => opened.map_err(|source| TlsError::Io { path: path.to_owned(), source })?,
    };
    let text = read(path, &mut file)?;
    let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&text).collect();
    let none =
        |source| TlsError::NotPem { path: path.to_owned(), what: "list of revoked certificates", source };
    let found = found.map_err(none)?;
    if found.is_empty() { Err(none(pem::Error::NoItemsFound)) } else { Ok(found) }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let mut file = open(path)?;
    let metadata = file.metadata().map_err(|source| TlsError::Io { path: path.to_owned(), source })?;
    if let Some(exposure) = exposure(&metadata) {
        return Err(TlsError::Exposed { path: path.to_owned(), exposure });
    }
    PrivateKeyDer::from_pem_slice(&read(path, &mut file)?).map_err(|source| TlsError::NotPem {
        path: path.to_owned(),
        what: "private key",
        source,
    })
}

fn open(path: &Path) -> Result<File, TlsError> {
    File::open(path).map_err(|source| TlsError::Io { path: path.to_owned(), source })
}

fn read(path: &Path, file: &mut File) -> Result<Vec<u8>, TlsError> {
    let mut text = Vec::new();
    file.read_to_end(&mut text).map_err(|source| TlsError::Io { path: path.to_owned(), source })?;
    Ok(text)
}
