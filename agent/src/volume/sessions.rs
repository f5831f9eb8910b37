//! Sessions that other hosts open. Any host of the volume may greet: the fence decides who is the primary (L5).

use super::opening::Others;
use super::{Event, Learn, Learned, OpenRole, Volume, refuse};
use crate::config::Name;
use crate::transport::{ControlReceiver, ControlSender, FrameReceiver};
use crate::words::{with_causes, with_name};
use blockmirror_protocol::replica::PrimaryMisbehaved;
use blockmirror_protocol::wire::StreamPreamble;
use blockmirror_protocol::wire::message::Members;
use blockmirror_protocol::wire::message::{Fetching, Hello, Refusal, Superseded};
use std::cell::RefCell;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::spawn_local;

/// How long after a word of the primary about who the hosts are the next one is kept: each change is saved.
const LEARN_PAUSE: Duration = Duration::from_millis(100);

/// The newest word of a session's primary about who the hosts are, until the supervisor is told: however many come, one is
/// kept (X1).
#[derive(Default)]
struct Told {
    newest: RefCell<Option<Members>>,
    came: Notify,
}

impl Told {
    fn note(&self, members: Members) {
        *self.newest.borrow_mut() = Some(members);
        self.came.notify_one();
    }

    /// Has the supervisor keep what it was not told yet.
    fn hand_on(&self, volume: &Name, learn: &Learn) {
        if let Some(members) = self.newest.take() {
            learn(volume, Learned::Members(members));
        }
    }

    /// Hands on what comes, and never ends. What came last is handed on by whoever ends this, before anything that is learned
    /// later: it tells who is the primary.
    async fn keep_handing_on(&self, volume: &Name, learn: &Learn) -> Infallible {
        loop {
            self.came.notified().await;
            self.hand_on(volume, learn);
            tokio::time::sleep(LEARN_PAUSE).await;
        }
    }
}

impl Volume {
    pub(super) async fn begin_session(
        &mut self,
        hello: Hello,
        sender: ControlSender,
        receiver: ControlReceiver,
    ) {
        if matches!(&self.role, OpenRole::Replica(replica) if replica.is_recovering()) {
            let text = "a recovery reads this replica; replication goes on when it has ended".to_owned();
            return refuse(sender, Refusal::Busy, text);
        }
        if self.has_failed_replica() {
            self.open_anew(Others::Told(hello.fence)).await;
        } else if matches!(self.role, OpenRole::Closed(_)) {
            self.reopen(Others::Told(hello.fence)).await;
        }
        match &self.role {
            OpenRole::Replica(_) => self.serve_session(hello, sender, receiver),
            OpenRole::Primary(primary, links) => {
                let ours = primary.superseded().unwrap_or(primary.state().superblock().fence);
                if !ours.may_become(hello.fence) {
                    let error = PrimaryMisbehaved("its greeting tells of more promotions than there were");
                    if let Some(link) = links.get(&receiver.peer()) {
                        link.accuse(&error);
                    }
                    return refuse(sender, Refusal::Other, error.to_string());
                }
                if hello.fence.is_refused_by(ours) {
                    return sender.end_with(Superseded { fence: ours }, Some(receiver));
                }
                self.supersede(hello.fence).await;
                let text = "this host was the primary until just now; it becomes a replica when nobody has its \
                            devices open any more";
                refuse(sender, Refusal::Busy, text.to_owned());
            }
            OpenRole::Changing(change) => {
                refuse(sender, Refusal::Busy, format!("this host is just {}", change.words));
            }
            OpenRole::Closed(text) => refuse(sender, Refusal::Backing, text.clone()),
        }
    }

    fn has_failed_replica(&self) -> bool {
        matches!(&self.role, OpenRole::Replica(replica) if replica.has_failed())
    }

    async fn open_anew(&mut self, others: Others) {
        if let OpenRole::Replica(replica) = &self.role {
            replica.close().await;
        }
        self.reopen(others).await;
    }

    /// Opens the backing of a replica anew that has failed (W5): nothing but what its operator asks for may come.
    pub(super) async fn take_up_failed(&mut self) {
        if self.has_failed_replica() {
            self.open_anew(Others::Known).await;
        }
    }

