//! Who the volume's hosts are, as each of them knows (X3): operators remove some while everything runs, and take them in
//! again, empty or with what they had; whoever was away hears of it later, from anybody.

use super::freezing::ASKING;
use super::host::{Shell, host_id, host_number};
use super::links::{Channel, LinkId, Packet};
use super::world::{Event, World};
use blockmirror_protocol::membership;
use blockmirror_protocol::peer::Peer;
use blockmirror_protocol::succession::{Heard, Judgement, Succeeded, Weight};
use blockmirror_protocol::terms::Mode;
use blockmirror_protocol::tracker::Doubt;
use blockmirror_protocol::wire::message::{Member, Members as Told, Message, Refusal, Refused, Removal};
use std::collections::BTreeMap;

/// What a host knows of the others' memberships, by their numbers. One host's list of the volume's hosts.
#[derive(Clone, Debug)]
pub struct Members {
    own: usize,
    version: u64,
    removal: Option<u64>,
    known: BTreeMap<usize, u64>,
    removed: BTreeMap<usize, u64>,
    /// The newest that it ever heard of each: it must not go back.
    newest: BTreeMap<usize, u64>,
}

impl Members {
    /// All are members, as one of them knows.
    #[must_use]
    pub fn all(hosts: usize, own: usize) -> Self {
        let known: BTreeMap<usize, u64> =
            (0..hosts).filter(|host| *host != own).map(|host| (host, 0)).collect();
        Self { own, version: 0, removal: None, newest: known.clone(), known, removed: BTreeMap::new() }
    }

    /// Whether another host is a member.
    #[must_use]
    pub fn contains(&self, host: usize) -> bool {
        self.known.contains_key(&host)
    }

    /// The other members.
    #[must_use]
    pub fn peers(&self) -> Vec<usize> {
        self.known.keys().copied().collect()
    }

    /// The hosts that were members, and were removed.
    pub fn removed(&self) -> impl Iterator<Item = usize> + '_ {
        self.removed.keys().copied()
    }

    /// Whether this host has heard that it was removed itself.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.removal.is_some()
    }

    fn remove(&mut self, host: usize) {
        if let Some(version) = self.known.remove(&host) {
            self.removed.insert(host, version + 1);
            self.note();
        }
    }

    fn admit(&mut self, host: usize) -> u64 {
        let version = self.removed.remove(&host).map_or(0, |removed| removed + 1);
        self.known.insert(host, version);
        self.note();
        version
    }

    fn learn(&mut self, told: &Told) {
        for member in &told.members {
            let (host, version) = (host_number(member.host), member.version);
            if host == self.own {
                if membership::is_member(version, self.removal) {
                    (self.removal, self.version) = (None, self.version.max(version));
                }
            } else if membership::is_member(version, self.removed.get(&host).copied()) {
                self.removed.remove(&host);
                let known = self.known.entry(host).or_default();
                *known = version.max(*known);
            }
        }
        for Removal { host, version, .. } in &told.removed {
            let host = host_number(*host);
            if host == self.own {
                if membership::is_removal(*version, self.removal.unwrap_or(self.version)) {
                    self.removal = Some(*version);
                }
                continue;
            }
            let known = self.known.get(&host).or(self.removed.get(&host)).copied().unwrap_or(0);
            if membership::is_removal(*version, known) {
                self.known.remove(&host);
                self.removed.insert(host, *version);
            }
        }
        self.note();
    }

    /// What is known of any host never goes back, whatever older lists say.
    fn note(&mut self) {
        for (host, version) in self.known.iter().chain(&self.removed) {
            let newest = self.newest.entry(*host).or_default();
            assert!(version >= newest, "X3: host {} takes {host} for what it was before", self.own);
            *newest = *version;
        }
    }

    fn tell(&self) -> Told {
        let known = self.known.iter().map(|(host, version)| member(*host, *version));
        let members = std::iter::once(member(self.own, self.version)).chain(known).collect();
        let removed = self.removed.iter().map(|(host, version)| removal(*host, *version)).collect();
        Told { members, removed }
    }
}

