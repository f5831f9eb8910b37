//! What peers open: each stream's first message or preamble says what it is for; it is authorised here, by the key of
//! its connection, and handed to the volume that it names.

use super::Supervisor;
use super::admission::unknown_volume;
use crate::config::{PeerConfig, VolumeConfig};
use crate::standing;
use crate::standing::Service;
use crate::transport::{CloseReason, Connection, ControlReceiver, ControlSender, Incoming, ReceiveError};
use crate::volume::{Ask, HUNG, paused, refuse};
use crate::words::with_causes;
use blockmirror_protocol::disk::superblock::LINEAGE_LIMIT;
use blockmirror_protocol::units::{HostId, VolumeId};
use blockmirror_protocol::wire::message::{
    AskOthers, AskStanding, Fetching, Hello, Lend, Message, Other, Others, Recover, Refusal, Refused,
    Standing, TakeOver,
};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a peer may take to say what a stream is for.
const FIRST_MESSAGE_TIME: Duration = Duration::from_secs(10);

/// How long a volume may take to say whether it serves its devices.
const SERVES_TIME: Duration = Duration::from_secs(1);

/// How long other hosts may take to say how they stand, where that is told on.
const OTHERS_TIME: Duration = Duration::from_secs(2);

/// How long a key that is not known may stay connected, and how often that is looked at.
const STRANGER_TIME: Duration = Duration::from_secs(60);
const STRANGER_LOOKS: u32 = 30;

/// How many connections a key may have at a time: one that each side dialled, and what is left of those before a restart
/// or a change of address.
const CONNECTIONS: usize = 4;

/// How long a host that asks how this one stands waits while others are answered.
const STANDING_TIME: Duration = Duration::from_secs(2);

/// How many connections each key has opened.
#[derive(Clone, Default)]
pub(super) struct Connections(Arc<Mutex<HashMap<HostId, usize>>>);

/// A connection's place among those of its key.
struct Counted {
    connections: Connections,
    host: HostId,
    /// How many there were before.
    before: usize,
}

impl Connections {
    /// A place for one more, as long as the answer lives; nothing where the key has enough.
    fn count(&self, host: HostId) -> Option<Counted> {
        let mut counts = self.0.lock().expect("no holder of the lock panics");
        let count = counts.entry(host).or_default();
        let before = *count;
        if before >= CONNECTIONS {
            return None;
        }
        *count += 1;
        Some(Counted { connections: self.clone(), host, before })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.connections.0.lock().expect("no holder of the lock panics");
        if let Some(count) = counts.get_mut(&self.host) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.host);
            }
        }
    }
}

/// A stream that is refused, and its sending side to say so on.
type No = (Refused, ControlSender);

impl Supervisor {
    /// Accepts connections until the endpoint is closed.
    pub async fn accept_connections(self: Arc<Self>) {
        while let Some(connection) = self.endpoint.accept().await {
            tokio::spawn(self.clone().serve_connection(connection));
        }
    }

    async fn serve_connection(self: Arc<Self>, connection: Connection) {
        let mut parted = self.parted.subscribe();
        let Some(counted) = self.connections.count(connection.peer()) else {
            tracing::warn!(peer = %connection.peer(), "it has {CONNECTIONS} connections already; one more is closed");
            return connection.close(CloseReason::Refused, "too many connections of this host");
        };
        let mut is_known = self.knows(connection.peer()).await;
        if is_known {
            connection.trust(counted.before);
        } else if !self.watch_stranger(&connection, counted.before).await {
            return connection.close(CloseReason::Refused, "too many unknown hosts are connected");
        }
        loop {
            let incoming = tokio::select! {
                incoming = connection.accept() => incoming,
                Ok(()) = parted.changed() => {
                    let knows = self.knows(connection.peer()).await;
                    if is_known && !knows {
                        return connection.close(CloseReason::Refused, "this host is a member of no volume here any more");
                    }
                    is_known = knows;
                    continue;
                }
            };
            match incoming {
                Ok(Incoming::Control(sender, receiver)) => {
                    tokio::spawn(self.clone().serve_control(
                        connection.clone(),
                        counted.before,
                        sender,
                        receiver,
                    ));
                }
                Ok(Incoming::Frames(preamble, frames)) => {
                    let config = self.config_of(preamble.volume).await;
                    let Some(config) = config.filter(|config| is_member(config, connection.peer())) else {
                        return connection
                            .close(CloseReason::Refused, "frames for a volume that is not shared");
                    };
                    if let Ok(handle) = self.handle_of(&config.name).await {
                        handle.ask(Ask::Frames(preamble, frames));
                    }
                }
                Err(ReceiveError::Lost(_)) => return,
                Err(error) => {
                    tracing::warn!(peer = %connection.peer(), "{}", with_causes(&error));
                    return connection.close(CloseReason::Misbehaved, "no stream of this protocol");
                }
            }
        }
    }

