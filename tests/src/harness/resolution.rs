//! An operator resolves a split (L6): one host's content goes for that of another one, order by order
//! ([`blockmirror_protocol::rewrite`]).

use super::disk::Crash;
use super::gap::HistoryPoint;
use super::host::{Host, Shell, host_id, host_number};
use super::rewriting::Purpose;
use super::world::World;
use blockmirror_protocol::disk::superblock::Superblock;
use blockmirror_protocol::rewrite::Rewrite;
use blockmirror_protocol::split::{Concession, Side};
use blockmirror_protocol::terms::{Claim, Fence};
use blockmirror_protocol::wire::message::Standing;
use std::collections::BTreeSet;

/// A host whose content is given up.
#[derive(Clone, Debug)]
pub struct Yielding {
    concession: Concession,
    winner: Fence,
    /// What the host said of itself before, and the lives of primaries that it knew of.
    before: (Superblock, BTreeSet<(usize, u64)>),
    /// Lives of primaries in which something was answered that both know of.
    known_lives: BTreeSet<(usize, u64)>,
}

impl Yielding {
    /// Whether a superblock says that it is done, as far as that says anything of it.
    pub fn is_said_by(&self, superblock: &Superblock) -> bool {
        let mut said = superblock.clone();
        self.concession.record(&mut said, superblock.layers.undo());
        said == *superblock
    }
}

impl Host {
    /// What the layer for an undo leads back to is remembered, where it was begun just now.
    fn keep_what_it_had(&mut self, (before, known_lives): &(Superblock, BTreeSet<(usize, u64)>)) {
        let Some(undo) = self.superblock.layers.undo() else { return };
        if self.kept.as_ref().is_none_or(|kept| kept.layer != undo) {
            let layer = self.layers.get(undo);
            self.kept = Some(HistoryPoint::now(&self.disk, layer, before, known_lives));
        }
    }
}

impl World {
    /// An operator resolves a split, if there is one: the host's own content goes for that of the other one (L6). What
    /// others say of themselves is late or never comes; then nothing happens.
    pub(super) fn resolve(&mut self, host: usize, keep: usize) {
        let is_busy = self.hosts[host].demotion.is_some() || self.state_hangs(host);
        if self.hosts[host].members.is_removed() || is_busy {
            return;
        }
        let Shell::Replica(shell) = &self.hosts[host].shell else { return };
        let position = shell.machine.report().position;
        let side = Side { own: host_id(host), superblock: self.hosts[host].superblock.clone(), position };
        let others = self.hear_all(host);
        match side.yields_to(host_id(keep), &others) {
            Ok(winner) => self.yield_to(&side, keep, winner),
            Err(objection) => self.note(|| format!("host {host} does not yield to {keep}: {objection:?}")),
        }
    }

    /// A host's content goes for that of another one that stood so when it was asked.
    fn yield_to(&mut self, side: &Side, keep: usize, winner: &Standing) {
        let host = host_number(side.own);
        self.check_split(host, keep, winner);
        self.note(|| format!("host {host} yields to {keep}"));
        self.crash(host, Crash::Process);
        let it = &mut self.hosts[host];
        it.recover_superblock();
        self.recover_mirror(host);
        let it = &mut self.hosts[host];
        it.recover_history();
        let base = it.recover_map(keep).base();
        let concession = side.concession(winner, Some(base));
        let is_unused = it.layers.saved(it.superblock.layers.undo()).is_empty();
        let rewrite = Rewrite::resolution(&it.superblock, concession.clone(), is_unused);
        let before = (it.superblock.clone(), it.known_lives.clone());
        let known_lives = match concession.copies_everything() {
            true => BTreeSet::new(),
            false => &self.hosts[host].known_lives & &self.hosts[keep].known_lives,
        };
        let yielding = Yielding { concession, winner: winner.fence, before, known_lives };
        self.begin_rewriting(host, rewrite, Purpose::Resolution(Box::new(yielding)));
    }

    /// The superblock says that the host's content is given up.
    pub(super) fn resolution_is_recorded(&mut self, host: usize, yielding: &Yielding) {
        let Yielding { winner, before, known_lives, .. } = yielding;
        let it = &mut self.hosts[host];
        it.keep_what_it_had(before);
        it.followed.insert(winner.counter, winner.holder);
        it.agrees_up_to(winner.counter);
        it.expected = None;
        it.known_lives.clone_from(known_lives);
        assert!(
            winner.against(it.superblock.fence) == Claim::Older || !winner.is_refused_by(it.superblock.fence),
            "L6: host {host} gave its content up for that of {winner:?}, and refuses it all the same"
        );
    }

    /// A host is at odds with a primary only where it was promoted as often, or has been through a generation that the
    /// primary has not (L2, L3): a primary that has heard of a copy's newest generation knows it for as long as it runs.
    fn check_split(&self, host: usize, primary: usize, winner: &Standing) {
        if self.is_liar(host) || self.is_liar(primary) {
            return;
        }
        let it = &self.hosts[host].superblock;
        let is_met = self.hosts[primary].heard.get(&host) == Some(&it.copy);
        // What a host that was set back follows may be so old that the primary has no room for it any more.
        let is_set_back = self.hosts[host].is_set_back || self.hosts[primary].is_set_back;
        if winner.fence.against(it.fence) == Claim::Rival || !is_met || is_set_back {
            return;
        }
        let (Some(newest), Some(own)) = (winner.lineage.first(), it.lineage.first()) else {
            panic!("L3: host {host} and {primary} are at odds, and one of them has no content")
        };
        assert!(
            !self.generations.contains(*newest, *own),
            "L2: host {host} has nothing that {primary} lacks, and yet is refused"
        );
    }
}
