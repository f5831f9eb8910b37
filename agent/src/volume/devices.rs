//! The front ends of one volume: started together, stopped together, each with its own fate in the status.

use super::Surroundings;
use super::changes::{failed, refused};
use crate::blocking::blocking;
use crate::buffer::BufferPool;
use crate::config::{DeviceKind, VolumeConfig};
use crate::control::api::{DeviceStatus, Failure};
use crate::device::Volume;
use crate::device::loopback::{self, Left, Loopback, Options, StartError};
use crate::device::nbd::{ListenError, Offer, Server, Tls};
use crate::device::openers::{self, Claim, Users};
use crate::export::Export;
use crate::words::with_causes;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long it may take to find out who has a device open.
const OPENERS_TIME: Duration = Duration::from_secs(5);
/// How long systemd may take to say whether the host is being shut down.
const SYSTEM_TIME: Duration = Duration::from_secs(2);
/// How long users of a device may take to go when the host is being shut down, less than a volume may take to stop; and how
/// often it is looked for them.
const SHUTDOWN_TIME: Duration = Duration::from_secs(25);
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);

/// The front ends that are served, and those that could not be.
#[derive(Default)]
pub(super) struct Devices {
    nbd: Vec<Server>,
    loopback: Option<Loopback>,
    /// A loop device that is left to the next agent.
    left: Option<Left>,
    /// The loop device that an earlier agent left and that can't be taken over: its users wait.
    unserved: Option<Options>,
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
        if !config.devices.contains(&DeviceKind::Loop) {
            give_up_loop(config, surroundings, "it has none any more").await;
        }
        for kind in &config.devices {
            match kind {
                DeviceKind::Nbd => devices.start_nbd(config, surroundings, volume.clone(), pool),
                DeviceKind::Loop => devices.start_loop(config, surroundings, volume.clone(), pool).await,
            }
        }
        devices
    }

    /// Serves a replica's read-only export.
    pub(super) async fn start_export(
        config: &VolumeConfig,
        surroundings: &Surroundings,
        export: Rc<Export>,
        pool: &BufferPool,
    ) -> Self {
        let mut devices = Self::default();
        // Before anything is written under a device that is open (L5).
        give_up_loop(config, surroundings, "this host is a replica now").await;
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
        let mut users = openers::look(self.loopback.as_ref().map(Loopback::path), clients).await;
        if let Some(options) = self.unserved.clone() {
            users.staying.extend(blocking(move || loopback::users_of_kept(&options)).await);
        }
        users
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

    /// For the agent's end: leaves a loop device that is in use to the next agent, who answers what is asked from now on.
    /// Its users wait, rather than get errors (S1). One that nobody uses stays, to be stopped.
    pub(super) async fn leave(&mut self, surroundings: &Surroundings, name: &str) {
        let Some(loopback) = self.loopback.take_if(|loopback| loopback.can_be_left()) else { return };
        let path = loopback.path();
        let store = surroundings.store.clone();
        // Where systemd doesn't say, it is not.
        let asked = tokio::time::timeout(SYSTEM_TIME, blocking(move || store.is_the_last()));
        let is_the_last = asked.await.unwrap_or(false);
        let began = Instant::now();
        let users = loop {
            let looked = tokio::time::timeout(OPENERS_TIME, openers::look(Some(path.clone()), Vec::new()));
            let mut users = looked.await.unwrap_or_else(|_| Users {
                staying: vec!["perhaps in use, which cannot be told: the device does not answer".to_owned()],
                ..Users::default()
            });
            let words = [std::mem::take(&mut users.staying), std::mem::take(&mut users.passing)].concat();
            if words.is_empty() {
                self.claim = users.claim;
                self.loopback = Some(loopback);
                return;
            }
            if !is_the_last {
                break words;
            }
            if began.elapsed() >= SHUTDOWN_TIME {
                tracing::error!(
                    volume = name,
                    "the host is being shut down, and {} is still {}: that gets I/O errors now",
                    path.display(),
                    words.join(", ")
                );
                self.loopback = Some(loopback);
                return;
            }
            tokio::time::sleep(BETWEEN_LOOKS).await;
        };
        tracing::warn!(
            volume = name,
            "{} stays, as it is {}: whoever uses it waits until the agent is started again; to take it away instead, \
             close it before the agent is stopped, or blockmirror release {name} --force",
            path.display(),
            users.join(", ")
        );
        self.left = Some(loopback.leave().await);
    }

    /// Takes the loop device away, also one that an earlier agent left and nobody serves. Gives who had it open and gets
    /// errors now; where it is not forced, nobody may have.
    pub(super) async fn release(
        &mut self,
        config: &VolumeConfig,
        surroundings: &Surroundings,
        force: bool,
    ) -> Result<Vec<String>, Failure> {
        let name = &config.name;
        let in_use = |users: &[String]| {
            refused(format!(
                "the device is in use: {}; close it first, or with --force its users get i/o errors",
                users.join(", ")
            ))
        };
        let Some(loopback) = &self.loopback else {
            let options = loop_options(config, surroundings);
            if !surroundings.store.holds(&options.name) {
                return Err(refused(format!("{name} has no loop device on this host now")));
            }
            // It is not opened to be looked at: nobody would answer.
            let there = options.clone();
            let users = blocking(move || loopback::users_of_kept(&there)).await;
            if !users.is_empty() && !force {
                return Err(in_use(&users));
            }
            blocking(move || loopback::give_up(&options, "the operator wants that")).await;
            self.unserved = None;
            return Ok(users);
        };
        let looked = openers::look(Some(loopback.path()), Vec::new()).await;
        let users = [looked.staying, looked.passing].concat();
        if !users.is_empty() && !force {
            return Err(in_use(&users));
        }
        if let Some(loopback) = self.loopback.take() {
            match loopback.stop(looked.claim).await {
                Err(error) if users.is_empty() => return Err(failed(with_causes(&error))),
                Err(error) => tracing::warn!(volume = %name, "{}", with_causes(&error)),
                Ok(()) => {}
            }
        }
        for status in self.statuses.iter_mut().filter(|status| status.kind == DeviceKind::Loop) {
            status.error = Some("it was released; it is served again when the agent is restarted".to_owned());
        }
        Ok(users)
    }

    pub(super) async fn stop(self) {
        if let Some(left) = self.left {
            left.settle().await;
        }
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
        let options = loop_options(config, surroundings);
        match Loopback::start(&options, volume, pool.clone()).await {
            Ok(loopback) => {
                self.keep(DeviceKind::Loop, None, Some(loopback.link().to_owned()), None);
                self.loopback = Some(loopback);
            }
            Err(error) => {
                self.unserved = matches!(error, StartError::TakeOver(_)).then_some(options);
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

fn loop_options(config: &VolumeConfig, surroundings: &Surroundings) -> Options {
    Options {
        name: config.name.to_string(),
        volume: config.id.0,
        run_folder: surroundings.run_folder.clone(),
        device_folder: surroundings.device_folder.clone(),
        store: surroundings.store.clone(),
    }
}

/// Takes away the loop device that an earlier agent left, where the volume is to have none.
async fn give_up_loop(config: &VolumeConfig, surroundings: &Surroundings, why: &'static str) {
    let options = loop_options(config, surroundings);
    if surroundings.store.holds(&options.name) {
        blocking(move || loopback::give_up(&options, why)).await;
    }
}
