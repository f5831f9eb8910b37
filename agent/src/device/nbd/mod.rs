//! The NBD front end: serves a volume to NBD clients on a Unix socket or over TCP.
//!
//! Everything runs on the volume's thread: one task listens, and each connection is one task that negotiates
//! (`negotiate`) and then drives its requests (`connection`). Clients may open several connections; since they all
//! end in the one volume, a flush on one covers the replies given on all of them.
//!
//! What a client does can end its own connection only. A client that goes away leaves its requests to the volume,
//! which finishes them; their answers are dropped. Over TCP one that vanished without a word is gone after a minute.
//! Retained per connection: a read buffer, and the requests within the bounds of `connection`; connections are bounded
//! by [`CONNECTION_LIMIT`]. The requests of all connections of a volume together are bounded by `budget`: 256 MiB.
//!
//! NBD over TCP by itself neither encrypts nor asks who is there: whoever can reach the address can read and write the
//! volume. With [`Tls`] it does both, and serves nobody without. The Unix socket is plain.

mod budget;
mod connection;
mod exports;
mod input;
mod negotiate;
mod outgoing;
mod request;
mod stall;
#[cfg(test)]
mod tests;
mod tls;
mod unix_socket;

pub use exports::{Exports, in_words};
pub use tls::{Tls, TlsError};

use super::Volume;
use crate::buffer::BufferPool;
use crate::words::with_causes;
use budget::Budget;
use connection::{Connection, Ended};
use negotiate::{Agreed, Negotiation};
use rustix::net::sockopt;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use tls::Encrypted;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use unix_socket::SocketFile;

/// How many connections a server keeps at a time. Of those that have not opened the export yet the oldest gives way to a new
/// one; when all have, more wait in the kernel's queue.
pub const CONNECTION_LIMIT: usize = 64;

/// How many servers of one volume there are: one on a Unix socket, one over TCP.
#[cfg(test)]
const SERVERS_LIMIT: usize = 2;

/// How long a client may take until it has opened the export.
const NEGOTIATION_LIMIT: Duration = Duration::from_secs(60);

/// How long to wait after an accept that failed, for lack of descriptors say, before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How much of its answers a connection may have in its Unix socket, in bytes. The kernel's default of 208 KiB costs
/// large reads a wait for the client in the middle of each answer.
const UNIX_SEND_BUFFER_BYTES: usize = 1 << 20;

/// When a client over TCP that says nothing is asked whether it is still there, how often, and after how many questions
/// without an answer it is gone.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;

/// How long a client over TCP may leave an answer unacknowledged, or not take it, until it is gone.
const UNACKNOWLEDGED_LIMIT: Duration = Duration::from_secs(60);

