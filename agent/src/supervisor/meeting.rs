//! How hosts know who and where the others are.
//!
//! Each agent keeps a connection to every host of its volumes, whatever their roles, and says on it what this host is called
//! and where it listens; the other answers with the same. What a host says of itself takes the place of what was known of
//! it, in the volumes' files too. So a host whose address or name changed is found as long as either side knows where the
//! other is: a replica that moved goes to its primary, which can't find it any more. A primary passes on what it learnt.
//!
//! Addresses are looked at every other second: one that comes late is told as soon as it is there.

use super::admission::seen_addresses;
use super::incoming::stranger;
use super::learning::Lesson;
use super::{Entry, Supervisor};
use crate::config::{Address, Name};
use crate::transport::Connection;
use crate::volume::Ask;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{Member, Message, Refusal, Refused, Whereabouts};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// How often this host's addresses are looked at, and whether others are to be told.
const LOOK: Duration = Duration::from_secs(2);
/// How long a host that can't be reached is let alone, at first and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));
/// How long a host may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// What this host has told another one.
struct Contact {
    /// The connection on which it did.
    told_on: Option<usize>,
    is_telling: bool,
    /// When to try again, and how long to wait after that.
    next: Instant,
    pause: Duration,
}

impl Contact {
    fn new() -> Self {
        Self { told_on: None, is_telling: false, next: Instant::now(), pause: BACK_OFF.0 }
    }

    fn ended(&mut self, told_on: Option<usize>) {
        self.is_telling = false;
        self.told_on = told_on;
        self.pause = if told_on.is_some() { BACK_OFF.0 } else { (self.pause * 2).min(BACK_OFF.1) };
        self.next = Instant::now() + self.pause;
    }
}

impl Supervisor {
    /// Keeps in touch with every host of every volume, for as long as the agent runs.
    pub async fn keep_in_touch(self: Arc<Self>) {
        let mut opened = self.peers.opened();
        let mut contacts: BTreeMap<HostId, Contact> = BTreeMap::new();
        let mut telling = JoinSet::new();
        let mut looks = tokio::time::interval(LOOK);
        let mut own = self.own_member().addresses;
        loop {
            tokio::select! {
                _ = looks.tick() => {
                    let now = self.own_member().addresses;
                    if now != own {
                        own.clone_from(&now);
                        self.tell_volumes(now).await;
                        contacts.clear();
                    }
                    self.look_for_twins().await;
                }
                Ok(host) = opened.recv() => {
                    // Somebody else dialled it.
                    if let Some(contact) = contacts.get_mut(&host) {
                        contact.next = Instant::now();
                    }
                }
                Some(Ok((host, told_on))) = telling.join_next() => {
                    if let Some(contact) = contacts.get_mut(&host) {
                        contact.ended(told_on);
                    }
                }
            }
            let known = self.known_hosts().await;
            contacts.retain(|host, _| known.contains_key(host));
            for (host, addresses) in known {
                let contact = contacts.entry(host).or_insert_with(Contact::new);
                let live = self.peers.live(host).map(|connection| connection.number());
                let is_told = live.is_some() && live == contact.told_on;
                if is_told || contact.is_telling || contact.next > Instant::now() {
                    continue;
                }
                contact.is_telling = true;
                let supervisor = self.clone();
                telling.spawn(async move { (host, supervisor.tell(host, &addresses).await) });
            }
        }
    }

    /// The hosts of all volumes, and where they may be.
    async fn known_hosts(&self) -> BTreeMap<HostId, Vec<String>> {
        let volumes = self.volumes.lock().await;
        let mut known: BTreeMap<HostId, Vec<String>> = BTreeMap::new();
        for peer in volumes.values().flat_map(|entry| &entry.config.peers) {
            let addresses = known.entry(peer.host).or_default();
            for address in &peer.addresses {
                if !addresses.iter().any(|known| known == address.as_str()) {
                    addresses.push(address.as_str().to_owned());
                }
            }
        }
        known
    }

    async fn tell_volumes(&self, addresses: Vec<String>) {
        for entry in self.volumes.lock().await.values() {
            entry.handle.ask(Ask::Moved(addresses.clone()));
        }
    }