/// A host as others are told of it.
fn member(number: usize, version: u64) -> Member {
    let (name, host, addresses, mode) = (number.to_string(), host_id(number), Vec::new(), Mode::Async);
    Member { name, host, addresses, mode, version }
}

fn removal(number: usize, version: u64) -> Removal {
    let (host, name, by) = (host_id(number), number.to_string(), String::new());
    Removal { host, name, by, at_seconds: 0, version }
}

impl World {
    /// An operator removes a host, or takes it in again.
    pub(super) fn change_members(&mut self, primary: usize) {
        let others: Vec<usize> = (0..self.hosts.len()).filter(|host| *host != primary).collect();
        let other = self.random.pick(&others);
        if self.hosts[primary].tracker().is_none() || self.hosts[primary].superseded.is_some() {
            return;
        }
        if !self.hosts[primary].members.contains(other) {
            return self.take_in(primary, other);
        }
        // At times an operator insists on doing it elsewhere.
        let by = if self.random.once_in(4) { self.random.pick(&others) } else { primary };
        let host = if by == other { primary } else { other };
        if self.hosts[by].is_up() && self.hosts[by].members.contains(host) {
            self.remove_member(by, host);
        }
    }

    /// An operator removes a host from the volume, by the word of another one.
    pub fn remove_member(&mut self, by: usize, host: usize) {
        self.note(|| format!("host {by} removes {host}"));
        self.hosts[by].members.remove(host);
        // A host that was released and is removed before it follows is the operator's to stop: nothing waits for it.
        self.hosts[host].expected.take_if(|expected| expected.primary == by);
        self.part_from(by, host);
        self.tell_members(by);
    }

    /// A host that was removed joins again.
    pub fn take_in(&mut self, primary: usize, host: usize) {
        let has_copy = matches!(self.hosts[host].shell, Shell::Replica(_));
        self.note(|| format!("host {primary} takes {host} in"));
        if !has_copy || self.random.once_in(2) {
            if !self.hosts[host].is_up() {
                return;
            }
            self.replace(host);
        }
        let version = self.hosts[primary].members.admit(host);
        self.begin_session_with(primary, host);
        let mut told = self.hosts[primary].members.tell();
        told.removed.clear();
        assert!(told.members.iter().any(|member| member.version == version && member.host == host_id(host)));
        self.learn(host, &told);
        self.tell_members(primary);
    }

    /// Every host is a member again, wherever operators disagreed.
    pub(super) fn reunite(&mut self) {
        let hosts = self.hosts.len();
        for host in 0..hosts {
            let versions = self.hosts.iter().filter_map(|other| other.members.newest.get(&host).copied());
            let newest = versions.max().unwrap_or(0).max(self.hosts[host].members.version);
            let version = newest + newest % 2;
            for other in &mut self.hosts {
                let members = &mut other.members;
                if members.own == host {
                    (members.version, members.removal) = (version, None);
                } else {
                    members.removed.remove(&host);
                    members.known.insert(host, version);
                    members.note();
                }
            }
        }
        for primary in self.primaries() {
            for other in (0..hosts).filter(|other| *other != primary) {
                let tracker = self.hosts[primary].tracker().expect("it is primary");
                if tracker.reports(self.clock(primary)).all(|(peer, _)| peer != host_id(other)) {
                    self.begin_session_with(primary, other);
                }
            }
        }
    }

    fn begin_session_with(&mut self, primary: usize, host: usize) {
        let (now, window, mode) =
            (self.clock(primary), self.settings.window_bytes, self.settings.modes[host]);
        let it = &mut self.hosts[primary];
        it.void_map(host);
        let (size, block_size) = (it.superblock.size_bytes, it.superblock.block_size);
        let peer = Peer::new(host_id(host), it.recover_map(host), size, block_size, window, mode);
        it.tracker_mut().expect("it is primary").add_peer(peer, now);
        self.plan_connect(LinkId::new(primary, host));
    }

