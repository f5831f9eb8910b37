//! What this host learns of a volume's hosts, and keeps in its configuration: what each volume finds out of roles, members
//! and removals, and what other hosts say of themselves.
//!
//! A folder that has no room, or does not answer, takes it later (X6): it is tried again every few seconds, since whoever
//! told it tells it only once. Of each kind the newest is kept, so what waits is bounded (X1), and never undoes what was
//! learnt after it.

use super::Supervisor;
use crate::config::{Address, Name, PEERS_LIMIT, VolumeConfig};
use crate::control::api::{Failure, FailureKind};
use crate::volume::Learned;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{Members, Removal};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;

/// How often what could not be saved is tried again.
const PAUSE: Duration = Duration::from_secs(3);
/// How many removals of one volume wait at most.
const REMOVALS: usize = 512;

/// Something that is to be kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Lesson {
    /// What a volume found out.
    Found(Learned),
    /// What a host says of itself: what it is called and where it is.
    Met { host: HostId, name: String, addresses: Vec<Address> },
}

/// What makes a lesson take the place of another one.
#[derive(PartialEq, Eq)]
enum Subject {
    Members,
    Removals,
    Roles,
    Host(HostId),
}

impl Lesson {
    fn subject(&self) -> Subject {
        match self {
            Self::Found(Learned::Members(_)) => Subject::Members,
            Self::Found(Learned::Removals(_)) => Subject::Removals,
            Self::Found(Learned::Roles(..)) => Subject::Roles,
            Self::Met { host, .. } => Subject::Host(*host),
        }
    }

    /// Takes it over into the configuration. Gives what a host was called before and is called now, where that changes.
    fn apply(&self, config: &mut VolumeConfig, own: HostId, own_name: &Name) -> Option<(Name, Name)> {
        match self {
            Self::Found(Learned::Roles(role, primary)) => config.set_roles(*role, *primary),
            Self::Found(Learned::Members(told)) => {
                config.learn(&told.members, own, own_name);
                config.learn_removals(&told.removed, own);
            }
            Self::Found(Learned::Removals(removed)) => config.learn_removals(removed, own),
            Self::Met { host, name, addresses } => {
                let before = config.peers.iter().find(|peer| peer.host == *host)?.name.clone();
                let after = config.meet(*host, name, addresses.clone(), own_name)?;
                return Some((before, after));
            }
        }
        None
    }

    /// Says that a host has another name now.
    fn tell_renamed(&self, volume: &Name, before: &Name, after: &Name) {
        match self {
            Self::Met { name, .. } if after.as_str() != name => tracing::warn!(
                %volume,
                "two hosts are called {name}: the one that was {before} is shown as {after}; give one of them another `name` \
                 in agent.toml"
            ),
            _ => tracing::info!(%volume, "the host {before} is called {after} now"),
        }
    }
}

/// What was learnt and is not saved yet, by volume, the newest last.
#[derive(Default)]
pub(super) struct Unsaved {
    lessons: Mutex<BTreeMap<Name, Vec<Lesson>>>,
    came: Notify,
}

impl Unsaved {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Name, Vec<Lesson>>> {
        self.lessons.lock().expect("no holder of the lock panics")
    }

    /// Takes what a volume found out, and has it saved.
    pub(super) fn found(&self, volume: &Name, learned: Learned) {
        self.put(volume, Lesson::Found(learned));
        self.came.notify_one();
    }

    /// Keeps a lesson until it is saved, in place of the one before on the same subject.
    fn put(&self, volume: &Name, lesson: Lesson) {
        let mut unsaved = self.lock();
        let lessons = unsaved.entry(volume.clone()).or_default();
        let index = lessons.iter().position(|known| known.subject() == lesson.subject());
        let lesson = match (index.map(|index| lessons.remove(index)), lesson) {
            (Some(Lesson::Found(Learned::Removals(before))), Lesson::Found(Learned::Removals(now))) => {
                Lesson::Found(Learned::Removals(merge(before, now)))
            }
            (Some(Lesson::Found(Learned::Members(before))), Lesson::Found(Learned::Members(now))) => {
                // Whoever tells the members now need not have heard of every removal.
                let removed = merge(before.removed, now.removed);
                Lesson::Found(Learned::Members(Members { removed, ..now }))
            }
            (_, lesson) => lesson,
        };
        // Of hosts that met there may be more than are members by now.
        if lessons.len() > PEERS_LIMIT + 3 {
            lessons.remove(0);
        }
        lessons.push(lesson);
    }

