//! Changes of a volume's role: while one is under way it has the shell to itself, as a task beside the volume, which goes
//! on answering status and refuses new sessions. A replica's session that is open goes on until the change ends it, and what
//! comes on it is taken in. Each change ends with an [`Event::Changed`] that says how the volume goes on.
//!
//! Every step of a change is durable before the next, so a change that is cut short is like a crash.

use super::demotion::{Demoted, Switched};
use super::membership::pass_on;
use super::opening::Others;
use super::pulse::HUNG;
use super::{Answer, OpenRole, Volume, refuse};
use crate::config::{DeviceKind, PeerConfig, VolumeConfig};
use crate::control::api::{Failure, FailureKind};
use crate::primary::Primary;
use crate::replica::{Progress, Replica};
use crate::standing;
use crate::standing::Answered;
use crate::transport::Peers;
use blockmirror_protocol::succession::{Judgement, Succeeded, Weight};
use blockmirror_protocol::terms::Fence;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{Refusal, Removal};
use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::task::spawn_local;

/// How long a host that was demoted for this one waits for the end of a change: surely not until it has given up.
const TAKE_OVER_PATIENCE: Duration = Duration::from_secs(30);
/// How often the users of a superseded primary's devices are looked for.
const LOOK_TIME: Duration = Duration::from_secs(1);
/// How long hosts may take to say what they know of a promotion: the one itself, and whether the others removed anybody.
const CONFIRM_TIME: Duration = Duration::from_secs(2);
/// How long a superseded primary may take to make durable what it knows.
pub(super) const CLOSE_TIME: Duration = Duration::from_secs(10);
/// How long a change may take to end when the agent does.
const END_TIME: Duration = Duration::from_secs(30);

/// What the volume's own tasks tell it.
pub(super) enum Event {
    /// A member says that another host was promoted.
    Told(Succeeded),
    /// Another host was promoted: that is believed.
    Superseded(Fence),
    /// It is time to look who has the devices of a superseded primary open.
    LookForOpeners,
    /// A session with a primary has ended.
    SessionEnded,
    /// A volume that could not be opened tries again, if this was its last attempt.
    TryAgain(u32),
    /// A device that could not be served is tried again, if this was the last attempt.
    StartDevice(DeviceKind, u32),
    /// It is time to ask that host who the volume's hosts are.
    AskMembers(HostId),
    /// A host that was removed was left: it may have joined again meanwhile.
    Parted,
    /// It is time to link the hosts again that could not be.
    LinkAgain,
    /// It is time to look whether a replica is alone.
    IsAlone,
    /// What other hosts said of themselves, while this replica was alone.
    Heard(Vec<(PeerConfig, Answered)>),
    /// Something else wrote to the backing; when, in words.
    Touched(String),
    /// A change has ended.
    Changed(Next, Then),
    /// This primary is to be demoted; since when that is tried.
    Demote(Answer<Demoted>, Option<Instant>),
    /// This primary is to be demoted for that host; since when that is tried.
    Switch(HostId, Answer<Switched>, Option<Instant>),
    /// The loop device is to be released, also while it is in use or not; since when that is tried.
    Release(bool, Answer<Vec<String>>, Option<Instant>),
}

/// How the volume goes on after a change.
pub(super) enum Next {
    /// As before: nothing was changed.
    GoOn(Rc<Replica>),
    /// It is opened as what its superblock says.
    Reopen,
    /// The same, and promoted again: what it was demoted for did not come to be.
    PromoteAgain,
}

/// Called when the volume has gone on, with what it is now.
pub(super) type Then = Box<dyn FnOnce(&OpenRole)>;

/// A change that is under way.
pub(super) struct Changing {
    /// What is going on, as in "this host is just ...".
    pub(super) words: &'static str,
    /// How far it is.
    pub(super) progress: Rc<Progress>,
    /// See [`Hands::told`].
    told: Rc<RefCell<Vec<Succeeded>>>,
    /// What is changed, if it is a replica: its session goes on until the change ends it.
    replica: Weak<Replica>,
}

/// What a change needs besides the shell.
#[derive(Clone)]
pub(super) struct Hands {
    pub(super) config: VolumeConfig,
    pub(super) own: HostId,
    pub(super) peers: Peers,
    pub(super) progress: Rc<Progress>,
    /// What members said of promotions since the change began.
    pub(super) told: Rc<RefCell<Vec<Succeeded>>>,
    events: UnboundedSender<Event>,
}

