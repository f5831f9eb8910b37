//! A host's key: what its peers know it by.
//!
//! A host has one Ed25519 key, made when its agent first starts and kept in its state folder. Its peers know it by the
//! SHA-256 of the public part ([`HostId`]). Whoever can read the file can pose as the host, so one that others may
//! read is refused, as SSH does.

use crate::durable;
use crate::secret::{Exposure, exposure};
use ::aws_lc_rs::error::Unspecified;
use ::aws_lc_rs::signature::Ed25519KeyPair;
use blockmirror_protocol::units::HostId;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The name of the key's file in the state folder.
pub const FILE_NAME: &str = "host.key";

/// The key of this host. Clones share it.
#[derive(Clone)]
pub struct HostKey {
    id: HostId,
    certified: Arc<CertifiedKey>,
    reset_secret: [u8; 32],
}

/// A key that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file or its folder could not be read or written.
    #[error("cannot {operation} the host's key {path}")]
    Io {
        /// `read` or `create`.
        operation: &'static str,
        /// The key's file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Others than the owner may read the file.
    #[error(
        "the host's key {path} can be read by others (mode {mode:03o}): run chmod 600 on it, or renew it"
    )]
    Exposed {
        /// The key's file.
        path: PathBuf,
        /// The file's permissions.
        mode: u32,
    },
    /// The file holds no key.
    #[error("the file {path} holds no private key in PEM form: restore it, or remove it to get a new one")]
    NotAKey {
        /// The key's file.
        path: PathBuf,
        /// What the parser met.
        source: pem::Error,
    },
    /// The key belongs to another user, who can change it.
    #[error("{path} belongs to the user {owner}, who could put another key there: chown root {path}", path = path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// The key is of a kind that cannot sign a handshake, or none could be made.
    #[error("cannot make use of the host's key")]
    Cryptography(#[source] rustls::Error),
    /// No key could be generated.
    #[error("cannot generate a key for this host")]
    Generation(#[source] Unspecified),
}

impl HostKey {
    /// Loads the host's key from its state folder, after creating folder and key where there are none.
    ///
    /// # Errors
    /// [`KeyError`]; a key that exists is never replaced.
    pub fn load_or_create(state_folder: &Path) -> Result<Self, KeyError> {
        let path = state_folder.join(FILE_NAME);
        match path.try_exists() {
            Ok(true) => return Self::load(&path),
            Ok(false) => {}
            Err(source) => return Err(KeyError::Io { operation: "read", path, source }),
        }
        let (key, text) = Self::generate()?;
        let created = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state_folder)
            .and_then(|()| durable::create(&path, text.as_bytes()));
        match created {
            Ok(()) => Ok(key),
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => Self::load(&path),
            Err(source) => Err(KeyError::Io { operation: "create", path, source }),
        }
    }

    /// Loads a key from its file.
    ///
    /// # Errors
    /// [`KeyError`] when the file cannot be read, may be read by others, or holds no key.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let unreadable = |source| KeyError::Io { operation: "read", path: path.to_owned(), source };
        // What is looked at is what is read.
        let mut file = std::fs::File::open(path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        match exposure(&metadata) {
            Some(Exposure::Readable { mode }) => {
                return Err(KeyError::Exposed { path: path.to_owned(), mode });
            }
            Some(Exposure::Foreign { owner }) => {
                return Err(KeyError::Foreign { path: path.to_owned(), owner });
            }
            None => {}
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(unreadable)?;
        Self::from_pem(&text, path)
    }

    /// The key of this text, which was kept at `path`.
    ///
    /// # Errors
    /// [`KeyError`] when the text is no key.
    pub fn from_pem(text: &str, path: &Path) -> Result<Self, KeyError> {
        let key = PrivatePkcs8KeyDer::from_pem_slice(text.as_bytes());
        Self::from_der(key.map_err(|source| KeyError::NotAKey { path: path.to_owned(), source })?)
    }

    /// A new key, and its text for whoever keeps it in a file of their own.
    ///
    /// # Errors
    /// [`KeyError::Generation`] where the system gives no randomness.
    pub fn generate() -> Result<(Self, String), KeyError> {
        let made = Ed25519KeyPair::generate().and_then(|pair| pair.to_pkcs8());
        let der = made.map_err(KeyError::Generation)?.as_ref().to_vec();
        let text = to_pem(&der);
        Ok((Self::from_der(PrivatePkcs8KeyDer::from(der))?, text))
    }

    /// A key that is kept nowhere.
    ///
    /// # Errors
    /// [`KeyError::Generation`] where the system gives no randomness.
    pub fn ephemeral() -> Result<Self, KeyError> {
        Ok(Self::generate()?.0)
    }

    fn from_der(key: PrivatePkcs8KeyDer<'static>) -> Result<Self, KeyError> {
        let reset_secret = blake3::derive_key("blockmirror/1 stateless reset", key.secret_pkcs8_der());
        let private = PrivateKeyDer::from(key);
        let signer = aws_lc_rs::sign::any_supported_type(&private).map_err(KeyError::Cryptography)?;
        let public = signer.public_key().map(|key| key.as_ref().to_vec());
        let none = || rustls::Error::General("the key has no public part".to_owned());
        let public = public.ok_or_else(none).map_err(KeyError::Cryptography)?;
        let id = fingerprint(&public);
        let certified = CertifiedKey::new(vec![CertificateDer::from(public)], signer);
        Ok(Self { id, certified: Arc::new(certified), reset_secret })
    }

    /// The same key for an endpoint beside the agent's: with reset tokens of its own. With the agent's, whoever sees a
    /// connection of this endpoint could have the agent make the token that ends it (RFC 9000, section 21.11).
    #[must_use]
    pub fn beside_the_agent(self) -> Self {
        Self { reset_secret: random(), ..self }
    }

    /// What the host's peers know it by.
    #[must_use]
    pub fn id(&self) -> HostId {
        self.id
    }

    /// A secret that follows from the key, for the tokens of stateless resets.
    pub(super) fn reset_secret(&self) -> &[u8; 32] {
        &self.reset_secret
    }

    pub(super) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }
}

