//! Something else writes to the disk of a replica while its agent is down (X4). That it did is what the agent finds out before it
//! opens the volume, and records; the machines must bring the copy up to date by that.
//!
//! What it writes no application does, and no two of them write the same. So it can be followed wherever it gets to: into layers of
//! pre-images, back out of them, into a recovery. It is the volume's content from when an operator took it for that, who
//! promoted the copy by force, or recovered a primary from a mixture; until then it is in no copy that counts for anything.

use super::disk::Value;
use super::gap::Layer;
use super::host::Host;
use super::world::{Event, World};
use blockmirror_protocol::disk::activity_log::{self, Recovered};
use blockmirror_protocol::disk::superblock::{Role, Superblock};
use blockmirror_protocol::layers::LayerId;
use blockmirror_protocol::succession;
use blockmirror_protocol::terms::DataState;
use std::collections::BTreeSet;

/// Every value from here on is of nobody: no world has so many requests.
const FOREIGN: Value = u32::MAX as Value;

/// What something else wrote.
#[derive(Debug, Default)]
pub struct Foreign {
    /// How often it did.
    writes: u64,
    /// What of it operators took for the volume's content.
    taken: BTreeSet<Value>,
}

impl Foreign {
    /// Whether this is in no copy that counts.
    fn is_nobodys(&self, value: Value) -> bool {
        value >= FOREIGN && !self.taken.contains(&value)
    }
}

impl Host {
    /// What a copy holds after the layer, if there is one, is restored.
    fn values(&self, layer: Option<&Layer>) -> impl Iterator<Item = Value> {
        let is_restored = move |sector: u64| layer.is_some_and(|layer| layer.value(sector).is_some());
        let content = self.disk.content().iter().filter(move |(sector, _)| !is_restored(**sector));
        let restored = layer.into_iter().flat_map(Layer::contents).flat_map(|(_, held)| held);
        content.map(|(_, value)| *value).chain(restored.map(|(_, value)| value))
    }
}

impl World {
    /// At times the disk of a replica that is about to start has content of nobody.
    pub(super) fn touch(&mut self, host: usize) {
        let touches = self.settings.touches;
        if touches == 0 || !self.is_rough || !self.random.once_in(touches) {
            return;
        }
        let sector = self.random.below(self.settings.size_bytes / 512);
        let value = FOREIGN + self.foreign.writes;
        self.foreign.writes += 1;
        self.note(|| format!("something else writes to sector {sector} of host {host}"));
        let Host { disk, mirror, kept, layers, superblock, .. } = &mut self.hosts[host];
        disk.replace(sector, value);
        let is_saved = |layer: LayerId| layers.get(layer).value(sector).is_some();
        mirror.something_else_wrote(sector, value, superblock.layers.rollback().is_some_and(is_saved));
        if let Some(kept) = kept.as_mut().filter(|kept| !is_saved(kept.layer)) {
            kept.something_else_wrote(sector, value);
        }
        let it = &mut self.hosts[host];
        let (Recovered::Active { serial, .. } | Recovered::Unsure { serial }) = it.recover_log();
        let record = activity_log::encode_everything(serial + 1);
        it.files.write_now(activity_log::FILE_NAME, activity_log::record_offset(serial + 1), &record);
        let it = &mut self.hosts[host];
        it.superblock.note_touched();
        it.write_superblock_now();
        self.differences.forget(host);
        for link in self.links.ids().filter(|link| link.listener == host) {
            self.links[link].united_by = None;
        }
        if self.settings.has_operators && self.random.once_in(2) {
            // Whoever mounted it to have a look may like what he saw.
            let (wait, life) = (self.random.up_to(self.settings.outage), self.hosts[host].life);
            self.plan(wait, Event::PromoteByRule(host, life));
        }
    }

    /// What something else wrote is in no copy that others, or an operator, are told to be good, now or when it is rolled back.
    ///
    /// # Panics
    /// When it is.
    pub(super) fn check_counted(&self, host: usize, superblock: &Superblock) {
        let it = &self.hosts[host];
        let layer = match succession::counts_as(superblock) {
            _ if superblock.role == Role::Primary || self.foreign.writes == 0 => return,
            // What it says is of the disk that was lost, still.
            _ if it.adopting.is_some() => return,
            (DataState::Consistent, _) => None,
            (DataState::Inconsistent, true) => {
                Some(it.layers.get(superblock.layers.rollback().expect("it was looked at")))
            }
            (DataState::Inconsistent, false) | (DataState::Empty, _) => return,
        };
        let is_there = it.values(layer).any(|value| self.foreign.is_nobodys(value));
        assert!(
            !is_there,
            "X4: host {host} holds what something else wrote to it, and counts as if it did not"
        );
    }

    /// A host's disk holds the volume's content from now on, by the rule or because an operator wants it so.
    ///
    /// # Panics
    /// When it does by the rule, and holds what something else wrote.
    pub(super) fn take_content(&mut self, host: usize, is_by_rule: bool) {
        let values = self.hosts[host].values(None);
        let found: Vec<Value> = values.filter(|value| self.foreign.is_nobodys(*value)).collect();
        assert!(
            found.is_empty() || !is_by_rule,
            "X4: what something else wrote to host {host} is the volume's content, and no operator wanted it"
        );
        self.foreign.taken.extend(found);
    }

    /// Whether an operator took this for the volume's content, which nobody of ours wrote.
    pub(super) fn is_taken(&self, value: Value) -> bool {
        self.foreign.taken.contains(&value)
    }
}
