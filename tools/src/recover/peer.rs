//! The host that has the content: who it is, whether it lets us in, and why it stops.

use super::others;
use blockmirror_agent::config::VOLUME_LIMIT_BYTES;
use blockmirror_agent::control::api::{Failure, FailureKind};
use blockmirror_agent::transport::{
    BindError, CloseReason, ConnectError, Connection, ControlReceiver, ControlSender, Endpoint, HostKey,
    Lost, ReceiveError, SendError,
};
use blockmirror_protocol::adoption::Content;
use blockmirror_protocol::disk::recovery::Subject;
use blockmirror_protocol::terms::DataState;
use blockmirror_protocol::units::{HostId, SECTOR_BYTES, VolumeId};
use blockmirror_protocol::wire::message::{Message, Others, Recover, Recovering, Refusal, Refused};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// How long the peer may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the work stopped.
pub enum Trouble {
    /// It may go on after a while: a lost connection, or a peer that is busy.
    Passing(Failure),
    /// Trying again is of no use.
    Final(Failure),
}

/// What is needed to open a recovery.
pub struct Peer {
    /// Our socket.
    pub endpoint: Endpoint,
    /// Where the peer's agent listens.
    pub addresses: Vec<String>,
    /// The keys that the peer may have, likeliest first.
    pub known: Vec<HostId>,
    /// The volume's identity, where it is known here.
    pub volume: Option<VolumeId>,
    /// What is asked for.
    pub request: Recover,
}

/// A recovery that the peer has agreed to. The content doesn't change as long as the connection lasts.
pub struct Opened {
    /// The connection that it lasts as long as.
    pub connection: Connection,
    /// What the peer has.
    pub info: Recovering,
    _sender: ControlSender,
    receiver: ControlReceiver,
}

impl Trouble {
    fn passing(error: &dyn std::error::Error) -> Self {
        Self::Passing(Failure::from_error(FailureKind::Failed, error))
    }

    /// Something failed for good.
    pub fn failed(error: &dyn std::error::Error) -> Self {
        Self::Final(Failure::from_error(FailureKind::Failed, error))
    }

    /// The peer sent what it should not have.
    pub fn misbehaved(what: &str) -> Self {
        let message = format!("the peer breaks the protocol: {what}; use the same release on both hosts");
        Self::Final(Failure::new(FailureKind::Failed, message))
    }

    /// The peer said no.
    pub fn refused(refused: &Refused) -> Self {
        let kind = match refused.refusal {
            Refusal::UnknownVolume => FailureKind::NoSuchVolume,
            Refusal::Busy
            | Refusal::Role
            | Refusal::Backing
            | Refusal::Unrelated
            | Refusal::SplitBrain
            | Refusal::Beyond
            | Refusal::Space
            | Refusal::Paused
            | Refusal::UnknownKey
            | Refusal::Token => FailureKind::Refused,
            Refusal::Version | Refusal::Other => FailureKind::Failed,
        };
        let failure = Failure::new(kind, format!("the peer refuses: {}", refused.text));
        match refused.refusal {
            Refusal::Busy => Self::Passing(failure),
            _ => Self::Final(failure),
        }
    }

    /// What to tell the operator.
    pub fn into_failure(self) -> Failure {
        match self {
            Self::Passing(failure) | Self::Final(failure) => failure,
        }
    }
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Final(failure)
    }
}

impl From<Lost> for Trouble {
    fn from(lost: Lost) -> Self {
        Self::passing(&lost)
    }
}

impl From<SendError> for Trouble {
    fn from(error: SendError) -> Self {
        Self::passing(&error)
    }
}

impl From<ReceiveError> for Trouble {
    fn from(error: ReceiveError) -> Self {
        match error {
            // A stream that ends early is told from a lost connection by the one that the recovery began with.
            ReceiveError::Lost(_) | ReceiveError::Ended(_) | ReceiveError::Abandoned(_) => {
                Self::passing(&error)
            }
            ReceiveError::PeerMisbehaved { .. } => Self::failed(&error),
        }
    }
}

/// A socket of our own, beside that of the agent, which may have the same key.
pub fn bind(key: &HostKey) -> Result<Endpoint, Failure> {
    let key = key.clone().beside_the_agent();
    let bind = |address: SocketAddr| Endpoint::bind(address, &key);
    let endpoint = match bind((Ipv6Addr::UNSPECIFIED, 0).into()) {
        // The host may know IPv4 alone.
        Err(BindError::Io { .. }) => bind((Ipv4Addr::UNSPECIFIED, 0).into()),
        other => other,
    };
    endpoint.map_err(|error| Failure::from_error(FailureKind::Failed, &error))
}

impl Peer {
    /// Connects, and asks for the content.
    pub async fn open(&self) -> Result<Opened, Trouble> {
        let connection = self.connect().await?;
        match tokio::time::timeout(ANSWER_TIMEOUT, self.ask(connection)).await {
            Ok(opened) => opened,
            Err(_) => Err(silent()),
        }
    }

