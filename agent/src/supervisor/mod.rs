//! The agent as a whole: which volumes there are, who may talk to them, and what the operator asks for.
//!
//! Runs on the main thread and moves no data. Each volume has its own thread ([`crate::volume`]); streams that peers
//! open are looked at once, authorised, and handed to the volume that they name.

mod addresses;
mod admission;
mod files;
mod incoming;
mod instances;
mod learning;
mod making;
mod meeting;
mod membership;
mod operations;
mod rebuilding;
mod strangers;

use crate::blocking::blocking;
use crate::config::{Address, ConfigFolder, DeviceKind, Mistake, Mode, Name, PeerConfig, VolumeConfig};
use crate::control::api::{Failure, FailureKind};
use crate::device::front_end::{self, Site};
use crate::kept::Store;
use crate::quantity::Seconds;
use crate::transport::{Endpoint, Limit, Peers, key};
use crate::volume::{Ask, Handle, Opened, Surroundings};
use crate::words::with_causes;
use admission::Admission;
use blockmirror_protocol::units::{HostId, VolumeId};
use blockmirror_protocol::wire::message::Member;
use files::Turns;
use incoming::Connections;
use instances::Instances;
use learning::{Lesson, Unsaved};
use membership::Heard;
pub use operations::Operator;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard, Weak};
use std::time::Duration;
use strangers::Strangers;
use tokio::sync::{Mutex, Semaphore, oneshot, watch};
use tokio::task::JoinSet;

/// How long the connections to other hosts may take to end.
const CLOSE_TIME: Duration = Duration::from_secs(3);

/// Where the agent keeps things.
#[derive(Clone, Debug)]
pub struct Folders {
    /// The configuration.
    pub config: ConfigFolder,
    /// Metadata, a folder for each volume.
    pub state: PathBuf,
    /// Sockets and mount points.
    pub run: PathBuf,
    /// Links to loop devices.
    pub devices: PathBuf,
}

/// The agent's volumes, and what they share.
pub struct Supervisor {
    me: Weak<Self>,
    folders: Folders,
    name: Name,
    endpoint: Endpoint,
    peers: Peers,
    /// What the configuration says others reach this host at; empty: its interfaces' addresses.
    advertised: Vec<Address>,
    /// Where what outlives the process is kept.
    store: Arc<Store>,
    volumes: Mutex<BTreeMap<Name, Entry>>,
    /// Volumes that are not served because something is wrong with their configuration, and what.
    mistakes: std::sync::Mutex<BTreeMap<Name, String>>,
    /// Keys that a token let in for a recovery.
    admitted: Mutex<HashMap<(VolumeId, HostId), Admission>>,
    /// What is learnt of hosts and not in the configuration yet.
    unsaved: Arc<Unsaved>,
    /// Told when a host is a member no more.
    parted: watch::Sender<()>,
    /// The greetings that were listened to last, by volume and host.
    heard: Mutex<HashMap<(VolumeId, HostId), Heard>>,
    /// Places for connections of unknown keys.
    strangers: Strangers,
    /// The agents that were heard with each key.
    instances: std::sync::Mutex<Instances>,
    /// The keys that two of them use each.
    doubled: std::sync::Mutex<BTreeSet<HostId>>,
    /// Drawn at the start: tells this agent from another one with the same key.
    instance: [u8; 16],
    /// How many connections each key has opened to this host.
    connections: Connections,
    /// Volumes come to be one at a time: two attempts at one name must not undo each other.
    making: Mutex<()>,
}

struct Entry {
    config: VolumeConfig,
    handle: Arc<Handle>,
    /// How it stands is read for one host at a time: peers may ask as often as they like, and a state folder that hangs
    /// must not take the threads that other volumes need (X1, X5).
    standings: Arc<Semaphore>,
    /// The turns of those who change its configuration, and of those who read or change its invitations.
    saving: Turns,
    inviting: Turns,
}

impl Entry {
    fn new(config: VolumeConfig, handle: Handle) -> Self {
        Self {
            config,
            handle: Arc::new(handle),
            standings: Arc::new(Semaphore::new(1)),
            saving: Turns::default(),
            inviting: Turns::default(),
        }
    }
}

