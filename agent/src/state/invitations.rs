//! The invitations that a volume's host has given out: who knows the secret of one may join, once.
//!
//! They are kept in the volume's state folder as hashes, so that the file does not let its reader in. A redemption
//! is durable before it succeeds: after a crash the same token is either used, or nobody was let in with it. The
//! secrets are random and long, so a plain hash protects them.
//!
//! # When an invitation has expired
//!
//! The clock of the day may be set back, and nobody is to be let in by that. As long as the host was not restarted, an
//! invitation lives no longer than the kernel counts since then, whatever that clock says. Besides, the latest time that
//! was ever seen is kept: what expired by it stays so, and where the clock is behind it after a restart, how much time has
//! passed is not known, and older invitations are of no use any more.

use crate::clock;
use crate::control::api::{InvitationState, InvitationStatus};
use crate::durable;
use crate::quantity::unix_seconds;
use crate::token::Secret;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};

/// The name of the file in the volume's state folder.
pub const FILE_NAME: &str = "invitations.toml";

/// How long an expired invitation is remembered, so that its bearer is told what is wrong with it, in seconds.
const REMEMBER_SECONDS: u64 = 7 * 24 * 3600;

/// How much later than the latest time on file it must be for that to be written anew: strangers who ask must not wear the
/// disk out.
const NOTE_SECONDS: u64 = 60;

/// How many digits of a secret's hash make an invitation's name.
const ID_DIGITS: usize = 8;

/// A moment, by both clocks of the host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Now {
    /// By the clock of the day, in seconds since 1970.
    pub unix_seconds: u64,
    /// Since the host was started, in seconds: nobody sets this clock.
    pub uptime_seconds: u64,
    /// Which start of the host that was.
    pub boot: String,
}

