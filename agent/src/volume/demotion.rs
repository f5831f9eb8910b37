//! `demote` and `switch`: a primary becomes a replica in order, with nothing lost.
//!
//! Devices stop first, and everything is made durable; then it is recorded here that this host is a replica; only then do
//! the replicas hear that they may take over. At no instant are there two who may, and a crash leaves none.

use super::changes::{Event, Hands, Next, close, failed, refused};
use super::promotable::heard;
use super::{Answer, OpenRole, Volume};
use crate::config::PeerConfig;
use crate::control::api::Failure;
use crate::primary::{Peer, Primary};
use crate::standing;
use blockmirror_protocol::disk::superblock::Role;
use blockmirror_protocol::succession;
use blockmirror_protocol::terms::Fence;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{Message, TakeOver, TookOver};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::task::spawn_local;

/// How long those are waited for who have the device open and may be gone in a moment, and how often they are looked for.
const PATIENCE: Duration = Duration::from_secs(5);
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);
/// How long it may take to make everything durable.
const CLOSE_TIME: Duration = Duration::from_secs(60);
/// How long the disk may take to answer before anything is begun.
const ANSWER_TIME: Duration = Duration::from_secs(3);
/// How long replicas may take to record that they have everything.
const RELEASE_TIME: Duration = Duration::from_secs(5);
/// How long the new primary may take.
const TAKE_OVER_TIME: Duration = Duration::from_secs(60);
/// How long it is asked whether it took over, when its answer was lost, and how often.
const STANDING_TIME: Duration = Duration::from_secs(3);
const STANDING_ATTEMPTS: u32 = 3;
/// How long all hosts may take to say who leads, before this one goes on as the primary.
const LEADS_TIME: Duration = Duration::from_secs(1);

/// Why a primary is not demoted now.
enum NotNow {
    /// These have its device open, perhaps just for a moment.
    InUse(Vec<String>),
    /// It can't be.
    Refused(Failure),
}

/// A demotion that was carried out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Demoted {
    /// The replicas that recorded that they have everything.
    pub released: Vec<String>,
    /// The others.
    pub unreleased: Vec<String>,
}

/// A switch that was carried out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Switched {
    /// How long nobody could write.
    pub without_writes: Duration,
}

/// What is known of a replica that took over.
struct Taken {
    /// The fence that it holds.
    fence: Fence,
    /// Whether its devices are served.
    serves: bool,
}

/// Why a replica did not take over.
enum NotTaken {
    /// For this reason, and it knows so: this host can go on as the primary, in this way.
    GoOn(String, String),
    /// It may have.
    Unknown(Failure),
}

/// A primary that was taken out of service.
struct Retiring {
    hands: Hands,
    primary: Rc<Primary>,
    links: BTreeMap<HostId, Rc<Peer>>,
    devices: super::devices::Devices,
}

impl Volume {
    /// `since` is since when it waits for those who have the device open, where it has waited already.
    pub(super) async fn demote(&mut self, answer: Answer<Demoted>, since: Option<Instant>) {
        match self.vacate(since).await {
            Ok(()) => {}
            Err(NotNow::InUse(users)) => {
                let since = self.wait_for(&users, since);
                return self.later(BETWEEN_LOOKS, Event::Demote(answer, since));
            }
            Err(NotNow::Refused(failure)) => return drop(answer.send(Err(failure))),
        }
        let retiring = self.take_out("being demoted");
        spawn_local(async move {
            let hands = retiring.hands.clone();
            match retiring.carry_out().await {
                Err(failure) => hands.end(Next::Reopen, move |_| drop(answer.send(Err(failure)))),
                Ok(released) => {
                    let (released, unreleased): (Vec<_>, Vec<_>) =
                        hands.config.peers.iter().partition(|peer| released.contains(&peer.host));
                    let names =
                        |peers: Vec<&PeerConfig>| peers.iter().map(|peer| peer.name.to_string()).collect();
                    let demoted = Demoted { released: names(released), unreleased: names(unreleased) };
                    hands.end(Next::Reopen, move |_| drop(answer.send(Ok(demoted))));
                }
            }
        });
    }