impl Changing {
    /// The replica that is changed, as long as there is one.
    pub(super) fn replica(&self) -> Option<Rc<Replica>> {
        self.replica.upgrade()
    }

    fn hear_of(&self, told: Succeeded) {
        let mut known = self.told.borrow_mut();
        if !known.contains(&told) {
            known.push(told);
        }
    }
}

impl Hands {
    /// Ends the change.
    pub(super) fn end(&self, next: Next, then: impl FnOnce(&OpenRole) + 'static) {
        // Nobody listens any more when the agent has ended meanwhile.
        drop(self.events.send(Event::Changed(next, Box::new(then))));
    }

    /// The fence of another host that was promoted, as a member has said since the change began.
    pub(super) async fn heard_of(&self) -> Option<Fence> {
        loop {
            let told = self.told.borrow_mut().pop()?;
            if self.judge(told).await.0 == Judgement::Superseded {
                return Some(told.fence);
            }
        }
    }

    /// What is to be made of a member's word that another host was promoted, and which removals the others tell of.
    async fn judge(&self, told: Succeeded) -> (Judgement, Vec<Removal>) {
        let (volume, members) = (self.config.id, &self.config.peers);
        let holder = members.iter().find(|peer| peer.host == told.fence.holder && peer.host != told.by);
        let stands = async {
            match holder {
                Some(holder) => standing::ask(&self.peers, volume, holder, CONFIRM_TIME).await.ok(),
                None => None,
            }
        };
        let others = members.iter().filter(|peer| peer.host != told.by).cloned().collect();
        let removals = standing::ask_removals(&self.peers, volume, others, CONFIRM_TIME);
        let (standing, removals) = tokio::join!(stands, removals);
        let members: Vec<_> = members.iter().map(|peer| (peer.host, peer.version)).collect();
        let told_removed: Vec<_> = removals.iter().map(|removal| (removal.host, removal.version)).collect();
        (told.judge(&members, &told_removed, standing.as_ref()), removals)
    }

    /// The name of a host, or its fingerprint where none is known.
    pub(super) fn name_of(&self, host: HostId) -> String {
        let known = self.config.peers.iter().find(|peer| peer.host == host);
        known.map_or_else(|| format!("host {host}"), |peer| peer.name.to_string())
    }

    /// The hosts of all peers.
    pub(super) fn hosts(&self) -> Vec<HostId> {
        self.config.peers.iter().map(|peer| peer.host).collect()
    }
}

impl Volume {
    /// From here on the shell is in the hands of the task that this is for.
    pub(super) fn begin_change(&mut self, words: &'static str) -> Hands {
        let hands = self.hands();
        let replica = match &self.role {
            OpenRole::Replica(replica) => Rc::downgrade(replica),
            OpenRole::Primary(..) | OpenRole::Closed(_) | OpenRole::Changing(_) => Weak::new(),
        };
        self.role = OpenRole::Changing(Changing {
            words,
            progress: hands.progress.clone(),
            told: hands.told.clone(),
            replica,
        });
        hands
    }

    /// What a task needs that asks other hosts.
    pub(super) fn hands(&self) -> Hands {
        Hands {
            config: self.config.borrow().clone(),
            own: self.surroundings.own.host,
            peers: self.surroundings.peers.clone(),
            progress: Rc::default(),
            told: Rc::default(),
            events: self.events.clone(),
        }
    }

    pub(super) async fn handle(&mut self, event: Event) {
        match event {
            Event::Told(told) => self.hear_of(told),
            Event::Superseded(fence) => self.supersede(fence).await,
            Event::LookForOpeners => self.look_for_openers().await,
            Event::TryAgain(attempt) => self.try_again(attempt).await,
            Event::StartDevice(kind, attempt) => self.start_device_again(kind, attempt).await,
            Event::SessionEnded => self.look_whom_it_follows(),
            Event::Demote(answer, since) => self.demote(answer, since).await,
            Event::Switch(host, answer, since) => self.switch(host, answer, since).await,
            Event::Release(force, answer, since) => self.release(force, answer, since).await,
            Event::AskMembers(host) => self.ask_members(host),
            Event::Parted => self.link_all().await,
            Event::LinkAgain => {
                self.links_later = false;
                self.link_all().await;
            }
            Event::IsAlone => self.look_whether_alone(),
            Event::Heard(answers) => self.look_for_better(&answers),
            Event::Touched(words) => self.note_touched(words).await,
            Event::Changed(next, then) => {
                self.go_on(next, then).await;
                if !matches!(self.role, OpenRole::Changing(_)) {
                    self.answer_those_who_wait();
                }
            }
        }
    }