    /// Tells a host who and where this one is, and hears the same of it. Gives the connection on which it did.
    async fn tell(&self, host: HostId, addresses: &[String]) -> Option<usize> {
        // Whoever needs the connection says what is wrong with it.
        let question = self.whereabouts().into();
        let asked = tokio::time::timeout(ANSWER_TIME, self.peers.ask(host, addresses, &question));
        let (connection, answer) = asked.await.ok()?.ok()?;
        let Message::Whereabouts(told) = answer else { return None };
        self.meet(&told, &connection).await.ok()?;
        Some(connection.number())
    }

    fn whereabouts(&self) -> Whereabouts {
        Whereabouts { name: self.name.to_string(), listen: self.told_addresses(), instance: self.instance }
    }

    /// A host tells who and where it is, and is told the same.
    pub(super) async fn hear(
        &self,
        told: Whereabouts,
        connection: &Connection,
    ) -> Result<Whereabouts, Refused> {
        if !self.knows_member(connection.peer()).await {
            return Err(stranger(connection.peer()));
        }
        self.meet(&told, connection).await?;
        Ok(self.whereabouts())
    }

    /// Where the two hosts are that use the key of this one, in words, if two do.
    pub(super) fn twins(&self, host: HostId) -> Option<String> {
        let twins = self.instances.lock().expect("no holder of the lock panics").twins(host, Instant::now());
        twins.map(|(one, other)| format!("at {one} and {other}"))
    }

    /// The keys that two hosts use each, as was last looked for.
    pub(super) fn doubled(&self) -> BTreeSet<HostId> {
        self.doubled.lock().expect("no holder of the lock panics").clone()
    }

    /// Looks whether two hosts use one key: then sessions with either end, until one is gone.
    async fn look_for_twins(&self) {
        let volumes = self.volumes.lock().await;
        let names: BTreeMap<HostId, &Name> = volumes
            .values()
            .flat_map(|entry| &entry.config.peers)
            .map(|peer| (peer.host, &peer.name))
            .collect();
        let places = names.keys().filter_map(|host| Some((*host, self.twins(*host)?)));
        let places: BTreeMap<HostId, String> = places.collect();
        let doubled: BTreeSet<HostId> = places.keys().copied().collect();
        let before = std::mem::replace(
            &mut *self.doubled.lock().expect("no holder of the lock panics"),
            doubled.clone(),
        );
        if before == doubled {
            return;
        }
        for (host, places) in places.iter().filter(|(host, _)| !before.contains(host)) {
            let name = names[host];
            tracing::warn!(
                "two hosts use the key of {name}: {places}; nothing is mirrored with either until one is gone"
            );
        }
        for entry in volumes.values() {
            entry.handle.ask(Ask::Doubled(doubled.clone()));
        }
    }

    async fn knows_member(&self, host: HostId) -> bool {
        !self.volumes_of(host).await.is_empty()
    }

    /// The volumes that a host is a host of.
    async fn volumes_of(&self, host: HostId) -> Vec<Name> {
        let volumes = self.volumes.lock().await;
        let is_host = |entry: &Entry| entry.config.peers.iter().any(|peer| peer.host == host);
        volumes.iter().filter(|(_, entry)| is_host(entry)).map(|(name, _)| name.clone()).collect()
    }

    /// Remembers what a host says of itself, in every volume that it is a host of.
    async fn meet(&self, told: &Whereabouts, connection: &Connection) -> Result<(), Refused> {
        if !Member::is_sound(&told.name, &told.listen) {
            let text = "the name or the addresses that it tells are too long".to_owned();
            return Err(Refused { refusal: Refusal::Other, text });
        }
        let host = connection.peer();
        let is_alone = {
            let mut instances = self.instances.lock().expect("no holder of the lock panics");
            instances.hear(host, told.instance, connection.clone(), Instant::now())
        };
        if !is_alone {
            // One was restarted just now, or two hosts use one key.
            let text = "another agent with this key is connected".to_owned();
            return Err(Refused { refusal: Refusal::Busy, text });
        }
        let seen = seen_addresses(&told.listen, connection.remote_address());
        let addresses: Vec<Address> = seen.iter().filter_map(|address| address.parse().ok()).collect();
        for volume in self.volumes_of(host).await {
            let lesson = Lesson::Met { host, name: told.name.clone(), addresses: addresses.clone() };
            self.learn(&volume, lesson);
        }
        Ok(())
    }
}