    /// Refuses to recover where another host has later content than the peer.
    pub async fn survey(&self, accept_older: bool) -> Result<(), Trouble> {
        let connection = self.connect().await?;
        let asked = tokio::time::timeout(ANSWER_TIMEOUT, others::ask(self, &connection)).await;
        let Others { own, mut others } = asked.unwrap_or_else(|_| Err(silent()))?;
        connection.close(CloseReason::Done, "the other hosts are known");
        if let Some(volume) = self.volume {
            others::ask_silent(self, volume, &mut others).await;
        }
        let content = Content::of(own.data, own.marker, &own.lineage);
        Ok(others::judge(&content, &others, &self.request.name, accept_older)?)
    }

    /// The same of what was recovered.
    pub async fn judge(&self, opened: &Opened, accept_older: bool) -> Result<(), Trouble> {
        let asked = tokio::time::timeout(ANSWER_TIMEOUT, others::ask(self, &opened.connection)).await;
        let Others { mut others, .. } = asked.unwrap_or_else(|_| Err(silent()))?;
        others::ask_silent(self, opened.info.volume, &mut others).await;
        let content = opened.content();
        Ok(others::judge(&content, &others, &self.request.name, accept_older)?)
    }

    async fn connect(&self) -> Result<Connection, Trouble> {
        let expected = self.known.first().copied().unwrap_or_default();
        let outcome = match self.endpoint.connect(&self.addresses, expected).await {
            Err(ConnectError::WrongKey { found, .. }) if self.known.contains(&found) => {
                self.endpoint.connect(&self.addresses, found).await
            }
            outcome => outcome,
        };
        outcome.map_err(|error| match error {
            ConnectError::WrongKey { address, found, .. } => {
                Trouble::Final(Failure::new(FailureKind::Refused, self.stranger(address, found)))
            }
            ConnectError::Unreachable { .. } => Trouble::passing(&error),
            ConnectError::NoAddress(_) | ConnectError::ShuttingDown(_) => Trouble::failed(&error),
        })
    }

    fn stranger(&self, address: SocketAddr, found: HostId) -> String {
        let what = format!("the host at {address} has the key {found}");
        match &self.known[..] {
            [] => format!("{what}; if that is right, add --peer-key {found}"),
            [expected] => format!("{what}, not the expected {expected}; check the address"),
            _ => {
                format!("{what}, which is of no host of the volume {}; check the address", self.request.name)
            }
        }
    }

    async fn ask(&self, connection: Connection) -> Result<Opened, Trouble> {
        let (mut sender, mut receiver) = connection.open_control().await?;
        sender.send(&self.request.clone().into()).await?;
        let info = match receiver.receive().await? {
            Message::Recovering(info) => info,
            Message::Refused(refused) => return Err(Trouble::refused(&refused)),
            _ => return Err(Trouble::misbehaved("it answers with another message")),
        };
        self.check(&info)?;
        Ok(Opened { connection, info, _sender: sender, receiver })
    }

    fn check(&self, info: &Recovering) -> Result<(), Trouble> {
        let refuse = |message: String| Err(Trouble::Final(Failure::new(FailureKind::Refused, message)));
        if self.volume.is_some_and(|volume| volume != info.volume) {
            return refuse(format!(
                "the peer's volume {} is another one of the same name",
                self.request.name
            ));
        }
        if info.data != DataState::Consistent && !self.request.accept_inconsistent {
            return refuse(
                "the peer's copy is not usable as it is; add --accept-inconsistent to get what there is"
                    .into(),
            );
        }
        match info.size_bytes {
            1..=VOLUME_LIMIT_BYTES if info.size_bytes.is_multiple_of(SECTOR_BYTES) => Ok(()),
            _ => Err(Trouble::misbehaved("no volume has such a size")),
        }
    }
}

fn silent() -> Trouble {
    let message = "the peer does not answer; look at the log of its agent";
    Trouble::Passing(Failure::new(FailureKind::Timeout, message))
}

impl Opened {
    /// What is recovered.
    pub fn subject(&self) -> Subject {
        let Recovering { volume, copy, size_bytes, position, .. } = self.info;
        Subject { volume, copy, size_bytes, position }
    }

    /// Of what history that is.
    pub fn content(&self) -> Content {
        Content::of(self.info.data, self.info.position, &self.info.lineage)
    }

    /// Waits until the peer or the connection puts an end to it. Cancel-safe.
    pub async fn ended(&mut self) -> Trouble {
        match self.receiver.receive().await {
            Ok(Message::Refused(refused)) => Trouble::refused(&refused),
            Ok(_) => Trouble::misbehaved("it sends a message that was not asked for"),
            // The peer has nothing more to say; the recovery lasts as long as the connection.
            Err(ReceiveError::Ended(_) | ReceiveError::Abandoned(_)) => self.connection.closed().await.into(),
            Err(error) => error.into(),
        }
    }
}