impl std::fmt::Debug for HostKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostKey({})", self.id)
    }
}

/// A private key's text (RFC 7468, section 10).
fn to_pem(der: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = "-----BEGIN PRIVATE KEY-----\n".to_owned();
    // 48 bytes make a line of 64 letters.
    for line in der.chunks(48) {
        for three in line.chunks(3) {
            let bits =
                three.iter().fold(0, |bits, byte| bits << 8 | usize::from(*byte)) << (8 * (3 - three.len()));
            let letter = |place: usize| char::from(LETTERS[bits >> (18 - 6 * place) & 63]);
            text.extend((0..4).map(|place| if place > three.len() { '=' } else { letter(place) }));
        }
        text.push('\n');
    }
    text + "-----END PRIVATE KEY-----\n"
}

/// The fingerprint of a public key: SHA-256 over its SubjectPublicKeyInfo in DER.
pub(super) fn fingerprint(public_key: &[u8]) -> HostId {
    let suite = aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13().expect("a suite of TLS 1.3");
    let hash = suite.common.hash_provider.hash(public_key);
    HostId(hash.as_ref().try_into().expect("SHA-256 gives 32 bytes"))
}

/// So many random bytes, fit for secrets and identities.
///
/// # Panics
/// When the system gives no randomness: nothing safe can be done without.
#[must_use]
pub fn random<const BYTES: usize>() -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    provider().secure_random.fill(&mut bytes).expect("the system gives random bytes");
    bytes
}

/// The one source of cryptography. AES-128 comes first: it is the cheapest that TLS 1.3 has, and long safe enough for
/// the life of a connection.
pub(super) fn provider() -> CryptoProvider {
    use aws_lc_rs::cipher_suite as suites;
    CryptoProvider {
        cipher_suites: vec![
            suites::TLS13_AES_128_GCM_SHA256,
            suites::TLS13_AES_256_GCM_SHA384,
            suites::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..aws_lc_rs::default_provider()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_is_created_once_and_loaded_ever_after() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("not/there/yet");
        let first = HostKey::load_or_create(&state).unwrap();
        assert_eq!(HostKey::load_or_create(&state).unwrap().id(), first.id());
        assert_eq!(HostKey::load(&state.join(FILE_NAME)).unwrap().id(), first.id());
        let (other, text) = HostKey::generate().unwrap();
        assert_ne!(other.id(), first.id());
        assert_eq!(HostKey::from_pem(&text, Path::new("elsewhere")).unwrap().id(), other.id());
        let mode = std::fs::metadata(state.join(FILE_NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    /// The example of RFC 8410, section 10.3: the form of keys must never change, or hosts would be strangers to each other.
    #[test]
    fn a_key_of_this_text_has_this_fingerprint() {
        let text = "-----BEGIN PRIVATE KEY-----\n\
                    MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
                    -----END PRIVATE KEY-----\n";
        let key = HostKey::from_pem(text, Path::new("elsewhere")).unwrap();
        assert_eq!(key.id().to_string(), "a1e9156054e04fac899ae9f275132cdc07a5dbc4ea2c2ad3a1ffc6e0d253681f");
        let der = PrivatePkcs8KeyDer::from_pem_slice(text.as_bytes()).unwrap();
        assert_eq!(to_pem(der.secret_pkcs8_der()), text);
    }

    #[test]
    fn an_endpoint_beside_the_agents_has_reset_tokens_of_its_own() {
        let key = HostKey::ephemeral().unwrap();
        let beside = key.clone().beside_the_agent();
        assert_eq!(beside.id(), key.id());
        assert_ne!(beside.reset_secret(), key.reset_secret());
    }

    #[test]
    fn a_key_of_another_user_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        HostKey::load_or_create(folder.path()).unwrap();
        let path = folder.path().join(FILE_NAME);
        if std::os::unix::fs::chown(&path, Some(12345), None).is_err() {
            return eprintln!("skipped: needs root");
        }
        let error = HostKey::load(&path).unwrap_err();
        assert!(matches!(error, KeyError::Foreign { owner: 12345, .. }), "{error:?}");
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        HostKey::load_or_create(folder.path()).unwrap();
        let path = folder.path().join(FILE_NAME);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = HostKey::load_or_create(folder.path()).unwrap_err();
        assert!(matches!(error, KeyError::Exposed { mode: 0o640, .. }), "{error:?}");
    }

    #[test]
    fn a_file_without_a_key_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        durable::create(&path, b"-----BEGIN NOTHING-----\n").unwrap();
        assert!(matches!(HostKey::load_or_create(folder.path()), Err(KeyError::NotAKey { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"-----BEGIN NOTHING-----\n");
    }

    #[test]
    fn a_fingerprint_is_the_sha_256_of_the_public_key() {
        assert_eq!(
            fingerprint(b"abc").to_string(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