    /// `since` is as for [`Volume::demote`].
    pub(super) async fn switch(&mut self, to: HostId, answer: Answer<Switched>, since: Option<Instant>) {
        let ready = self.demotable().and_then(|()| self.may_take_over(to));
        let peer = match ready {
            Ok(peer) => peer,
            Err(failure) => return drop(answer.send(Err(failure))),
        };
        match self.vacate(since).await {
            Ok(()) => {}
            Err(NotNow::InUse(users)) => {
                let since = self.wait_for(&users, since);
                return self.later(BETWEEN_LOOKS, Event::Switch(to, answer, since));
            }
            Err(NotNow::Refused(failure)) => return drop(answer.send(Err(failure))),
        }
        let began = Instant::now();
        let retiring = self.take_out("handing over");
        spawn_local(async move {
            let hands = retiring.hands.clone();
            let (next, done) = match retiring.hand_over_to(&peer).await {
                Ok(()) => (Next::Reopen, Ok(Switched { without_writes: began.elapsed() })),
                Err((next, failure)) => (next, Err(failure)),
            };
            hands.end(next, move |_| drop(answer.send(done)));
        });
    }

    /// Whether this primary can be demoted, if nobody uses its devices.
    fn demotable(&self) -> Result<(), Failure> {
        let volume = self.name();
        let primary = match &self.role {
            OpenRole::Primary(primary, _) => primary,
            OpenRole::Replica(_) => {
                let config = self.config.borrow();
                let primary = config.peers.iter().find(|peer| peer.role == crate::config::Role::Primary);
                let there = primary.map_or_else(|| "the primary".to_owned(), |peer| peer.name.to_string());
                return Err(refused(format!("this host is a replica of {volume}; run this on {there}")));
            }
            OpenRole::Changing(_) | OpenRole::Closed(_) => return Err(self.not_open()),
        };
        if let Some(fence) = primary.superseded() {
            let holder = self.name_of(fence.holder);
            return Err(refused(format!(
                "{holder} was promoted after this host, which becomes a replica by itself"
            )));
        }
        if let Some(error) = primary.failure() {
            return Err(refused(format!(
                "the backing has failed ({error}), so nothing can be handed over in order; \
                 on a replica: blockmirror promote {volume}"
            )));
        }
        Ok(())
    }

    /// Sees to it that nobody uses this primary's devices, nor will until they are stopped (L5). Whoever just looks at one,
    /// as udev does with each device that was closed after a write, is waited for; whoever stays is named at once.
    async fn vacate(&mut self, since: Option<Instant>) -> Result<(), NotNow> {
        self.demotable().map_err(NotNow::Refused)?;
        if let Err(text) = self.must_answer(ANSWER_TIME).await {
            let volume = self.name();
            return Err(NotNow::Refused(refused(format!(
                "{text}, so nothing can be handed over in order; on a replica: blockmirror promote {volume}"
            ))));
        }
        let mut users = self.devices.users().await;
        if users.staying.is_empty() && users.passing.is_empty() {
            self.devices.hold(users.claim.take());
            return Ok(());
        }
        if users.staying.is_empty() && since.is_none_or(|since| since.elapsed() < PATIENCE) {
            return Err(NotNow::InUse(users.passing));
        }
        let users = [users.staying, users.passing].concat();
        Err(NotNow::Refused(refused(format!("the device is in use: {}; close it first", users.join(", ")))))
    }

    /// Since when this waits for those who have the device open; the first time, the log says for whom.
    fn wait_for(&self, users: &[String], since: Option<Instant>) -> Option<Instant> {
        if since.is_none() {
            tracing::info!(volume = %self.name(), "waiting for those who have the device open: {}", users.join(", "));
        }
        since.or_else(|| Some(Instant::now()))
    }

