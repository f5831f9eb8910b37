//! The places at which a volume is served over NBD: a Unix socket, and an address where one is configured. What can't be
//! served, on an address that the host does not have yet for one, is tried again until it can (X6).

use super::{Client, ListenError, Offer, Server, Tls};
use crate::blocking::blocking;
use crate::buffer::BufferPool;
use crate::config::{DeviceKind, VolumeConfig};
use crate::control::api::DeviceStatus;
use crate::device::Volume;
use crate::device::front_end::{FrontEnd, Pending, Site};
use crate::device::openers::{self, Users};
use crate::system::Process;
use crate::words::with_causes;
use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use tokio::task::{AbortHandle, spawn_local};

/// How long after an attempt to listen the next one follows.
const LISTEN_PAUSE: Duration = Duration::from_secs(1);

/// A volume's front end for NBD.
pub struct Exports {
    site: Site,
    exports: Vec<Rc<Export>>,
}

impl Exports {
    /// One that serves nothing yet.
    #[must_use]
    pub fn boxed(site: Site) -> Box<dyn FrontEnd> {
        Box::new(Self { site, exports: Vec::new() })
    }
}

impl FrontEnd for Exports {
    fn start<'a>(
        &'a mut self,
        config: &'a VolumeConfig,
        volume: Rc<dyn Volume>,
        pool: BufferPool,
    ) -> Pending<'a, Option<Duration>> {
        let Site { name, run_folder, .. } = &self.site;
        let offer = Offer::new(name, volume, pool);
        let socket = run_folder.join(format!("{name}.nbd"));
        let tcp = config.nbd_listen.map(|address| Place::Tcp { address, tls: config.nbd_tls.clone() });
        let places = [Place::Unix(socket)].into_iter().chain(tcp);
        self.exports = places.map(|place| Export::start(name.clone(), place, offer.clone())).collect();
        Box::pin(std::future::ready(None))
    }

    fn statuses(&self) -> Vec<DeviceStatus> {
        self.exports.iter().map(|export| export.status.borrow().clone()).collect()
    }

    fn users(&self, _: bool) -> Pending<'_, Users> {
        let clients = |export: &Rc<Export>| export.server.borrow().as_ref().map(Server::clients);
        let clients: Vec<Client> = self.exports.iter().filter_map(clients).flatten().collect();
        Box::pin(async move {
            let staying = blocking(move || in_words(clients)).await;
            Users { staying, ..Users::default() }
        })
    }

    fn stop(self: Box<Self>) -> Pending<'static, ()> {
        Box::pin(async move {
            for export in self.exports {
                export.stop().await;
            }
        })
    }
}

/// Clients in words, nobody twice, and without this process itself. Blocks.
#[must_use]
pub fn in_words(clients: Vec<Client>) -> Vec<String> {
    openers::unique(clients.into_iter().filter_map(words_of))
}

fn words_of(client: Client) -> Option<String> {
    match client {
        Client::Process(Some(id)) if id.cast_unsigned() == std::process::id() => None,
        Client::Process(Some(id)) => {
            Some(format!("NBD client {}", openers::in_words(Process(id.cast_unsigned()))))
        }
        Client::Process(None) => Some("NBD client in a container".to_owned()),
        Client::Address(address) => Some(format!("NBD client {address}")),
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
