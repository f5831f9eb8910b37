//! Hosts that were removed from a volume (X3), as each of its hosts keeps them and tells them on. Which word counts, by the
//! numbers of memberships, is [`blockmirror_protocol::membership`]'s.

use super::{Mode, Name, PeerConfig, Role, VolumeConfig};
use blockmirror_protocol::membership;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{Member, Removal};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How many removed hosts that it never knew a volume remembers at most; of those that it knew, all.
const STRANGERS: usize = 256;
/// For how long a removal counts as late, in seconds; far longer than anybody keeps his word.
const LATELY_SECONDS: u64 = 3600;

/// A host that was removed from the volume: `[[removed]]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemovedConfig {
    /// What it was called.
    pub name: Name,
    /// The fingerprint of its key.
    #[serde(serialize_with = "show", deserialize_with = "host_id")]
    pub host: HostId,
    /// The host on which the operator removed it.
    pub by: Name,
    /// When that was, in seconds since 1970.
    pub at_seconds: u64,
    /// See [`PeerConfig::version`].
    pub version: u64,
    /// The mode in which it was mirrored to by this host; nothing where it was not known here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
}

impl RemovedConfig {
    /// `b was removed from data by a at 14:03:11 UTC`.
    #[must_use]
    pub fn words(&self, volume: &Name) -> String {
        let at = crate::quantity::clock(self.at_seconds);
        format!("{} was removed from {volume} by {} at {at}", self.name, self.by)
    }

    fn told(removal: &Removal) -> Self {
        Self {
            name: Name::nearest(&removal.name),
            host: removal.host,
            by: Name::nearest(&removal.by),
            // TOML's integers have a sign.
            at_seconds: removal.at_seconds.min(i64::MAX as u64),
            version: removal.version,
            mode: None,
        }
    }

    fn tell(&self) -> Removal {
        Removal {
            host: self.host,
            name: self.name.to_string(),
            by: self.by.to_string(),
            at_seconds: self.at_seconds,
            version: self.version,
        }
    }
}

impl VolumeConfig {
    /// Removes a peer, by the operator's word. Does nothing where there is none of that key.
    pub fn remove(&mut self, host: HostId, by: &Name, now_seconds: u64) {
        let Some(index) = self.peers.iter().position(|peer| peer.host == host) else { return };
        let PeerConfig { name, version, mode, .. } = self.peers.remove(index);
        let (by, version, mode) = (by.clone(), version + 1, Some(mode));
        self.removed.push(RemovedConfig { name, host, by, at_seconds: now_seconds, version, mode });
    }

    /// Whether a host that was removed may still count on nothing being answered without it, as one in the mode sync that
    /// has not heard of its removal (W4). Clocks may have jumped, and hosts' clocks differ.
    #[must_use]
    pub fn may_owe_word(&self, now_seconds: u64) -> bool {
        let is_late =
            |removed: &RemovedConfig| now_seconds < removed.at_seconds.saturating_add(LATELY_SECONDS);
        self.removed.iter().any(|removed| removed.mode == Some(Mode::Sync) && is_late(removed))
    }

    /// That a host was removed, if it was.
    #[must_use]
    pub fn removal_of(&self, host: HostId) -> Option<&RemovedConfig> {
        self.removed.iter().find(|removed| removed.host == host)
    }

