//! Who is let in: invitations, and what their bearers may do.

use super::addresses::is_local;
use super::files::{Turn, Turns, with_invitations};
use super::operations::{Operator, finish};
use super::{Supervisor, failed, refused};
use crate::config::{Address, Mode, Name, PEERS_LIMIT, Role, VolumeConfig};
use crate::control::api::{
    Failure, INVITATION_SCHEMA, INVITATIONS_SCHEMA, Invitation, InvitationsReply, InvitationsRequest,
    InviteRequest, RevokeRequest,
};
use crate::control::verbs::{CarryOut, InvitationOf};
use crate::state::invitations::{Invalid, InvitationError, Invitations, Now};
use crate::token::{Secret, Token};
use crate::transport::{CloseReason, Connection, key};
use crate::volume::Ask;
use crate::words::with_causes;
use blockmirror_protocol::wire::message::{Join, Joined, Member, Recover, Refusal, Refused};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::task::JoinSet;

/// How long a state folder may take to keep the time: the agent's start and its end wait for it.
const NOTE_TIME: Duration = Duration::from_secs(1);

/// What whoever may not read is told, whether there is such a volume or not.
const NO_HOST: &str = "this key is not that of a host of such a volume; use the failed host's key, or a token from \
                       `blockmirror invite` on this host";

/// A key that a token let in for a recovery.
pub(super) struct Admission {
    /// The name of the token's invitation.
    id: String,
    /// What it recovers over.
    connection: Connection,
}

impl CarryOut<InviteRequest> for Operator {
    async fn carry_out(&self, volume: Name, request: InviteRequest) -> Result<Invitation, Failure> {
        self.0.invite_to(volume, request).await
    }
}

impl CarryOut<InvitationsRequest> for Operator {
    async fn carry_out(&self, volume: Name, _: InvitationsRequest) -> Result<InvitationsReply, Failure> {
        self.0.invitations_of(volume).await
    }
}

impl CarryOut<RevokeRequest> for Operator {
    async fn carry_out(
        &self,
        invitation: InvitationOf,
        _: RevokeRequest,
    ) -> Result<InvitationsReply, Failure> {
        // What it let in ends, also where the tool goes away before the disk has answered.
        let supervisor = self.0.clone();
        finish(tokio::spawn(async move { supervisor.revoke(invitation).await })).await
    }
}

impl Supervisor {
    async fn invite_to(&self, volume: Name, request: InviteRequest) -> Result<Invitation, Failure> {
        let id = {
            let volumes = self.volumes.lock().await;
            volumes.get(&volume).ok_or_else(|| Failure::no_such_volume(&volume))?.config.id
        };
        let secret = Secret(key::random());
        let (given, lifetime_seconds) = (secret.clone(), request.expires_seconds);
        self.at_invitations(&volume, move |invitations| {
            invitations.create(&Now::read(), lifetime_seconds, &given)
        })
        .await
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
        let is_member = config.peers.iter().any(|peer| peer.host == connection.peer());
        self.admits(&config.name, Secret(join.secret), join.ask_only, is_member).await?;
        let member = Member {
            name: join.name,
            host: connection.peer(),
            addresses: seen_addresses(&join.listen, connection.remote_address()),
            mode: Mode::default().into(),
            version: config.version_of_admission(connection.peer()),
        };
        if !join.ask_only {
            self.add_replica(&config, &member).await.map_err(|failure| other(failure.message))?;
        }
        let mut members = self.members_of(&config).members;
        members.retain(|known| known.host != member.host);
        members.push(member);
        Ok(Joined {
            volume: config.id,
            name: config.name.to_string(),
            size_bytes: config.size_bytes,
            block_size: config.block_size,
            members,
        })
    }

    /// Whether a host would be let in to recover; a secret is not used up.
    pub(super) async fn may_ask(
        &self,
        config: &VolumeConfig,
        secret: Option<[u8; 32]>,
        connection: &Connection,
    ) -> Result<(), Refused> {
        if self.may_recover(config, connection).await {
            return Ok(());
        }
        match secret {
            Some(secret) => self.check_secret(&config.name, Secret(secret)).await,
            None => Err(Refused { refusal: Refusal::UnknownKey, text: NO_HOST.to_owned() }),
        }
    }