    /// What waits of a volume, in the order in which it was learnt.
    fn of(&self, volume: &Name) -> Vec<Lesson> {
        self.lock().get(volume).cloned().unwrap_or_default()
    }

    /// These are in the configuration. What was learnt since, on the same subject, is not.
    pub(super) fn settle(&self, volume: &Name, saved: &[Lesson]) {
        let mut unsaved = self.lock();
        if let Some(lessons) = unsaved.get_mut(volume) {
            lessons.retain(|known| !saved.contains(known));
            if lessons.is_empty() {
                unsaved.remove(volume);
            }
        }
    }

    /// The volumes of which something waits.
    fn volumes(&self) -> Vec<Name> {
        self.lock().keys().cloned().collect()
    }
}

/// The newest word of each host's removal.
fn merge(mut before: Vec<Removal>, now: Vec<Removal>) -> Vec<Removal> {
    for removal in now {
        match before.iter().position(|known| known.host == removal.host) {
            Some(index) if before[index].version < removal.version => before[index] = removal,
            Some(_) => {}
            None if before.len() < REMOVALS => before.push(removal),
            None => {}
        }
    }
    before
}

impl Supervisor {
    /// Keeps what volumes find out: the members that primaries tell, so that replicas know each other when the primary is
    /// gone, and who is the primary. Never ends.
    pub async fn keep_members(self: Arc<Self>) {
        let mut looks = tokio::time::interval(PAUSE);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut refusing = BTreeSet::new();
        loop {
            tokio::select! {
                () = self.unsaved.came.notified() => {}
                _ = looks.tick() => {}
            }
            for volume in self.unsaved.volumes() {
                self.save_lessons(volume, &mut refusing).await;
            }
        }
    }

    /// Tries to save what a volume found out. `refusing` are the volumes that are known to take nothing for now.
    async fn save_lessons(&self, volume: Name, refusing: &mut BTreeSet<Name>) {
        match self.save(&volume).await {
            Ok(()) if refusing.remove(&volume) => {
                tracing::info!(%volume, "what other hosts told is in the configuration now");
            }
            Ok(()) => {}
            Err(failure) => {
                let text = failure.message;
                if refusing.insert(volume.clone()) {
                    tracing::warn!(%volume, "{text}; what other hosts told goes into the configuration when that can be done");
                } else {
                    tracing::debug!(%volume, "{text}");
                }
            }
        }
    }

    /// Keeps something in a volume's configuration, soon or as soon as that can be done.
    pub(super) fn learn(&self, volume: &Name, lesson: Lesson) {
        self.unsaved.put(volume, lesson);
        self.unsaved.came.notify_one();
    }

    /// As [`Supervisor::learn`], but at once; says why it is not done yet.
    pub(super) async fn learn_now(&self, volume: &Name, lesson: Lesson) -> Result<(), Failure> {
        self.unsaved.put(volume, lesson);
        self.save(volume).await
    }

