//! A volume's facts for status: the machines' numbers beside what the configuration says.

use super::{Changing, OpenRole, Volume};
use crate::blocking::blocking;
use crate::config::{PeerConfig, Role, VolumeConfig};
use crate::control::api::{
    Blocked, Connection, Health, NetworkPath, PeerState, PeerStatus, Progress, Rebuild, Removed, Rollback,
    Succession, VolumeFacts,
};
use crate::primary::{LinkState, Split};
use crate::quantity::{Size, per_cent, unix_seconds};
use crate::replica::Replica;
use crate::state::holding::EARLIER;
use crate::state::stored::{self, Stored};
use crate::system;
use crate::transport;
use crate::words::with_name;
use blockmirror_protocol::disk::superblock::{Role as SuperblockRole, Superblock};
use blockmirror_protocol::peer::{Connection as Link, ReplicaState, Report};
use blockmirror_protocol::rebuild;
use blockmirror_protocol::replica::consent;
use blockmirror_protocol::tracker;
use blockmirror_protocol::units::{HostId, Time};
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

/// How long the state folder may take to say what it holds.
const STORED_TIME: Duration = Duration::from_millis(200);

impl Volume {
    /// All that is known here, and how each host is reached.
    pub(super) async fn facts(&self) -> VolumeFacts {
        let mut facts = self.facts_of_role().await;
        let (peers, config) = (&self.surroundings.peers, self.config.borrow());
        for (status, peer) in facts.peers.iter_mut().zip(&config.peers) {
            status.path = peers.live(peer.host).map(|connection| path(&connection));
            let follows_too = facts.role == Role::Replica && peer.role == Role::Replica;
            if follows_too && status.path.is_some() && status.connection == Connection::Disconnected {
                status.connection = Connection::Reachable;
            }
            if status.connection == Connection::Disconnected && status.error.is_none() {
                status.error =
                    peers.trouble(peer.host).map(|error| with_name(&*error, peer.host, &peer.name));
            }
        }
        facts
    }

    fn rebuild_facts(&self, rebuild: rebuild::Progress, reports: &HashMap<HostId, Report>) -> Rebuild {
        let is_linked = |report: &Report| report.connection == Link::Connected;
        Rebuild {
            source: self.name_of(rebuild.source),
            missing_bytes: rebuild.missing_bytes,
            is_reached: reports.get(&rebuild.source).is_some_and(is_linked),
            waiting: rebuild.waiting,
            unreadable_bytes: rebuild.unreadable_bytes,
            is_unrecorded: rebuild.is_unrecorded,
            is_source_lost: rebuild.is_source_lost,
        }
    }

    async fn facts_of_role(&self) -> VolumeFacts {
        let config = self.config.borrow().clone();
        let mut facts = VolumeFacts {
            storage: Some(self.storage_kind.clone()).filter(|kind| !kind.is_empty()),
            devices: self.devices.statuses(),
            health: self.health().await,
            backing_users: self.backing_users().await,
            peers: Vec::new(),
            ..VolumeFacts::unknown(&config)
        };
        match &self.role {
            OpenRole::Closed(_) | OpenRole::Changing(_) => {
                match &self.role {
                    OpenRole::Closed(text) => facts.backing_error = Some(text.clone()),
                    OpenRole::Changing(change) => facts.succession.change = Some(words(change)),
                    OpenRole::Primary(..) | OpenRole::Replica(_) => unreachable!("the shell is not here"),
                }
                let stored = self.stored(&config).await;
                if let Some(superblock) = &stored.superblock {
                    facts.touched = self.touched_words(superblock);
                    facts.data = Some(superblock.data.into());
                    facts.succession.fence = Some(superblock.fence.counter);
                }
                facts.peers = config
                    .peers
                    .iter()
                    .zip(stored.out_of_sync_bytes)
                    .map(|(peer, out_of_sync_bytes)| PeerStatus {
                        out_of_sync_bytes,
                        ..PeerStatus::unknown(peer)
                    })
                    .collect();
            }
            OpenRole::Primary(primary, links) => {
                let (epoch, reports) = primary.reports();
                primary.ask_marks();
                facts.backing_error = primary.failure();
                let superblock = primary.state().superblock();
                facts.data = Some(superblock.data.into());
                facts.succession.fence = Some(superblock.fence.counter);
                facts.succession.superseded_by = primary.superseded().map(|fence| self.name_of(fence.holder));
                facts.succession.openers.clone_from(&self.openers);
                facts.succession.own_name = Some(self.surroundings.own.name.clone());
                facts.epoch = Some(epoch);
                facts.blocked = primary.blocked().map(|it| self.blocked(it));
                facts.rebuild = primary.rebuild().map(|rebuild| self.rebuild_facts(rebuild, &reports));
                facts.succession.alone = self.alone(primary, &config.peers);
                let awaited = primary.awaited();
                facts.succession.awaited =
                    awaited.into_iter().map(|host| self.name_of(host).to_string()).collect();
                let now = primary.now();
                facts.peers = config
                    .peers
                    .iter()
                    .map(|peer| match (reports.get(&peer.host), links.get(&peer.host)) {
                        (Some(report), Some(link)) => replica(peer, report, &link.state(), now),
                        _ => PeerStatus::unknown(peer),
                    })
                    .collect();
            }
            OpenRole::Replica(shell) => {
                let report = shell.report();
                facts.backing_error = shell.error().filter(|_| shell.has_failed());
                facts.data = Some(report.data.into());
                facts.touched = self.touched_words(&shell.state().superblock());
                facts.epoch = Some(report.position.epoch.0);
                facts.succession = self.succession(shell);
                for peer in &config.peers {
                    let mut status = PeerStatus::unknown(peer);
                    let accused = shell.accused().filter(|(host, _)| *host == peer.host);
                    status.error = accused.map(|(_, text)| text);
                    if peer.role == Role::Primary {
                        status.paused_there = !peer.paused && !report.connected && shell.paused_there();
                        status.connection = match report.connected {
                            _ if peer.paused || status.paused_there => Connection::Paused,
                            true => Connection::Connected,
                            false => Connection::Disconnected,
                        };
                        status.connection_seconds = Some(shell.since().elapsed().as_secs());
                        status.resync =
                            report.resync.map(|(done, total)| Progress::new(done, total.max(done), 0));
                    }
                    facts.peers.push(status);
                }
            }
        }
        facts.succession.removed = config.removal.as_ref().map(Removed::from);
        self.forget_touched(&facts);
        if !matches!(self.role, OpenRole::Replica(_)) {
            let noticed = self.touched.borrow().as_ref().map(|touched| touched.words.clone());
            facts.touched = noticed.or(facts.touched);
        }
        facts
    }