/// A server that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process accepts connections on the socket.
    #[error("{} is served by another process; stop that first", path.display())]
    AlreadyServed {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket has the socket's name.
    #[error("{} is not a socket; move it away or choose another path", path.display())]
    NotASocket {
        /// The file in the way.
        path: PathBuf,
    },
    /// The address is of no interface of this host, or not yet.
    #[error("{} is no address of this host now; it is served there when it is one", address.ip())]
    NoSuchAddress {
        /// Where to listen.
        address: SocketAddr,
    },
    /// Something else listens there.
    #[error("{address} is in use by another program; it is served there when that ends")]
    AddressInUse {
        /// Where to listen.
        address: SocketAddr,
    },
    /// The kernel refused.
    #[error("cannot {operation} {place}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The path or address.
        place: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The certificates for TLS cannot be used.
    #[error("cannot serve tls")]
    Tls(#[from] TlsError),
}

/// What the servers of one volume have in common: the volume and its name, and the memory of all their clients.
#[derive(Clone)]
pub struct Offer {
    name: Rc<str>,
    volume: Rc<dyn Volume>,
    pool: BufferPool,
    budget: Rc<Budget>,
}

impl Offer {
    /// An offer of `volume` under `name`.
    #[must_use]
    pub fn new(name: &str, volume: Rc<dyn Volume>, pool: BufferPool) -> Self {
        Self { name: name.into(), volume, pool, budget: Rc::default() }
    }
}

/// A client with the export open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// A process of this host, on the Unix socket. The kernel's own client appears as the process that attached it;
    /// a process of another pid namespace has no id here.
    Process(Option<i32>),
    /// A client on TCP.
    Address(SocketAddr),
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(Some(id)) => write!(f, "process {id}"),
            Self::Process(None) => f.write_str("a process"),
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

/// A listening socket and its connections.
///
/// [`stop`](Self::stop) ends them; so does dropping the server, as soon as the thread's tasks run again. Either way
/// the connections are closed at once: requests that the volume has are finished there, but not answered. Whoever
/// wants applications to see an orderly end lets them close the device first ([`clients`](Self::clients)).
pub struct Server {
    shared: Rc<Shared>,
    address: Option<SocketAddr>,
    task: JoinHandle<()>,
    /// Dropping it stops the task.
    stop: oneshot::Sender<()>,
    /// Dropping it removes the file.
    _file: Option<SocketFile>,
}

impl Server {
    /// Serves a volume on a Unix socket that only this process's user can open. A socket that nobody accepts on is
    /// replaced.
    ///
    /// # Errors
    /// [`ListenError`].
    ///
    /// # Panics
    /// Outside of a `LocalSet` on a runtime with I/O and time.
    pub fn unix(path: &Path, offer: Offer) -> Result<Self, ListenError> {
        let (listener, file) = unix_socket::listen(path)?;
        Ok(Self::start(Listener::Unix(listener), Some(file), None, Shared::new(offer, None)))
    }

    /// Serves a volume on a TCP address, with TLS alone where that is given.
    ///
    /// # Errors
    /// [`ListenError`].
    ///
    /// # Panics
    /// As [`unix`](Self::unix).
    pub fn tcp(address: SocketAddr, offer: Offer, tls: Option<Tls>) -> Result<Self, ListenError> {
        let (listener, address) = listen_tcp(address).map_err(|source| match source.kind() {
            io::ErrorKind::AddrNotAvailable => ListenError::NoSuchAddress { address },
            io::ErrorKind::AddrInUse => ListenError::AddressInUse { address },
            _ => ListenError::Io { operation: "listen on", place: address.to_string(), source },
        })?;
        Ok(Self::start(Listener::Tcp(listener), None, Some(address), Shared::new(offer, tls)))
    }

    fn start(
        listener: Listener,
        file: Option<SocketFile>,
        address: Option<SocketAddr>,
        shared: Rc<Shared>,
    ) -> Self {
        let (stop, stopped) = oneshot::channel();
        let task = tokio::task::spawn_local(serve(listener, shared.clone(), stopped));
        Self { shared, address, task, stop, _file: file }
    }

    /// The address that a TCP server listens on, with the port that the kernel chose where none was given.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// How many connections have the export open.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.clients.borrow().len()
    }

    /// Who has the export open, one entry per connection, oldest first.
    #[must_use]
    pub fn clients(&self) -> Vec<Client> {
        self.shared.clients.borrow().values().copied().collect()
    }

    /// Stops listening, removes the socket and closes the connections; when this returns all of it is done.
    pub async fn stop(self) {
        let Self { task, stop, _file, .. } = self;
        drop(_file);
        drop(stop);
        if let Err(error) = task.await {
            tracing::error!(error = &error as &dyn std::error::Error, "an nbd server ended by itself");
        }
    }
}

fn listen_tcp(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((TcpListener::from_std(listener)?, address))
}

/// What all connections of a server share.
struct Shared {
    offer: Offer,
    tls: Option<Tls>,
    clients: RefCell<BTreeMap<u64, Client>>,
    next_client: Cell<u64>,
    /// Connections that have not opened the export yet, oldest first; what is dropped here ends them.
    negotiating: RefCell<BTreeMap<u64, oneshot::Sender<()>>>,
}

impl Shared {
    fn new(offer: Offer, tls: Option<Tls>) -> Rc<Self> {
        Rc::new(Self {
            offer,
            tls,
            clients: RefCell::default(),
            next_client: Cell::new(0),
            negotiating: RefCell::default(),
        })
    }

    fn next_key(&self) -> u64 {
        let key = self.next_client.get();
        self.next_client.set(key + 1);
        key
    }

    /// Counts a client until the result is dropped.
    fn register(self: &Rc<Self>, client: Client) -> Registered {
        let key = self.next_key();
        self.clients.borrow_mut().insert(key, client);
        Registered { shared: self.clone(), key }
    }
}

struct Registered {
    shared: Rc<Shared>,
    key: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.shared.clients.borrow_mut().remove(&self.key);
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

enum Accepted {
    Unix(UnixStream, Client),
    Tcp(TcpStream, Client),
}

impl Listener {
    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Unix(listener) => {
                let (socket, _) = listener.accept().await?;
                let process = socket.peer_cred()?.pid().filter(|id| *id > 0);
                enlarge_send_buffer(&socket);
                Ok(Accepted::Unix(socket, Client::Process(process)))
            }
            Self::Tcp(listener) => {
                let (socket, address) = listener.accept().await?;
                socket.set_nodelay(true)?;
                notice_vanishing(&socket)?;
                Ok(Accepted::Tcp(socket, Client::Address(address)))
            }
        }
    }
}

/// Lets the kernel end the connection of a client whose host or network is gone: it would count as a user of the volume
/// for ever, and keep one of the places for connections.
fn notice_vanishing(socket: &TcpStream) -> io::Result<()> {
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
    sockopt::set_socket_keepalive(socket, true)?;
    let limit = u32::try_from(UNACKNOWLEDGED_LIMIT.as_millis()).expect("the limit is short");
    Ok(sockopt::set_tcp_user_timeout(socket, limit)?)
}