    /// A replica's session has ended: whom it follows may be another one now, or nobody.
    fn look_whom_it_follows(&mut self) {
        if let OpenRole::Replica(replica) = &self.role {
            self.correct_roles(&replica.state().superblock());
            self.ask_members_later();
        }
    }

    /// Takes over, where this host was demoted for meanwhile.
    fn answer_those_who_wait(&mut self) {
        for (host, sender, since) in std::mem::take(&mut self.taking_over) {
            if since.elapsed() < TAKE_OVER_PATIENCE {
                self.take_over(host, sender);
            } else {
                refuse(sender, Refusal::Role, "this host was changing its role for too long".to_owned());
            }
        }
    }

    async fn go_on(&mut self, next: Next, then: Then) {
        match next {
            Next::GoOn(replica) => {
                self.role = OpenRole::Replica(replica.clone());
                // What it would have been told meanwhile.
                let config = self.config.borrow().clone();
                let is_member = |host| config.peers.iter().any(|peer| peer.host == host);
                if replica.greeter().is_some_and(|greeter| !is_member(greeter)) {
                    replica.disconnect();
                }
                self.configure(config);
                self.keep_from(self.doubled.clone());
                self.look_whom_it_follows();
                // Something else may have written to its disk.
                let is_due = self.touched.borrow().as_ref().is_some_and(|touched| touched.is_due);
                if is_due {
                    replica.close().await;
                    self.reopen(Others::Known).await;
                }
            }
            Next::Reopen => self.reopen(Others::Known).await,
            Next::PromoteAgain => {
                self.reopen(Others::Known).await;
                return self.promote_again(then);
            }
        }
        then(&self.role);
    }

    /// Waits for the end of a change, without opening the volume again: the agent ends.
    pub(super) async fn end_change(&mut self, events: &mut UnboundedReceiver<Event>) {
        let OpenRole::Changing(change) = &self.role else { return };
        change.progress.is_over.set(true);
        let ended = async {
            while let Some(event) = events.recv().await {
                match event {
                    Event::Changed(next, then) => return Some((next, then)),
                    // Whether a demotion is in order depends on it.
                    Event::Told(told) => change.hear_of(told),
                    Event::Superseded(fence) => change.hear_of(Succeeded { fence, by: fence.holder }),
                    _ => {}
                }
            }
            None
        };
        let ended = tokio::time::timeout(END_TIME, ended).await.ok().flatten();
        self.role = OpenRole::Closed("the agent stops".to_owned());
        if let Some((next, then)) = ended {
            if let Next::GoOn(replica) = next {
                self.role = OpenRole::Replica(replica);
            }
            then(&self.role);
        }
    }

    /// A member says that another host was promoted. Nothing is answered until the others were asked: whether any of them
    /// knows that the speaker was removed (X3), and the one that was promoted, which knows best (X2). One that can't be
    /// asked, as when it has just died, stands against nothing: two that write are worse.
    fn hear_of(&mut self, told: Succeeded) {
        let primary = match &self.role {
            OpenRole::Primary(primary, _) => primary,
            OpenRole::Changing(change) => return change.hear_of(told),
            OpenRole::Replica(_) | OpenRole::Closed(_) => return,
        };
        let doubt = match self.claims.borrow_mut().hear(told) {
            Weight::Nothing => return,
            Weight::Denied => None,
            Weight::Doubt => Some(primary.doubt()),
        };
        let (hands, learn, claims) = (self.hands(), self.surroundings.learn.clone(), self.claims.clone());
        let speaker = self.name_of(told.by);
        let is_own = told.fence.holder == told.by;
        let holder = if is_own { "it".to_owned() } else { self.name_of(told.fence.holder) };
        // Not to keep what it has open, when the volume is opened anew.
        let primary = Rc::downgrade(primary);
        spawn_local(async move {
            let (judgement, removals) = hands.judge(told).await;
            claims.borrow_mut().note(told, judgement);
            let volume = &hands.config.name;
            // The connections of those that were removed end.
            pass_on(&learn, volume, removals);
            match judgement {
                Judgement::Superseded => return drop(hands.events.send(Event::Superseded(told.fence))),
                Judgement::Removed(host) => {
                    let removed = if host == told.by { &speaker } else { &holder };
                    tracing::warn!(
                        %volume,
                        "{speaker} says that {holder} was promoted, but {removed} was removed from the volume; this host \
                         goes on as the primary"
                    );
                }
                Judgement::Denied => tracing::warn!(
                    %volume,
                    "{speaker} says that {holder} was promoted, which that one denies; this host goes on as the primary"
                ),
            }
            if let Some(primary) = primary.upgrade() {
                primary.trust(doubt);
            }
        });
    }