    /// Lets a host read for a recovery: one of the volume's, or the bearer of a token. A token is used up only where the
    /// recovery can begin. Without a right to anything, nobody hears which volumes there are.
    pub(super) async fn admit_recovery(
        &self,
        config: Option<&VolumeConfig>,
        recover: &Recover,
        connection: &Connection,
    ) -> Result<(), Refused> {
        let peer = connection.peer();
        let is_admitted = match config {
            Some(config) => self.may_recover(config, connection).await,
            None => false,
        };
        let secret = recover.secret.map(Secret).filter(|_| !is_admitted);
        let unknown = |text: &str| Refused { refusal: Refusal::UnknownKey, text: text.to_owned() };
        let Some(config) = config else {
            return Err(match secret {
                Some(_) => token(&Invalid::Wrong),
                None => unknown(NO_HOST),
            });
        };
        match &secret {
            Some(secret) => self.check_secret(&config.name, secret.clone()).await?,
            None if !is_admitted => return Err(unknown(NO_HOST)),
            None => {}
        }
        let handle = self.handle_of(&config.name).await.map_err(|_| unknown_volume())?;
        let answer = handle.answer(|answer| Ask::MayRecover(recover.accept_inconsistent, answer)).await;
        answer.unwrap_or_else(|| Err(other("the volume's thread has ended".to_owned())))?;
        if let Some(secret) = secret {
            // Whoever takes the invitation back has its turn after this, and ends what begins here.
            let (id, _turn) = self.use_secret(&config.name, secret).await?;
            let admission = Admission { id, connection: connection.clone() };
            self.admitted.lock().await.insert((config.id, peer), admission);
        } else if let Some(admission) = self.admitted.lock().await.get_mut(&(config.id, peer)) {
            admission.connection = connection.clone();
        }
        Ok(())
    }

    /// Whether a host may begin a recovery without a token: one of the volume's, which nobody who can be asked knows to be
    /// removed (X3), or one whose token was good and has neither expired since nor been revoked.
    async fn may_recover(&self, config: &VolumeConfig, connection: &Connection) -> bool {
        if self.may_be_heard(config, None, connection).await {
            return true;
        }
        let host = connection.peer();
        let id = {
            let admitted = self.admitted.lock().await;
            let Some(admission) = admitted.get(&(config.id, host)) else { return false };
            admission.id.clone()
        };
        let asked = id.clone();
        let is_over = self
            .at_invitations(&config.name, move |invitations| Ok(invitations.is_over(&asked, &Now::read())))
            .await;
        // What can't be read lets nobody in.
        let is_over = is_over.map_or(true, |(is_over, _)| is_over);
        let mut admitted = self.admitted.lock().await;
        let is_gone =
            |admission: &Admission| is_over && admission.id == id && !admission.connection.is_live();
        if admitted.get(&(config.id, host)).is_some_and(is_gone) {
            admitted.remove(&(config.id, host));
        }
        !is_over
    }

    /// Whether a host may read on in a recovery that it began: one that is under way goes on after its token has expired.
    pub(super) async fn may_read(&self, config: &VolumeConfig, connection: &Connection) -> bool {
        if self.may_be_heard(config, None, connection).await {
            return true;
        }
        let admitted = self.admitted.lock().await;
        let admission = admitted.get(&(config.id, connection.peer()));
        admission.is_some_and(|admission| admission.connection.is_same(connection))
    }

    async fn invitations_of(&self, volume: Name) -> Result<InvitationsReply, Failure> {
        self.config_of_name(&volume).await?;
        let listed = self.at_invitations(&volume, |invitations| Ok(invitations.list(&Now::read()))).await;
        let (invitations, _) = listed.map_err(|error| failed(with_causes(&error)))?;
        Ok(InvitationsReply { schema: INVITATIONS_SCHEMA.to_owned(), volume, invitations })
    }

