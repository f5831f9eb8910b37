//! The agent's control socket: how the operator's tool reaches a running agent.
//!
//! HTTP with JSON over a Unix socket that only its owner can open. This module claims the socket and describes what
//! can be asked for ([`Operations`]); `server` turns requests into calls, [`api`] holds what is said.
//!
//! One agent owns a run folder at a time: it holds a lock on `agent.lock`, which the kernel releases however the agent
//! ends. So whoever gets the lock may replace a socket that a killed agent left.

pub mod api;
mod server;

use crate::config::Name;
use crate::process::open_lock;
use api::{
    AddressRequest, AgentRecord, Comparison, CreateRequest, Demotion, Failure, Forgetting, Invitation,
    InvitationsReply, InviteRequest, JoinRequest, ModeRequest, PeerRemoval, PeerStatus, PeersReply,
    PromoteRequest, Promotion, Release, ReleaseRequest, RemovePeerRequest, Resolution, ResolveRequest,
    StatusReply, Switch, SwitchRequest, TuneRequest, Undoing,
};
use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How many connections wait for the agent at most.
const BACKLOG: i32 = 64;

/// The control socket in a run folder.
#[must_use]
pub fn socket_path(run: &Path) -> PathBuf {
    run.join("agent.sock")
}

/// The file in a run folder that tells where the agent keeps its files.
#[must_use]
pub fn record_path(run: &Path) -> PathBuf {
    run.join("agent.json")
}

/// What the operator can ask of a running agent. A call whose future is dropped was given up by the tool: what it had
/// begun is stopped or finished, never left half done.
pub trait Operations: Send + Sync + 'static {
    /// How things stand, for all volumes or one.
    fn status(&self, volume: Option<Name>) -> impl Future<Output = Result<StatusReply, Failure>> + Send;

    /// Makes a volume and serves it.
    fn create(&self, request: CreateRequest) -> impl Future<Output = Result<StatusReply, Failure>> + Send;

    /// Makes a one-time token for a volume.
    fn invite(
        &self,
        volume: Name,
        request: InviteRequest,
    ) -> impl Future<Output = Result<Invitation, Failure>> + Send;

    /// The tokens of a volume, and what became of them.
    fn invitations(&self, volume: Name) -> impl Future<Output = Result<InvitationsReply, Failure>> + Send;

    /// Takes a token back that was not used, and ends what it lets its bearer do.
    fn revoke(
        &self,
        volume: Name,
        id: String,
    ) -> impl Future<Output = Result<InvitationsReply, Failure>> + Send;

    /// Removes a host from a volume.
    fn remove_peer(
        &self,
        volume: Name,
        peer: Name,
        request: RemovePeerRequest,
    ) -> impl Future<Output = Result<PeerRemoval, Failure>> + Send;

    /// Makes this host a replica.
    fn join(&self, request: JoinRequest) -> impl Future<Output = Result<StatusReply, Failure>> + Send;

    /// The other hosts of a volume.
    fn peers(&self, volume: Name) -> impl Future<Output = Result<PeersReply, Failure>> + Send;

    /// Stops mirroring to or from a peer until [`Operations::resume`]; what it misses is marked.
    fn pause(&self, volume: Name, peer: Name) -> impl Future<Output = Result<PeerStatus, Failure>> + Send;

    /// Goes on mirroring with a peer.
    fn resume(&self, volume: Name, peer: Name) -> impl Future<Output = Result<PeerStatus, Failure>> + Send;

    /// Sets when writes are answered while a peer is in sync.
    fn set_mode(
        &self,
        volume: Name,
        peer: Name,
        request: ModeRequest,
    ) -> impl Future<Output = Result<PeerStatus, Failure>> + Send;

    /// Sets how what goes to a peer is sent.
    fn tune(
        &self,
        volume: Name,
        peer: Name,
        request: TuneRequest,
    ) -> impl Future<Output = Result<PeerStatus, Failure>> + Send;

    /// Sets where a host is reached.
    fn set_address(
        &self,
        volume: Name,
        peer: Name,
        request: AddressRequest,
    ) -> impl Future<Output = Result<PeerStatus, Failure>> + Send;

    /// Makes this host the primary.
    fn promote(
        &self,
        volume: Name,
        request: PromoteRequest,
    ) -> impl Future<Output = Result<Promotion, Failure>> + Send;

    /// Makes this primary a replica.
    fn demote(&self, volume: Name) -> impl Future<Output = Result<Demotion, Failure>> + Send;

    /// Makes this primary a replica, and a replica the primary.
    fn switch(
        &self,
        volume: Name,
        request: SwitchRequest,
    ) -> impl Future<Output = Result<Switch, Failure>> + Send;

    /// Gives this host's content up for another's, or says what that would lose.
    fn resolve(
        &self,
        volume: Name,
        request: ResolveRequest,
    ) -> impl Future<Output = Result<Resolution, Failure>> + Send;

    /// Brings back what this host had before its content was given up.
    fn undo(&self, volume: Name) -> impl Future<Output = Result<Undoing, Failure>> + Send;

    /// Gives up for good what could be brought back.
    fn forget(&self, volume: Name) -> impl Future<Output = Result<Forgetting, Failure>> + Send;

    /// Takes this host's loop device of a volume away.
    fn release(
        &self,
        volume: Name,
        request: ReleaseRequest,
    ) -> impl Future<Output = Result<Release, Failure>> + Send;

    /// Compares all digests with a peer's. Takes as long as both hosts need to read the volume; how far it is shows
    /// in the status.
    fn compare(&self, volume: Name, peer: Name) -> impl Future<Output = Result<Comparison, Failure>> + Send;
}