    fn may_take_over(&self, to: HostId) -> Result<PeerConfig, Failure> {
        let OpenRole::Primary(primary, _) = &self.role else { unreachable!("it is demotable") };
        let config = self.config.borrow();
        let (volume, peer) = (&config.name, config.peers.iter().find(|peer| peer.host == to));
        let Some(peer) = peer else { return Err(refused("that host is no replica of the volume")) };
        let name = &peer.name;
        if peer.paused {
            return Err(refused(format!(
                "{name} is paused, so it can't take over: blockmirror resume {volume} {name}, then \
                 blockmirror wait {volume} --for in-sync"
            )));
        }
        if !primary.in_sync().contains(&to) {
            return Err(refused(format!(
                "{name} is not connected and in sync, so it can't take over: blockmirror wait {volume} --for in-sync"
            )));
        }
        Ok(peer.clone())
    }

    fn take_out(&mut self, words: &'static str) -> Retiring {
        let devices = std::mem::take(&mut self.devices);
        let role = std::mem::replace(&mut self.role, OpenRole::Closed(String::new()));
        let OpenRole::Primary(primary, links) = role else { unreachable!("it is demotable") };
        Retiring { hands: self.begin_change(words), primary, links, devices }
    }
}

impl Retiring {
    /// Demotes, and gives the replicas that have recorded that they have everything.
    async fn carry_out(mut self) -> Result<Vec<HostId>, Failure> {
        let released = self.release().await;
        self.give_up();
        released
    }

    async fn hand_over_to(mut self, peer: &PeerConfig) -> Result<(), (Next, Failure)> {
        let released = self.release().await;
        let primary = self.primary.clone();
        self.give_up();
        let released = released.map_err(|failure| (Next::Reopen, failure))?;
        let name = &peer.name;
        let ours = primary.state().superblock().fence;
        let outcome = if released.contains(&peer.host) {
            take_over(&self.hands, peer, ours).await
        } else {
            // It may have, and its operator may have promoted it at once.
            let text = format!("{name} did not record in time that it has everything");
            match promoted(&self.hands, peer, ours).await {
                Some(Some(taken)) => Ok(taken),
                Some(None) => Err(NotTaken::GoOn(text, String::new())),
                // It answers nothing before that one follows it again.
                None => Err(NotTaken::GoOn(text, format!(", and answers no write before {name} is heard"))),
            }
        };
        let taken = match outcome {
            Ok(taken) => taken,
            Err(NotTaken::Unknown(failure)) => return Err((Next::Reopen, failure)),
            Err(NotTaken::GoOn(text, how)) => {
                // Perhaps for a host that was promoted out of this one's reach, which leads now.
                let Some(fence) = leads(&self.hands, ours).await else {
                    let text = format!("{text}; this host goes on as the primary{how}");
                    return Err((Next::PromoteAgain, failed(text)));
                };
                let known = primary.state().change_superblock(|superblock| superblock.fence = fence).await;
                if let Err(error) = known {
                    tracing::warn!("{}", crate::words::with_causes(&error));
                }
                let holder = self.hands.name_of(fence.holder);
                let text = format!("{text}; {holder} was promoted, and this host is its replica now");
                return Err((Next::Reopen, failed(text)));
            }
        };
        // From here on this host knows whom it follows; otherwise it would hear it with the first greeting.
        let known = primary.state().change_superblock(|superblock| superblock.fence = taken.fence).await;
        if let Err(error) = known {
            tracing::warn!("{}", crate::words::with_causes(&error));
        }
        if taken.serves {
            return Ok(());
        }
        let text = format!(
            "{name} is the primary now, but does not serve the volume; this host is its replica. \
             On {name}: blockmirror status {}",
            self.hands.config.name
        );
        Err((Next::Reopen, failed(text)))
    }