    /// Takes an invitation back; what its bearer is just reading ends.
    async fn revoke(&self, InvitationOf { volume, id }: InvitationOf) -> Result<InvitationsReply, Failure> {
        let config = self.config_of_name(&volume).await?;
        let wanted = id.clone();
        let revoked =
            self.at_invitations(&volume, move |invitations| invitations.revoke(&wanted, &Now::read())).await;
        let (is_known, turn) = revoked.map_err(|error| failed(with_causes(&error)))?;
        if !is_known {
            let text =
                format!("no invitation \"{id}\" of {volume}; blockmirror invite {volume} --list tells them");
            return Err(refused(text));
        }
        self.admitted.lock().await.retain(|(known, _), admission| {
            let is_over = *known == config.id && admission.id == id;
            if is_over {
                admission.connection.close(CloseReason::Refused, "the token was revoked");
            }
            !is_over
        });
        drop(turn);
        self.invitations_of(volume).await
    }

    /// Keeps the time for invitations, so that a clock that goes back later lets nobody in.
    pub(super) async fn note_time(&self) {
        let volumes: Vec<(Name, Turns)> = {
            let volumes = self.volumes.lock().await;
            volumes.iter().map(|(name, entry)| (name.clone(), entry.inviting.clone())).collect()
        };
        let mut noting = JoinSet::new();
        for (volume, turns) in volumes {
            let folder = self.state_folder(&volume);
            noting.spawn(async move {
                let note = |invitations: &mut Invitations| invitations.note_time(&Now::read());
                if let Err(error) = with_invitations(folder, turns, NOTE_TIME, note).await {
                    tracing::warn!(%volume, "{}", with_causes(&error));
                }
            });
        }
        noting.join_all().await;
    }

    /// Whether a secret lets a host in, which uses it up unless that is only asked. One that is a member already and comes
    /// with a secret that was used may not have heard the answer: it is told again (W4 and L2 are a matter of what its copy
    /// holds, which its greeting tells).
    async fn admits(
        &self,
        volume: &Name,
        secret: Secret,
        ask_only: bool,
        is_member: bool,
    ) -> Result<(), Refused> {
        let admitted = match ask_only {
            true => self.check_secret(volume, secret).await,
            false => self.use_secret(volume, secret).await.map(|_| ()),
        };
        match admitted {
            Err(Refused { refusal: Refusal::Token, text })
                if is_member && text == Invalid::Used.to_string() =>
            {
                Ok(())
            }
            admitted => admitted,
        }
    }

    async fn check_secret(&self, volume: &Name, secret: Secret) -> Result<(), Refused> {
        let checked = self.at_invitations(volume, move |invitations| {
            let now = Now::read();
            invitations.note_time(&now)?;
            Ok(invitations.check(&secret, &now)?)
        });
        checked.await.map(|_| ()).map_err(|error| refusal(&error))
    }

    /// Uses a secret up, and gives the name of its invitation, with the turn at the volume's invitations.
    async fn use_secret(&self, volume: &Name, secret: Secret) -> Result<(String, Turn), Refused> {
        let used = self.at_invitations(volume, move |invitations| invitations.redeem(&secret, &Now::read()));
        used.await.map_err(|error| refusal(&error))
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
            config.readmit(peer.host);
        })
        .await?;
        let handle = self.handle_of(&config.name).await?;
        let added = handle.answer(|answer| Ask::AddPeer(peer, answer)).await;
        let added = match added {
            Some(added) => added.map_err(|error| failed(with_causes(&error))),
            None => Err(failed("the volume's thread has ended")),
        };
        if added.is_err() && is_new {
            // Nothing of it is left there, so nothing of it is left here.
            let removed = config.removal_of(host).cloned();
            self.change_config(&config.name, |config| {
                config.peers.retain(|known| known.host != host);
                config.removed.extend(removed);
            })
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

fn token(invalid: &Invalid) -> Refused {
    Refused { refusal: Refusal::Token, text: invalid.to_string() }
}

fn refusal(error: &InvitationError) -> Refused {
    match error {
        InvitationError::Invalid(invalid) => token(invalid),
        error => other(with_causes(error)),
    }
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