    /// The hosts that were removed, as others are told of them; among them this one, for a host that is a member yet.
    pub fn removals(&self) -> impl Iterator<Item = Removal> + '_ {
        self.removed.iter().map(RemovedConfig::tell)
    }

    /// The removal of one host, as it is told of it.
    #[must_use]
    pub fn told_removal_of(&self, host: HostId) -> Option<Removal> {
        self.removal_of(host).map(RemovedConfig::tell)
    }

    /// The number that a host has which is taken in now.
    #[must_use]
    pub fn version_of_admission(&self, host: HostId) -> u64 {
        let known = self.peers.iter().find(|peer| peer.host == host).map(|peer| peer.version);
        known.or_else(|| self.removal_of(host).map(|removed| removed.version + 1)).unwrap_or(0)
    }

    /// Takes a host in again that was removed.
    pub fn readmit(&mut self, host: HostId) {
        self.removed.retain(|removed| removed.host != host);
    }

    /// Takes over which hosts were removed, this one (`own`) among them, as a member tells.
    pub fn learn_removals(&mut self, told: &[Removal], own: HostId) {
        for removal in told {
            let is_news = |known: u64| membership::is_removal(removal.version, known);
            if removal.host == own {
                let known = self.removal.as_ref().map_or(self.version, |removal| removal.version);
                if is_news(known) {
                    self.removal = Some(RemovedConfig::told(removal));
                }
                continue;
            }
            let peer = self.peers.iter().position(|peer| peer.host == removal.host);
            let removed = self.removed.iter().position(|removed| removed.host == removal.host);
            match (peer, removed) {
                (Some(index), _) if is_news(self.peers[index].version) => {
                    let mode = Some(self.peers.remove(index).mode);
                    self.readmit(removal.host);
                    self.removed.push(RemovedConfig { mode, ..RemovedConfig::told(removal) });
                }
                (None, Some(index)) if is_news(self.removed[index].version) => {
                    let mode = self.removed[index].mode;
                    self.removed[index] = RemovedConfig { mode, ..RemovedConfig::told(removal) };
                }
                (None, None) if is_news(0) && self.removed.len() < STRANGERS => {
                    self.removed.push(RemovedConfig::told(removal));
                }
                _ => {}
            }
        }
    }

    /// Whether a host counts as a member that is told to be one: whether that is newer than its removal, if it was
    /// removed. Where it is this host (`own`), what is told of it is kept.
    pub(super) fn takes_for_member(&mut self, member: &Member, own: HostId) -> bool {
        let removed = if member.host == own { self.removal.as_ref() } else { self.removal_of(member.host) };
        let known = removed.map(|removed| removed.version);
        let is_member = membership::is_member(member.version, known);
        if is_member && member.host == own {
            self.removal = None;
            self.version = self.version.max(member.version);
        } else if is_member {
            self.readmit(member.host);
        }
        is_member
    }

    /// The primary, as far as this host knows; none where it is this one.
    #[must_use]
    pub fn primary(&self) -> Option<&PeerConfig> {
        self.peers.iter().find(|peer| peer.role == Role::Primary)
    }
}

fn show<S: Serializer>(host: &HostId, serializer: S) -> Result<S::Ok, S::Error> {
    super::show(host, serializer)
}

