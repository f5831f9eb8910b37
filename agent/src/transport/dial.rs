//! Reaching a host that may have several addresses.
//!
//! The addresses are tried in their order, each with a head start before the next: the first that answers with the
//! right key wins, and one that is dead costs the head start, not its whole time-out. [`Peers`](super::Peers) remembers
//! which one it was, and has it tried first the next time.

use super::connection::Connection;
use super::endpoint::Dialler;
use super::tls;
use crate::words::with_causes;
use blockmirror_protocol::units::HostId;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// How long an address is tried before the next one is tried as well.
const HEAD_START: Duration = Duration::from_millis(250);

/// Why a host could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is nothing to try.
    #[error("no address of host {0} is known: give one as address:port")]
    NoAddress(HostId),
    /// Another host answered: an address was given to another machine, the host has got a new key, or somebody
    /// poses as it.
    #[error(
        "the host at {address} has the key {found}, not the expected {expected}: check the address, or pair again"
    )]
    WrongKey {
        /// Where it answered.
        address: SocketAddr,
        /// The key that was looked for.
        expected: HostId,
        /// The key that it has.
        found: HostId,
    },
    /// No address answered as it should.
    #[error("cannot reach host {host}: {}", Joined(attempts))]
    Unreachable {
        /// The host that was looked for.
        host: HostId,
        /// What became of each address.
        attempts: Vec<FailedAttempt>,
    },
    /// The endpoint was closed.
    #[error("cannot reach host {0}: this agent is shutting down")]
    ShuttingDown(HostId),
}

/// What became of one address.
#[derive(Debug)]
pub struct FailedAttempt {
    /// The address, as it was given or resolved.
    pub address: String,
    /// Why it did not do.
    pub error: AttemptError,
}

/// Why one address did not do.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// The name could not be resolved.
    #[error("the name cannot be resolved")]
    Name(#[source] io::Error),
    /// Nobody answered in time.
    #[error("no answer within {0:?}; is the agent running, and is UDP let through?")]
    Silence(Duration),
    /// The address is of a kind that this endpoint cannot send to.
    #[error("the address cannot be used from here")]
    Address(#[source] quinn::ConnectError),
    /// The handshake failed.
    #[error("the handshake failed")]
    Handshake(#[source] quinn::ConnectionError),
    /// Another host answered.
    #[error("the host there has the key {0}")]
    WrongKey(HostId),
    /// This host answered itself: each of the two has an interface of this address, as that of a bridge for containers.
    #[error("that address is this host's own")]
    Ourselves,
}

struct Joined<'a>(&'a [FailedAttempt]);

impl fmt::Display for Joined<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, attempt) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", attempt.address, with_causes(&attempt.error))?;
        }
        Ok(())
    }
}

/// Dials all addresses of a host, the `first` of them first, where it is among them. Runs on the transport's thread.
pub(super) async fn dial(
    dialler: Arc<Dialler>,
    addresses: Vec<String>,
    expected: HostId,
    first: Option<SocketAddr>,
) -> Result<Connection, ConnectError> {
    if addresses.is_empty() {
        return Err(ConnectError::NoAddress(expected));
    }
    let (targets, mut failed) = resolve(&addresses, dialler.timeout).await;
    dialler.known.lock().expect("no holder of the lock panics").dialled(expected, &targets);
    let targets = in_order(targets, first);
    let mut attempts = JoinSet::new();
    for (index, address) in targets.into_iter().enumerate() {
        let dialler = dialler.clone();
        attempts.spawn(async move {
            sleep(HEAD_START * u32::try_from(index).unwrap_or(u32::MAX)).await;
            (address, attempt(&dialler, address, expected).await)
        });
    }
    let mut stranger = None;
    while let Some(joined) = attempts.join_next().await {
        let Ok((address, outcome)) = joined else { return Err(ConnectError::ShuttingDown(expected)) };
        match outcome {
            Ok(connection) => return Ok(connection),
            Err(error) => {
                if let AttemptError::WrongKey(found) = error {
                    stranger = Some((address, found));
                }
                failed.push(FailedAttempt { address: address.to_string(), error });
            }
        }
    }
    Err(match stranger {
        Some((address, found)) => ConnectError::WrongKey { address, expected, found },
        None => ConnectError::Unreachable { host: expected, attempts: failed },
    })
}

pub(super) fn in_order(mut targets: Vec<SocketAddr>, first: Option<SocketAddr>) -> Vec<SocketAddr> {
    targets.sort_by_key(|target| Some(*target) != first);
    targets
}

/// The socket addresses behind names, in order and without repetition, and the names that have none.
async fn resolve(addresses: &[String], limit: Duration) -> (Vec<SocketAddr>, Vec<FailedAttempt>) {
    let (mut targets, mut failed) = (Vec::new(), Vec::new());
    for address in addresses {
        let error = match timeout(limit, tokio::net::lookup_host(address)).await {
            Ok(Ok(found)) => {
                for target in found {
                    if !targets.contains(&target) {
                        targets.push(target);
                    }
                }
                continue;
            }
            Ok(Err(error)) => error,
            Err(_) => io::ErrorKind::TimedOut.into(),
        };
        failed.push(FailedAttempt { address: address.clone(), error: AttemptError::Name(error) });
    }
    (targets, failed)
}

/// Dials one address of a host.
pub(super) async fn attempt(
    dialler: &Dialler,
    address: SocketAddr,
    expected: HostId,
) -> Result<Connection, AttemptError> {
    let found = Arc::new(OnceLock::new());
    let mut config = quinn::ClientConfig::new(tls::client(&dialler.key, expected, found.clone()));
    config.transport_config(dialler.transport.clone());
    let connecting =
        dialler.quic.connect_with(config, address, tls::SERVER_NAME).map_err(AttemptError::Address)?;
    let outcome = timeout(dialler.timeout, connecting).await;
    if let Some(found) = found.get() {
        let is_own = *found == dialler.key.id();
        return Err(if is_own { AttemptError::Ourselves } else { AttemptError::WrongKey(*found) });
    }
    let quic =
        outcome.map_err(|_| AttemptError::Silence(dialler.timeout))?.map_err(AttemptError::Handshake)?;
    Ok(Connection::new(quic).expect("the handshake has verified the peer's key"))
}
