//! One connection per peer, shared by all volumes.

use super::connection::{CloseReason, Connection};
use super::dial::ConnectError;
use super::endpoint::Endpoint;
use super::error::{ReceiveError, SendError};
use super::limit::Limit;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::Message;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::{broadcast, watch};

/// How many hosts that answered are remembered for whoever listens late.
const NEWS: usize = 64;

/// How a dial ended; nothing as long as it is under way.
type Outcome = Option<Result<Connection, Arc<ConnectError>>>;

/// The dialling of one host.
#[derive(Debug)]
struct Dial {
    addresses: Vec<String>,
    outcome: watch::Receiver<Outcome>,
    /// Where it answered last.
    answered: Option<SocketAddr>,
}

/// Why a host did not answer a question.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// It could not be reached.
    #[error(transparent)]
    Unreachable(Arc<ConnectError>),
    /// The question could not be sent.
    #[error(transparent)]
    Send(#[from] SendError),
    /// Nothing came back.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
}

impl AskError {
    fn is_lost(&self) -> bool {
        matches!(self, Self::Send(SendError::Lost(_)) | Self::Receive(ReceiveError::Lost(_)))
    }
}

/// The connections that this host has dialled, one per peer. Clones are handles to the same set.
#[derive(Clone, Debug)]
pub struct Peers {
    endpoint: Endpoint,
    dials: Arc<Mutex<HashMap<HostId, Dial>>>,
    opened: broadcast::Sender<HostId>,
    resync_limit: Limit,
}

impl Peers {
    /// Connections that are dialled from this endpoint, and how fast resyncs may be over all of them.
    #[must_use]
    pub fn new(endpoint: Endpoint, resync_limit: Limit) -> Self {
        Self { endpoint, dials: Arc::default(), opened: broadcast::channel(NEWS).0, resync_limit }
    }

    /// Tells of each host that answered a dial from now on.
    #[must_use]
    pub fn opened(&self) -> broadcast::Receiver<HostId> {
        self.opened.subscribe()
    }

    /// The connection that this host has dialled to another one, if it is live.
    #[must_use]
    pub fn live(&self, host: HostId) -> Option<Connection> {
        match &*self.lock().get(&host)?.outcome.borrow() {
            Some(Ok(connection)) if connection.is_live() => Some(connection.clone()),
            _ => None,
        }
    }

    /// What the connections are dialled from.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// How fast all resyncs together may be.
    #[must_use]
    pub fn resync_limit(&self) -> &Limit {
        &self.resync_limit
    }

    /// Where a host answered last.
    #[must_use]
    pub fn answered(&self, host: HostId) -> Option<SocketAddr> {
        self.lock().get(&host)?.answered
    }

    /// Why the last dial of a host failed, if it did.
    #[must_use]
    pub fn trouble(&self, host: HostId) -> Option<Arc<ConnectError>> {
        match &*self.lock().get(&host)?.outcome.borrow() {
            Some(Err(error)) => Some(error.clone()),
            _ => None,
        }
    }

    /// The live connection to a host, or a new one. Callers that ask while a dial is under way share its outcome; it
    /// goes on when they stop waiting. One that failed is tried again at once: backing off is the caller's part.
    ///
    /// # Errors
    /// [`ConnectError`], shared by all who waited for the dial.
    pub async fn connection_to(
        &self,
        host: HostId,
        addresses: &[String],
    ) -> Result<Connection, Arc<ConnectError>> {
        let mut dial = self.dial_of(host, addresses);
        match dial.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().expect("the dial has ended"),
            Err(_) => Err(Arc::new(ConnectError::ShuttingDown(host))),
        }
    }

    /// Puts a question to a host, and gives its answer and the connection on which it came.
    ///
    /// A host that has started again since it was dialled has forgotten the connection, which nobody notices before it is
    /// used: where the connection turns out to be lost, the question is put once more, on a new one. So it must be one that
    /// may be put twice.
    ///
    /// # Errors
    /// [`AskError`].
    pub async fn ask(
        &self,
        host: HostId,
        addresses: &[String],
        question: &Message,
    ) -> Result<(Connection, Message), AskError> {
        match self.ask_once(host, addresses, question).await {
            Err(error) if error.is_lost() => self.ask_once(host, addresses, question).await,
            answered => answered,
        }
    }

    /// As [`Peers::ask`], for what must not be put twice.
    ///
    /// # Errors
    /// [`AskError`]; where the connection was lost, the host may have heard it all the same.
    pub async fn ask_once(
        &self,
        host: HostId,
        addresses: &[String],
        question: &Message,
    ) -> Result<(Connection, Message), AskError> {
        let connection = self.connection_to(host, addresses).await.map_err(AskError::Unreachable)?;
        let (mut sender, mut receiver) = connection.open_control().await.map_err(SendError::Lost)?;
        sender.send(question).await?;
        let answer = receiver.receive().await?;
        Ok((connection, answer))
    }

    /// Closes the connection to a host that is a peer no longer, and forgets it.
    pub fn disconnect(&self, host: HostId) {
        let dial = self.lock().remove(&host);
        if let Some(Some(Ok(connection))) = dial.map(|dial| dial.outcome.borrow().clone()) {
            connection.close(CloseReason::Done, "the host is a peer no longer");
        }
    }

    fn dial_of(&self, host: HostId, addresses: &[String]) -> watch::Receiver<Outcome> {
        let mut dials = self.lock();
        let known = dials.get(&host);
        if let Some(dial) = known.filter(|dial| dial.is_of_use(addresses)) {
            return dial.outcome.clone();
        }
        let answered = known.and_then(|dial| dial.answered);
        let (outcome, dial) = watch::channel(None);
        let dialling = self.endpoint.dial(addresses, host, answered);
        let peers = self.clone();
        self.endpoint.handle().spawn(async move {
            let ended = dialling.await.map_err(Arc::new);
            let opened = ended.as_ref().ok().map(Connection::remote_address);
            outcome.send_replace(Some(ended));
            if let Some(address) = opened {
                if let Some(dial) = peers.lock().get_mut(&host) {
                    dial.answered = Some(address);
                }
                // Nobody may be listening.
                drop(peers.opened.send(host));
            }
        });
        dials.insert(host, Dial { addresses: addresses.to_vec(), outcome: dial.clone(), answered });
        dial
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<HostId, Dial>> {
        self.dials.lock().expect("no holder of the peers' lock panics")
    }
}

impl Dial {
    /// Whether it is under way, to these addresses, or has led to a connection that is still live.
    fn is_of_use(&self, addresses: &[String]) -> bool {
        match &*self.outcome.borrow() {
            None => self.addresses == addresses && self.outcome.has_changed().is_ok(),
            Some(Ok(connection)) => connection.is_live(),
            Some(Err(_)) => false,
        }
    }
}