impl Now {
    /// This moment.
    #[must_use]
    pub fn read() -> Self {
        // Without it, each agent counts for a start of its own, which is the safe side.
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        Self {
            unix_seconds: unix_seconds(),
            uptime_seconds: clock::since_boot().as_secs(),
            boot: boot.map_or_else(|_| format!("process {}", std::process::id()), |id| id.trim().to_owned()),
        }
    }
}

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
    /// The latest time that was seen, in seconds since 1970.
    #[serde(default)]
    latest_seconds: u64,
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
    /// The start of the host in which it was made, and until when of that one it can be used.
    #[serde(default)]
    boot: String,
    #[serde(default)]
    expires_uptime_seconds: u64,
    /// Whether somebody has joined or recovered with it.
    used: bool,
    /// Whether the operator took it back.
    #[serde(default)]
    revoked: bool,
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
    /// The operator took it back.
    #[error("the token was revoked: make a new one with `blockmirror invite`")]
    Revoked,
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
    /// The folder's file system hangs.
    #[error("the state folder {path} does not answer; what was begun may be done when it does")]
    Silent {
        /// The folder.
        path: PathBuf,
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
        now: &Now,
        lifetime_seconds: u64,
        secret: &Secret,
    ) -> Result<(), InvitationError> {
        let mut changed = self.pruned(now);
        // TOML's integers have a sign.
        let after = |seconds: u64| seconds.saturating_add(lifetime_seconds).min(i64::MAX as u64);
        changed.invitation.push(Invitation {
            secret_hash: blake3::hash(&secret.0),
            expires_seconds: after(self.latest(now)),
            boot: now.boot.clone(),
            expires_uptime_seconds: after(now.uptime_seconds),
            used: false,
            revoked: false,
        });
        self.store(changed)
    }

    /// Whether a secret would let its bearer in now.
    ///
    /// # Errors
    /// [`Invalid`], which says why not.
    pub fn check(&self, secret: &Secret, now: &Now) -> Result<(), Invalid> {
        self.find(secret, now).map(|_| ())
    }

    /// Uses an invitation up, and gives its name. Only when this returns may its bearer be let in.
    ///
    /// # Errors
    /// [`InvitationError`] when the secret is of no use, or its use could not be made durable.
    pub fn redeem(&mut self, secret: &Secret, now: &Now) -> Result<String, InvitationError> {
        let used = self.find(secret, now)?.secret_hash;
        let mut changed = self.pruned(now);
        let invitation = changed
            .invitation
            .iter_mut()
            .find(|invitation| invitation.secret_hash == used)
            .expect("an invitation that is valid is not pruned");
        invitation.used = true;
        let id = invitation.id();
        self.store(changed)?;
        Ok(id)
    }

    /// Takes an invitation back, used or not. Says whether there is one of that name.
    ///
    /// # Errors
    /// [`InvitationError::Io`] when that could not be made durable.
    pub fn revoke(&mut self, id: &str, now: &Now) -> Result<bool, InvitationError> {
        let mut changed = self.pruned(now);
        let found = changed.invitation.iter_mut().find(|invitation| invitation.id() == id);
        let Some(invitation) = found else { return Ok(false) };
        invitation.revoked = true;
        self.store(changed).map(|()| true)
    }

    /// Whether what the invitation of that name let its bearer do is over: it has expired, was taken back, or is forgotten.
    #[must_use]
    pub fn is_over(&self, id: &str, now: &Now) -> bool {
        let invitation = self.kept.invitation.iter().find(|invitation| invitation.id() == id);
        invitation.is_none_or(|invitation| invitation.revoked || self.has_expired(invitation, now))
    }

    /// All that are remembered, the oldest first.
    pub fn list(&self, now: &Now) -> Vec<InvitationStatus> {
        let status = |invitation: &Invitation| {
            let state = match () {
                () if invitation.revoked => InvitationState::Revoked,
                () if invitation.used => InvitationState::Used,
                () if self.has_expired(invitation, now) => InvitationState::Expired,
                () => InvitationState::Open,
            };
            let left = invitation.expires_seconds.saturating_sub(self.latest(now));
            let left = match invitation.boot == now.boot {
                true => left.min(invitation.expires_uptime_seconds.saturating_sub(now.uptime_seconds)),
                false => left,
            };
            let left_seconds = (state == InvitationState::Open).then_some(left);
            InvitationStatus { id: invitation.id(), state, left_seconds }
        };
        self.kept.invitation.iter().map(status).collect()
    }

    /// Keeps the time, where it is later than the latest one that was seen and that says something new.
    ///
    /// # Errors
    /// [`InvitationError::Io`] when it could not be made durable.
    pub fn note_time(&mut self, now: &Now) -> Result<(), InvitationError> {
        let before = Now { unix_seconds: self.kept.latest_seconds, ..now.clone() };
        let expires = |invitation: &Invitation| {
            self.has_expired(invitation, now) && !self.has_expired(invitation, &before)
        };
        let is_later = now.unix_seconds >= self.kept.latest_seconds.saturating_add(NOTE_SECONDS);
        if self.kept.invitation.is_empty() || !is_later && !self.kept.invitation.iter().any(expires) {
            return Ok(());
        }
        self.store(Kept { latest_seconds: self.latest(now), ..self.kept.clone() })
    }

    fn latest(&self, now: &Now) -> u64 {
        now.unix_seconds.max(self.kept.latest_seconds)
    }

    fn has_expired(&self, invitation: &Invitation, now: &Now) -> bool {
        let by_the_day = self.latest(now) >= invitation.expires_seconds;
        match invitation.boot == now.boot {
            true => by_the_day || now.uptime_seconds >= invitation.expires_uptime_seconds,
            false => by_the_day || now.unix_seconds < self.kept.latest_seconds,
        }
    }

    /// Takes as long for every hash that is not the right one: hashes compare in constant time.
    fn find(&self, secret: &Secret, now: &Now) -> Result<&Invitation, Invalid> {
        let hash = blake3::hash(&secret.0);
        let found = self.kept.invitation.iter().find(|invitation| invitation.secret_hash == hash);
        match found {
            None => Err(Invalid::Wrong),
            Some(invitation) if invitation.revoked => Err(Invalid::Revoked),
            Some(invitation) if invitation.used => Err(Invalid::Used),
            Some(invitation) if self.has_expired(invitation, now) => Err(Invalid::Expired),
            Some(invitation) => Ok(invitation),
        }
    }

    /// What is kept, at this time, without those that expired long ago.
    fn pruned(&self, now: &Now) -> Kept {
        let mut kept = Kept { latest_seconds: self.latest(now), ..self.kept.clone() };
        let latest = kept.latest_seconds;
        kept.invitation
            .retain(|invitation| latest < invitation.expires_seconds.saturating_add(REMEMBER_SECONDS));
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

impl Invitation {
    fn id(&self) -> String {
        self.secret_hash.to_hex().chars().take(ID_DIGITS).collect()
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

    /// A moment at which the clock of the day is right, of a host that was started long before.
    fn at(unix_seconds: u64) -> Now {
        Now { unix_seconds, uptime_seconds: unix_seconds - NOW + 1000, boot: "one".to_owned() }
    }

    fn secret(byte: u8) -> Secret {
        Secret([byte; 32])
    }

    fn redeem(invitations: &mut Invitations, byte: u8, now: u64) -> Result<(), Invalid> {
        match invitations.redeem(&secret(byte), &at(now)) {
            Ok(_) => Ok(()),
            Err(InvitationError::Invalid(invalid)) => Err(invalid),
            Err(error) => panic!("{error:?}"),
        }
    }

    #[test]
    fn an_invitation_is_good_once_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let mut invitations = Invitations::load(folder.path()).unwrap();
        assert_eq!(invitations.check(&secret(1), &at(NOW)), Err(Invalid::Wrong));
        invitations.create(&at(NOW), HOUR, &secret(1)).unwrap();
        invitations.create(&at(NOW), HOUR, &secret(2)).unwrap();

        let mut reloaded = Invitations::load(folder.path()).unwrap();
        assert_eq!(reloaded.check(&secret(1), &at(NOW)), Ok(()));
        assert_eq!(reloaded.check(&secret(1), &at(NOW)), Ok(()), "asking does not use it up");
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
        invitations.create(&at(NOW), HOUR, &secret(1)).unwrap();
        assert_eq!(invitations.check(&secret(1), &at(NOW + HOUR - 1)), Ok(()));
        assert_eq!(redeem(&mut invitations, 1, NOW + HOUR), Err(Invalid::Expired));
        invitations.create(&at(NOW + HOUR), HOUR, &secret(2)).unwrap();
        assert_eq!(redeem(&mut invitations, 1, NOW + HOUR), Err(Invalid::Expired));
        invitations.create(&at(NOW + HOUR + REMEMBER_SECONDS), HOUR, &secret(3)).unwrap();
        assert_eq!(invitations.kept.invitation.len(), 2, "the second is remembered yet");
        assert_eq!(redeem(&mut invitations, 1, NOW), Err(Invalid::Wrong));
    }

    #[test]
    fn the_file_holds_no_secret_and_is_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mut invitations = Invitations::load(folder.path()).unwrap();
        invitations.create(&at(NOW), u64::MAX, &Secret(*b"0123456789abcdef0123456789abcdef")).unwrap();
        let path = folder.path().join(FILE_NAME);
        let text = std::fs::read_to_string(&path).unwrap();
        let hash = blake3::hash(b"0123456789abcdef0123456789abcdef");
        assert_eq!(
            text,
            format!(
                "latest_seconds = {NOW}\n\n[[invitation]]\nsecret_hash = \"{hash}\"\nexpires_seconds = {}\n\
                 boot = \"one\"\nexpires_uptime_seconds = {}\nused = false\nrevoked = false\n",
                i64::MAX,
                i64::MAX,
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
        invitations.create(&at(NOW), HOUR, &secret(1)).unwrap();
        std::fs::remove_dir_all(&state).unwrap();
        assert!(matches!(invitations.redeem(&secret(1), &at(NOW)), Err(InvitationError::Io { .. })));
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

    #[test]
    fn a_clock_that_is_set_back_lets_nobody_in() {
        let folder = tempfile::tempdir().unwrap();
        let mut invitations = Invitations::load(folder.path()).unwrap();
        invitations.create(&at(NOW), HOUR, &secret(1)).unwrap();
        let moment = |unix_seconds, uptime_seconds, boot: &str| Now {
            unix_seconds,
            uptime_seconds,
            boot: boot.to_owned(),
        };
        let check = |now: &Now| Invitations::load(folder.path()).unwrap().check(&secret(1), now);
        for (now, expected) in [
            // The clock goes back by two hours, before and after its time.
            (moment(NOW - 2 * HOUR, 1000 + HOUR - 1, "one"), Ok(())),
            (moment(NOW - 2 * HOUR, 1000 + HOUR, "one"), Err(Invalid::Expired)),
            // The host was started again: its clock is right, late, or behind what was seen before.
            (moment(NOW + HOUR - 1, 5, "two"), Ok(())),
            (moment(NOW + HOUR, 5, "two"), Err(Invalid::Expired)),
            (moment(NOW - 1, 5, "two"), Err(Invalid::Expired)),
        ] {
            assert_eq!(check(&now), expected, "{now:?}");
        }
        // The clock was ahead once, which was seen: by it the token expired, and stays so.
        invitations.note_time(&moment(NOW + 2 * HOUR, 1001, "one")).unwrap();
        assert_eq!(check(&moment(NOW + 1, 1002, "one")), Err(Invalid::Expired));
        // A new one lives for its time all the same.
        let mut invitations = Invitations::load(folder.path()).unwrap();
        invitations.create(&moment(NOW + 2, 1003, "one"), HOUR, &secret(1)).unwrap();
        invitations.kept.invitation.remove(0);
        let now = |uptime_seconds| moment(NOW + 10, uptime_seconds, "one");
        assert_eq!(invitations.check(&secret(1), &now(1003 + HOUR - 1)), Ok(()));
        assert_eq!(invitations.check(&secret(1), &now(1003 + HOUR)), Err(Invalid::Expired));
    }

    #[test]
    fn an_invitation_that_was_revoked_lets_nobody_in_and_is_over() {
        let folder = tempfile::tempdir().unwrap();
        let mut invitations = Invitations::load(folder.path()).unwrap();
        for byte in 1..=3 {
            invitations.create(&at(NOW), HOUR, &secret(byte)).unwrap();
        }
        let ids: Vec<String> = invitations.list(&at(NOW)).into_iter().map(|each| each.id).collect();
        assert_eq!(invitations.redeem(&secret(2), &at(NOW)).unwrap(), ids[1]);
        assert!(!invitations.is_over(&ids[1], &at(NOW + HOUR - 1)), "what it lets its bearer do goes on");
        assert!(invitations.is_over(&ids[1], &at(NOW + HOUR)));
        assert!(invitations.revoke(&ids[0], &at(NOW)).unwrap());
        assert!(invitations.revoke(&ids[1], &at(NOW)).unwrap());
        assert!(!invitations.revoke("00", &at(NOW)).unwrap());
        let invitations = Invitations::load(folder.path()).unwrap();
        assert_eq!(invitations.check(&secret(1), &at(NOW)), Err(Invalid::Revoked));
        assert!(invitations.is_over(&ids[1], &at(NOW)));
        let list = |now| {
            let states = invitations.list(&at(now)).into_iter().map(|each| (each.state, each.left_seconds));
            states.collect::<Vec<_>>()
        };
        let revoked = (InvitationState::Revoked, None);
        assert_eq!(list(NOW + 600), [revoked, revoked, (InvitationState::Open, Some(HOUR - 600))]);
        assert_eq!(list(NOW + HOUR), [revoked, revoked, (InvitationState::Expired, None)]);
    }
}
