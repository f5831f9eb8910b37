//! A volume's hosts, as they tell each other of them, and as each keeps them.

use super::{Address, Mode, NAME_LIMIT_BYTES, Name, PeerConfig, Role, VolumeConfig};
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::Member;

impl VolumeConfig {
    /// The volume's other hosts, as third ones are told of them.
    pub fn members(&self) -> impl Iterator<Item = Member> + '_ {
        self.peers.iter().map(|peer| Member {
            name: peer.name.to_string(),
            host: peer.host,
            addresses: peer.addresses.iter().map(|address| address.as_str().to_owned()).collect(),
            mode: peer.mode.into(),
        })
    }

    /// A member as a peer of this host, under a name that no other peer has.
    #[must_use]
    pub fn peer_of(&self, member: &Member, role: Role) -> PeerConfig {
        let nearest = Name::nearest(&member.name);
        let is_taken =
            |name: &Name| self.peers.iter().any(|peer| peer.name == *name && peer.host != member.host);
        let numbered = (2..).map(|number: u32| {
            let suffix = format!("-{number}");
            // The suffix must not be cut off with the end of a long name.
            let kept: String = nearest.as_str().chars().take(NAME_LIMIT_BYTES - suffix.len()).collect();
            Name::nearest(&format!("{kept}{suffix}"))
        });
        let name = std::iter::once(nearest.clone()).chain(numbered).find(|name| !is_taken(name));
        let name = name.expect("there are more numbers than peers");
        let addresses = member.addresses.iter().filter_map(|address| address.parse().ok()).collect();
        PeerConfig { mode: member.mode.into(), ..PeerConfig::new(name, role, member.host, addresses) }
    }

    /// Takes over what the primary, which comes first, tells of all hosts, this one (`own`) among them: their addresses,
    /// and on a replica the modes, so that a promotion changes no promise (W4).
    pub fn learn(&mut self, members: &[Member], own: HostId) {
        let primary = members.first().map(|member| member.host);
        // What the primary promises for this host, this host promises for the primary when the two change places.
        let own_mode = members.iter().find(|member| member.host == own).map(|member| member.mode);
        for member in members.iter().filter(|member| member.host != own) {
            let told = self.peer_of(member, Role::Replica);
            let is_replica = self.role == Role::Replica;
            let mode = if primary == Some(member.host) { own_mode } else { Some(member.mode) };
            match self.peers.iter_mut().find(|peer| peer.host == member.host) {
                Some(known) => {
                    // A primary that started before its network was up knows none of its own but loopback.
                    let lead_nowhere = |addresses: &[Address]| addresses.iter().all(Address::is_loopback);
                    let is_better = !lead_nowhere(&told.addresses) || lead_nowhere(&known.addresses);
                    if !told.addresses.is_empty() && is_better {
                        known.addresses = told.addresses;
                    }
                    known.mode = mode.filter(|_| is_replica).map_or(known.mode, Mode::from);
                }
                None => self.peers.push(PeerConfig { mode: mode.map_or(told.mode, Mode::from), ..told }),
            }
        }
        if self.role == Role::Replica {
            self.set_roles(Role::Replica, primary);
        }
    }
}
