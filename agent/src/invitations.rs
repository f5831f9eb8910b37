//! The invitations that a volume's host has given out: who knows the secret of one may join, once.
//!
//! They are kept in the volume's state folder as hashes, so that the file does not let its reader in. A redemption
//! is durable before it succeeds: after a crash the same token is either used, or nobody was let in with it. The
//! secrets are random and long, so a plain hash protects them.

use crate::durable;
use crate::token::Secret;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};

/// The name of the file in the volume's state folder.
pub const FILE_NAME: &str = "invitations.toml";

/// How long an expired invitation is remembered, so that its bearer is told what is wrong with it, in seconds.
const REMEMBER_SECONDS: u64 = 7 * 24 * 3600;

/// The invitations of one volume. One value at a time holds a volume's.
#[derive(Debug)]
pub struct Invitations {
    path: PathBuf,
    kept: Kept,
}

/// The file's content.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    #[serde(default)]
    invitation: Vec<Invitation>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Invitation {
    /// BLAKE3 of the secret, in hexadecimal digits.
    #[serde(with = "hexadecimal")]
    secret_hash: blake3::Hash,
    /// Until when it can be used, in seconds since 1970.
    expires_seconds: u64,
    /// Whether somebody has joined with it.
    used: bool,
}

/// Why a secret does not let its bearer in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// No invitation has this secret.
    #[error("the token belongs to no invitation of this volume: make a new one with `blockmirror invite`")]
    Wrong,
    /// Somebody has joined with it.
    #[error("the token was used already: make a new one with `blockmirror invite`")]
    Used,
    /// It was not used in time.
    #[error("the token has expired: make a new one with `blockmirror invite`")]
    Expired,
}

/// Why an invitation was not made or redeemed.
#[derive(Debug, thiserror::Error)]
pub enum InvitationError {
    /// The secret does not let its bearer in.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The file cannot be read or written.
    #[error("cannot {operation} the invitations in {path}")]
    Io {
        /// `read` or `write`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file holds something else.
    #[error("the invitations in {path} are damaged: remove the file and invite again")]
    Corrupted {
        /// The file.
        path: PathBuf,
        /// What the parser met.
        source: toml::de::Error,
    },
}

impl Invitations {
    /// Loads a volume's invitations from its state folder; there are none where there is no file.
    ///
    /// # Errors
    /// [`InvitationError`] when the file cannot be read or holds something else.
    pub fn load(state_folder: &Path) -> Result<Self, InvitationError> {
        let path = state_folder.join(FILE_NAME);
        let kept = match std::fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text)
                .map_err(|source| InvitationError::Corrupted { path: path.clone(), source })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Kept::default(),
            Err(source) => return Err(InvitationError::Io { operation: "read", path, source }),
        };
        Ok(Self { path, kept })
    }

    /// Makes an invitation with a secret that is random and new. It is durable when this returns.
    ///
    /// # Errors
    /// [`InvitationError::Io`] when it could not be made durable.
    pub fn create(
        &mut self,
        now_seconds: u64,
        lifetime_seconds: u64,
        secret: &Secret,
    ) -> Result<(), InvitationError> {
        let mut changed = self.pruned(now_seconds);
        changed.invitation.push(Invitation {
            secret_hash: blake3::hash(&secret.0),
            // TOML's integers have a sign.
            expires_seconds: now_seconds.saturating_add(lifetime_seconds).min(i64::MAX as u64),
            used: false,
        });
        self.store(changed)
    }

    /// Whether a secret would let its bearer in now.
    ///
    /// # Errors
    /// [`Invalid`], which says why not.
    pub fn check(&self, secret: &Secret, now_seconds: u64) -> Result<(), Invalid> {
        self.find(secret, now_seconds).map(|_| ())
    }

    /// Uses an invitation up. Only when this returns may its bearer be let in.
    ///
    /// # Errors
    /// [`InvitationError`] when the secret is of no use, or its use could not be made durable.
    pub fn redeem(&mut self, secret: &Secret, now_seconds: u64) -> Result<(), InvitationError> {
        let used = self.find(secret, now_seconds)?.secret_hash;
        let mut changed = self.pruned(now_seconds);
        let invitation = changed
            .invitation
            .iter_mut()
            .find(|invitation| invitation.secret_hash == used)
            .expect("an invitation that is valid is not pruned");
        invitation.used = true;
        self.store(changed)
    }

    /// Takes as long for every hash that is not the right one: hashes compare in constant time.
    fn find(&self, secret: &Secret, now_seconds: u64) -> Result<&Invitation, Invalid> {
        let hash = blake3::hash(&secret.0);
        let found = self.kept.invitation.iter().find(|invitation| invitation.secret_hash == hash);
        match found {
            None => Err(Invalid::Wrong),
            Some(invitation) if invitation.used => Err(Invalid::Used),
            Some(invitation) if invitation.expires_seconds <= now_seconds => Err(Invalid::Expired),
            Some(invitation) => Ok(invitation),
        }
    }

    /// What is kept, without those that expired long ago.
    fn pruned(&self, now_seconds: u64) -> Kept {
        let mut kept = self.kept.clone();
        kept.invitation
            .retain(|invitation| now_seconds < invitation.expires_seconds.saturating_add(REMEMBER_SECONDS));
        kept
    }

    fn store(&mut self, changed: Kept) -> Result<(), InvitationError> {
        let text = toml::to_string(&changed).expect("invitations have a TOML form");
        durable::replace(&self.path, text.as_bytes()).map_err(|source| InvitationError::Io {
            operation: "write",
            path: self.path.clone(),
            source,
        })?;
        self.kept = changed;
        Ok(())
    }
}

