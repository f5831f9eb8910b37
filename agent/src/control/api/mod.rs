//! What the agent and the operator's tool say to each other, as JSON.
//!
//! Every answer that scripts may read carries the name and version of its schema; a field is added within a version,
//! never renamed or given another meaning. What a host doesn't know is null, never zero: a replica cannot tell how
//! much it lacks, and a stopped agent cannot tell how far its peers are.

mod orders;
mod status;

pub use crate::crashes::Panics;
pub use orders::*;
pub use status::*;

use crate::config::Name;
use crate::words::with_causes;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Why a request failed, for the program: it decides the tool's exit code.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// It was tried and went wrong.
    Failed,
    /// The request makes no sense.
    Usage,
    /// No agent answers.
    AgentNotRunning,
    /// This host has no such volume or peer.
    NoSuchVolume,
    /// It could destroy data, and was not asked for explicitly.
    Refused,
    /// It did not happen in time.
    Timeout,
}

impl FailureKind {
    /// The exit code of the tool.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::AgentNotRunning => 3,
            Self::NoSuchVolume => 4,
            Self::Refused => 5,
            Self::Timeout => 6,
        }
    }
}

/// Why a request failed: one lower-case clause that says what to do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For the program.
    pub kind: FailureKind,
    /// For the operator.
    pub message: String,
}

impl Failure {
    /// A failure of some kind.
    #[must_use]
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The failure that an error and its sources tell: their messages in one clause.
    #[must_use]
    pub fn from_error(kind: FailureKind, error: &dyn std::error::Error) -> Self {
        Self::new(kind, with_causes(error))
    }

    /// This host has no volume of that name.
    #[must_use]
    pub fn no_such_volume(name: &Name) -> Self {
        let message = format!("no volume \"{name}\" on this host; blockmirror status lists them");
        Self::new(FailureKind::NoSuchVolume, message)
    }

    /// The volume has no peer of that name.
    #[must_use]
    pub fn no_such_peer(volume: &Name, peer: &Name) -> Self {
        let message = format!("no peer \"{peer}\" of {volume}; blockmirror peers {volume} lists them");
        Self::new(FailureKind::NoSuchVolume, message)
    }
}

/// `RUN/agent.json`: where a running or stopped agent keeps what the tool can read without it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AgentRecord {
    /// The agent's process.
    pub pid: u32,
    /// The folder of its configuration.
    pub config: PathBuf,
    /// The folder of its metadata.
    pub state: PathBuf,
    /// Where it listens for peers.
    pub listen: SocketAddr,
}