/// Why the control socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The folder belongs to another agent.
    #[error("another agent is running on {run}; stop it, or give this one another --run folder", run = .0.display())]
    AgentRunning(PathBuf),
    /// The kernel says no.
    #[error("cannot {operation} {path}", path = path.display())]
    Io {
        /// `create`, `lock`, `write`, `bind` or `serve`.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl ControlError {
    fn io(operation: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { operation, path: path.to_owned(), source: source.into() }
    }
}

/// The claimed control socket. Dropped, it is gone; the record stays, for the tool to find the stopped agent's files.
#[derive(Debug)]
pub struct ControlSocket {
    path: PathBuf,
    listener: UnixListener,
    /// Held for as long as the socket is ours.
    _lock: File,
}

impl ControlSocket {
    /// Claims a run folder, which is made where it is missing, and leaves `record` there. Requests are answered only
    /// once [`ControlSocket::serve`] runs; until then they wait.
    ///
    /// # Errors
    /// [`ControlError::AgentRunning`] while another agent holds the folder; else what the kernel refused.
    pub fn claim(run: &Path, record: &AgentRecord) -> Result<Self, ControlError> {
        std::fs::create_dir_all(run).map_err(|source| ControlError::io("create", run, source))?;
        let lock = lock(run)?;
        let path = record_path(run);
        write_record(&path, record).map_err(|source| ControlError::io("write", &path, source))?;
        let path = socket_path(run);
        let listener = listen_at(&path).map_err(|source| ControlError::io("bind", &path, source))?;
        Ok(Self { path, listener, _lock: lock })
    }

    /// Answers requests until the future is dropped.
    ///
    /// # Errors
    /// [`ControlError::Io`] when the runtime cannot take the socket.
    pub async fn serve<O: Operations>(&self, operations: Arc<O>) -> Result<(), ControlError> {
        let serve = |source| ControlError::io("serve", &self.path, source);
        let listener = self.listener.try_clone().map_err(serve)?;
        let listener = tokio::net::UnixListener::from_std(listener).map_err(serve)?;
        axum::serve(listener, server::router(operations)).await.map_err(serve)
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Best effort: whoever claims the folder next replaces the socket anyway.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn lock(run: &Path) -> Result<File, ControlError> {
    let path = run.join("agent.lock");
    let file = open_lock(&path).map_err(|source| ControlError::io("create", &path, source))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ControlError::AgentRunning(run.to_owned())),
        Err(source) => Err(ControlError::io("lock", &path, source)),
    }
}

fn write_record(path: &Path, record: &AgentRecord) -> io::Result<()> {
    let beside = path.with_extension("json.new");
    std::fs::write(&beside, serde_json::to_vec_pretty(record)?)?;
    std::fs::rename(&beside, path)
}

/// Listens at `path` in place of whatever socket is there.
fn listen_at(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Before it is bound: the file is made with the socket's mode, so that no one can open it in between.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests;
