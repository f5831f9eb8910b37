//! Opening a volume in the role that its superblock says (L5).
//!
//! A primary first hears how the others stand: where another host was promoted while this one was down, it becomes a
//! replica before anybody can open its devices. The configuration follows the superblock: a change of the role is
//! durable there first, and whoever reads the file later finds it corrected.

use super::awaiting::{Disk, Unopened};
use super::changes::Event;
use super::promotable::heard;
use super::{Learned, OpenRole, Touched, Volume};
use crate::adoption;
use crate::blocking::blocking;
use crate::config::VolumeConfig;
use crate::crashes;
use crate::export::Export;
use crate::primary::Primary;
use crate::replica::{OpenReplicaError, Replica};
use crate::standing;
use crate::state::backing::{self, BackingError};
use crate::state::holding::{Compared, Holding, Notes};
use crate::state::{Recovered, StateError, Unrecovered};
use crate::storage::file::File;
use crate::storage::{self, Storage};
use crate::volume::devices::{Devices, give_up_devices};
use blockmirror_protocol::adoption::Content;
use blockmirror_protocol::disk::superblock::{Role, Superblock};
use blockmirror_protocol::handover::End;
use blockmirror_protocol::succession;
use blockmirror_protocol::terms::Fence;
use blockmirror_protocol::units::HostId;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use tokio::task::spawn_local;

/// How long a primary waits at its start for others to say how they stand.
const STANDING_TIME: Duration = Duration::from_secs(2);

/// What is known of the other hosts when a volume is opened.
pub(super) enum Others {
    /// Nothing: a primary asks them.
    Ask,
    /// One of them has said that this is the fence.
    Told(Fence),
    /// Whatever they could say is taken into account already.
    Known,
}

