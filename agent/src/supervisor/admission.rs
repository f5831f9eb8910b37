//! Who is let in: invitations, and what their bearers may do.

use super::addresses::is_local;
use super::{Supervisor, failed, refused};
use crate::config::{Address, Mode, Name, PEERS_LIMIT, Role, VolumeConfig};
use crate::control::api::{Failure, INVITATION_SCHEMA, Invitation, InviteRequest};
use crate::invitations::{InvitationError, Invitations};
use crate::quantity::unix_seconds;
use crate::token::{Secret, Token};
use crate::transport::{Connection, key};
use crate::volume::Ask;
use crate::words::with_causes;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{Join, Joined, Member, Refusal, Refused};
use std::net::SocketAddr;

impl Supervisor {
    pub(super) async fn invite_to(
        &self,
        volume: Name,
        request: InviteRequest,
    ) -> Result<Invitation, Failure> {
        let id = {
            let volumes = self.volumes.lock().await;
            volumes.get(&volume).ok_or_else(|| Failure::no_such_volume(&volume))?.config.id
        };
        let secret = Secret(key::random());
        let mut invitations =
            Invitations::load(&self.state_folder(&volume)).map_err(|error| failed(with_causes(&error)))?;
        invitations
            .create(unix_seconds(), request.expires_seconds, &secret)
            .map_err(|error| failed(with_causes(&error)))?;
        let addresses = if request.addresses.is_empty() { self.own_addresses() } else { request.addresses };
        let token = Token {
            addresses: addresses.iter().map(|address| address.as_str().to_owned()).collect(),
            host: self.endpoint.id(),
            volume: id,
            name: volume.to_string(),
            secret,
        };
        Ok(Invitation {
            schema: INVITATION_SCHEMA.to_owned(),
            volume,
            token: token.encode().map_err(|error| failed(error.to_string()))?,
            expires_seconds: request.expires_seconds,
            addresses,
        })
    }

    /// A new host asks to become a replica.
    pub(super) async fn admit(&self, join: Join, connection: &Connection) -> Result<Joined, Refused> {
        let config = self.config_of(join.volume).await.ok_or_else(unknown_volume)?;
        if config.role != Role::Primary {
            let text = "only the primary takes replicas in; use a token that it made".to_owned();
            return Err(Refused { refusal: Refusal::Role, text });
        }
        if !Member::is_sound(&join.name, &join.listen) || config.peers.len() >= PEERS_LIMIT {
            return Err(other(
                "the new host's name or addresses are too long, or there are too many hosts".to_owned(),
            ));
        }
        if join.name == self.name.as_str() {
            // Commands name hosts, and neither would know which one is meant.
            return Err(other(format!(
                "the new host and this one are both called {}: give one of them another `name` in agent.toml",
                join.name
            )));
        }
        self.use_secret(&config.name, &Secret(join.secret), join.ask_only)?;
        let member = Member {
            name: join.name,
            host: connection.peer(),
            addresses: seen_addresses(&join.listen, connection.remote_address()),
            mode: Mode::default().into(),
        };
        if !join.ask_only {
            self.add_replica(&config, &member).await.map_err(|failure| other(failure.message))?;
        }
        let mut members = vec![self.own_member()];
        members.extend(config.members().filter(|known| known.host != member.host));
        members.push(member);
        Ok(Joined {
            volume: config.id,
            name: config.name.to_string(),
            size_bytes: config.size_bytes,
            block_size: config.block_size,
            members,
        })
    }

    /// Lets a host read for a recovery: one of the volume's, or the bearer of a token, as long as the agent runs.
    pub(super) async fn admit_recovery(
        &self,
        config: &VolumeConfig,
        secret: Option<[u8; 32]>,
        peer: HostId,
    ) -> Result<(), Refused> {
        if self.may_recover(config, peer).await {
            return Ok(());
        }
        let Some(secret) = secret else {
            let text = "this key is not one of the volume's hosts; use the failed host's key, \
                        or a token from `blockmirror invite` on this host";
            return Err(Refused { refusal: Refusal::UnknownKey, text: text.to_owned() });
        };
        self.use_secret(&config.name, &Secret(secret), false)?;
        self.admitted.lock().await.insert((config.id, peer));
        Ok(())
    }

