//! The agent's control socket: how the operator's tool reaches a running agent.
//!
//! HTTP with JSON over a Unix socket that only its owner can open. This module claims the socket; [`verbs`] is
//! the table of what can be asked for, `server` turns requests into calls, [`api`] holds what is said.
//!
//! One agent owns a run folder at a time: it holds a lock on `agent.lock`, which the kernel releases however the agent
//! ends. So whoever gets the lock may replace a socket that a killed agent left.

pub mod api;
mod server;
pub mod verbs;

use crate::durable;
use crate::process::open_lock;
use api::AgentRecord;
use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use verbs::Operations;

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
    durable::replace_until_restart(path, &serde_json::to_vec_pretty(record)?)
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
