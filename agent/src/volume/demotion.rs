//! `demote` and `switch`: a primary becomes a replica in order, with nothing lost. The steps are those of [`Handover`];
//! here they are carried out, and said in words. The devices are stopped before the first of them.

use super::changes::{Event, Hands, Next, close, failed, refused};
use super::devices::NotNow;
use super::promotable::heard;
use super::{Answer, OpenRole, Volume};
use crate::config::PeerConfig;
use crate::control::api::Failure;
use crate::device::openers::{BETWEEN_LOOKS, wait_for, waited};
use crate::primary::{Link, Primary};
use crate::standing;
use crate::words::{with_causes, with_name};
use blockmirror_protocol::disk::superblock::Superblock;
use blockmirror_protocol::handover::{Event as Came, Handover, Outcome, Reason, Step};
use blockmirror_protocol::replica::consent;
use blockmirror_protocol::succession;
use blockmirror_protocol::terms::Fence;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{Message, TakeOver, TookOver};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::task::spawn_local;

/// How long it may take to make everything durable.
const CLOSE_TIME: Duration = Duration::from_secs(60);
/// How long the disk may take to answer before anything is begun.
const ANSWER_TIME: Duration = Duration::from_secs(3);
/// How long replicas may take to record that they have everything.
const RELEASE_TIME: Duration = Duration::from_secs(5);
/// How long the new primary may take.
const TAKE_OVER_TIME: Duration = Duration::from_secs(60);
/// How long it may take to say how it stands, each time it is asked.
const STANDING_TIME: Duration = Duration::from_secs(3);
/// How long all hosts may take to say who leads, before this one goes on as the primary.
const LEADS_TIME: Duration = Duration::from_secs(1);

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

/// A primary that was taken out of service.
struct Retiring {
    hands: Hands,
    primary: Rc<Primary>,
    links: BTreeMap<HostId, Rc<Link>>,
    devices: super::devices::Devices,
}

impl Volume {
    /// `since` is since when it waits for those who have the device open, where it has waited already.
    pub(super) async fn demote(&mut self, answer: Answer<Demoted>, since: Option<Instant>) {
        match self.vacate(None, since).await {
            Ok(()) => {}
            Err(NotNow::InUse(users)) => {
                let since = wait_for(self.name().as_str(), &users, since);
                return self.later(BETWEEN_LOOKS, Event::Demote(answer, Some(since)));
            }
            Err(NotNow::Refused(failure)) => return drop(answer.send(Err(failure))),
        }
        let retiring = self.take_out("being demoted");
        spawn_local(async move {
            let hands = retiring.hands.clone();
            let (outcome, why) = retiring.hand_over(None).await;
            match outcome {
                Outcome::Demoted(released) => {
                    let (released, unreleased): (Vec<_>, Vec<_>) =
                        hands.config.peers.iter().partition(|peer| released.contains(&peer.host));
                    let names =
                        |peers: Vec<&PeerConfig>| peers.iter().map(|peer| peer.name.to_string()).collect();
                    let demoted = Demoted { released: names(released), unreleased: names(unreleased) };
                    hands.end(Next::Reopen, move |_| drop(answer.send(Ok(demoted))));
                }
                undone => {
                    let (next, text) = undone_words(&hands, None, &undone, &why);
                    hands.end(next, move |_| drop(answer.send(Err(failed(text)))));
                }
            }
        });
    }

    /// `since` is as for [`Volume::demote`].
    pub(super) async fn switch(&mut self, to: HostId, answer: Answer<Switched>, since: Option<Instant>) {
        let ready = self.demotable(Some(to)).and_then(|()| self.may_take_over(to));
        let peer = match ready {
            Ok(peer) => peer,
            Err(failure) => return drop(answer.send(Err(failure))),
        };
        match self.vacate(Some(to), since).await {
            Ok(()) => {}
            Err(NotNow::InUse(users)) => {
                let since = wait_for(self.name().as_str(), &users, since);
                return self.later(BETWEEN_LOOKS, Event::Switch(to, answer, Some(since)));
            }
            Err(NotNow::Refused(failure)) => return drop(answer.send(Err(failure))),
        }
        let began = Instant::now();
        let retiring = self.take_out("handing over");
        spawn_local(async move {
            let hands = retiring.hands.clone();
            let (undone, why) = match retiring.hand_over(Some(&peer)).await {
                (Outcome::TakenOver { serves: true, .. }, _) => {
                    let switched = Switched { without_writes: began.elapsed() };
                    return hands.end(Next::Reopen, move |_| drop(answer.send(Ok(switched))));
                }
                undone => undone,
            };
            let (next, text) = undone_words(&hands, Some(&peer), &undone, &why);
            let volume = hands.config.name.clone();
            hands.end(next, move |role| {
                let is_none = matches!(undone, Outcome::GoesOn(_)) && !matches!(role, OpenRole::Primary(..));
                let but = match is_none {
                    true => format!(", and could not become it again: blockmirror status {volume}"),
                    false => String::new(),
                };
                drop(answer.send(Err(failed(format!("{text}{but}")))));
            });
        });
    }