    /// That something else wrote to a replica that says this of itself, in words, until all of it was compared.
    pub(super) fn touched_words(&self, superblock: &Superblock) -> Option<String> {
        let noticed = self.touched.borrow();
        let words = || noticed.as_ref().map_or(EARLIER, |touched| &touched.words).to_owned();
        superblock.touched.then(words)
    }

    /// The loop devices on an image that is a backing: they go round the claim on it.
    async fn backing_users(&self) -> Vec<PathBuf> {
        let backing = self.config.borrow().backing.clone();
        let looked = blocking(move || {
            let place = std::fs::canonicalize(&backing).unwrap_or(backing);
            system::loop_devices_on(&place)
        });
        tokio::time::timeout(STORED_TIME, looked).await.unwrap_or_default()
    }

    async fn health(&self) -> Health {
        Health {
            hung: self.hung().await,
            awaited: self.awaiting.awaited(),
            is_closed: matches!(self.role, OpenRole::Closed(_)),
            shrunk: self.shrunk(),
            grown: self.grown(),
            panics: self.awaiting.panics(),
            errors: self.troubles.errors(),
            stale: self.devices.stale().await,
            mistake: None,
        }
    }

    /// What the state folder says; nothing where that does not answer.
    async fn stored(&self, config: &VolumeConfig) -> Stored {
        let (folder, of) = (self.surroundings.state_folder.clone(), config.clone());
        let read = blocking(move || stored::read(&folder, &of));
        tokio::time::timeout(STORED_TIME, read).await.unwrap_or_else(|_| Stored::nothing(config))
    }

    /// Forgets that something else wrote to the backing, once all was compared.
    fn forget_touched(&self, facts: &VolumeFacts) {
        let is_compared = match &self.role {
            OpenRole::Primary(..) => {
                !facts.peers.is_empty()
                    && facts.peers.iter().all(|peer| peer.state == Some(PeerState::InSync))
            }
            OpenRole::Replica(replica) => {
                let is_due = self.touched.borrow().as_ref().is_some_and(|touched| touched.is_due);
                !is_due && !replica.state().superblock().touched
            }
            OpenRole::Closed(_) | OpenRole::Changing(_) => false,
        };
        if is_compared {
            *self.touched.borrow_mut() = None;
        }
    }

    /// The host that took over, where this one keeps what it overwrites, or would.
    pub(super) fn unagreed(&self, superblock: &Superblock) -> Option<String> {
        let is_unagreed = superblock.role == SuperblockRole::Replica && !consent::is_given(superblock);
        is_unagreed.then(|| self.name_of(superblock.fence.holder))
    }

    fn blocked(&self, blocked: tracker::replies::Blocked) -> Blocked {
        Blocked {
            in_sync: blocked.in_sync,
            required: blocked.required,
            requests: blocked.requests,
            oldest_seconds: blocked.oldest.as_secs(),
            limit_seconds: blocked.limit.map(|limit| limit.as_secs()),
            promised_to: blocked.promised_to.map(|host| self.name_of(host)),
        }
    }

