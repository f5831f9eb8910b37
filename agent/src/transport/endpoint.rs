//! The agent's one socket for peers, and the thread that drives it.
//!
//! Encryption and loss recovery of all connections happen on the transport's thread, so that they neither delay a
//! volume's front end nor are delayed by it. One volume may live on the same thread ([`Endpoint::place`]): waking another
//! one costs more than the work, which counts where each flush waits for a peer. Handshakes are taken in the background, a bounded number at a time: one
//! that dawdles holds up nobody.

use super::connection::{CloseReason, Connection};
use super::dial::{self, ConnectError};
use super::handshakes::{Handshakes, KnownHosts, Origin, Verdict};
use super::key::HostKey;
use super::settings::Options;
use super::socket::{self, ThreadRuntime};
use super::tls;
use crate::busy_poll;
use blockmirror_protocol::units::HostId;
use quinn::{TransportConfig, VarInt};
use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{Mutex, Notify, mpsc, watch};
use tokio::task::{JoinSet, LocalSet, spawn_local};
use tokio::time::timeout;

/// How many connections wait for [`Endpoint::accept`].
const ACCEPTED: usize = 64;

/// How long the ends of connections may take. Peers are told at once, and who does not hear it notices the silence; what
/// takes longer is a handshake that was under way, and an agent that is restarted must not keep writers waiting for that.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(150);

/// Dials and accepts connections. Clones are handles to the same socket and thread, which end when the last is
/// dropped; the port is free again when the last connection is dropped, too.
#[derive(Clone, Debug)]
pub struct Endpoint {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dialler: Arc<Dialler>,
    handle: Handle,
    local_address: SocketAddr,
    accepted: Mutex<mpsc::Receiver<Connection>>,
    guests: mpsc::UnboundedSender<Guest>,
    taken: Arc<AtomicBool>,
    stop: Arc<Notify>,
    stopped: watch::Receiver<bool>,
}

/// Where known hosts are.
type Known = Arc<std::sync::Mutex<KnownHosts>>;

/// Work that is not the transport's and is done on its thread.
type Guest = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// A place on the transport's thread. It is free again when this, or the work that has it, is gone.
#[derive(Debug)]
pub struct Place {
    taken: Arc<AtomicBool>,
    guests: mpsc::UnboundedSender<Guest>,
}

impl Place {
    /// Has the work done there. It is given up when [`Endpoint::close`] is called before it ends.
    pub fn host(self, work: impl FnOnce() -> Pin<Box<dyn Future<Output = ()>>> + Send + 'static) {
        let guests = self.guests.clone();
        let guest: Guest = Box::new(move || {
            let work = work();
            Box::pin(async move {
                work.await;
                drop(self);
            })
        });
        // Where the thread is gone, so is what the work would be for.
        drop(guests.send(guest));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.store(false, Ordering::Release);
    }
}

/// What it takes to dial.
#[derive(Debug)]
pub(super) struct Dialler {
    pub(super) quic: quinn::Endpoint,
    pub(super) key: HostKey,
    pub(super) transport: Arc<TransportConfig>,
    pub(super) timeout: Duration,
    pub(super) known: Known,
}