    /// Sees to it that an unknown key gets itself known in time or is gone. Says whether there is room for it.
    async fn watch_stranger(self: &Arc<Self>, connection: &Connection, before: usize) -> bool {
        let Some(place) = self.strangers.admit(connection.remote_address().ip()) else { return false };
        let (supervisor, connection) = (self.clone(), connection.clone());
        tokio::spawn(async move {
            // Leaving early, the connection's end would be noticed late; it is looked at every now and then.
            for _ in 0..STRANGER_LOOKS {
                tokio::time::sleep(STRANGER_TIME / STRANGER_LOOKS).await;
                if !connection.is_live() {
                    break;
                }
                if supervisor.knows(connection.peer()).await {
                    return connection.trust(before);
                }
            }
            connection.close(CloseReason::Refused, "nothing was asked for in time");
            drop(place);
        });
        true
    }

    async fn serve_control(
        self: Arc<Self>,
        connection: Connection,
        before: usize,
        sender: ControlSender,
        mut receiver: ControlReceiver,
    ) {
        let first = tokio::time::timeout(FIRST_MESSAGE_TIME, receiver.receive()).await;
        let outcome = match first {
            Ok(Ok(Message::Hello(hello))) => self.take_session(hello, &connection, sender, receiver).await,
            Ok(Ok(Message::Join(join))) => match self.admit(join, &connection).await {
                Ok(joined) => {
                    connection.trust(before);
                    return sender.end_with(joined, Some(receiver));
                }
                Err(no) => Err((no, sender)),
            },
            Ok(Ok(Message::Recover(recover))) => {
                self.take_recovery(recover, &connection, before, sender).await
            }
            Ok(Ok(message @ (Message::ReadContent(_) | Message::AskDigest(_)))) => {
                self.take_read(message, &connection, sender, receiver).await
            }
            Ok(Ok(Message::Lend(lend))) => self.take_lending(lend, &connection, sender).await,
            Ok(Ok(Message::Fetching(fetching))) => {
                self.take_fetching(fetching, &connection, sender, receiver).await
            }
            Ok(Ok(Message::AskOthers(ask))) => match self.others(ask, &connection).await {
                Ok(others) => return sender.end_with(others, Some(receiver)),
                Err(no) => Err((no, sender)),
            },
            Ok(Ok(Message::AskStanding(ask))) => match self.stand(ask, connection.peer()).await {
                Ok(standing) => return sender.end_with(standing, Some(receiver)),
                Err(no) => Err((no, sender)),
            },
            Ok(Ok(Message::Whereabouts(told))) => match self.hear(told, &connection).await {
                Ok(own) => return sender.end_with(own, Some(receiver)),
                // Whoever joins is not known for a moment, and asks again.
                Err(no) => return refuse(sender, no.refusal, no.text),
            },
            Ok(Ok(Message::AskMembers(ask))) => match self.tell_members(ask, connection.peer()).await {
                Ok(members) => return sender.end_with(members, Some(receiver)),
                Err(no) => Err((no, sender)),
            },
            Ok(Ok(Message::TakeOver(wish))) => self.take_over(wish, &connection, sender).await,
            Ok(Ok(_)) => {
                return connection.close(CloseReason::Misbehaved, "a stream began with the wrong message");
            }
            Ok(Err(error)) => return tracing::debug!(peer = %connection.peer(), "{}", with_causes(&error)),
            Err(_) if self.knows(connection.peer()).await => return,
            Err(_) => return connection.close(CloseReason::Refused, "nothing was asked for in time"),
        };
        if let Err((Refused { refusal, text }, sender)) = outcome {
            tracing::info!(peer = %connection.peer(), "refused: {text}");
            refuse(sender, refusal, text);
        }
    }

    async fn take_session(
        &self,
        hello: Hello,
        connection: &Connection,
        sender: ControlSender,
        receiver: ControlReceiver,
    ) -> Result<(), No> {
        let Some(config) = self.config_of(hello.volume).await else { return Err((unknown_volume(), sender)) };
        let peer = connection.peer();
        if !is_member(&config, peer) {
            return Err((unknown_key(&config, peer), sender));
        }
        let holder = hello.fence.holder;
        if holder != peer && (holder == self.endpoint.id() || is_member(&config, holder)) {
            // A primary holds its fence itself, by the key that it had when it was promoted.
            let text = "the greeting carries the fence of another host".to_owned();
            return Err((Refused { refusal: Refusal::Role, text }, sender));
        }
        if config.peers.iter().any(|known| known.host == peer && known.paused) {
            return Err((paused(), sender));
        }
        if let Some(places) = self.twins(peer) {
            let text =
                format!("two hosts use the key of this one: {places}; nothing is mirrored until one is gone");
            return Err((Refused { refusal: Refusal::Busy, text }, sender));
        }
        if !self.may_be_heard(&config, Some(hello.fence), connection).await {
            let config = self.config_of(hello.volume).await.unwrap_or(config);
            return Err((unknown_key(&config, peer), sender));
        }
        self.hand_on(&config, sender, |sender| Ask::Session(Box::new(hello), sender, receiver)).await
    }