    /// Stops the devices, makes everything durable, records that this is a replica, and tells the others.
    async fn release(&mut self) -> Result<Vec<HostId>, Failure> {
        self.primary.wait_no_more();
        std::mem::take(&mut self.devices).stop().await;
        let in_sync = self.primary.in_sync();
        // What is copied to others would keep their maps from coming to rest.
        for (_, link) in self.links.iter().filter(|(host, _)| !in_sync.contains(host)) {
            link.stop();
        }
        if !close(&self.primary, CLOSE_TIME).await || self.primary.failure().is_some() {
            return Err(failed("not everything could be made durable here; this host stays the primary"));
        }
        let fence = self.primary.state().superblock().fence;
        self.primary
            .record_demotion(fence)
            .await
            .map_err(|error| failed(crate::words::with_causes(&error)))?;
        Ok(self.primary.release(RELEASE_TIME).await)
    }

    fn give_up(&self) {
        self.links.values().for_each(|link| link.stop());
        self.primary.retire();
    }
}

/// Has a replica take over, and gives the fence that it holds then. When its answer is lost, it is asked how it stands:
/// to go on here as well would make two primaries.
async fn take_over(hands: &Hands, peer: &PeerConfig, ours: Fence) -> Result<Taken, NotTaken> {
    let name = &peer.name;
    let told = standing::order(&hands.peers, peer, TakeOver { volume: hands.config.id }.into());
    let lost = match tokio::time::timeout(TAKE_OVER_TIME, told).await {
        Ok(Ok(Message::TookOver(TookOver { fence }))) if fence.supersedes(ours) => {
            return Ok(Taken { fence, serves: true });
        }
        Ok(Ok(Message::Refused(no))) => {
            let text = format!("{name} does not take over ({})", no.text);
            return match promoted(hands, peer, ours).await {
                Some(Some(taken)) => Ok(taken),
                Some(None) => Err(NotTaken::GoOn(text, String::new())),
                None => Err(NotTaken::Unknown(failed(unknown(hands, peer, &no.text)))),
            };
        }
        Ok(Ok(_)) => "it answered with something else".to_owned(),
        Ok(Err(text)) => text,
        Err(_) => "it does not answer".to_owned(),
    };
    match promoted(hands, peer, ours).await {
        Some(Some(taken)) => Ok(taken),
        Some(None) | None => Err(NotTaken::Unknown(failed(unknown(hands, peer, &lost)))),
    }
}

/// The newest promotion that any host knows of that can be heard, if that is newer than this host's.
async fn leads(hands: &Hands, ours: Fence) -> Option<Fence> {
    let config = &hands.config;
    let answers = standing::ask_all(&hands.peers, config.id, &config.peers, LEADS_TIME).await;
    succession::newest_fence(ours, &heard(&answers))
}

/// What to do where it can't be told whether a host has taken over.
fn unknown(hands: &Hands, peer: &PeerConfig, why: &str) -> String {
    let (volume, name) = (&hands.config.name, &peer.name);
    format!(
        "{name} was told to take over, and it is not known whether it did ({why}); this host is demoted. \
         On {name}: blockmirror status {volume}; if it is no primary: blockmirror promote {volume}, there or here"
    )
}

/// What a host says of itself that may have been promoted after this one: what it holds, or that it was not. Nothing where
/// it stays silent: then it may have been, and this host must not go on as if it were not.
async fn promoted(hands: &Hands, peer: &PeerConfig, ours: Fence) -> Option<Option<Taken>> {
    for _ in 0..STANDING_ATTEMPTS {
        let stands = standing::ask(&hands.peers, hands.config.id, peer, STANDING_TIME).await;
        if let Ok(standing) = stands {
            let is_promoted = standing.role == Role::Primary && standing.fence.supersedes(ours);
            return Some(is_promoted.then_some(Taken { fence: standing.fence, serves: standing.serves }));
        }
    }
    None
}
