//! The front ends of one volume: started together, stopped together, each with its own fate in the status. What can't be
//! listened on, an address that the host does not have yet for one, is tried again until it can (X6).

use super::Surroundings;
use crate::buffer::BufferPool;
use crate::config::{DeviceKind, VolumeConfig};
use crate::control::api::DeviceStatus;
use crate::device::Volume;
use crate::device::loopback::{Loopback, Options};
use crate::device::nbd::{Client, ListenError, Offer, Server, Tls};
use crate::device::openers::{self, Claim, Users};
use crate::export;
use crate::words::with_causes;
use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use tokio::task::{AbortHandle, spawn_local};

/// How long it may take to find out who has a device open.
const OPENERS_TIME: Duration = Duration::from_secs(5);
/// How long after an attempt to listen the next one follows.
const LISTEN_PAUSE: Duration = Duration::from_secs(1);

/// The front ends that are served, and those that could not be.
#[derive(Default)]
pub(super) struct Devices {
    nbd: Vec<Rc<Export>>,
    loopback: Option<Loopback>,
    /// Held until they are stopped.
    claim: Option<Claim>,
    /// Of the loop device.
    status: Option<DeviceStatus>,
}

impl Devices {
    /// Serves a primary's devices.
    pub(super) async fn start(
        config: &VolumeConfig,
        surroundings: &Surroundings,
        volume: Rc<dyn Volume>,
        pool: &BufferPool,
    ) -> Self {
        let mut devices = Self::default();
        for kind in &config.devices {
            match kind {
                DeviceKind::Nbd => devices.start_nbd(config, surroundings, volume.clone(), pool),
                DeviceKind::Loop => devices.start_loop(config, surroundings, volume.clone(), pool).await,
            }
        }
        devices
    }

    /// Serves a replica's read-only export.
    pub(super) fn start_export(
        config: &VolumeConfig,
        surroundings: &Surroundings,
        export: Rc<export::Export>,
        pool: &BufferPool,
    ) -> Self {
        let mut devices = Self::default();
        devices.start_nbd(config, surroundings, export, pool);
        devices
    }

    pub(super) async fn statuses(&self) -> Vec<DeviceStatus> {
        let mut loopback = self.status.clone();
        if self.loop_has_ended().await
            && let Some(status) = &mut loopback
        {
            status.error = Some("its connection was aborted; restart the agent".to_owned());
        }
        self.nbd.iter().map(|export| export.status.borrow().clone()).chain(loopback).collect()
    }

    /// Who has a device open, in words; devices that nobody uses can be stopped.
    pub(super) async fn openers(&self) -> Vec<String> {
        let clients = self.clients();
        let openers = openers::openers(self.loopback.as_ref().map(Loopback::path), clients);
        tokio::time::timeout(OPENERS_TIME, openers).await.unwrap_or_else(|_| {
            vec!["perhaps in use, which cannot be told: the device does not answer".to_owned()]
        })
    }

    /// Who still has the loop device of an earlier run, in words.
    pub(super) async fn stale(&self) -> Vec<String> {
        match &self.loopback {
            Some(loopback) => loopback.stale().await,
            None => Vec::new(),
        }
    }

    /// Who has a device open. Where nobody has, the loop device is claimed; whoever means to stop the devices keeps that.
    pub(super) async fn users(&self) -> Users {
        openers::look(self.loopback.as_ref().map(Loopback::path), self.clients()).await
    }

    fn clients(&self) -> Vec<Client> {
        let clients = |export: &Rc<Export>| export.server.borrow().as_ref().map(Server::clients);
        self.nbd.iter().filter_map(clients).flatten().collect()
    }

    /// Keeps others from using the loop device until the devices are stopped.
    pub(super) fn hold(&mut self, claim: Option<Claim>) {
        self.claim = claim;
    }

    /// Whether the loop device was served and is no longer, without waiting for that.
    async fn loop_has_ended(&self) -> bool {
        let Some(loopback) = &self.loopback else { return false };
        tokio::select! {
            biased;
            () = loopback.ended() => true,
            () = std::future::ready(()) => false,
        }
    }

    pub(super) async fn stop(self) {
        if let Some(loopback) = self.loopback
            && let Err(error) = loopback.stop(self.claim).await
        {
            tracing::warn!("{}", with_causes(&error));
        }
        for export in self.nbd {
            export.stop().await;
        }
    }

    fn start_nbd(
        &mut self,
        config: &VolumeConfig,
        surroundings: &Surroundings,
        volume: Rc<dyn Volume>,
        pool: &BufferPool,
    ) {
        let offer = Offer::new(config.name.as_str(), volume, pool.clone());
        let socket = surroundings.run_folder.join(format!("{}.nbd", config.name));
        let tcp = config.nbd_listen.map(|address| Place::Tcp { address, tls: config.nbd_tls.clone() });
        for place in [Place::Unix(socket)].into_iter().chain(tcp) {
            self.nbd.push(Export::start(config.name.to_string(), place, offer.clone()));
        }
    }

