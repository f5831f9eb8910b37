//! Who else has to do with a file that holds a secret key: such a key is refused, as SSH does.

use std::fs::Metadata;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

/// Who else has to do with a file that holds a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Exposure {
    /// Others than the owner may read or write it.
    #[error("can be read by others (mode {mode:03o}): run chmod 600 on it, or renew it")]
    Readable {
        /// The file's permissions.
        mode: u32,
    },
    /// It belongs to another user, who can change it.
    #[error("belongs to the user {owner}, who could put another one there: run chown root on it")]
    Foreign {
        /// Whose it is.
        owner: u32,
    },
}

/// Who else than this process's user and root has to do with a file, by what is known of it.
#[must_use]
pub fn exposure(metadata: &Metadata) -> Option<Exposure> {
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Some(Exposure::Readable { mode });
    }
    let (owner, own) = (metadata.uid(), rustix::process::geteuid().as_raw());
    (owner != own && owner != 0).then_some(Exposure::Foreign { owner })
}
