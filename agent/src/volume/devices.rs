//! The front ends of one volume: started together, stopped together, each with its own fate in the status. What can't be
//! served, on an address that the host does not have yet for one, or without a loop device that is free, is tried again until it
//! can (X6).

use super::changes::{Event, failed, refused};
use super::{Answer, OpenRole, Surroundings};
use crate::blocking::blocking;
use crate::buffer::BufferPool;
use crate::config::{DeviceKind, Name, VolumeConfig};
use crate::control::api::{DeviceStatus, Failure};
use crate::device::Volume;
use crate::device::loopback::{self, Left, Loopback, Options, StartError};
use crate::device::nbd::{Client, ListenError, Offer, Server, Tls};
use crate::device::openers::{self, BETWEEN_LOOKS, Claim, Users};
use crate::export;
use crate::words::with_causes;
use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::task::{AbortHandle, spawn_local};

/// How long it may take to find out who has a device open.
const OPENERS_TIME: Duration = Duration::from_secs(5);
/// How long after an attempt to listen the next one follows.
const LISTEN_PAUSE: Duration = Duration::from_secs(1);
/// How long after an attempt to serve a loop device the next one follows; and after one that had to wait for somebody who keeps
/// the device open and does not answer.
const LOOP_PAUSE: Duration = Duration::from_secs(1);
const SILENT_PAUSE: Duration = Duration::from_secs(20);
/// How long systemd may take to say whether the host is being shut down.
const SYSTEM_TIME: Duration = Duration::from_secs(2);
/// How long users of a device may take to go when the host is being shut down, less than a volume may take to stop; and how
/// often it is looked for them.
const SHUTDOWN_TIME: Duration = Duration::from_secs(25);
const SHUTDOWN_LOOKS: Duration = Duration::from_millis(200);

/// Why devices are not taken away now.
pub(super) enum NotNow {
    /// These have one open, perhaps just for a moment.
    InUse(Vec<String>),
    /// They can't be.
    Refused(Failure),
}