fn host_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<HostId, D::Error> {
    super::host_id(deserializer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmirror_protocol::membership::STEP;
    use blockmirror_protocol::units::{BlockSize, VolumeId};

    const OWN: HostId = HostId([9; 32]);

    fn own_name() -> Name {
        "own".parse().unwrap()
    }

    /// The word that it was given was known to the run of the agent alone in which it was removed.
    #[test]
    fn a_host_that_was_removed_lately_may_count_on_what_it_was_promised() {
        let removed = |mode, name: &str| {
            let mut config = config();
            let index = config.peers.iter().position(|peer| peer.name.as_str() == name).unwrap();
            config.peers[index].mode = mode;
            config.remove(config.peers[index].host, &own_name(), 10_000);
            config
        };
        let name = config().peers[1].name.to_string();
        for (mode, now, owes) in [
            (Mode::Sync, 10_001, true),
            (Mode::Sync, 9_000, true),
            (Mode::Sync, 13_600, false),
            (Mode::SemiSync, 10_001, false),
            (Mode::Async, 10_001, false),
        ] {
            assert_eq!(removed(mode, &name).may_owe_word(now), owes, "{mode} {now}");
        }
        assert!(!config().may_owe_word(0));
    }

    fn host(number: u8) -> HostId {
        HostId([number; 32])
    }

    fn member(name: &str, number: u8, version: u64) -> Member {
        let mode = Mode::Async.into();
        let addresses = vec![format!("192.0.2.{number}:7447")];
        Member { name: name.to_owned(), host: host(number), addresses, mode, version }
    }

    /// A replica of the hosts 1, 2 and 3, the first of which is the primary.
    fn config() -> VolumeConfig {
        let mut config = VolumeConfig::new(
            "data".parse().unwrap(),
            VolumeId([1; 16]),
            Role::Replica,
            "/data".into(),
            1 << 20,
            BlockSize::default(),
        );
        config.learn(&[member("a", 1, 0), member("b", 2, 0), member("c", 3, 0)], OWN, &own_name());
        config
    }

    fn peers(config: &VolumeConfig) -> Vec<&str> {
        config.peers.iter().map(|peer| peer.name.as_str()).collect()
    }

    #[test]
    fn a_removed_host_stays_out_whoever_still_lists_it_until_it_is_taken_in_again() {
        let mut one = config();
        one.remove(host(2), &"a".parse().unwrap(), 1_700_000_000);
        assert_eq!(peers(&one), ["a", "c"]);
        assert_eq!(
            one.removal_of(host(2)).unwrap().words(&one.name),
            "b was removed from data by a at 22:13:20 UTC"
        );
        // One that was away still lists it.
        one.learn(&[member("c", 3, 0), member("b", 2, 0)], OWN, &own_name());
        assert_eq!(peers(&one), ["a", "c"]);
        // Another host hears of it, and keeps it; hearing of it again changes nothing.
        let mut other = config();
        let told: Vec<Removal> = one.removals().collect();
        other.learn_removals(&told, OWN);
        other.learn_removals(&told, OWN);
        assert_eq!((peers(&other), other.removed.len()), (vec!["a", "c"], 1));
        // A new token takes it in.
        let version = one.version_of_admission(host(2));
        assert_eq!(version, 2);
        other.learn(&[member("a", 1, 0), member("b", 2, version)], OWN, &own_name());
        assert_eq!((peers(&other), other.removed.len()), (vec!["a", "c", "b"], 0));
        // The old removal is older than that, a new one is not.
        other.learn_removals(&told, OWN);
        assert_eq!(peers(&other), ["a", "c", "b"]);
        other.learn_removals(&[Removal { version: version + 1, ..told[0].clone() }], OWN);
        assert_eq!(peers(&other), ["a", "c"]);
    }

    #[test]
    fn a_host_hears_of_its_own_removal_and_of_its_end() {
        let mut config = config();
        let removal = Removal { host: OWN, name: "x".into(), by: "a".into(), at_seconds: 1, version: 1 };
        config.learn_removals(std::slice::from_ref(&removal), OWN);
        assert_eq!(config.removal.as_ref().unwrap().version, 1);
        config.learn(&[member("a", 1, 0), Member { host: OWN, ..member("x", 9, 0) }], OWN, &own_name());
        assert!(config.removal.is_some(), "that is older");
        config.learn(&[member("a", 1, 0), Member { host: OWN, ..member("x", 9, 2) }], OWN, &own_name());
        assert_eq!((&config.removal, config.version), (&None, 2));
        config.learn_removals(&[removal], OWN);
        assert_eq!(config.removal, None);
    }

    #[test]
    fn what_a_peer_tells_of_removals_has_bounds() {
        let mut config = config();
        let removal = |number: u16, version| {
            let mut key = [0xee; 32];
            key[..2].copy_from_slice(&number.to_le_bytes());
            Removal {
                host: HostId(key),
                name: "x".repeat(5000),
                by: String::new(),
                at_seconds: u64::MAX,
                version,
            }
        };
        let told: Vec<Removal> = (0..2000).map(|number| removal(number, 1)).collect();
        config.learn_removals(&told, OWN);
        assert_eq!(config.removed.len(), STRANGERS);
        assert!(toml::to_string(&config).unwrap().len() < 128 << 10);
        // Numbers that leave no room for later ones, and those of members, are nobody's removal.
        for version in [u64::MAX, STEP + 1, 2, 0] {
            let told = Removal { host: host(2), ..removal(0, version) };
            config.learn_removals(&[told], OWN);
            config.learn_removals(&[Removal { host: OWN, ..removal(0, version) }], OWN);
        }
        assert_eq!((peers(&config), &config.removal), (vec!["a", "b", "c"], &None));
        config.learn(&[member("a", 1, 0), member("d", 4, u64::MAX - 1), member("e", 5, 3)], OWN, &own_name());
        assert_eq!(peers(&config), ["a", "b", "c"]);
        // Those that are known find room in any case.
        config.learn_removals(&[Removal { host: host(2), ..removal(0, 1) }], OWN);
        assert_eq!(peers(&config), ["a", "c"]);
    }
}
