//! Whether a host has agreed to whom it follows (L6), as the model has it from what its operator did and what it was told;
//! and that what others overwrite is kept until it has.

use super::host::{Host, Shell};
use super::world::World;
use blockmirror_protocol::replica::{SpacePolicy, StateChange, consent};
use blockmirror_protocol::terms::DataState;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::Welcome;
use std::collections::BTreeSet;

/// Whom a host agrees to.
#[derive(Clone, Default, Debug)]
pub struct Agreed {
    /// The holder of every fence up to this one.
    up_to: u64,
    /// Of those with the other counter, these.
    heirs: (BTreeSet<HostId>, u64),
}

impl Agreed {
    /// To the holder of every fence up to this one.
    pub(super) fn up_to(counter: u64) -> Self {
        Self { up_to: counter, ..Self::default() }
    }

    /// To no fence from this one on.
    pub(super) fn withdraw(&mut self, counter: u64) {
        *self = Self::up_to(self.up_to.min(counter.saturating_sub(1)));
    }
}

impl Host {
    /// It agrees to the holder of every fence up to this one.
    pub(super) fn agrees_up_to(&mut self, counter: u64) {
        self.agreed.up_to = self.agreed.up_to.max(counter);
    }

    /// It was demoted in order, and these have recorded that they have everything: whichever of them is promoted next is
    /// agreed to.
    pub(super) fn bequeaths(&mut self, heirs: &[HostId]) {
        consent::bequeath(&mut self.superblock, heirs);
        self.agreed.heirs = (heirs.iter().copied().collect(), self.superblock.fence.counter + 1);
        self.write_superblock_now();
    }

    /// Whoever is promoted next after the primary that it follows is agreed to, if that one is.
    pub(super) fn is_handed_on(&mut self) {
        let counter = self.superblock.fence.counter;
        if self.agreed.up_to >= counter {
            self.agrees_up_to(counter + 1);
        }
    }

    /// It agrees to whom it follows, and to the next one where that one was demoted already.
    fn agrees(&mut self) {
        self.agrees_up_to(self.superblock.fence.counter);
        if self.superblock.released {
            self.is_handed_on();
        }
    }

    /// Whether no image of the volume can be had from its disk.
    pub(super) fn has_nothing_to_lose(&self) -> bool {
        self.mirror.image.is_none() && self.mirror.point.is_none() && self.kept.is_none()
    }

    /// A change of the superblock is being written.
    pub(super) fn note_change(&mut self, change: &StateChange, space: SpacePolicy) {
        let gives_up = matches!(change, StateChange::Forget | StateChange::GiveRollbackUp);
        if gives_up && space == SpacePolicy::GoOn {
            self.agrees();
        }
    }

    /// It answers a primary: from now on that one overwrites it.
    ///
    /// # Panics
    /// When nobody has agreed to that, and what it holds is not kept.
    pub(super) fn check_consent(&mut self, welcome: &Welcome) {
        let counter = welcome.fence.counter;
        let has_image = match welcome.data {
            DataState::Empty => false,
            DataState::Inconsistent => welcome.can_roll_back || self.kept.is_some(),
            DataState::Consistent => true,
        };
        let (heirs, next) = &self.agreed.heirs;
        if !has_image || counter == *next && heirs.contains(&welcome.fence.holder) {
            self.agrees_up_to(counter);
        }
        assert!(
            counter <= self.agreed.up_to || self.kept.is_some(),
            "L6: host {} gives up what it has for {}, to whom it has not agreed",
            self.number,
            welcome.fence.holder
        );
    }
}

impl World {
    /// An operator agrees to whom a replica follows, and has what is kept given up.
    pub(super) fn forget(&mut self, host: usize) {
        self.note(|| format!("host {host} agrees to whom it follows"));
        let it = &mut self.hosts[host];
        let Shell::Replica(shell) = &mut it.shell else { return };
        if !shell.machine.has_failed() {
            shell.machine.agree();
            it.agrees();
        }
    }

    /// Operators agree where a replica waits because it can't keep what would be overwritten.
    pub(super) fn relent(&mut self) {
        for host in 0..self.hosts.len() {
            if matches!(&self.hosts[host].shell, Shell::Replica(shell) if shell.machine.report().is_full) {
                self.forget(host);
            }
        }
    }
}
