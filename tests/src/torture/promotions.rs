//! Other hosts become the primary.

use super::Torture;
use super::disk::superblock;
use super::ledger::Moment;
use super::sites::Site;
use crate::machines::host::Host;
use blockmirror_agent::config::Mode;

/// The exit code of a command that was refused for safety.
const REFUSED: i32 = 5;

impl Torture {
    /// After the primary was killed: promotes a replica that has its history, if there is one. It has if it knows the
    /// primary's newest generation: where the primary went on in one that a promoted replica has never heard of, its
    /// return is a split brain (L3), which an operator has to resolve.
    pub(super) fn promote_another(&mut self) -> bool {
        let generation = self.generation();
        let mut candidates = self.replicas();
        candidates.retain(|replica| {
            let site = &self.sites[*replica];
            let lineage = superblock(&site.host).lineage;
            site.floor.is_some() && generation.is_none_or(|generation| lineage.contains(&generation))
        });
        if candidates.is_empty() {
            return false;
        }
        let chosen = self.random.pick(&candidates);
        let floor = self.floor(chosen).expect("it has the primary's history");
        self.sites[chosen].heal();
        self.say(&format!("{} is promoted", self.name(chosen)));
        promote(&self.sites[chosen].host);
        self.take_over(chosen, floor);
        true
    }

    /// Makes a replica the primary with nothing lost: by a switch, or by a demotion and a promotion.
    pub(super) fn hand_over(&mut self) {
        let chosen = self.some_replica();
        let (from, to) = (self.name(self.primary).to_owned(), self.name(chosen).to_owned());
        self.wait_until_in_sync();
        self.end_load();
        // What it keeps from an earlier promotion, its operator has agreed to by now.
        if superblock(&self.sites[chosen].host).layers.undo().is_some() {
            self.sites[chosen].host.succeed(&["forget", "data"]);
        }
        if self.random.once_in(3) {
            self.say(&format!("{from} is demoted and {to} is promoted"));
            self.sites[self.primary].host.succeed(&["demote", "data"]);
            self.sites[chosen].host.succeed(&["promote", "data"]);
        } else {
            self.say(&format!("switch from {from} to {to}"));
            self.sites[self.primary].host.succeed(&["switch", "data", "--to", &to]);
        }
        self.take_over(chosen, self.now());
    }

    /// What the new primary has is what there is from now on. Of the others nothing is known until they are in sync.
    fn take_over(&mut self, chosen: usize, floor: Moment) {
        self.primary = chosen;
        self.tally.promotions += 1;
        self.set_modes();
        self.wait_for_device();
        let whose = format!("the new primary {}", self.name(chosen));
        let image = self.check(&self.device(), floor, &whose);
        self.tally.records += self.ledger.lock().expect("the writer makes sense").settle(&image);
        self.sites.iter_mut().for_each(Site::forget);
        self.start_load();
    }

    fn set_modes(&self) {
        if self.settings.mode == Mode::default() {
            return;
        }
        let mode = self.settings.mode.to_string();
        for replica in self.replicas() {
            self.sites[self.primary].host.succeed(&["mode", "data", self.name(replica), &mode]);
        }
    }
}

/// Without force where that is enough: what it could lose, the operator is to know.
fn promote(host: &Host) {
    let said = host.tool(&["promote", "data"]);
    match said.code {
        0 => {}
        REFUSED => {
            println!("{}", said.error.trim());
            host.succeed(&["promote", "data", "--force"]);
        }
        _ => panic!("{said:?}"),
    }
}