/// A hash as its hexadecimal digits.
mod hexadecimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(hash: &blake3::Hash, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hash.to_hex())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<blake3::Hash, D::Error> {
        blake3::Hash::from_hex(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_700_000_000;
    const HOUR: u64 = 3600;

    fn secret(byte: u8) -> Secret {
        Secret([byte; 32])
    }

    fn redeem(invitations: &mut Invitations, byte: u8, now: u64) -> Result<(), Invalid> {
        match invitations.redeem(&secret(byte), now) {
            Ok(()) => Ok(()),
            Err(InvitationError::Invalid(invalid)) => Err(invalid),
            Err(error) => panic!("{error:?}"),
        }
    }

    #[test]
    fn an_invitation_is_good_once_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let mut invitations = Invitations::load(folder.path()).unwrap();
        assert_eq!(invitations.check(&secret(1), NOW), Err(Invalid::Wrong));
        invitations.create(NOW, HOUR, &secret(1)).unwrap();
        invitations.create(NOW, HOUR, &secret(2)).unwrap();

        let mut reloaded = Invitations::load(folder.path()).unwrap();
        assert_eq!(reloaded.check(&secret(1), NOW), Ok(()));
        assert_eq!(reloaded.check(&secret(1), NOW), Ok(()), "asking does not use it up");
        assert_eq!(redeem(&mut reloaded, 1, NOW), Ok(()));
        assert_eq!(redeem(&mut reloaded, 1, NOW), Err(Invalid::Used));

        let mut reloaded = Invitations::load(folder.path()).unwrap();
        assert_eq!(redeem(&mut reloaded, 1, NOW), Err(Invalid::Used));
        assert_eq!(redeem(&mut reloaded, 2, NOW), Ok(()));
    }

    #[test]
    fn an_invitation_expires_and_is_forgotten_in_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let mut invitations = Invitations::load(folder.path()).unwrap();
        invitations.create(NOW, HOUR, &secret(1)).unwrap();
        assert_eq!(invitations.check(&secret(1), NOW + HOUR - 1), Ok(()));
        assert_eq!(redeem(&mut invitations, 1, NOW + HOUR), Err(Invalid::Expired));
        invitations.create(NOW + HOUR, HOUR, &secret(2)).unwrap();
        assert_eq!(redeem(&mut invitations, 1, NOW + HOUR), Err(Invalid::Expired));
        invitations.create(NOW + HOUR + REMEMBER_SECONDS, HOUR, &secret(3)).unwrap();
        assert_eq!(invitations.kept.invitation.len(), 2, "the second is remembered yet");
        assert_eq!(redeem(&mut invitations, 1, NOW), Err(Invalid::Wrong));
    }

    #[test]
    fn the_file_holds_no_secret_and_is_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mut invitations = Invitations::load(folder.path()).unwrap();
        invitations.create(NOW, u64::MAX, &Secret(*b"0123456789abcdef0123456789abcdef")).unwrap();
        let path = folder.path().join(FILE_NAME);
        let text = std::fs::read_to_string(&path).unwrap();
        let hash = blake3::hash(b"0123456789abcdef0123456789abcdef");
        assert_eq!(
            text,
            format!(
                "[[invitation]]\nsecret_hash = \"{hash}\"\nexpires_seconds = {}\nused = false\n",
                i64::MAX
            )
        );
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_redemption_that_cannot_be_kept_lets_nobody_in() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        std::fs::create_dir(&state).unwrap();
        let mut invitations = Invitations::load(&state).unwrap();
        invitations.create(NOW, HOUR, &secret(1)).unwrap();
        std::fs::remove_dir_all(&state).unwrap();
        assert!(matches!(invitations.redeem(&secret(1), NOW), Err(InvitationError::Io { .. })));
        std::fs::create_dir(&state).unwrap();
        assert_eq!(redeem(&mut invitations, 1, NOW), Ok(()), "it is not used up by the failure");
    }

    #[test]
    fn a_damaged_file_is_reported_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        std::fs::write(&path, "[[invitation]]\nsecret_hash = \"zz\"\nexpires_seconds = 1\nused = false\n")
            .unwrap();
        assert!(matches!(Invitations::load(folder.path()), Err(InvitationError::Corrupted { .. })));
        assert!(path.exists());
    }
}