    /// A host hears who the others are.
    pub(super) fn learn(&mut self, host: usize, told: &Told) {
        let before = self.hosts[host].members.peers();
        self.hosts[host].members.learn(told);
        let members = self.hosts[host].members.clone();
        let gone: Vec<usize> = before.into_iter().filter(|peer| !members.contains(*peer)).collect();
        gone.iter().for_each(|peer| self.part_from(host, *peer));
        if !gone.is_empty() {
            self.note(|| format!("host {host} hears that {gone:?} were removed"));
            self.tell_members(host);
        }
    }

    /// A host is a peer no more: its sessions end, and nothing is kept for it.
    fn part_from(&mut self, host: usize, peer: usize) {
        let (link, back) = (LinkId::new(host, peer), LinkId::new(peer, host));
        let now = self.clock(host);
        let it = &mut self.hosts[host];
        it.heard.remove(&peer);
        let left = match &mut it.shell {
            Shell::Primary(shell) => {
                shell.tracker.remove_peer(host_id(peer), now);
                it.void_map(peer);
                self.excuse(host, peer);
                self.hosts[host].members.peers()
            }
            Shell::Replica(shell) => {
                if shell.is_greeted_by(peer) {
                    shell.machine.handle_disconnected();
                }
                Vec::new()
            }
            Shell::Down | Shell::Rewriting(_) => Vec::new(),
        };
        self.links[link].dialler_side = None;
        self.links[link].united_by = None;
        self.links[back].listener_side = None;
        self.cut(link);
        self.cut(back);
        if let [last] = left[..] {
            // It keeps no activity log any more (D5).
            self.cut(LinkId::new(host, last));
        }
        self.differences.forget(host);
    }

    /// That the operator removed it, a host that counted on others can't know: then nothing is owed to it any more.
    fn excuse(&mut self, primary: usize, host: usize) {
        let it = &mut self.hosts[host];
        if it.superblock.given.is_for_ever() {
            it.expected.take_if(|expected| expected.primary == primary);
        }
    }

    /// A primary tells all that it reaches who the volume's hosts are.
    fn tell_members(&mut self, host: usize) {
        if self.hosts[host].tracker().is_none() {
            return;
        }
        let links: Vec<LinkId> = self.links.of_dialler(host).collect();
        for link in
            links.into_iter().filter(|link| self.links[*link].dialler_side.is_some()).collect::<Vec<_>>()
        {
            self.introduce(link);
        }
    }

    /// A primary tells a host who the volume's hosts are.
    pub(super) fn introduce(&mut self, link: LinkId) {
        let told = Message::from(self.hosts[link.dialler].members.tell());
        self.send(link, Channel::ToListener, Packet::Message(told.encode().expect("it is short")));
    }

    /// Every host that a primary tells of, itself first.
    pub(super) fn members_of(&self, host: usize) -> Vec<Member> {
        self.hosts[host].members.tell().members
    }

    /// Before a host is listened to: hears from all others whether it was removed meanwhile.
    pub(super) fn may_be_heard(&mut self, host: usize, greeter: usize) -> bool {
        if !self.hosts[host].members.contains(greeter) {
            return false;
        }
        self.ask_removals(host, Some(greeter));
        self.hosts[host].members.contains(greeter)
    }

    /// A host asks all others but one who was removed.
    pub(super) fn ask_removals(&mut self, asker: usize, but: Option<usize>) {
        for host in self.hosts[asker].members.peers() {
            if Some(host) != but {
                self.ask_members(asker, host);
            }
        }
    }

    /// A host asks another one who was removed.
    pub(super) fn ask_members(&mut self, asker: usize, host: usize) {
        let removed = self.removals_told(asker, host);
        if !removed.is_empty() {
            self.learn(asker, &Told { members: Vec::new(), removed });
        }
    }

