//! The front ends of one volume: started together, stopped together, each with its own fate in the status.

use super::Surroundings;
use crate::buffer::BufferPool;
use crate::config::{DeviceKind, VolumeConfig};
use crate::control::api::DeviceStatus;
use crate::device::Volume;
use crate::device::loopback::{Loopback, Options};
use crate::device::nbd::{ListenError, Offer, Server, Tls};
use crate::device::openers::{self, Claim, Users};
use crate::export::Export;
use crate::words::with_causes;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// How long it may take to find out who has a device open.
const OPENERS_TIME: Duration = Duration::from_secs(5);

/// The front ends that are served, and those that could not be.
#[derive(Default)]
pub(super) struct Devices {
    nbd: Vec<Server>,
    loopback: Option<Loopback>,
    /// Held until they are stopped.
    claim: Option<Claim>,
    statuses: Vec<DeviceStatus>,
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
        export: Rc<Export>,
        pool: &BufferPool,
    ) -> Self {
        let mut devices = Self::default();
        devices.start_nbd(config, surroundings, export, pool);
        devices
    }

    pub(super) async fn statuses(&self) -> Vec<DeviceStatus> {
        let mut statuses = self.statuses.clone();
        if self.loop_has_ended().await {
            for status in statuses.iter_mut().filter(|status| status.kind == DeviceKind::Loop) {
                status.error = Some("its connection was aborted; restart the agent".to_owned());
            }
        }
        statuses
    }

    /// Who has a device open, in words; devices that nobody uses can be stopped.
    pub(super) async fn openers(&self) -> Vec<String> {
        let clients = self.nbd.iter().flat_map(Server::clients).collect();
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
        let clients = self.nbd.iter().flat_map(Server::clients).collect();
        openers::look(self.loopback.as_ref().map(Loopback::path), clients).await
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
        for server in self.nbd {
            server.stop().await;
        }
    }

    fn start_nbd(
        &mut self,
        config: &VolumeConfig,
        surroundings: &Surroundings,
        volume: Rc<dyn Volume>,
        pool: &BufferPool,
    ) {
        let name = config.name.as_str();
        let socket: PathBuf = surroundings.run_folder.join(format!("{name}.nbd"));
        let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
        let offer = Offer::new(name, volume, pool.clone());
        let served = Server::unix(&socket, offer.clone());
        self.keep_nbd(uri, served);
        if let Some(address) = config.nbd_listen {
            let folder = config.nbd_tls.as_deref();
            let scheme = if folder.is_some() { "nbds" } else { "nbd" };
            let tls = folder.map(Tls::load).transpose().map_err(ListenError::from);
            let served = tls.and_then(|tls| Server::tcp(address, offer, tls));
            let address = served.as_ref().ok().and_then(Server::address).unwrap_or(address);
            self.keep_nbd(format!("{scheme}://{address}/{name}"), served);
            if folder.is_none() && !address.ip().is_loopback() {
                self.warn(format!(
                    "nbd on {address} is not encrypted and serves whoever reaches it; set nbd_tls"
                ));
            }
        }
    }

    /// Says something about the device that was kept last.
    fn warn(&mut self, warning: String) {
        if let Some(status) = self.statuses.last_mut().filter(|status| status.error.is_none()) {
            tracing::warn!("{warning}");
            status.warning = Some(warning);
        }
    }

    fn keep_nbd(&mut self, uri: String, served: Result<Server, ListenError>) {
        let error = served.as_ref().err().map(|error| with_causes(error));
        self.keep(DeviceKind::Nbd, Some(uri), None, error);
        self.nbd.extend(served);
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
        match Loopback::start(&options, volume, pool.clone()).await {
            Ok(loopback) => {
                self.keep(DeviceKind::Loop, None, Some(loopback.link().to_owned()), None);
                self.loopback = Some(loopback);
            }
            Err(error) => {
                let path = surroundings.device_folder.join(config.name.as_str());
                self.keep(DeviceKind::Loop, None, Some(path), Some(with_causes(&error)));
            }
        }
    }

    fn keep(&mut self, kind: DeviceKind, uri: Option<String>, path: Option<PathBuf>, error: Option<String>) {
        if let Some(error) = &error {
            tracing::error!("the {kind} device is not served: {error}");
        }
        self.statuses.push(DeviceStatus { kind, uri, path, error, warning: None });
    }
}
