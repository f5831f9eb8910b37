//! Quinn alone, with the transport's keys, settings and socket, but without its thread, frames and checksums: what is
//! left when everything that the transport adds is taken away. It is what the transport is measured against, and
//! carries nothing else.

use super::dial::{self, AttemptError};
use super::endpoint::{self, Dialler};
use super::key::HostKey;
use super::settings::{self, Options};
use blockmirror_protocol::units::HostId;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::runtime::Handle;

/// A socket whose packets are handled by the runtime that it was opened in.
#[derive(Debug)]
pub struct Bare {
    dialler: Dialler,
}

impl Bare {
    /// Opens the socket. Must be called within a runtime.
    ///
    /// # Errors
    /// What the kernel said.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn open(listen: SocketAddr, key: &HostKey, options: &Options) -> io::Result<Self> {
        let quic = endpoint::open(listen, key, options, Handle::current())?;
        let (transport, timeout) = (options.transport(), options.connect_timeout);
        Ok(Self { dialler: Dialler { quic, key: key.clone(), transport, timeout, known: Arc::default() } })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.dialler.quic.local_addr()
    }

    /// Dials a host.
    ///
    /// # Errors
    /// [`AttemptError`].
    pub async fn connect(&self, to: SocketAddr, expected: HostId) -> Result<quinn::Connection, AttemptError> {
        Ok(dial::attempt(&self.dialler, to, expected).await?.quic)
    }

    /// The next connection that is made with this host, with the room that a known peer has. Nothing where its
    /// handshake failed, or none will come any more.
    pub async fn accept(&self) -> Option<quinn::Connection> {
        let connection = self.dialler.quic.accept().await?.await.ok()?;
        settings::trust(&connection, 0);
        Some(connection)
    }
}