    fn removals_told(&mut self, asker: usize, host: usize) -> Vec<Removal> {
        if !self.reaches(asker, host) {
            return Vec::new();
        }
        let members = &self.hosts[host].members;
        match members.removed.get(&asker) {
            Some(version) => vec![removal(asker, *version)],
            None => members.tell().removed,
        }
    }

    /// A member says that another host was promoted: nothing is answered until the others were asked.
    pub(super) fn hear_of(&mut self, host: usize, told: Succeeded) {
        let now = self.clock(host);
        let it = &mut self.hosts[host];
        if !told.fence.supersedes(it.superblock.fence) {
            // Both were promoted, and neither before the other: operators decide.
            return;
        }
        let life = it.life;
        let doubt = match it.claims.hear(told) {
            Weight::Nothing => return,
            Weight::Denied => None,
            Weight::Doubt => Some(it.tracker_mut().expect("it was told as a primary").doubt(now)),
        };
        it.doubts.extend(doubt);
        let delay = self.random.up_to(ASKING);
        self.plan(delay, Event::Judge(host, life, told, doubt));
    }

    /// The others have said what they know of it, those that could be reached.
    pub(super) fn judge(&mut self, host: usize, life: u64, told: Succeeded, doubt: Option<Doubt>) {
        if self.hosts[host].life != life || self.hosts[host].tracker().is_none() {
            return;
        }
        let (by, holder) = (host_number(told.by), host_number(told.fence.holder));
        let known = self.hosts[host].members.known.clone();
        let others: Vec<usize> = known.keys().copied().filter(|other| *other != by).collect();
        let removed: Vec<Removal> =
            others.iter().flat_map(|other| self.removals_told(host, *other)).collect();
        let standing = if others.contains(&holder) { self.hear(host, holder) } else { None };
        let members: Vec<_> = known.iter().map(|(host, version)| (host_id(*host), *version)).collect();
        let removals: Vec<_> = removed.iter().map(|removal| (removal.host, removal.version)).collect();
        let judgement = told.judge(&members, &removals, standing.as_ref());
        self.note(|| format!("host {host} hears that {holder} was promoted from {by}: {judgement:?}"));
        if !removed.is_empty() {
            self.learn(host, &Told { members: Vec::new(), removed });
        }
        let it = &mut self.hosts[host];
        it.claims.note(told, judgement);
        it.doubts.retain(|other| Some(*other) != doubt);
        if judgement == Judgement::Superseded {
            assert!(
                it.members.contains(by) && it.members.contains(holder),
                "X3: host {host} believes {by} that {holder} was promoted, and hears that one of them was removed"
            );
            return self.supersede(host, told.fence);
        }
        if let Some(doubt) = doubt {
            let now = self.clock(host);
            self.hosts[host].tracker_mut().expect("it was looked at").trust(doubt, now);
        }
    }

    /// A host that greeted is none of the volume's.
    pub(super) fn turn_away(&mut self, link: LinkId) {
        let no = Message::from(Refused { refusal: Refusal::UnknownKey, text: "removed".into() });
        self.send(link, Channel::ToDialler, Packet::Message(no.encode().expect("it is short")));
    }

    /// How all others stand, as far as they can be reached. Those that another one knows to be removed don't count.
    pub(super) fn hear_all(&mut self, asker: usize) -> Vec<Heard> {
        let mut told: BTreeMap<usize, u64> = BTreeMap::new();
        let mut heard = Vec::new();
        for host in self.hosts[asker].members.peers() {
            heard.push(Heard { host: host_id(host), standing: self.hear(asker, host) });
            for removal in self.removals_told(asker, host) {
                let newest = told.entry(host_number(removal.host)).or_default();
                *newest = removal.version.max(*newest);
            }
        }
        let known = &self.hosts[asker].members.known;
        for answer in &mut heard {
            let host = host_number(answer.host);
            if told.get(&host).is_some_and(|told| *told > known[&host]) {
                answer.standing = None;
            }
        }
        heard
    }
}