    /// How this host stands, for one of the volume's.
    async fn stand(&self, ask: AskStanding, asker: HostId) -> Result<Standing, Refused> {
        let config = self.config_of(ask.volume).await.ok_or_else(unknown_volume)?;
        if !is_member(&config, asker) {
            return Err(unknown_key(&config, asker));
        }
        self.own_standing(config, asker).await
    }

    async fn own_standing(&self, config: VolumeConfig, asker: HostId) -> Result<Standing, Refused> {
        let (handle, standings) = {
            let volumes = self.volumes.lock().await;
            let entry = volumes.get(&config.name).ok_or_else(unknown_volume)?;
            (entry.handle.clone(), entry.standings.clone())
        };
        let turn = tokio::time::timeout(STANDING_TIME, standings.acquire_owned()).await;
        let Ok(Ok(turn)) = turn else {
            let text = "this host is busy saying how it stands".to_owned();
            return Err(Refused { refusal: Refusal::Busy, text });
        };
        let service = tokio::time::timeout(SERVES_TIME, handle.answer(Ask::Serves)).await;
        let mut service = service.ok().flatten().unwrap_or_else(|| {
            // One that is just being opened serves nobody, and hangs only when its thread does.
            let silence = handle.pulse().silence().filter(|_| handle.has_opened());
            Service {
                serves: silence.is_some(),
                silent: silence.map(|silence| silence.lasted).unwrap_or_default(),
            }
        });
        service.serves &= service.silent < HUNG;
        let folder = self.state_folder(&config.name);
        let read = move || {
            let standing = standing::read(&folder, &config, asker, service);
            // Whoever asked may be gone; the turn lasts as long as the work.
            drop(turn);
            standing
        };
        let standing = tokio::task::spawn_blocking(read).await.ok().flatten();
        standing.ok_or_else(|| {
            let text = "the volume's state can't be read here; see `blockmirror status`".to_owned();
            Refused { refusal: Refusal::Backing, text }
        })
    }

    /// How all hosts of a volume stand, for one that would recover it.
    async fn others(&self, ask: AskOthers, connection: &Connection) -> Result<Others, Refused> {
        let asker = connection.peer();
        let config = self.config_called(&ask.name).await.ok_or_else(unknown_volume)?;
        self.may_ask(&config, ask.secret, connection).await?;
        let hosts: Vec<PeerConfig> = config.peers.iter().filter(|peer| peer.host != asker).cloned().collect();
        let answers = standing::ask_all(&self.peers, config.id, &hosts, OTHERS_TIME).await;
        let others = answers.into_iter().map(|(peer, answered)| Other {
            name: peer.name.to_string(),
            host: peer.host,
            addresses: peer.addresses.iter().map(ToString::to_string).collect(),
            standing: answered.ok().map(told_on),
        });
        let others = others.collect();
        Ok(Others { own: Box::new(told_on(self.own_standing(config, asker).await?)), others })
    }

    async fn config_called(&self, name: &str) -> Option<VolumeConfig> {
        let volumes = self.volumes.lock().await;
        let named = volumes.values().find(|entry| entry.config.name.as_str() == name);
        named.map(|entry| entry.config.clone())
    }

    async fn take_over(
        &self,
        wish: TakeOver,
        connection: &Connection,
        sender: ControlSender,
    ) -> Result<(), No> {
        let Some(config) = self.config_of(wish.volume).await else { return Err((unknown_volume(), sender)) };
        let peer = connection.peer();
        if !self.may_be_heard(&config, None, connection).await {
            let config = self.config_of(wish.volume).await.unwrap_or(config);
            return Err((unknown_key(&config, peer), sender));
        }
        self.hand_on(&config, sender, |sender| Ask::TakeOver(peer, sender)).await
    }