    fn serve_session(&self, hello: Hello, sender: ControlSender, receiver: ControlReceiver) {
        let OpenRole::Replica(replica) = &self.role else { return };
        let config = self.config.borrow();
        let (name, greeting, greeter) = (config.name.clone(), hello.fence.holder, receiver.peer());
        let primary = config.peers.iter().find(|peer| peer.host == greeting).cloned();
        let (replica, learn, events) =
            (replica.clone(), self.surroundings.learn.clone(), self.events.clone());
        spawn_local(async move {
            let told = Told::default();
            let served = tokio::select! {
                served = replica.serve(hello, sender, receiver, |members| told.note(members)) => served,
                never = told.keep_handing_on(&name, &learn) => match never {},
            };
            told.hand_on(&name, &learn);
            if let Err(error) = served {
                let text = primary.map(|peer| with_name(&error, peer.host, &peer.name));
                let text = text.unwrap_or_else(|| with_causes(&error));
                if error.is_misbehaviour() {
                    tracing::warn!(volume = %name, "{text}");
                    replica.accuse(greeter, text);
                } else {
                    tracing::info!(volume = %name, "{text}");
                }
            }
            drop(replica);
            drop(events.send(Event::SessionEnded));
        });
    }

    /// A primary opened a stream for the answers to what it fetches.
    pub(super) fn answer_fetches(
        &self,
        fetching: Fetching,
        sender: ControlSender,
        receiver: ControlReceiver,
    ) {
        // Dropped, it tells the primary that nothing comes.
        let OpenRole::Replica(replica) = &self.role else { return };
        if replica.greeter() != Some(receiver.peer()) {
            return;
        }
        let replica = replica.clone();
        spawn_local(async move {
            // The session notices by itself that its connection is gone.
            if let Err(error) = replica.answer_fetches(fetching, sender).await {
                tracing::debug!("{}", with_causes(&error));
            }
            drop(receiver);
        });
    }

    pub(super) fn take_frames(&self, preamble: StreamPreamble, frames: FrameReceiver) {
        let replica = match &self.role {
            OpenRole::Replica(replica) => Some(replica.clone()),
            OpenRole::Changing(change) => change.replica(),
            OpenRole::Primary(..) | OpenRole::Closed(_) => None,
        };
        // Dropped, it tells the primary that nobody takes it in.
        let Some(replica) = replica else { return };
        let name = self.config.borrow().name.clone();
        let sender = frames.peer();
        spawn_local(async move {
            if let Err(error) = replica.take_frames(preamble.session, frames).await {
                // The end of the control stream is told; this is news only where the frames themselves are wrong.
                if !error.is_lost() {
                    tracing::warn!(volume = %name, "{}", with_causes(&error));
                }
                if replica.greeter() == Some(sender) {
                    if error.is_misbehaviour() {
                        replica.accuse(sender, with_causes(&error));
                    }
                    replica.end_session(preamble.session);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmirror_protocol::terms::Mode;
    use blockmirror_protocol::units::HostId;
    use blockmirror_protocol::wire::message::Member;
    use std::sync::Arc;
    use tokio::sync::mpsc::unbounded_channel;

    /// Each of them was kept until it was saved.
    #[tokio::test]
    async fn of_many_words_about_the_hosts_the_newest_is_kept() {
        let (told, name) = (Told::default(), "data".parse().expect("a name"));
        let (kept, mut source) = unbounded_channel();
        let learn: Learn = Arc::new(move |_, learned| kept.send(learned).expect("it is read"));
        let word = |number: u64| {
            let member = Member {
                host: HostId::default(),
                name: "a".to_owned(),
                addresses: Vec::new(),
                mode: Mode::Async,
                version: number,
            };
            Members { members: vec![member], removed: Vec::new() }
        };
        told.note(word(0));
        let first = tokio::select! {
            never = told.keep_handing_on(&name, &learn) => match never {},
            first = source.recv() => first,
        };
        (1..1000).for_each(|number| told.note(word(number)));
        // The session ends.
        told.hand_on(&name, &learn);
        told.hand_on(&name, &learn);
        drop(learn);
        let mut kept: Vec<_> = first.into_iter().collect();
        while let Some(word) = source.recv().await {
            kept.push(word);
        }
        let numbers = kept.into_iter().map(|learned| match learned {
            Learned::Members(told) => told.members[0].version,
            other => panic!("{other:?} was not told"),
        });
        assert_eq!(numbers.collect::<Vec<_>>(), [0, 999]);
    }
}