    /// Saves all that waits of a volume. What is saved waits no more before the configuration can be changed again: else it
    /// would undo, when it is tried again, what an operator changed meanwhile.
    async fn save(&self, volume: &Name) -> Result<(), Failure> {
        let own = self.endpoint.id();
        let mut renamed = Vec::new();
        let change = |config: &mut VolumeConfig| {
            let lessons = self.unsaved.of(volume);
            for lesson in &lessons {
                if let Some((before, after)) = lesson.apply(config, own, &self.name) {
                    renamed.push((lesson.clone(), before, after));
                }
            }
            lessons
        };
        let saved = self.change_config_for(volume, change).await;
        match &saved {
            Ok(()) => {
                renamed.iter().for_each(|(lesson, before, after)| lesson.tell_renamed(volume, before, after));
            }
            Err(failure) if failure.kind == FailureKind::NoSuchVolume => {
                self.unsaved.settle(volume, &self.unsaved.of(volume));
            }
            Err(_) => {}
        }
        saved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Role;

    fn roles(primary: u8) -> Lesson {
        Lesson::Found(Learned::Roles(Role::Replica, Some(HostId([primary; 32]))))
    }

    fn met(host: u8, name: &str) -> Lesson {
        Lesson::Met { host: HostId([host; 32]), name: name.to_owned(), addresses: Vec::new() }
    }

    fn removal(host: u8, version: u64) -> Removal {
        Removal { host: HostId([host; 32]), name: String::new(), by: String::new(), at_seconds: 0, version }
    }

    fn removals(removals: &[(u8, u64)]) -> Lesson {
        Lesson::Found(Learned::Removals(
            removals.iter().map(|(host, version)| removal(*host, *version)).collect(),
        ))
    }

    #[test]
    fn the_newest_on_a_subject_is_kept_and_the_others_stay() {
        let (unsaved, data) = (Unsaved::default(), "data".parse().expect("a name"));
        for lesson in [roles(1), met(1, "a"), met(2, "b"), roles(2), met(1, "c")] {
            unsaved.put(&data, lesson);
        }
        assert_eq!(unsaved.of(&data), [met(2, "b"), roles(2), met(1, "c")]);
        unsaved.settle(&data, &[roles(1), met(2, "b")]);
        assert_eq!(unsaved.of(&data), [roles(2), met(1, "c")], "it was another one that was saved");
        unsaved.settle(&data, &unsaved.of(&data));
        assert_eq!((unsaved.of(&data), unsaved.volumes()), (vec![], vec![]));
    }

    #[test]
    fn of_removals_the_newest_word_on_each_host_is_kept() {
        let (unsaved, data) = (Unsaved::default(), "data".parse().expect("a name"));
        unsaved.put(&data, removals(&[(1, 3), (2, 1)]));
        unsaved.put(&data, removals(&[(1, 1), (2, 5), (3, 1)]));
        assert_eq!(unsaved.of(&data), [removals(&[(1, 3), (2, 5), (3, 1)])]);
    }

    #[test]
    fn members_that_come_later_do_not_undo_a_removal_that_waits() {
        let (unsaved, data) = (Unsaved::default(), "data".parse().expect("a name"));
        let members = |removed| Lesson::Found(Learned::Members(Members { members: Vec::new(), removed }));
        unsaved.put(&data, members(vec![removal(1, 1)]));
        unsaved.put(&data, members(Vec::new()));
        assert_eq!(unsaved.of(&data), [members(vec![removal(1, 1)])]);
    }

    #[test]
    fn what_waits_is_bounded() {
        let (unsaved, data) = (Unsaved::default(), "data".parse().expect("a name"));
        for number in 0..=255 {
            unsaved.put(&data, met(number, "a"));
            unsaved.put(
                &data,
                Lesson::Found(Learned::Removals(
                    (0..=255)
                        .map(|other| Removal { host: HostId([number ^ other; 32]), ..removal(0, 1) })
                        .collect(),
                )),
            );
        }
        assert!(unsaved.of(&data).len() <= PEERS_LIMIT + 4);
        let many = (0..2 * REMOVALS).map(|number| {
            let mut host = [0; 32];
            host[..8].copy_from_slice(&(number as u64).to_le_bytes());
            Removal { host: HostId(host), ..removal(0, 1) }
        });
        unsaved.put(&data, Lesson::Found(Learned::Removals(many.collect())));
        let kept = unsaved.of(&data);
        let Some(Lesson::Found(Learned::Removals(kept))) = kept.last() else {
            panic!("removals stay removals");
        };
        assert_eq!(kept.len(), REMOVALS);
    }
}