/// Why an endpoint could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Something else listens there.
    #[error("{0} is in use: stop the other program, or choose another port to listen on")]
    InUse(SocketAddr),
    /// The socket could not be opened.
    #[error("cannot listen on {address}")]
    Io {
        /// Where to listen.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The thread could not be started.
    #[error("cannot start the transport's thread")]
    Thread(#[source] io::Error),
}

impl Endpoint {
    /// Opens the socket and starts its thread. `[::]` listens on IPv4 as well.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(listen: SocketAddr, key: &HostKey) -> Result<Self, BindError> {
        Self::bind_with(listen, key, &Options::default())
    }

    /// As [`Endpoint::bind`], with other numbers than the usual ones.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind_with(listen: SocketAddr, key: &HostKey, options: &Options) -> Result<Self, BindError> {
        let runtime = ThreadsOwn::new().map_err(BindError::Thread)?;
        let quic =
            open(listen, key, options, runtime.handle().clone()).map_err(|source| match source.kind() {
                io::ErrorKind::AddrInUse => BindError::InUse(listen),
                _ => BindError::Io { address: listen, source },
            })?;
        let local_address = quic.local_addr().map_err(|source| BindError::Io { address: listen, source })?;
        let handle = runtime.handle().clone();
        let (accepted, accepted_receiver) = mpsc::channel(ACCEPTED);
        let (guests, guests_receiver) = mpsc::unbounded_channel();
        let (stopped, stopped_receiver) = watch::channel(false);
        let stop = Arc::new(Notify::new());
        let known = Known::default();
        let thread = Thread {
            runtime,
            quic: quic.clone(),
            accepted,
            known: known.clone(),
            guests: guests_receiver,
            stop: stop.clone(),
            stopped,
            handshake_timeout: options.idle_timeout,
        };
        std::thread::Builder::new()
            .name("transport".into())
            .spawn(move || thread.run())
            .map_err(BindError::Thread)?;
        let dialler = Arc::new(Dialler {
            quic,
            key: key.clone(),
            transport: options.transport(),
            timeout: options.connect_timeout,
            known,
        });
        let accepted = Mutex::new(accepted_receiver);
        let stopped = stopped_receiver;
        let taken = Arc::default();
        let inner = Inner { dialler, handle, local_address, accepted, guests, taken, stop, stopped };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The host that this endpoint speaks for.
    #[must_use]
    pub fn id(&self) -> HostId {
        self.inner.dialler.key.id()
    }

    /// Where it listens.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.inner.local_address
    }

    /// Dials a host at its addresses (`address:port` or `name:port`), which are tried in their order, each with a
    /// bounded time-out. A caller that stops waiting ends the dial.
    ///
    /// # Errors
    /// [`ConnectError`] when no address answers with the expected key.
    pub async fn connect(&self, addresses: &[String], expected: HostId) -> Result<Connection, ConnectError> {
        let mut dial = JoinSet::new();
        dial.spawn_on(self.dial(addresses, expected, None), &self.inner.handle);
        match dial.join_next().await {
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) | None => Err(ConnectError::ShuttingDown(expected)),
        }
    }

    /// The known hosts, and from where they dial: room for their handshakes is kept free, whoever else dials. Where a host is
    /// known by name, it is kept for the addresses that the name stood for when the host was last dialled.
    ///
    /// # Panics
    /// Never: no holder of the lock does.
    pub fn keep_room_for(&self, hosts: HashMap<HostId, HashSet<IpAddr>>) {
        self.inner.dialler.known.lock().expect("no holder of the lock panics").set(hosts);
    }

    /// Waits for the next host that has connected. Nothing comes any more once the endpoint is closed. Cancel-safe.
    pub async fn accept(&self) -> Option<Connection> {
        self.inner.accepted.lock().await.recv().await
    }

    /// The place on the transport's thread for something else than its own work, unless it is taken: what lives there and
    /// waits for packets needs no other thread to be woken.
    #[must_use]
    pub fn place(&self) -> Option<Place> {
        let taken = self.inner.taken.clone();
        let is_free = !taken.swap(true, Ordering::AcqRel);
        is_free.then(|| Place { taken, guests: self.inner.guests.clone() })
    }

    /// Closes every connection, tells the peers, and ends the thread.
    pub async fn close(&self) {
        self.inner.stop.notify_one();
        let mut stopped = self.inner.stopped.clone();
        // An error means that the thread is gone: nothing is left to wait for.
        let _ = stopped.wait_for(|stopped| *stopped).await;
    }

    /// The work of dialling, to be run on the transport's thread.
    pub(super) fn dial(
        &self,
        addresses: &[String],
        expected: HostId,
        first: Option<SocketAddr>,
    ) -> impl Future<Output = Result<Connection, ConnectError>> + Send + use<> {
        dial::dial(self.inner.dialler.clone(), addresses.to_vec(), expected, first)
    }

    /// The transport's thread.
    pub(super) fn handle(&self) -> &Handle {
        &self.inner.handle
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.notify_one();
    }
}

/// Opens the socket and sets its tasks going on a runtime, the thread's as a rule.
pub(super) fn open(
    listen: SocketAddr,
    key: &HostKey,
    options: &Options,
    runtime: Handle,
) -> io::Result<quinn::Endpoint> {
    let socket = socket::open(listen, options.socket_buffer_bytes)?;
    let server = options.server(tls::server(key));
    let runtime = ThreadRuntime::new(runtime, options.packet_limit_bytes);
    quinn::Endpoint::new(options.endpoint(key), Some(server), socket, Arc::new(runtime))
}