    /// Another host was promoted: writes fail from now on, durably over restarts. When nobody has the devices open any
    /// more, this host becomes a replica; nothing is written under an open device (L5).
    pub(super) async fn supersede(&mut self, fence: Fence) {
        let (primary, links) = match &self.role {
            OpenRole::Primary(primary, links) => (primary, links),
            // The word was judged while the change began.
            OpenRole::Changing(change) => return change.hear_of(Succeeded { fence, by: fence.holder }),
            OpenRole::Replica(_) | OpenRole::Closed(_) => return,
        };
        let known = primary.superseded().unwrap_or(primary.state().superblock().fence);
        if !fence.supersedes(known) {
            return;
        }
        primary.supersede(fence);
        links.values().for_each(|link| link.stop());
        let (name, holder) = (self.name(), self.name_of(fence.holder));
        tracing::warn!(volume = %name, "{holder} was promoted: this host takes no more writes");
        if let Err(error) = primary.record_demotion().await {
            // The next start asks the others, who know it.
            tracing::error!(volume = %name, "{}", crate::words::with_causes(&error));
        }
        self.look_for_openers().await;
    }

    async fn look_for_openers(&mut self) {
        let OpenRole::Primary(primary, _) = &self.role else { return };
        let Some(fence) = primary.superseded() else { return };
        let openers = self.devices.hold().await.words();
        if openers.is_empty() {
            return self.become_replica();
        }
        if openers != self.openers {
            let holder = self.name_of(fence.holder);
            let words = openers.join(", ");
            tracing::warn!(
                volume = %self.name(),
                "this host becomes a replica of {holder} when its device is closed: {words}"
            );
        }
        self.openers = openers;
        self.later(LOOK_TIME, Event::LookForOpeners);
    }

    /// Has something done after a while.
    pub(super) fn later(&self, pause: Duration, event: Event) {
        let events = self.events.clone();
        spawn_local(async move {
            tokio::time::sleep(pause).await;
            drop(events.send(event));
        });
    }

    fn become_replica(&mut self) {
        let devices = std::mem::take(&mut self.devices);
        let role = std::mem::replace(&mut self.role, OpenRole::Closed(String::new()));
        let OpenRole::Primary(primary, _) = role else {
            unreachable!("only a superseded primary comes here")
        };
        let hands = self.begin_change("becoming a replica");
        spawn_local(async move {
            devices.stop().await;
            close(&primary, CLOSE_TIME).await;
            primary.retire();
            drop(primary);
            hands.end(Next::Reopen, |_| ());
        });
    }
}

/// Makes everything durable that a primary knows. Says whether that was done in time, and the disk answered.
pub(super) async fn close(primary: &Primary, limit: Duration) -> bool {
    let closed = tokio::select! {
        closed = tokio::time::timeout(limit, primary.close()) => closed.is_ok(),
        () = primary.hangs(HUNG) => false,
    };
    if !closed {
        tracing::warn!("not everything could be made durable in time; what may differ is copied again");
    }
    closed
}

impl Volume {
    /// Why a volume that is neither primary nor replica just now takes no order.
    pub(super) fn not_open(&self) -> Failure {
        match &self.role {
            OpenRole::Changing(change) => refused(format!("this host is just {}", change.words)),
            OpenRole::Closed(text) => refused(format!("the volume is not open here: {text}")),
            OpenRole::Primary(..) | OpenRole::Replica(_) => unreachable!("it is open"),
        }
    }
}

pub(super) fn refused(text: impl Into<String>) -> Failure {
    Failure::new(FailureKind::Refused, text)
}

pub(super) fn failed(text: impl Into<String>) -> Failure {
    Failure::new(FailureKind::Failed, text)
}
