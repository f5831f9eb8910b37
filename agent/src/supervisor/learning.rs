//! What this host learns of a volume's hosts, and keeps in its configuration: what each volume finds out of roles, members
//! and removals, and what other hosts say of themselves.
//!
//! A folder that has no room, or does not answer, takes it later (X6): it is tried again every few seconds, since whoever
//! told it tells it only once. Of each kind the newest is kept, so what waits is bounded (X1), and never undoes what was
//! learnt after it.

use super::{News, Supervisor};
use crate::config::{Address, Name, PEERS_LIMIT, VolumeConfig};
use crate::control::api::{Failure, FailureKind};
use crate::volume::Learned;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{Members, Removal};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;
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
pub(super) struct Unsaved(Mutex<BTreeMap<Name, Vec<Lesson>>>);

impl Unsaved {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Name, Vec<Lesson>>> {
        self.0.lock().expect("no holder of the lock panics")
    }

    /// Keeps a lesson until it is saved, in place of the one before on the same subject. Gives what is to be saved.
    fn put(&self, volume: &Name, lesson: Lesson) -> Lesson {
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
        lessons.push(lesson.clone());
        lesson
    }

    /// Whether this still is the newest on its subject, and not saved.
    fn holds(&self, volume: &Name, lesson: &Lesson) -> bool {
        self.lock().get(volume).is_some_and(|lessons| lessons.contains(lesson))
    }

    fn drop(&self, volume: &Name, lesson: &Lesson) {
        let mut unsaved = self.lock();
        if let Some(lessons) = unsaved.get_mut(volume) {
            lessons.retain(|known| known != lesson);
            if lessons.is_empty() {
                unsaved.remove(volume);
            }
        }
    }

    /// All that waits.
    fn all(&self) -> Vec<(Name, Lesson)> {
        let unsaved = self.lock();
        unsaved
            .iter()
            .flat_map(|(volume, lessons)| lessons.iter().map(|lesson| (volume.clone(), lesson.clone())))
            .collect()
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
    /// gone, and who is the primary.
    pub async fn keep_members(self: Arc<Self>, mut source: UnboundedReceiver<News>) {
        let mut looks = tokio::time::interval(PAUSE);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                news = source.recv() => {
                    let Some((volume, learned)) = news else { return };
                    self.learn(&volume, Lesson::Found(learned)).await;
                }
                _ = looks.tick() => self.learn_again().await,
            }
        }
    }

    /// Keeps something in a volume's configuration, now or as soon as that can be done.
    pub(super) async fn learn(&self, volume: &Name, lesson: Lesson) {
        if let Err(failure) = self.learn_now(volume, lesson).await {
            tracing::warn!(
                %volume,
                "{}; what other hosts told goes into the configuration when that can be done",
                failure.message
            );
        }
    }

    /// As [`Supervisor::learn`], and says why it is not done yet.
    pub(super) async fn learn_now(&self, volume: &Name, lesson: Lesson) -> Result<(), Failure> {
        let lesson = self.unsaved.put(volume, lesson);
        self.save(volume, &lesson).await
    }

    /// Tries to save what could not be saved before.
    async fn learn_again(&self) {
        let mut silent: Option<Name> = None;
        for (volume, lesson) in self.unsaved.all() {
            // One attempt says enough about a folder that does not answer.
            if silent.as_ref() == Some(&volume) {
                continue;
            }
            match self.save(&volume, &lesson).await {
                Ok(()) => tracing::info!(%volume, "what other hosts told is in the configuration now"),
                Err(failure) => {
                    tracing::debug!(%volume, "{}", failure.message);
                    silent = Some(volume);
                }
            }
        }
    }

    async fn save(&self, volume: &Name, lesson: &Lesson) -> Result<(), Failure> {
        let own = self.endpoint.id();
        let mut renamed = None;
        let change = |config: &mut VolumeConfig| {
            // Not what was learnt before something newer.
            if self.unsaved.holds(volume, lesson) {
                renamed = lesson.apply(config, own, &self.name);
            }
        };
        let saved = self.change_config(volume, change).await;
        if let (Ok(()), Some((before, after))) = (&saved, renamed) {
            lesson.tell_renamed(volume, &before, &after);
        }
        let is_gone = |failure: &Failure| failure.kind == FailureKind::NoSuchVolume;
        if saved.as_ref().err().is_none_or(is_gone) {
            self.unsaved.drop(volume, lesson);
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
            assert_eq!(unsaved.put(&data, lesson.clone()), lesson);
        }
        let kept: Vec<Lesson> = unsaved.all().into_iter().map(|(_, lesson)| lesson).collect();
        assert_eq!(kept, [met(2, "b"), roles(2), met(1, "c")]);
        assert!(!unsaved.holds(&data, &roles(1)), "it would undo what is newer");
        unsaved.drop(&data, &roles(1));
        assert!(unsaved.holds(&data, &roles(2)), "it was another one that was saved");
        for lesson in kept {
            unsaved.drop(&data, &lesson);
        }
        assert!(unsaved.lock().is_empty());
    }

    #[test]
    fn of_removals_the_newest_word_on_each_host_is_kept() {
        let (unsaved, data) = (Unsaved::default(), "data".parse().expect("a name"));
        unsaved.put(&data, removals(&[(1, 3), (2, 1)]));
        let merged = unsaved.put(&data, removals(&[(1, 1), (2, 5), (3, 1)]));
        assert_eq!(merged, removals(&[(1, 3), (2, 5), (3, 1)]));
    }

    #[test]
    fn members_that_come_later_do_not_undo_a_removal_that_waits() {
        let (unsaved, data) = (Unsaved::default(), "data".parse().expect("a name"));
        let members = |removed| Lesson::Found(Learned::Members(Members { members: Vec::new(), removed }));
        unsaved.put(&data, members(vec![removal(1, 1)]));
        assert_eq!(unsaved.put(&data, members(Vec::new())), members(vec![removal(1, 1)]));
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
        assert!(unsaved.all().len() <= PEERS_LIMIT + 4);
        let many = (0..2 * REMOVALS).map(|number| {
            let mut host = [0; 32];
            host[..8].copy_from_slice(&(number as u64).to_le_bytes());
            Removal { host: HostId(host), ..removal(0, 1) }
        });
        let Lesson::Found(Learned::Removals(kept)) =
            unsaved.put(&data, Lesson::Found(Learned::Removals(many.collect())))
        else {
            panic!("removals stay removals");
        };
        assert_eq!(kept.len(), REMOVALS);
    }
}