/// The thread's runtime. A runtime must not be dropped where another one runs, as in a caller of
/// [`Endpoint::bind`]; this one leaves what cannot be interrupted, the resolving of a name, to itself instead.
struct ThreadsOwn(Option<Runtime>);

impl ThreadsOwn {
    fn new() -> io::Result<Self> {
        tokio::runtime::Builder::new_current_thread().enable_all().build().map(|runtime| Self(Some(runtime)))
    }
}

impl Deref for ThreadsOwn {
    type Target = Runtime;
    fn deref(&self) -> &Runtime {
        self.0.as_ref().expect("a runtime is there until it is dropped")
    }
}

impl Drop for ThreadsOwn {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// What the thread owns.
struct Thread {
    runtime: ThreadsOwn,
    quic: quinn::Endpoint,
    accepted: mpsc::Sender<Connection>,
    known: Known,
    guests: mpsc::UnboundedReceiver<Guest>,
    stop: Arc<Notify>,
    stopped: watch::Sender<bool>,
    handshake_timeout: Duration,
}

impl Thread {
    fn run(self) {
        let Self { runtime, quic, accepted, known, guests, stop, stopped, handshake_timeout } = self;
        let local = LocalSet::new();
        let serve = local.run_until(async {
            spawn_local(busy_poll::stay_awake());
            tokio::select! {
                () = accept_all(&quic, accepted, &known, handshake_timeout) => {}
                () = take_in(guests) => {}
                () = stop.notified() => {}
            }
            quic.close(VarInt::from_u32(CloseReason::ShuttingDown as u32), b"the agent is shutting down");
            // A peer that does not answer is not waited for: it will notice the silence.
            let _ = timeout(CLOSE_TIMEOUT, quic.wait_idle()).await;
        });
        runtime.block_on(serve);
        // What is left of a guest ends as it lived.
        let entered = runtime.enter();
        drop(local);
        drop(entered);
        drop((quic, runtime));
        stopped.send_replace(true);
    }
}

/// Begins what the thread is asked to do beside its own work.
async fn take_in(mut guests: mpsc::UnboundedReceiver<Guest>) {
    while let Some(guest) = guests.recv().await {
        spawn_local(guest());
    }
    std::future::pending().await
}

async fn accept_all(
    quic: &quinn::Endpoint,
    accepted: mpsc::Sender<Connection>,
    known: &Known,
    limit: Duration,
) {
    let mut tasks = JoinSet::new();
    let mut handshakes = Handshakes::default();
    loop {
        tokio::select! {
            incoming = quic.accept() => {
                let Some(incoming) = incoming else { return };
                let address = incoming.remote_address().ip();
                let origin = Origin::new(address, &known.lock().expect("no holder of the lock panics"));
                match handshakes.judge(origin, incoming.may_retry()) {
                    Verdict::Refuse => incoming.refuse(),
                    // It may, so there is no error.
                    Verdict::Prove => drop(incoming.retry()),
                    Verdict::Take => {
                        handshakes.begin(origin);
                        let shake = shake_hands(incoming, accepted.clone(), limit);
                        tasks.spawn(async move {
                            shake.await;
                            origin
                        });
                    }
                }
            }
            Some(ended) = tasks.join_next() => {
                handshakes.end(ended.expect("a handshake neither panics nor is cancelled"));
            }
        }
    }
}

/// A handshake that fails concerns only the one who dialled, who is told by TLS what is wrong.
async fn shake_hands(incoming: quinn::Incoming, accepted: mpsc::Sender<Connection>, limit: Duration) {
    let address = incoming.remote_address();
    match timeout(limit, incoming).await {
        Ok(Ok(quic)) => {
            if let Some(connection) = Connection::new(quic) {
                // Where the endpoint is closing, the connection is dropped and thereby closed.
                let _ = accepted.send(connection).await;
            }
        }
        Ok(Err(error)) => tracing::info!(%address, %error, "a handshake failed"),
        Err(_) => tracing::info!(%address, "a handshake took too long"),
    }
}