impl Supervisor {
    /// An agent that is reached at `endpoint` and has no volumes yet.
    #[must_use]
    pub fn new(
        folders: Folders,
        name: Name,
        endpoint: Endpoint,
        advertised: Vec<Address>,
        resync_limit: Limit,
        store: Arc<Store>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            folders,
            name,
            peers: Peers::new(endpoint.clone(), resync_limit),
            endpoint,
            advertised,
            store,
            volumes: Mutex::default(),
            mistakes: std::sync::Mutex::default(),
            admitted: Mutex::default(),
            unsaved: Arc::default(),
            parted: watch::Sender::new(()),
            heard: Mutex::default(),
            strangers: Strangers::default(),
            instances: std::sync::Mutex::default(),
            doubled: std::sync::Mutex::default(),
            instance: key::random(),
            connections: Connections::default(),
            making: Mutex::default(),
        })
    }

    /// Starts every volume of the configuration. One that is wrong doesn't keep the others from being served. The result
    /// ends when each is open, or is known not to open; peers may ask for them before, as they ask others.
    ///
    /// # Errors
    /// A [`Mistake`] when the folder can't be read.
    pub async fn start_volumes(&self) -> Result<impl Future<Output = ()> + Send + 'static, Mistake> {
        let found = self.folders.config.load_volumes()?;
        for mistake in &found.mistakes {
            let text = with_causes(mistake);
            tracing::error!("{text}");
            // A file whose name is none is no volume's.
            if let Some(name) = mistake.path().file_stem().and_then(|stem| stem.to_str()?.parse().ok()) {
                self.lock_mistakes().entry(name).or_insert(text);
            }
        }
        self.give_up_unknown(&found.volumes).await;
        // All at once: one whose disk makes it wait doesn't hold up the others.
        let mut opening = Vec::new();
        for config in found.volumes {
            let name = config.name.clone();
            match self.start(config).await {
                Ok(opened) => opening.push(opened),
                Err(failure) => {
                    tracing::error!(volume = %name, "{}", failure.message);
                    self.lock_mistakes().insert(name, failure.message);
                }
            }
        }
        self.note_time().await;
        Ok(async move {
            for opened in opening {
                // An error means that the thread died; the next ask will tell.
                let _ = opened.await;
            }
        })
    }

    /// Takes away what an earlier agent left of volumes that are not configured any more. One whose configuration is wrong
    /// may be mended.
    async fn give_up_unknown(&self, known: &[VolumeConfig]) {
        for name in self.store.names() {
            let is_known = known.iter().any(|config| config.name.as_str() == name)
                || self.lock_mistakes().keys().any(|mistaken| mistaken.as_str() == name);
            if !is_known {
                let site = Site {
                    name,
                    volume: [0; 16],
                    run_folder: self.folders.run.clone(),
                    device_folder: self.folders.devices.clone(),
                    store: self.store.clone(),
                };
                let why = "there is no such volume on this host any more";
                blocking(move || front_end::give_up(&DeviceKind::ALL, &site, why)).await;
            }
        }
    }

    /// Stops all volumes in order. Says whether each of them has ended: what hangs does not keep the agent.
    pub async fn stop(&self) -> bool {
        self.note_time().await;
        let volumes = std::mem::take(&mut *self.volumes.lock().await);
        let mut stops = JoinSet::new();
        for (name, entry) in volumes {
            stops.spawn(async move { entry.handle.stop().await.map_err(|silence| (name, silence)) });
        }
        let mut all_ended = true;
        for (volume, silence) in stops.join_all().await.into_iter().filter_map(Result::err) {
            all_ended = false;
            tracing::error!(
                %volume,
                "{} has not answered for {}: the agent ends without having ended the volume, as in a crash; \
                 what it leaves, a loop device perhaps, the next start takes over",
                silence.what(),
                Seconds(silence.lasted.as_secs())
            );
        }
        if tokio::time::timeout(CLOSE_TIME, self.endpoint.close()).await.is_err() {
            tracing::error!("the transport's thread does not end: it waits for the disk of the volume on it");
        }
        all_ended
    }

    async fn start(&self, config: VolumeConfig) -> Result<Opened, Failure> {
        let unsaved = self.unsaved.clone();
        let surroundings = Surroundings {
            state_folder: self.state_folder(&config.name),
            run_folder: self.folders.run.clone(),
            device_folder: self.folders.devices.clone(),
            store: self.store.clone(),
            peers: self.peers.clone(),
            learn: Arc::new(move |volume, learned| unsaved.found(volume, learned)),
            own: self.own_member(),
        };
        let name = config.name.clone();
        let (handle, opened) = Handle::start(config.clone(), surroundings)
            .map_err(|error| failed(format!("no thread can be had for the volume: {error}")))?;
        let mut volumes = self.volumes.lock().await;
        handle.ask(Ask::Doubled(self.doubled()));
        volumes.insert(name, Entry::new(config, handle));
        self.keep_room(&volumes);
        Ok(opened)
    }

    /// Keeps room for the handshakes of the volumes' hosts.
    fn keep_room(&self, volumes: &BTreeMap<Name, Entry>) {
        let mut hosts: HashMap<HostId, HashSet<IpAddr>> = HashMap::new();
        for peer in volumes.values().flat_map(|entry| &entry.config.peers) {
            // The others are names, which are resolved when the host is dialled.
            let parsed =
                peer.addresses.iter().filter_map(|address| address.as_str().parse::<SocketAddr>().ok());
            hosts.entry(peer.host).or_default().extend(parsed.map(|address| address.ip().to_canonical()));
        }
        self.endpoint.keep_room_for(hosts);
    }

    fn state_folder(&self, name: &Name) -> PathBuf {
        self.folders.state.join(name.as_str())
    }

    /// This host, as others are told of it. The primary is not mirrored to, so its mode says nothing.
    fn own_member(&self) -> Member {
        let addresses = self.own_addresses().iter().map(|address| address.as_str().to_owned()).collect();
        Member {
            name: self.name.to_string(),
            host: self.endpoint.id(),
            addresses,
            mode: Mode::default().into(),
            version: 0,
        }
    }

    /// Where this host listens, as it tells others: what the configuration says, or the addresses of its interfaces and the
    /// one with which it is seen.
    fn told_addresses(&self) -> Vec<String> {
        let mut told: Vec<String> = self.own_addresses().into_iter().map(String::from).collect();
        let listen = self.endpoint.local_address();
        if self.advertised.is_empty() && listen.ip().is_unspecified() {
            told.push(listen.to_string());
        }
        told
    }

    fn own_addresses(&self) -> Vec<Address> {
        if self.advertised.is_empty() {
            return addresses::reachable(self.endpoint.local_address());
        }
        self.advertised.clone()
    }

    async fn handle_of(&self, name: &Name) -> Result<Arc<Handle>, Failure> {
        let volumes = self.volumes.lock().await;
        volumes.get(name).map(|entry| entry.handle.clone()).ok_or_else(|| self.not_served(name))
    }

    /// Why there is no such volume.
    fn not_served(&self, name: &Name) -> Failure {
        match self.mistake_of(name) {
            Some(mistake) => failed(mistake),
            None => Failure::no_such_volume(name),
        }
    }

    fn mistake_of(&self, name: &Name) -> Option<String> {
        self.lock_mistakes().get(name).cloned()
    }

    fn lock_mistakes(&self) -> MutexGuard<'_, BTreeMap<Name, String>> {
        self.mistakes.lock().expect("no holder of the lock panics")
    }

    async fn config_of(&self, volume: VolumeId) -> Option<VolumeConfig> {
        let volumes = self.volumes.lock().await;
        volumes.values().find(|entry| entry.config.id == volume).map(|entry| entry.config.clone())
    }

    async fn config_of_name(&self, name: &Name) -> Result<VolumeConfig, Failure> {
        let volumes = self.volumes.lock().await;
        volumes.get(name).map(|entry| entry.config.clone()).ok_or_else(|| self.not_served(name))
    }

    async fn peer_of(&self, volume: &Name, peer: &Name) -> Result<PeerConfig, Failure> {
        let config = self.config_of_name(volume).await?;
        config.peer(peer).cloned().ok_or_else(|| Failure::no_such_peer(volume, peer))
    }

    /// Changes a volume's configuration, on disk first, and tells the volume. Hosts that are peers no more are left. What was
    /// begun is done in full, also where whoever asked is gone or waits no more: what is saved is gone by.
    async fn change_config(
        &self,
        name: &Name,
        change: impl FnOnce(&mut VolumeConfig),
    ) -> Result<(), Failure> {
        let change = |config: &mut VolumeConfig| {
            change(config);
            Vec::new()
        };
        self.change_config_for(name, change).await
    }

    /// As [`Supervisor::change_config`], where the change gives the lessons that it takes over: they are saved with it.
    async fn change_config_for(
        &self,
        name: &Name,
        change: impl FnOnce(&mut VolumeConfig) -> Vec<Lesson>,
    ) -> Result<(), Failure> {
        let path = self.folders.config.volume_path(name);
        let saving = {
            let volumes = self.volumes.lock().await;
            volumes.get(name).ok_or_else(|| Failure::no_such_volume(name))?.saving.clone()
        };
        let silent = |silent: files::Silent| failed(silent.to_string());
        let turn = files::turn(&path, saving, files::ANSWER_TIME).await.map_err(silent)?;
        let mut changed = self.config_of_name(name).await?;
        let lessons = change(&mut changed);
        if changed == self.config_of_name(name).await? {
            self.unsaved.settle(name, &lessons);
            return Ok(());
        }
        let me = self.me.upgrade().expect("whoever calls holds it");
        let (saved, is_saved) = oneshot::channel();
        let keeping = tokio::spawn(me.keep_config(changed, lessons, turn, saved));
        if tokio::time::timeout(files::ANSWER_TIME, is_saved).await.is_err() {
            return Err(silent(files::Silent::at(&path)));
        }
        operations::finish(keeping).await
    }

    /// Saves a volume's configuration, then goes by it. Nothing but the next change of it waits for the disk.
    async fn keep_config(
        self: Arc<Self>,
        changed: VolumeConfig,
        lessons: Vec<Lesson>,
        turn: files::Turn,
        answered: oneshot::Sender<()>,
    ) -> Result<(), Failure> {
        let (folder, config) = (self.folders.config.clone(), changed.clone());
        let saved = blocking(move || folder.save_volume(&config)).await;
        let name = changed.name.clone();
        if answered.send(()).is_err() {
            // Whoever asked was told that it may be done later, or is gone.
            match &saved {
                Ok(()) => {
                    tracing::info!(volume = %name, "a change of the configuration was saved late, and holds now")
                }
                Err(error) => tracing::warn!(volume = %name, "{}", with_causes(error)),
            }
        }
        saved.map_err(|error| failed(with_causes(&error)))?;
        self.unsaved.settle(&name, &lessons);
        let mut volumes = self.volumes.lock().await;
        let entry = volumes.get_mut(&name).ok_or_else(|| Failure::no_such_volume(&name))?;
        let before = std::mem::replace(&mut entry.config, changed.clone());
        entry.handle.ask(Ask::Configure(Box::new(changed)));
        let is_left = |peer: &&PeerConfig| entry.config.peers.iter().all(|kept| kept.host != peer.host);
        let left: Vec<HostId> = before.peers.iter().filter(is_left).map(|peer| peer.host).collect();
        let handle = entry.handle.clone();
        self.keep_room(&volumes);
        drop(volumes);
        self.part(&handle, left).await;
        drop(turn);
        Ok(())
    }
}

fn failed(text: impl Into<String>) -> Failure {
    Failure::new(FailureKind::Failed, text)
}

fn refused(text: impl Into<String>) -> Failure {
    Failure::new(FailureKind::Refused, text)
}