    pub(super) async fn may_recover(&self, config: &VolumeConfig, host: HostId) -> bool {
        config.peers.iter().any(|peer| peer.host == host)
            || self.admitted.lock().await.contains(&(config.id, host))
    }

    /// Checks a secret, and uses it up unless `only_check`.
    fn use_secret(&self, volume: &Name, secret: &Secret, only_check: bool) -> Result<(), Refused> {
        let token = |text: String| Refused { refusal: Refusal::Token, text };
        let mut invitations =
            Invitations::load(&self.state_folder(volume)).map_err(|error| other(with_causes(&error)))?;
        if only_check {
            return invitations.check(secret, unix_seconds()).map_err(|error| token(error.to_string()));
        }
        invitations.redeem(secret, unix_seconds()).map_err(|error| match error {
            InvitationError::Invalid(invalid) => token(invalid.to_string()),
            error => other(with_causes(&error)),
        })
    }

    async fn add_replica(&self, config: &VolumeConfig, member: &Member) -> Result<(), Failure> {
        let addresses: Vec<Address> =
            member.addresses.iter().filter_map(|address| address.parse().ok()).collect();
        if addresses.is_empty() {
            return Err(refused("the new host tells no address that this one could reach it at"));
        }
        let peer = config.peer_of(member, Role::Replica);
        let (host, is_new) = (peer.host, config.peers.iter().all(|known| known.host != peer.host));
        self.change_config(&config.name, |config| {
            // A host that joins anew has an empty copy; where it listens may have changed.
            match config.peers.iter_mut().find(|known| known.host == peer.host) {
                Some(known) => known.addresses = addresses,
                None => config.peers.push(peer.clone()),
            }
        })
        .await?;
        let handle = self.handle_of(&config.name).await?;
        let added = handle.answer(|answer| Ask::AddPeer(peer, answer)).await;
        let added = added.unwrap_or_else(|| Err("the volume's thread has ended".to_owned())).map_err(failed);
        if added.is_err() && is_new {
            // Nothing of it is left there, so nothing of it is left here.
            self.change_config(&config.name, |config| config.peers.retain(|known| known.host != host))
                .await?;
        }
        added
    }
}

/// What a host says of where it listens, with the address that it is seen at in place of an unspecified one. A link-local
/// one means nothing without the link.
pub(super) fn seen_addresses(listen: &[String], seen: SocketAddr) -> Vec<String> {
    let mut addresses: Vec<String> = Vec::new();
    for address in listen {
        let address = match address.parse::<SocketAddr>() {
            Ok(told) if !told.ip().is_unspecified() => address.clone(),
            Ok(_) if is_local(seen.ip()) && listen.len() > 1 => continue,
            Ok(told) => SocketAddr::new(seen.ip(), told.port()).to_string(),
            Err(_) => address.clone(),
        };
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

pub(super) fn unknown_volume() -> Refused {
    Refused { refusal: Refusal::UnknownVolume, text: "this host has no such volume".to_owned() }
}

fn other(text: String) -> Refused {
    Refused { refusal: Refusal::Other, text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unspecified_address_stands_for_the_one_that_is_seen() {
        let seen = "192.0.2.7:40000".parse().unwrap();
        let listen = ["0.0.0.0:7447".to_owned(), "[::]:7448".to_owned(), "b.example:7447".to_owned()];
        let told = seen_addresses(&listen, seen);
        assert_eq!(told, ["192.0.2.7:7447", "192.0.2.7:7448", "b.example:7447"]);
        let listen = ["192.0.2.7:7447".to_owned(), "[fd00::7]:7447".to_owned(), "[::]:7447".to_owned()];
        for (seen, told) in [
            ("192.0.2.7:40000", &listen[..2]),
            (
                "198.51.100.1:40000",
                &["192.0.2.7:7447", "[fd00::7]:7447", "198.51.100.1:7447"].map(str::to_owned),
            ),
            ("[fe80::1%3]:40000", &listen[..2]),
            ("127.0.0.1:40000", &listen[..2]),
        ] {
            assert_eq!(seen_addresses(&listen, seen.parse().unwrap()), told, "{seen}");
        }
    }
}