    /// What a replica knows of who may write.
    fn succession(&self, replica: &Replica) -> Succession {
        let superblock = replica.state().superblock();
        let split = replica.split();
        Succession {
            fence: Some(superblock.fence.counter).filter(|counter| *counter > 0),
            released: superblock.released,
            better: self.better.clone().filter(|_| !replica.report().connected),
            elsewhere: self.elsewhere.clone().filter(|_| !replica.report().connected),
            demoted: superblock.fence.holder == self.surroundings.own.host,
            rollback: replica.rollback_point().map(point),
            history: replica.history_point().map(point),
            unagreed: self.unagreed(&superblock),
            is_full: replica.report().is_full,
            shortage: replica.shortage(),
            own_name: Some(self.surroundings.own.name.clone()),
            split_from: split.map(|split| self.name_of(split.from)),
            split_seconds: split.map(|split| split.since.elapsed().as_secs()),
            is_beyond: split.is_some_and(|split| split.is_beyond),
            ..Succession::default()
        }
    }
}

/// A layer that was begun then and takes so many bytes.
fn point((began, bytes): (u64, u64)) -> Rollback {
    Rollback { at_unix_seconds: began, age_seconds: unix_seconds().saturating_sub(began), bytes }
}

/// The way that a connection goes.
fn path(connection: &transport::Connection) -> NetworkPath {
    let statistics = connection.statistics();
    NetworkPath {
        address: connection.remote_address().into(),
        packet_bytes: statistics.packet_bytes,
        round_trip_microseconds: u64::try_from(statistics.round_trip.as_micros()).unwrap_or(u64::MAX),
        sent_packets: statistics.sent_packets,
        lost_packets: statistics.lost_packets,
        black_holes: statistics.black_holes,
    }
}

/// What a change does, and how far it is.
fn words(change: &Changing) -> String {
    match change.progress.restored_bytes.get() {
        (_, 0) => change.words.to_owned(),
        (done, total) => format!("{}: rolling back, {} %", change.words, per_cent(done, total)),
    }
}

/// How many ranges that can't be read are named.
const NAMED_RANGES: usize = 4;

/// What can't be read here, so that the replica lacks it.
fn unreadable(report: &Report) -> String {
    let bytes = report.unreadable.iter().map(|range| range.length).sum();
    let named = report.unreadable.iter().take(NAMED_RANGES);
    let mut places: Vec<String> = named.map(|range| format!("{} to {}", range.offset, range.end())).collect();
    let further = report.unreadable.len().saturating_sub(NAMED_RANGES);
    if further > 0 {
        places.push(format!("{further} more places"));
    }
    let rest = if report.more_unreadable { "; there are more, and it waits" } else { "" };
    let places = match places.is_empty() {
        true => String::new(),
        false => format!(" (bytes {})", places.join(", ")),
    };
    format!("{} can't be read here and so can't be copied{places}; a write there heals it{rest}", Size(bytes))
}

/// A replica, as its session and link report it.
fn replica(peer: &PeerConfig, report: &Report, link: &LinkState, now: Time) -> PeerStatus {
    let connection = match report.connection {
        _ if link.paused => Connection::Paused,
        Link::Disconnected | Link::Connecting if link.paused_there => Connection::Paused,
        Link::Disconnected => Connection::Disconnected,
        Link::Connecting => Connection::Connecting,
        Link::Connected => Connection::Connected,
    };
    let state = match report.state {
        _ if link.replica_failed && report.connection != Link::Connected => PeerState::Failed,
        _ if matches!(link.split, Some(Split::Brain | Split::Beyond)) => PeerState::SplitBrain,
        _ if link.split == Some(Split::Strangers) => PeerState::Stranger,
        ReplicaState::InSync => PeerState::InSync,
        ReplicaState::Resyncing => PeerState::Resyncing,
        ReplicaState::Behind => PeerState::Behind,
        ReplicaState::OutOfSync => PeerState::OutOfSync,
    };
    let error = if report.more_unreadable || !report.unreadable.is_empty() {
        Some(unreadable(report))
    } else if report.went_back {
        Some(
            "its copy has gone back behind what was durable there, as when a host is restored from a snapshot: \
             all of it is compared"
                .to_owned(),
        )
    } else if report.map_failed {
        Some("its dirty map can't be written: the disk of the state folder is full or failing".to_owned())
    } else {
        link.error.clone()
    };
    let in_sync = state == PeerState::InSync;
    PeerStatus {
        connection,
        connection_seconds: Some(now.since(report.since).as_secs()),
        paused_there: connection == Connection::Paused && !link.paused,
        error,
        is_beyond: link.split == Some(Split::Beyond),
        state: Some(state),
        // What is on its way is told as lag; it is not out of sync until its acknowledgement is late (D4).
        out_of_sync_bytes: Some(if in_sync { report.map_bytes } else { report.out_of_sync_bytes }),
        lag_bytes: Some(report.lag_bytes),
        lag_seconds: Some(report.lag.as_secs()),
        heard: Some(report.heard),
        promised: report.is_promised,
        durable_epoch: Some(report.durable.0).filter(|epoch| *epoch > 0),
        resync: report
            .resync
            .map(|progress| Progress::new(progress.done_bytes, progress.total_bytes, progress.rate_bytes)),
        compare: report.compare.map(|(done, total)| Progress::new(done, total, 0)),
        ..PeerStatus::unknown(peer)
    }
}
