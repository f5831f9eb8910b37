//! One connection per peer, shared by all volumes.

use super::connection::{CloseReason, Connection};
use super::dial::ConnectError;
use super::endpoint::Endpoint;
use super::limit::Limit;
use blockmirror_protocol::units::HostId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::watch;

/// How a dial ended; nothing as long as it is under way.
type Outcome = Option<Result<Connection, Arc<ConnectError>>>;

/// The connections that this host has dialled, one per peer. Clones are handles to the same set.
#[derive(Clone, Debug)]
pub struct Peers {
    endpoint: Endpoint,
    dials: Arc<Mutex<HashMap<HostId, watch::Receiver<Outcome>>>>,
    resync_limit: Limit,
}

impl Peers {
    /// Connections that are dialled from this endpoint, and how fast resyncs may be over all of them.
    #[must_use]
    pub fn new(endpoint: Endpoint, resync_limit: Limit) -> Self {
        Self { endpoint, dials: Arc::default(), resync_limit }
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

    /// Closes the connection to a host that is a peer no longer, and forgets it.
    pub fn disconnect(&self, host: HostId) {
        let dial = self.lock().remove(&host);
        if let Some(Some(Ok(connection))) = dial.as_ref().map(|dial| dial.borrow().clone()) {
            connection.close(CloseReason::Done, "the host is a peer no longer");
        }
    }

    fn dial_of(&self, host: HostId, addresses: &[String]) -> watch::Receiver<Outcome> {
        let mut dials = self.lock();
        if let Some(dial) = dials.get(&host).filter(|dial| is_of_use(dial)) {
            return dial.clone();
        }
        let (outcome, dial) = watch::channel(None);
        let dialling = self.endpoint.dial(addresses, host);
        self.endpoint.handle().spawn(async move {
            outcome.send_replace(Some(dialling.await.map_err(Arc::new)));
        });
        dials.insert(host, dial.clone());
        dial
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<HostId, watch::Receiver<Outcome>>> {
        self.dials.lock().expect("no holder of the peers' lock panics")
    }
}

/// Whether a dial is under way or has led to a connection that is still live.
fn is_of_use(dial: &watch::Receiver<Outcome>) -> bool {
    match &*dial.borrow() {
        None => dial.has_changed().is_ok(),
        Some(Ok(connection)) => connection.is_live(),
        Some(Err(_)) => false,
    }
}