    async fn start_loop(
        &mut self,
        config: &VolumeConfig,
        surroundings: &Surroundings,
        volume: Rc<dyn Volume>,
        pool: &BufferPool,
    ) {
        let options = Options {
            name: config.name.to_string(),
            run_folder: surroundings.run_folder.clone(),
            device_folder: surroundings.device_folder.clone(),
        };
        let (path, error) = match Loopback::start(&options, volume, pool.clone()).await {
            Ok(loopback) => {
                let path = loopback.link().to_owned();
                self.loopback = Some(loopback);
                (path, None)
            }
            Err(error) => {
                let text = with_causes(&error);
                tracing::error!("the loop device is not served: {text}");
                (surroundings.device_folder.join(config.name.as_str()), Some(text))
            }
        };
        let kind = DeviceKind::Loop;
        self.status = Some(DeviceStatus { kind, uri: None, path: Some(path), error, warning: None });
    }
}

/// Where a volume is served to NBD clients.
enum Place {
    /// For processes of this host.
    Unix(PathBuf),
    /// For others too; with the folder of the certificates where it is encrypted.
    Tcp { address: SocketAddr, tls: Option<PathBuf> },
}

impl Place {
    fn listen(&self, offer: Offer) -> Result<Server, ListenError> {
        match self {
            Self::Unix(path) => Server::unix(path, offer),
            Self::Tcp { address, tls } => {
                let tls = tls.as_deref().map(Tls::load).transpose()?;
                Server::tcp(*address, offer, tls)
            }
        }
    }

    fn uri(&self, volume: &str, server: Option<&Server>) -> String {
        match self {
            Self::Unix(path) => format!("nbd+unix:///{volume}?socket={}", path.display()),
            Self::Tcp { address, tls } => {
                let scheme = if tls.is_some() { "nbds" } else { "nbd" };
                let address = server.and_then(Server::address).unwrap_or(*address);
                format!("{scheme}://{address}/{volume}")
            }
        }
    }

    /// What an operator should know who has the volume served there.
    fn warning(&self, server: &Server) -> Option<String> {
        let Self::Tcp { tls: None, .. } = self else { return None };
        let address = server.address().filter(|address| !address.ip().is_loopback())?;
        Some(format!("nbd on {address} is not encrypted and serves whoever reaches it; set nbd_tls"))
    }
}

/// The volume as it is served, or to be served, to NBD clients at one place.
struct Export {
    volume: String,
    place: Place,
    offer: Offer,
    server: RefCell<Option<Server>>,
    status: RefCell<DeviceStatus>,
    /// The attempts to listen, where the first one failed.
    attempts: RefCell<Option<AbortHandle>>,
}

impl Export {
    /// Serves it, now or as soon as that can be done.
    fn start(volume: String, place: Place, offer: Offer) -> Rc<Self> {
        let uri = Some(place.uri(&volume, None));
        let status = DeviceStatus { kind: DeviceKind::Nbd, uri, path: None, error: None, warning: None };
        let (status, server) = (RefCell::new(status), RefCell::default());
        let export = Rc::new(Self { volume, place, offer, server, status, attempts: RefCell::default() });
        if !export.listen() {
            let me = export.clone();
            let attempts = spawn_local(async move {
                loop {
                    tokio::time::sleep(LISTEN_PAUSE).await;
                    if me.listen() {
                        return;
                    }
                }
            });
            *export.attempts.borrow_mut() = Some(attempts.abort_handle());
        }
        export
    }

    /// Tries to serve it, and says whether it is served.
    fn listen(&self) -> bool {
        let (volume, mut status) = (&self.volume, self.status.borrow_mut());
        match self.place.listen(self.offer.clone()) {
            Ok(server) => {
                let uri = self.place.uri(volume, Some(&server));
                if status.error.take().is_some() {
                    tracing::info!(%volume, "the nbd device is served: {uri}");
                }
                status.uri = Some(uri);
                status.warning = self.place.warning(&server);
                if let Some(warning) = &status.warning {
                    tracing::warn!(%volume, "{warning}");
                }
                *self.server.borrow_mut() = Some(server);
                true
            }
            Err(error) => {
                let text = with_causes(&error);
                if status.error.as_ref() != Some(&text) {
                    tracing::error!(%volume, "the nbd device is not served: {text}; it is tried again");
                }
                status.error = Some(text);
                false
            }
        }
    }

    /// Ends it; when this returns nobody is served any more.
    async fn stop(&self) {
        if let Some(attempts) = self.attempts.take() {
            attempts.abort();
        }
        if let Some(server) = self.server.take() {
            server.stop().await;
        }
    }
}