    /// Whether this primary can be demoted, perhaps for another host, if nobody uses its devices.
    fn demotable(&self, to: Option<HostId>) -> Result<(), Failure> {
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
        if let Err(source) = primary.may_be_demoted(to) {
            let source = self.name_of(source);
            return Err(refused(format!(
                "this host's disk is being filled from {source}, and is no image of the volume before its end: blockmirror wait \
                 {volume} --for in-sync, then again; or stop this agent, and on {source}: blockmirror promote {volume}"
            )));
        }
        Ok(())
    }

    /// Sees to it that nobody uses this primary's devices, nor will until they are stopped (L5). Whoever just looks at one,
    /// as udev does with each device that was closed after a write, is waited for; whoever stays is named at once.
    async fn vacate(&mut self, to: Option<HostId>, since: Option<Instant>) -> Result<(), NotNow> {
        self.demotable(to).map_err(NotNow::Refused)?;
        if let Err(silent) = self.must_answer(ANSWER_TIME).await {
            let volume = self.name();
            return Err(NotNow::Refused(refused(format!(
                "{silent}, so nothing can be handed over in order; on a replica: blockmirror promote {volume}"
            ))));
        }
        let users = self.devices.hold().await;
        if users.is_nobody() {
            return Ok(());
        }
        if users.may_pass(waited(since)) {
            return Err(NotNow::InUse(users.passing));
        }
        let users = users.words().join(", ");
        Err(NotNow::Refused(refused(format!("the device is in use: {users}; close it first"))))
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
        if let Some(host) = primary.promised_to() {
            // The next primary knows less of what that one was promised.
            return Err(refused(format!(
                "{host} was promised that nothing is answered without it, or without so many other replicas, and has not \
                 heard otherwise: let it connect, or where it is lost for good: blockmirror remove-peer {volume} {host} \
                 --force",
                host = self.name_of(host)
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
    /// Carries out the steps of a handover. Gives how it ended, and the words for what went wrong last.
    async fn hand_over(mut self, to: Option<&PeerConfig>) -> (Outcome, String) {
        let ours = self.primary.state().superblock().fence;
        let mut handover = Handover::new(ours, to.map(|peer| peer.host));
        let mut why = String::new();
        let outcome = loop {
            let came = match (handover.step(), to) {
                (Err(outcome), _) => break outcome.clone(),
                (Ok(Step::Close), _) => Came::Closed(self.close().await),
                (Ok(Step::Record(by)), _) => {
                    if let Some(fence) = by {
                        self.primary.supersede(fence);
                    } else if let Some(fence) = self.hands.heard_of().await {
                        handover.handle(Came::Superseded(fence));
                        continue;
                    }
                    let recorded = self.primary.record_demotion().await;
                    Came::Recorded(recorded.map_err(|error| why = with_causes(&error)).is_ok())
                }
                (Ok(Step::Release), _) => {
                    let released = self.primary.release(RELEASE_TIME).await;
                    self.give_up();
                    let bequeath = |superblock: &mut Superblock| consent::bequeath(superblock, &released);
                    if let Err(error) = self.primary.state().change_superblock(bequeath).await {
                        // What they overwrite is kept, then.
                        tracing::warn!("{}", with_causes(&error));
                    }
                    Came::Released(released)
                }
                (Ok(Step::TakeOver(_)), Some(peer)) => {
                    let (came, text) = take_over(&self.hands, peer).await;
                    why = text;
                    came
                }
                (Ok(Step::Ask(_)), Some(peer)) => {
                    let stands =
                        standing::ask(&self.hands.peers, self.hands.config.id, peer, STANDING_TIME).await;
                    Came::Stands(stands.ok().map(Box::new))
                }
                (Ok(Step::AskAll), _) => Came::Leads(leads(&self.hands, ours).await),
                (Ok(Step::TakeOver(_) | Step::Ask(_)), None) => unreachable!("nobody is to take over"),
            };
            handover.handle(came);
        };
        self.give_up();
        if let Outcome::TakenOver { fence, .. } | Outcome::Superseded { fence, .. } = outcome {
            // From here on this host knows whom it follows; otherwise it would hear it with the first greeting.
            let follow = |superblock: &mut Superblock| consent::follow(superblock, fence);
            if let Err(error) = self.primary.state().change_superblock(follow).await {
                tracing::warn!("{}", with_causes(&error));
            }
        }
        (outcome, why)
    }

    /// Stops the devices, and makes everything durable.
    async fn close(&mut self) -> bool {
        self.primary.wait_no_more();
        std::mem::take(&mut self.devices).stop().await;
        let in_sync = self.primary.in_sync();
        // What is copied to others would keep their maps from coming to rest.
        for (_, link) in self.links.iter().filter(|(host, _)| !in_sync.contains(host)) {
            link.stop();
        }
        close(&self.primary, CLOSE_TIME).await && self.primary.failure().is_none()
    }

    fn give_up(&self) {
        self.links.values().for_each(|link| link.stop());
        self.primary.retire();
    }
}

/// Has a replica take over. Gives what came of it, and why it doesn't.
async fn take_over(hands: &Hands, peer: &PeerConfig) -> (Came, String) {
    let told = standing::order(&hands.peers, peer, TakeOver { volume: hands.config.id }.into());
    match tokio::time::timeout(TAKE_OVER_TIME, told).await {
        Ok(Ok(Message::TookOver(TookOver { fence }))) => {
            (Came::TookOver(fence), "it answered with something else".to_owned())
        }
        Ok(Ok(Message::Refused(no))) => (Came::Refused, no.text),
        Ok(Ok(_)) => (Came::Unanswered, "it answered with something else".to_owned()),
        Ok(Err(error)) => (Came::Unanswered, with_name(&error, peer.host, &peer.name)),
        Err(_) => (Came::Unanswered, "it does not answer".to_owned()),
    }
}

/// The newest promotion that any host knows of that can be heard, if that is newer than this host's.
async fn leads(hands: &Hands, ours: Fence) -> Option<Fence> {
    let config = &hands.config;
    let answers = standing::ask_all(&hands.peers, config.id, &config.peers, LEADS_TIME).await;
    succession::newest_fence(ours, &heard(&answers))
}

/// How this host goes on after a handover that was not carried out as it was meant to be, and the words for it.
fn undone_words(hands: &Hands, to: Option<&PeerConfig>, undone: &Outcome, why: &str) -> (Next, String) {
    let volume = &hands.config.name;
    let name = to.map_or_else(String::new, |peer| peer.name.to_string());
    let not_taken = |reason: Reason| match reason {
        Reason::Unreleased | Reason::UnreleasedAndSilent => {
            format!("{name} did not record in time that it has everything")
        }
        Reason::Refused => format!("{name} does not take over ({why})"),
    };
    match undone {
        Outcome::Undurable => {
            let text = "not everything could be made durable here; this host stays the primary";
            (Next::Reopen, text.to_owned())
        }
        Outcome::Unrecorded => (Next::Reopen, why.to_owned()),
        Outcome::GoesOn(reason) => {
            let how = match reason {
                Reason::Unreleased | Reason::Refused => String::new(),
                Reason::UnreleasedAndSilent => format!(", and answers no write before {name} is heard"),
            };
            let text = format!("{}; this host goes on as the primary{how}", not_taken(*reason));
            (Next::PromoteAgain, text)
        }
        Outcome::Superseded { fence, reason } => {
            let (why, holder) = (not_taken(*reason), hands.name_of(fence.holder));
            (Next::Reopen, format!("{why}; {holder} was promoted, and this host is its replica now"))
        }
        Outcome::TakenOver { fence, .. } if to.is_none_or(|to| to.host != fence.holder) => {
            let holder = hands.name_of(fence.holder);
            (Next::Reopen, format!("{holder} was promoted meanwhile, and this host is its replica now"))
        }
        Outcome::TakenOver { .. } => (
            Next::Reopen,
            format!(
                "{name} is the primary now, but does not serve the volume; this host is its replica. \
                 On {name}: blockmirror status {volume}"
            ),
        ),
        Outcome::Unknown | Outcome::Demoted(_) => (
            Next::Reopen,
            format!(
                "{name} was told to take over, and it is not known whether it did ({why}); this host is demoted. \
                 On {name}: blockmirror status {volume}; if it is no primary: blockmirror promote {volume}, there or here"
            ),
        ),
    }
}