    async fn take_recovery(
        &self,
        recover: Recover,
        connection: &Connection,
        before: usize,
        sender: ControlSender,
    ) -> Result<(), No> {
        let config = {
            let volumes = self.volumes.lock().await;
            let named = volumes.values().find(|entry| entry.config.name.as_str() == recover.name);
            named.map(|entry| entry.config.clone())
        };
        if let Err(no) = self.admit_recovery(config.as_ref(), &recover, connection).await {
            return Err((no, sender));
        }
        let Some(config) = config else { return Err((unknown_volume(), sender)) };
        connection.trust(before);
        let connection = connection.clone();
        self.hand_on(&config, sender, |sender| Ask::Recover(recover.accept_inconsistent, sender, connection))
            .await
    }

    async fn take_lending(
        &self,
        lend: Lend,
        connection: &Connection,
        sender: ControlSender,
    ) -> Result<(), No> {
        let Some(config) = self.config_of(lend.volume).await else { return Err((unknown_volume(), sender)) };
        let peer = connection.peer();
        if !self.may_be_heard(&config, Some(lend.fence), connection).await {
            return Err((unknown_key(&config, peer), sender));
        }
        let connection = connection.clone();
        self.hand_on(&config, sender, |sender| Ask::Lend(lend.fence, sender, connection)).await
    }

    async fn take_fetching(
        &self,
        fetching: Fetching,
        connection: &Connection,
        sender: ControlSender,
        receiver: ControlReceiver,
    ) -> Result<(), No> {
        let Some(config) = self.config_of(fetching.volume).await else {
            return Err((unknown_volume(), sender));
        };
        let peer = connection.peer();
        if !is_member(&config, peer) {
            return Err((unknown_key(&config, peer), sender));
        }
        self.hand_on(&config, sender, |sender| Ask::Fetching(fetching, sender, receiver)).await
    }

    async fn take_read(
        &self,
        first: Message,
        connection: &Connection,
        sender: ControlSender,
        receiver: ControlReceiver,
    ) -> Result<(), No> {
        let config = self.config_of(volume_of(&first)).await;
        let Some(config) = config else { return Err((unknown_volume(), sender)) };
        if !self.may_read(&config, connection).await {
            let text = "no recovery was begun with this key".to_owned();
            return Err((Refused { refusal: Refusal::UnknownKey, text }, sender));
        }
        self.hand_on(&config, sender, |sender| Ask::Read(first, sender, receiver)).await
    }

    async fn hand_on(
        &self,
        config: &VolumeConfig,
        sender: ControlSender,
        ask: impl FnOnce(ControlSender) -> Ask,
    ) -> Result<(), No> {
        match self.handle_of(&config.name).await {
            Ok(handle) => handle.ask(ask(sender)),
            Err(_) => return Err((unknown_volume(), sender)),
        }
        Ok(())
    }

    /// Whether a key belongs to a host of any volume, or was let in by a token.
    pub(super) async fn knows(&self, host: HostId) -> bool {
        let is_member = {
            let volumes = self.volumes.lock().await;
            volumes.values().any(|entry| entry.config.peers.iter().any(|peer| peer.host == host))
        };
        is_member || self.admitted.lock().await.keys().any(|(_, admitted)| *admitted == host)
    }
}

fn is_member(config: &VolumeConfig, host: HostId) -> bool {
    config.peers.iter().any(|peer| peer.host == host)
}

/// What is told on of how a host stands: no more than a message has room for.
fn told_on(mut standing: Standing) -> Standing {
    standing.lineage.truncate(LINEAGE_LIMIT);
    standing.began.clear();
    standing
}

pub(super) fn unknown_key(config: &VolumeConfig, host: HostId) -> Refused {
    match config.removal_of(host) {
        Some(removal) => Refused { refusal: Refusal::UnknownKey, text: removal.words(&config.name) },
        None => stranger(host),
    }
}

/// What a host is told that shares no volume with this one.
pub(super) fn stranger(host: HostId) -> Refused {
    let text = format!("the host with the key {host} is none of this volume's");
    Refused { refusal: Refusal::UnknownKey, text }
}

fn volume_of(message: &Message) -> VolumeId {
    match message {
        Message::ReadContent(read) => read.volume,
        Message::AskDigest(ask) => ask.volume,
        _ => VolumeId::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_so_many_connections_and_no_more() {
        let (connections, host) = (Connections::default(), HostId([1; 32]));
        let counted: Vec<_> = (0..CONNECTIONS).map(|_| connections.count(host).expect("a place")).collect();
        assert!(connections.count(host).is_none());
        assert!(connections.count(HostId([2; 32])).is_some(), "others have places of their own");
        assert_eq!(counted.iter().map(|counted| counted.before).collect::<Vec<_>>(), [0, 1, 2, 3]);
        drop(counted);
        assert!(connections.count(host).is_some());
        assert!(connections.0.lock().unwrap().is_empty(), "nothing is kept of hosts that are gone");
    }
}
