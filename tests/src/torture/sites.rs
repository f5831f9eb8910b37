//! The hosts: what has happened to each, and what its copy is known to have.

use super::Torture;
use super::disk::{assert_identical, superblock};
use super::ledger::Moment;
use crate::machines::folder::Folder;
use crate::machines::host::Host;
use blockmirror_agent::config::Mode;
use blockmirror_agent::control::api::{Connection, PeerState, PeerStatus};
use blockmirror_protocol::units::GenerationId;

/// How a host's agent is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Condition {
    /// It runs.
    Up,
    /// It was stopped by a signal, and answers nobody.
    Stalled,
    /// There is none.
    Down,
}

/// A host.
pub(super) struct Site {
    pub host: Host,
    pub condition: Condition,
    /// Whether the link to it is cut.
    pub is_cut: bool,
    /// Up to where its copy is known to have everything, or can be rolled back to such a state. Nothing where it has
    /// another history than the primary, as far as is known.
    pub floor: Option<Moment>,
    /// In sync mode, the generation that the primary had when this replica was last seen to be in sync with it. As
    /// long as it has that one, no answer was given without the replica (L1).
    witness: Option<GenerationId>,
}

impl Site {
    /// Makes it what it should be.
    pub fn heal(&mut self) {
        match self.condition {
            Condition::Up => {}
            Condition::Stalled => self.host.go_on(),
            Condition::Down => self.host.start(),
        }
        self.host.link().mend();
        (self.condition, self.is_cut) = (Condition::Up, false);
    }

    /// Whether it can't answer.
    pub fn is_broken(&self) -> bool {
        self.condition != Condition::Up || self.is_cut
    }

    /// The host is gone without a warning, if it was there.
    pub fn make_sure_that_it_is_down(&mut self) {
        if self.condition != Condition::Down {
            self.host.lose();
            self.condition = Condition::Down;
        }
    }

    /// Its copy may have another history than the primary's.
    pub fn forget(&mut self) {
        (self.floor, self.witness) = (None, None);
    }
}

/// Hosts that have a volume of this size, the first as its primary, and are in sync.
pub(super) fn make(folder: &Folder, names: &[&str], size_bytes: u64, mode: Mode) -> Vec<Site> {
    let mut hosts: Vec<Host> = names.iter().map(|name| Host::new(folder, name)).collect();
    let (primary, replicas) = hosts.split_first().expect("there are two hosts at least");
    primary.create(size_bytes, "loop");
    for replica in replicas {
        replica.join(primary, &replica.backing());
    }
    wait_until_in_sync(&hosts[0]);
    if mode != Mode::default() {
        hosts.iter_mut().for_each(Host::stop);
        hosts.iter().for_each(|host| set_mode(host, mode));
        hosts.iter_mut().for_each(Host::start);
        wait_until_in_sync(&hosts[0]);
    }
    let new = |host| Site {
        host,
        condition: Condition::Up,
        is_cut: false,
        floor: Some(Moment::default()),
        witness: None,
    };
    hosts.into_iter().map(new).collect()
}

/// What the host does for each other one while it is the primary.
fn set_mode(host: &Host, mode: Mode) {
    host.configure(|volume| volume.peers.iter_mut().for_each(|peer| peer.mode = mode));
}

fn wait_until_in_sync(primary: &Host) {
    primary.succeed(&["wait", "data", "--for", "in-sync", "--timeout", "90s"]);
}

/// Whether the primary says so.
pub(super) fn is_in_sync(peer: &PeerStatus) -> bool {
    peer.connection == Connection::Connected
        && peer.state == Some(PeerState::InSync)
        && peer.out_of_sync_bytes == Some(0)
}

impl Torture {
    /// Notes what each replica is seen to have, while the writer goes on.
    pub(super) fn sample(&mut self) {
        // In this order: what is read first was true when the rest is.
        let now = self.now();
        let generation = self.generation();
        let peers = self.sites[self.primary].host.status().facts.peers;
        let is_sync = self.settings.mode == Mode::Sync;
        for peer in peers.iter().filter(|peer| is_in_sync(peer)) {
            let of_peer = |site: &&mut Site| site.host.name() == peer.name.as_str();
            let site = self.sites.iter_mut().find(of_peer).expect("the primary has no other peers");
            if is_sync {
                (site.floor, site.witness) = (Some(now), generation);
            } else if peer.lag_bytes == Some(0) {
                site.floor = Some(now);
            }
        }
    }

    /// The newest generation that the primary knows, whether it runs or not.
    pub(super) fn generation(&self) -> Option<GenerationId> {
        superblock(&self.sites[self.primary].host).lineage.first().copied()
    }

    /// Up to where a replica is certain to have everything.
    pub(super) fn floor(&self, replica: usize) -> Option<Moment> {
        // In this order: every answer before this moment was given in the generation that is read then, or an older one.
        let now = self.now();
        let site = &self.sites[replica];
        let nothing_without_it = site.witness.is_some() && site.witness == self.generation();
        if nothing_without_it { Some(now) } else { site.floor }
    }

    /// Heals everything, and waits until every replica has everything, while the writer goes on if it does.
    pub(super) fn wait_until_in_sync(&mut self) {
        self.sites.iter_mut().for_each(Site::heal);
        wait_until_in_sync(&self.sites[self.primary].host);
    }

    /// Brings everything together: nothing is written any more, all backings must be identical, and what the primary's
    /// device holds is what there is.
    pub(super) fn come_together(&mut self) {
        self.end_load();
        self.wait_until_in_sync();
        let is_quiet = |peer: &PeerStatus| is_in_sync(peer) && peer.lag_bytes == Some(0);
        let wait = |torture: &Self| {
            let host = &torture.sites[torture.primary].host;
            host.wait_until("all is quiet", |status| status.facts.peers.iter().all(is_quiet));
        };
        wait(self);
        self.assert_identical();
        let image = self.check(&self.device(), self.now(), "the primary in a lull");
        let mut ledger = self.ledger.lock().expect("the writer makes sense");
        self.tally.records += ledger.settle(&image);
        let now = ledger.now();
        drop(ledger);
        self.sites.iter_mut().for_each(|site| site.floor = Some(now));
        // Mounting it has written something.
        wait(self);
    }

    pub(super) fn assert_identical(&self) {
        for replica in self.replicas() {
            assert_identical(&self.sites[self.primary].host, &self.sites[replica].host);
        }
    }
}