/// The front ends that are served, and those that could not be.
#[derive(Default)]
pub(super) struct Devices {
    nbd: Vec<Rc<Export>>,
    loopback: Option<Loopback>,
    /// A loop device that is left to the next agent.
    left: Option<Left>,
    /// The loop device that an earlier agent left and that can't be taken over: its users wait.
    unserved: Option<Options>,
    /// When a loop device that could not be served is tried again.
    loop_pause: Option<Duration>,
    /// How often it was tried.
    loop_attempts: u32,
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
        export: Rc<export::Export>,
        pool: &BufferPool,
    ) -> Self {
        let mut devices = Self::default();
        // Before anything is written under a device that is open (L5).
        give_up_loop(config, surroundings, "this host is a replica now").await;
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
        if let (Some(status), Some(device)) = (&mut loopback, &self.loopback)
            && !device.seems_kept()
        {
            status.warning = Some(
                "it does not outlive the agent, as nothing keeps it: before the agent is stopped, unmount it"
                    .to_owned(),
            );
        }
        self.nbd.iter().map(|export| export.status.borrow().clone()).chain(loopback).collect()
    }

    /// Who has a device open, in words; devices that nobody uses can be stopped.
    pub(super) async fn openers(&self) -> Vec<String> {
        let openers = openers::openers(self.loopback.as_ref().map(Loopback::path), self.clients());
        tokio::time::timeout(OPENERS_TIME, openers).await.unwrap_or_else(|_| vec![untold()])
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
        let mut users = look(self.loopback.as_ref().map(Loopback::path), self.clients()).await;
        if let Some(options) = self.unserved.clone() {
            users.staying.extend(blocking(move || loopback::users_of_kept(&options)).await);
        }
        users
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

    /// For the agent's end: leaves a loop device that is in use to the next agent, who answers what is asked from now on.
    /// Its users wait, rather than get errors (S1). One that nobody uses stays, to be stopped; whoever just looks at it is
    /// waited for.
    pub(super) async fn leave(&mut self, surroundings: &Surroundings, name: &Name) {
        match &self.loopback {
            Some(loopback) if loopback.can_be_left().await => {}
            _ => return,
        }
        let Some(loopback) = self.loopback.take() else { return };
        let path = loopback.path();
        let store = surroundings.store.clone();
        // Where systemd doesn't say, it is not.
        let asked = tokio::time::timeout(SYSTEM_TIME, blocking(move || store.is_the_last()));
        let is_the_last = asked.await.unwrap_or(false);
        let began = Instant::now();
        let mut since = None;
        let users = loop {
            let mut users = look(Some(path.clone()), Vec::new()).await;
            if users.is_nobody() {
                self.claim = users.claim.take();
                self.loopback = Some(loopback);
                return;
            }
            let words = users.words();
            match is_the_last {
                false if users.may_pass(waited(since)) => {
                    since = Some(wait_for(name, &words, since));
                    tokio::time::sleep(BETWEEN_LOOKS).await;
                }
                false => break words,
                true if began.elapsed() >= SHUTDOWN_TIME => {
                    tracing::error!(
                        volume = name.as_str(),
                        "the host is being shut down, and {} is still {}: that gets I/O errors now",
                        path.display(),
                        words.join(", ")
                    );
                    self.loopback = Some(loopback);
                    return;
                }
                true => tokio::time::sleep(SHUTDOWN_LOOKS).await,
            }
        };
        tracing::warn!(
            volume = name.as_str(),
            "{} stays, as it is {}: whoever uses it waits until the agent is started again; to take it away instead, \
             close it before the agent is stopped, or blockmirror release {name} --force",
            path.display(),
            users.join(", ")
        );
        self.left = Some(loopback.leave().await);
    }

    /// Takes the loop device away, also one that an earlier agent left and nobody serves. Gives who had it open and gets
    /// errors now; where it is not forced, nobody may have, and whoever just looks at it is waited for: since then, if this was
    /// tried before.
    pub(super) async fn release(
        &mut self,
        config: &VolumeConfig,
        surroundings: &Surroundings,
        force: bool,
        since: Option<Instant>,
    ) -> Result<Vec<String>, NotNow> {
        let name = &config.name;
        let in_use = |users: &[String]| {
            NotNow::Refused(refused(format!(
                "the device is in use: {}; close it first, or with --force its users get i/o errors",
                users.join(", ")
            )))
        };
        let Some(loopback) = &self.loopback else {
            let options = loop_options(config, surroundings);
            if !surroundings.store.holds(&options.name) {
                let text = format!("{name} has no loop device on this host now");
                return Err(NotNow::Refused(refused(text)));
            }
            // It is not opened to be looked at: nobody would answer.
            let there = options.clone();
            let users = blocking(move || loopback::users_of_kept(&there)).await;
            if !users.is_empty() && !force {
                return Err(in_use(&users));
            }
            blocking(move || loopback::give_up(&options, "the operator wants that")).await;
            self.unserved = None;
            self.note_released();
            return Ok(users);
        };
        let looked = look(Some(loopback.path()), Vec::new()).await;
        let users = looked.words();
        if !users.is_empty() && !force {
            return Err(if looked.may_pass(waited(since)) { NotNow::InUse(users) } else { in_use(&users) });
        }
        if let Some(loopback) = self.loopback.take() {
            match loopback.stop(looked.claim).await {
                Err(error) if users.is_empty() => return Err(NotNow::Refused(failed(with_causes(&error)))),
                Err(error) => tracing::warn!(volume = %name, "{}", with_causes(&error)),
                Ok(()) => {}
            }
        }
        self.note_released();
        Ok(users)
    }

    /// Status says what became of the loop device.
    fn note_released(&mut self) {
        if let Some(status) = &mut self.status {
            status.error = Some("it was released; it is served again when the agent is restarted".to_owned());
        }
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
        let options = loop_options(config, surroundings);
        self.loop_attempts += 1;
        self.loop_pause = None;
        let known = self.status.take().and_then(|status| status.error);
        let (path, error) = match Loopback::start(&options, volume, pool.clone()).await {
            Ok(loopback) => {
                let path = loopback.link().to_owned();
                self.loopback = Some(loopback);
                if known.is_some() {
                    tracing::info!(volume = %config.name, "the loop device is served: {}", path.display());
                }
                (path, None)
            }
            Err(error) => {
                let text = with_causes(&error);
                self.loop_pause = match &error {
                    StartError::Name(_) | StartError::NotPermitted | StartError::TakeOver(_) => None,
                    StartError::Silent(_) => Some(SILENT_PAUSE),
                    _ => Some(LOOP_PAUSE),
                };
                self.unserved = matches!(error, StartError::TakeOver(_)).then_some(options);
                if known.as_ref() != Some(&text) {
                    let again = if self.loop_pause.is_some() { "; it is tried again" } else { "" };
                    tracing::error!(volume = %config.name, "the loop device is not served: {text}{again}");
                }
                (surroundings.device_folder.join(config.name.as_str()), Some(text))
            }
        };
        let kind = DeviceKind::Loop;
        self.status = Some(DeviceStatus { kind, uri: None, path: Some(path), error, warning: None });
    }
}

