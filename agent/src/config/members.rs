//! A volume's hosts, as they tell each other of them, and as each keeps them.

use super::{Address, Mode, NAME_LIMIT_BYTES, Name, PeerConfig, Role, VolumeConfig};
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{MEMBERS_LIMIT, Member};
use std::collections::HashSet;

/// How many addresses of a host are kept at most.
pub const ADDRESSES: usize = 16;

/// How many other hosts a volume has at most.
pub const PEERS_LIMIT: usize = MEMBERS_LIMIT - 1;

impl VolumeConfig {
    /// The volume's other hosts, as third ones are told of them.
    pub fn members(&self) -> impl Iterator<Item = Member> + '_ {
        self.peers.iter().map(|peer| Member {
            name: peer.name.to_string(),
            host: peer.host,
            addresses: peer.addresses.iter().map(|address| address.as_str().to_owned()).collect(),
            mode: peer.mode.into(),
            version: peer.version,
        })
    }

    /// A member as a peer of this host, under a name that no other peer has.
    #[must_use]
    pub fn peer_of(&self, member: &Member, role: Role) -> PeerConfig {
        let name = self.free_name(&member.name, member.host, None);
        let addresses = member.addresses.iter().filter_map(|address| address.parse().ok()).collect();
        let peer = PeerConfig::new(name, role, member.host, addresses);
        PeerConfig { mode: member.mode.into(), version: member.version, ..peer }
    }

    /// The name that a host goes by; with a number behind it where another peer, or this host (`own`), goes by it too.
    fn free_name(&self, wanted: &str, host: HostId, own: Option<&Name>) -> Name {
        let nearest = Name::nearest(wanted);
        let is_taken = |name: &Name| {
            own == Some(name) || self.peers.iter().any(|peer| peer.name == *name && peer.host != host)
        };
        let numbered = (2..).map(|number: u32| {
            let suffix = format!("-{number}");
            // The suffix must not be cut off with the end of a long name.
            let kept: String = nearest.as_str().chars().take(NAME_LIMIT_BYTES - suffix.len()).collect();
            Name::nearest(&format!("{kept}{suffix}"))
        });
        let name = std::iter::once(nearest.clone()).chain(numbered).find(|name| !is_taken(name));
        name.expect("there are more numbers than peers")
    }

    /// Takes over what a host says of itself: what it is called, and where it is. Gives the name that it is known by now,
    /// where that changed.
    pub fn meet(&mut self, host: HostId, name: &str, addresses: Vec<Address>, own: &Name) -> Option<Name> {
        let name = self.free_name(name, host, Some(own));
        let known = self.peers.iter_mut().find(|peer| peer.host == host)?;
        // One that started before its network was up knows none of its own but loopback.
        let lead_nowhere = |addresses: &[Address]| addresses.iter().all(Address::is_loopback);
        let is_better = !lead_nowhere(&addresses) || lead_nowhere(&known.addresses);
        if !addresses.is_empty() && is_better {
            known.addresses = addresses;
        }
        let is_news = known.name != name;
        known.name = name.clone();
        is_news.then_some(name)
    }

    /// Takes over what the primary, which comes first, tells of all hosts, this one (`own`) among them: their addresses,
    /// and on a replica the modes, so that a promotion changes no promise (W4). What a host says of itself counts more than
    /// what the primary says of it, which may be older.
    pub fn learn(&mut self, members: &[Member], own: HostId, own_name: &Name) {
        let primary = members.first().map(|member| member.host);
        // What the primary promises for this host, this host promises for the primary when the two change places.
        let own_mode = members.iter().find(|member| member.host == own).map(|member| member.mode);
        let members: Vec<&Member> =
            members.iter().filter(|member| self.takes_for_member(member, own)).collect();
        for member in members.into_iter().filter(|member| member.host != own) {
            let told = self.peer_of(member, Role::Replica);
            let is_replica = self.role == Role::Replica;
            let is_primary = primary == Some(member.host);
            let mode = if is_primary { own_mode } else { Some(member.mode) };
            let has_room = self.peers.len() < PEERS_LIMIT;
            let Some(known) = self.peers.iter_mut().find(|peer| peer.host == member.host) else {
                // Messages are bounded; what many of them tell must be as well (X1).
                if has_room {
                    self.peers.push(PeerConfig { mode: mode.map_or(told.mode, Mode::from), ..told });
                }
                continue;
            };
            known.version = known.version.max(told.version);
            known.mode = mode.filter(|_| is_replica).map_or(known.mode, Mode::from);
            if is_primary {
                self.meet(member.host, &member.name, told.addresses, own_name);
            } else {
                let others = std::mem::take(&mut known.addresses);
                known.addresses = told.addresses;
                known.addresses.extend(others);
                let mut seen = HashSet::new();
                known.addresses.retain(|address| seen.insert(address.clone()));
                known.addresses.truncate(ADDRESSES);
            }
        }
        if self.role == Role::Replica {
            self.set_roles(Role::Replica, primary);
        }
    }
}