/// Allows for more unread answers, as far as the kernel lets this process: without it large reads are merely slower.
fn enlarge_send_buffer(socket: &UnixStream) {
    use sockopt::{set_socket_send_buffer_size, set_socket_send_buffer_size_force};
    let forced = set_socket_send_buffer_size_force(socket, UNIX_SEND_BUFFER_BYTES);
    if let Err(error) = forced.or_else(|_| set_socket_send_buffer_size(socket, UNIX_SEND_BUFFER_BYTES)) {
        tracing::debug!(%error, "an nbd client keeps the default send buffer");
    }
}

/// Accepts connections until the server is stopped, then closes them.
async fn serve(listener: Listener, shared: Rc<Shared>, mut stopped: oneshot::Receiver<()>) {
    let mut connections = JoinSet::new();
    loop {
        let full = shared.clients.borrow().len() >= CONNECTION_LIMIT;
        tokio::select! {
            biased;
            _ = &mut stopped => break,
            Some(ended) = connections.join_next(), if !connections.is_empty() => report_panic(ended),
            accepted = listener.accept(), if !full => {
                if connections.len() >= CONNECTION_LIMIT {
                    drop(shared.negotiating.borrow_mut().pop_first());
                }
                match accepted {
                Ok(Accepted::Unix(socket, client)) => {
                    connections.spawn_local(attend(socket, client, shared.clone()));
                }
                Ok(Accepted::Tcp(socket, client)) => {
                    connections.spawn_local(attend(socket, client, shared.clone()));
                }
                Err(error) => {
                    tracing::warn!(volume = &*shared.offer.name, %error, "cannot accept an nbd client");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                }
            }
        }
    }
    drop(listener);
    connections.shutdown().await;
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "an nbd connection ended by a defect of ours"
        );
    }
}

/// One connection from its first byte to its last.
async fn attend<S: AsyncRead + AsyncWrite + Unpin>(socket: S, client: Client, shared: Rc<Shared>) {
    let volume = &*shared.offer.name;
    match converse(socket, client, &shared).await {
        Ok(()) => tracing::debug!(volume, %client, "nbd client left"),
        Err(ended @ (Ended::Misbehaved(_) | Ended::Handshake(_))) => {
            tracing::warn!(volume, %client, "nbd connection closed: {}", with_causes(&ended));
        }
        Err(ended) => tracing::info!(volume, %client, "nbd connection lost: {}", with_causes(&ended)),
    }
}

async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    mut socket: S,
    client: Client,
    shared: &Rc<Shared>,
) -> Result<(), Ended> {
    if let Some(tls) = &shared.tls {
        let opened = in_time(shared, open_encrypted(socket, tls, &shared.offer)).await?;
        let Some((socket, agreed)) = opened else { return Ok(()) };
        return transmit(socket, client, shared, agreed).await;
    }
    let opened = in_time(shared, open(&mut socket, &shared.offer)).await?;
    let Some(agreed) = opened else { return Ok(()) };
    transmit(socket, client, shared, agreed).await
}

/// Lets a client open the export for as long as it may take, and nobody else needs its place.
async fn in_time<T>(
    shared: &Rc<Shared>,
    opening: impl Future<Output = Result<T, Ended>>,
) -> Result<T, Ended> {
    let key = shared.next_key();
    let (place, given_up) = oneshot::channel();
    shared.negotiating.borrow_mut().insert(key, place);
    let opened = tokio::select! {
        opened = opening => opened,
        _ = given_up => Err(Ended::TooSlow),
        () = tokio::time::sleep(NEGOTIATION_LIMIT) => Err(Ended::TooSlow),
    };
    drop(shared.negotiating.borrow_mut().remove(&key));
    opened
}

async fn open<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut S,
    offer: &Offer,
) -> Result<Option<Agreed>, Ended> {
    let flags = negotiate::greet(socket).await?;
    let negotiation = Negotiation::new(&offer.name, offer.volume.geometry(), flags, false);
    negotiate::negotiate(socket, negotiation).await
}

async fn open_encrypted<S: AsyncRead + AsyncWrite + Unpin>(
    mut socket: S,
    tls: &Tls,
    offer: &Offer,
) -> Result<Option<(Encrypted<S>, Agreed)>, Ended> {
    let flags = negotiate::greet(&mut socket).await?;
    if !negotiate::ask_for_tls(&mut socket, flags).await? {
        return Ok(None);
    }
    let mut socket = tls.accept(socket).await.map_err(Ended::Handshake)?;
    let negotiation = Negotiation::new(&offer.name, offer.volume.geometry(), flags, true);
    let agreed = negotiate::negotiate(&mut socket, negotiation).await?;
    Ok(agreed.map(|agreed| (socket, agreed)))
}

async fn transmit<S: AsyncRead + AsyncWrite + Unpin>(
    socket: S,
    client: Client,
    shared: &Rc<Shared>,
    agreed: Agreed,
) -> Result<(), Ended> {
    let Offer { name, volume, pool, budget } = shared.offer.clone();
    let _registered = shared.register(client);
    tracing::debug!(volume = &*name, %client, "nbd client opened the volume");
    Connection::new(socket, volume, pool, budget, agreed).await
}