impl super::Volume {
    /// Sees to it that a loop device that could not be served is tried again.
    pub(super) fn await_loop(&self) {
        if let Some(pause) = self.devices.loop_pause {
            self.later(pause, Event::StartLoop(self.devices.loop_attempts));
        }
    }

    /// Takes the loop device away. The answer is who had it open. `since` is since when it waits for those who have it open,
    /// where it has waited already.
    pub(super) async fn release(&mut self, force: bool, answer: Answer<Vec<String>>, since: Option<Instant>) {
        let config = self.config.borrow().clone();
        let released = match &self.role {
            OpenRole::Changing(_) => Err(NotNow::Refused(self.not_open())),
            _ => self.devices.release(&config, &self.surroundings, force, since).await,
        };
        let answered = match released {
            Ok(users) => Ok(users),
            Err(NotNow::Refused(failure)) => Err(failure),
            Err(NotNow::InUse(users)) => {
                let since = wait_for(&config.name, &users, since);
                return self.later(BETWEEN_LOOKS, Event::Release(force, answer, Some(since)));
            }
        };
        drop(answer.send(answered));
    }

    /// It is time for another attempt, if there was none since this one.
    pub(super) async fn start_loop_again(&mut self, attempt: u32) {
        let OpenRole::Primary(primary, _) = &self.role else { return };
        let is_due = self.devices.loop_pause.is_some() && self.devices.loop_attempts == attempt;
        if !is_due || primary.superseded().is_some() {
            return;
        }
        let (config, primary) = (self.config.borrow().clone(), primary.clone());
        self.devices.start_loop(&config, &self.surroundings, primary, &self.pool).await;
        self.await_loop();
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

/// How long those who may be gone in a moment have been waited for.
pub(super) fn waited(since: Option<Instant>) -> Duration {
    since.map_or(Duration::ZERO, |since| since.elapsed())
}

/// Since when those are waited for who have the device open; the first time, the log says for whom.
pub(super) fn wait_for(volume: &Name, users: &[String], since: Option<Instant>) -> Instant {
    since.unwrap_or_else(|| {
        tracing::info!(%volume, "waiting for those who have the device open: {}", users.join(", "));
        Instant::now()
    })
}

/// Who uses these, soon: a device that does not answer counts as used (L5).
async fn look(device: Option<PathBuf>, clients: Vec<Client>) -> Users {
    let looked = tokio::time::timeout(OPENERS_TIME, openers::look(device, clients)).await;
    looked.unwrap_or_else(|_| Users { staying: vec![untold()], ..Users::default() })
}

fn untold() -> String {
    "perhaps in use, which cannot be told: the device does not answer".to_owned()
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
pub(super) async fn give_up_loop(config: &VolumeConfig, surroundings: &Surroundings, why: &'static str) {
    let options = loop_options(config, surroundings);
    if surroundings.store.holds(&options.name) {
        blocking(move || loopback::give_up(&options, why)).await;
    }
}