/// Why a volume can't be opened, though all of it is there.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotOpened {
    /// The kernel lets this process have neither io_uring nor threads.
    #[error("no storage can be had")]
    NoStorage(#[source] io::Error),
    /// The state folder can't be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The state folder is that of another volume.
    #[error(
        "the configuration names another id, size or block size than the state in {folder}", folder = folder.display()
    )]
    Foreign {
        /// The folder.
        folder: PathBuf,
    },
    /// The backing is not the one that the volume had.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The backing can't be read.
    #[error(transparent)]
    Unreadable(#[from] storage::Error),
    /// Nobody could tell later whether something else wrote to the backing.
    #[error("cannot note that the backing is open")]
    Unnoted(#[source] io::Error),
    /// The replica can't go on from what its state says.
    #[error(transparent)]
    Replica(#[from] OpenReplicaError),
}

impl Volume {
    /// Opens the backing and what depends on it, or remembers why that is not possible.
    pub(super) async fn reopen(&mut self, others: Others) {
        std::mem::take(&mut self.devices).stop().await;
        self.disk = None;
        // The old role's claim on the backing is given back before the backing is claimed anew.
        *self.recovery.borrow_mut() = None;
        self.role = OpenRole::Closed(String::new());
        self.let_go().await;
        self.openers.clear();
        (self.better, self.elsewhere) = (None, None);
        match self.try_open(others).await {
            Ok(role) => {
                self.role = role;
                self.has_opened = true;
                if let Some(obstacle) = self.awaiting.has_come() {
                    tracing::info!(volume = %self.name(), "the volume is open (before: {})", obstacle.text());
                }
            }
            Err(obstacle) => self.await_better(obstacle),
        }
    }

    async fn try_open(&mut self, others: Others) -> Result<OpenRole, Unopened> {
        let folder = self.surroundings.state_folder.clone();
        if let Some(panics) = blocking(move || crashes::obstacle(&folder)).await {
            let text = format!("it ended the agent {} times in a row ({})", panics.times, panics.last);
            return Err(Unopened::Panicked(panics, text));
        }
        let storage = storage::open().map_err(NotOpened::NoStorage)?;
        self.storage_kind = storage.kind().to_owned();
        self.storages.add(storage.clone());
        let state = Unrecovered::open(&self.surroundings.state_folder, storage.clone(), self.pool.clone())
            .await
            .map_err(NotOpened::from)?;
        self.must_belong(&state.superblock())?;
        let config = self.config.borrow().clone();
        let backing = self.find_backing(&config).await;
        // Others are heard before anybody can open the devices, and once before the disk is there.
        // What was open here has its role since by this host's own doing, or by its operator's.
        let is_start = !self.has_opened;
        let mut heard = Vec::new();
        if state.superblock().role == Role::Primary && (backing.is_ok() || !self.awaiting.is_retry()) {
            heard = self.yield_to_others(&state, others).await?;
        }
        self.correct_roles(&state.superblock());
        let config = self.config.borrow().clone();
        if state.superblock().role == Role::Replica {
            // Whoever waits at a device that was kept gets an error, also where the disk is not there.
            give_up_devices(&config, &self.surroundings, "this host is a replica now").await;
        }
        let backing = backing?;
        let is_new = adopt(&config, &self.surroundings.state_folder, &state).await?;
        if is_new {
            // A file system that goes on over other content destroys it.
            give_up_devices(&config, &self.surroundings, "the volume's content is another one now").await;
        }
        let state = self.hold(&storage, &backing, state, is_new).await?;
        self.disk = Some(Disk::new(storage.clone(), backing.clone(), self.pool.clone()));
        self.first_size.set(self.first_size.get().or(Some(backing.size_bytes())));
        if !backing.is_direct() {
            tracing::warn!(volume = %config.name, "the backing refuses direct I/O; it is written through the cache");
        }
        match state.state.superblock().role {
            Role::Primary => {
                let started = is_start.then_some(heard);
                Ok(self.open_primary(&config, storage, backing, state, started).await?)
            }
            Role::Replica => Ok(self.open_replica(&config, storage, backing, state).await?),
        }
    }

    /// Finds out whether something else wrote to the backing since it was open here, which means that any block may differ
    /// (X4), recovers the state, and notes that the backing is open. A replica's superblock says what was found before the notes
    /// say anything else. Of one that `is_new` the metadata says that already.
    async fn hold(
        &mut self,
        storage: &Rc<dyn Storage>,
        backing: &Rc<File>,
        state: Unrecovered,
        is_new: bool,
    ) -> Result<Recovered, NotOpened> {
        let notes = self.notes();
        if is_new {
            // What was noticed was of the old one.
            *self.touched.borrow_mut() = None;
        }
        let compared = match is_new {
            true => Compared::anew(),
            false if self.awaiting.shrunk().is_some() => Compared::smaller(),
            false => Holding::compare(&notes, storage, backing, &self.pool).await?,
        };
        if let Some(words) = compared.touched() {
            let (name, path) = (self.name(), backing.path().display());
            tracing::warn!(
                volume = %name,
                "{path}: {words}; all of it is compared before anything counts as in sync"
            );
            *self.touched.borrow_mut() = Some(Touched { words: words.to_owned(), is_due: true });
        }
        let due =
            self.touched.borrow().as_ref().filter(|touched| touched.is_due).map(|due| due.words.clone());
        let state = state.recover(&compared.or_earlier(due)).await?;
        self.touched.borrow_mut().iter_mut().for_each(|touched| touched.is_due = false);
        let events = self.events.clone();
        let touched = move |words| drop(events.send(Event::Touched(words)));
        let held = Holding::begin(notes, storage.clone(), backing.clone(), self.pool.clone(), touched).await;
        self.holding = held.map_err(NotOpened::Unnoted)?;
        Ok(state)
    }

    /// Where this host notes what the backing looks like.
    fn notes(&self) -> Notes {
        let super::Surroundings { state_folder, run_folder, .. } = &*self.surroundings;
        Notes::new(state_folder, run_folder, self.name().as_str())
    }

    fn must_belong(&self, superblock: &Superblock) -> Result<(), NotOpened> {
        let config = self.config.borrow();
        if (superblock.volume, superblock.size_bytes, superblock.block_size)
            == (config.id, config.size_bytes, config.block_size)
        {
            return Ok(());
        }
        Err(NotOpened::Foreign { folder: self.surroundings.state_folder.clone() })
    }

    /// Records that this host is a replica, where another one was promoted since. Tells which of them said how they stand.
    async fn yield_to_others(&self, state: &Unrecovered, others: Others) -> Result<Vec<HostId>, NotOpened> {
        let superblock = state.superblock();
        let config = self.config.borrow().clone();
        let mut spoke = Vec::new();
        let newer = match others {
            Others::Known => None,
            Others::Told(fence) => {
                let ours = superblock.fence;
                Some(fence).filter(|fence| fence.supersedes(ours) && ours.may_become(*fence))
            }
            Others::Ask => {
                let peers = &self.surroundings.peers;
                let answers = standing::ask_all(peers, config.id, &config.peers, STANDING_TIME).await;
                let answers = heard(&answers);
                spoke.extend(answers.iter().filter(|other| other.standing.is_some()).map(|other| other.host));
                succession::newest_fence(superblock.fence, &answers)
            }
        };
        let Some(fence) = newer else { return Ok(spoke) };
        let holder = self.name_of(fence.holder);
        tracing::warn!(volume = %config.name, "{holder} was promoted since; this host is a replica now");
        state.change_superblock(|superblock| End::found(superblock, fence).record(superblock, None)).await?;
        Ok(spoke)
    }

    /// The name of a host, or its fingerprint where none is known.
    pub(super) fn name_of(&self, host: HostId) -> String {
        let config = self.config.borrow();
        let known = config.peers.iter().find(|peer| peer.host == host);
        known.map_or_else(|| format!("host {host}"), |peer| peer.name.to_string())
    }

    /// Makes the configuration say what the superblock does: what this host is, and which other one is the primary.
    pub(super) fn correct_roles(&self, superblock: &Superblock) {
        let (own, holder) = (self.surroundings.own.host, superblock.fence.holder);
        let primary = match superblock.role {
            Role::Primary => None,
            // It has not met the primary yet that it joined.
            Role::Replica if holder.is_none() => Some(superblock.source.holder),
            Role::Replica => Some(holder).filter(|holder| *holder != own && !superblock.released),
        };
        let role = match superblock.role {
            Role::Primary => crate::config::Role::Primary,
            Role::Replica => crate::config::Role::Replica,
        };
        let before = self.config.borrow().clone();
        self.config.borrow_mut().set_roles(role, primary);
        if *self.config.borrow() != before {
            // The supervisor is there as long as a volume is.
            (self.surroundings.learn)(&before.name, Learned::Roles(role, primary));
        }
    }

    async fn open_primary(
        &mut self,
        config: &VolumeConfig,
        storage: Rc<dyn Storage>,
        backing: Rc<File>,
        state: Recovered,
        started: Option<Vec<HostId>>,
    ) -> Result<OpenRole, NotOpened> {
        if let Some(shortfall) = config.shortfall() {
            tracing::warn!(volume = %config.name, "{shortfall}; all there are will do until then");
        }
        let primary = Primary::open(storage, backing, state, self.pool.clone(), config).await?;
        primary.count_in(self.troubles.clone());
        if let Some(heard) = started {
            primary.start(heard, config.awaits_majority());
        }
        self.note_company(&primary);
        let mut links = BTreeMap::new();
        for peer in &config.peers {
            links.insert(peer.host, self.link(&primary, peer));
        }
        // Before anything is waited for: the first greeting tells who the hosts are.
        self.introduce(&links);
        self.ask_after_absences(&primary);
        self.devices = Devices::start(config, &self.surroundings, primary.clone(), &self.pool).await;
        self.await_devices();
        Ok(OpenRole::Primary(primary, links))
    }

    /// Whenever the process was away, asks the others who leads before this host answers anything.
    fn ask_after_absences(&self, primary: &Rc<Primary>) {
        let (events, hands, me) = (self.events.clone(), self.hands(), Rc::downgrade(primary));
        spawn_local(async move {
            while let Some(primary) = me.upgrade() {
                let doubts = tokio::select! {
                    doubts = primary.was_away() => doubts,
                    () = primary.is_retired() => return,
                };
                let config = &hands.config;
                tracing::warn!(volume = %config.name, "this process was stopped for a while; others are asked who leads");
                let answers = standing::ask_all(&hands.peers, config.id, &config.peers, STANDING_TIME).await;
                let known = primary.superseded().unwrap_or(primary.state().superblock().fence);
                match succession::newest_fence(known, &heard(&answers)) {
                    // Nobody listens any more when the agent has ended meanwhile.
                    Some(fence) => drop(events.send(Event::Superseded(fence))),
                    None => primary.trust(doubts),
                }
            }
        });
    }

    async fn open_replica(
        &mut self,
        config: &VolumeConfig,
        storage: Rc<dyn Storage>,
        backing: Rc<File>,
        state: Recovered,
    ) -> Result<OpenRole, NotOpened> {
        let size_bytes = state.state.superblock().size_bytes;
        let folder = &self.surroundings.state_folder;
        let replica =
            Replica::open(storage.clone(), backing.clone(), state, self.pool.clone(), folder, config).await?;
        replica.count_in(self.troubles.clone());
        let export = Export::new(storage.clone(), backing.clone(), self.pool.clone(), size_bytes);
        export.count_in(self.troubles.clone());
        self.ask_members_later();
        self.devices = Devices::start_export(config, &self.surroundings, export, &self.pool).await;
        Ok(OpenRole::Replica(replica))
    }
}

/// Where the backing took the place of another one, makes the metadata say what is known of its content. Says whether it
/// did.
async fn adopt(config: &VolumeConfig, folder: &Path, state: &Unrecovered) -> Result<bool, NotOpened> {
    let (there, path) = (folder.to_owned(), config.backing.clone());
    let compared = blocking(move || backing::compare(&there, &path)).await?;
    let record = |identity: String| {
        let there = folder.to_owned();
        async move { blocking(move || backing::record(&there, &identity)).await }
    };
    let (identity, recovered) = match compared {
        backing::Match::Same => return Ok(false),
        backing::Match::Renamed { identity } => {
            record(identity).await?;
            return Ok(false);
        }
        backing::Match::Adopted { identity, recovered } => (identity, recovered),
    };
    let peers: Vec<HostId> = config.peers.iter().map(|peer| peer.host).collect();
    if let Some(Content::Mixture) = recovered.as_ref().and_then(|recovered| recovered.content.as_ref()) {
        tracing::warn!(
            volume = %config.name,
            "what was recovered is a mixture of old and new: no host that has another copy takes it, unless \
             `blockmirror resolve {} --keep` says so there", config.name
        );
    }
    adoption::adopt(state, &peers, recovered.as_ref()).await?;
    // Only now: a crash before this does it all again.
    record(identity).await?;
    Ok(true)
}
