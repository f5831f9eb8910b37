//! Who the volume's hosts are, kept up to date (X3): a host that was removed is left, and nothing is kept for it; and other
//! hosts are asked about removals when one is met again, and as long as no primary writes to this replica, which may have
//! been removed while it was away.

use super::changes::Event;
use super::promotable::heard;
use super::{Learn, Learned, OpenRole, Volume};
use crate::config::{Name, PeerConfig};
use crate::control::api::{Better, Elsewhere, WentOn};
use crate::standing::{self, Answered};
use crate::words::with_causes;
use blockmirror_protocol::succession::Objection;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{Refusal, Refused, Removal, Standing};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::spawn_local;

/// How long others may take to say who the volume's hosts are.
const ANSWER_TIME: Duration = Duration::from_secs(3);
/// How often a replica that no primary writes to asks.
const ASK_TIME: Duration = Duration::from_secs(5);

impl Volume {
    /// A host is a peer no more: its sessions and recoveries end, and nothing is kept for it.
    pub(super) fn part(&mut self, host: HostId, answer: oneshot::Sender<()>) {
        let text = "this host was removed from the volume".to_owned();
        self.end_recoveries(Some(host), &Refused { refusal: Refusal::UnknownKey, text });
        match &mut self.role {
            OpenRole::Primary(primary, links) => {
                // Whoever asked may be gone; nothing depends on it.
                let Some(link) = links.remove(&host) else { return answer.send(()).unwrap_or_default() };
                link.part();
                // The one that is left, if it is one, keeps no activity log any more (D5).
                let last = links.values().next().filter(|_| links.len() == 1).cloned();
                // Not to keep what it has open, when the volume is opened anew.
                let primary = Rc::downgrade(primary);
                let events = self.events.clone();
                spawn_local(async move {
                    // One that takes its leave counts on nothing any more; what was promised to one that can't be
                    // reached is kept.
                    link.ended().await;
                    if let Some(primary) = primary.upgrade()
                        && let Err(error) = primary.remove_peer(host).await
                    {
                        tracing::warn!("{}", with_causes(&error));
                    }
                    if let Some(last) = last {
                        last.greet_anew();
                    }
                    answer.send(()).unwrap_or_default();
                    // Nobody listens any more when the agent has ended meanwhile.
                    drop(events.send(Event::Parted));
                });
            }
            OpenRole::Replica(replica) => {
                if replica.greeter() == Some(host) {
                    replica.disconnect();
                }
                answer.send(()).unwrap_or_default();
            }
            // It is opened, or goes on, without that host.
            OpenRole::Closed(_) | OpenRole::Changing(_) => answer.send(()).unwrap_or_default(),
        }
    }

    /// Two hosts use each of these keys: it can't be told which of them a session is with, so there is none with either.
    pub(super) fn keep_from(&mut self, hosts: BTreeSet<HostId>) {
        match &self.role {
            OpenRole::Primary(_, links) => {
                links.iter().for_each(|(host, link)| link.set_doubled(hosts.contains(host)));
            }
            OpenRole::Replica(replica) => {
                if replica.greeter().is_some_and(|greeter| hosts.contains(&greeter)) {
                    replica.disconnect();
                }
            }
            OpenRole::Closed(_) | OpenRole::Changing(_) => {}
        }
        self.doubled = hosts;
    }

    /// Asks another host which hosts were removed.
    pub(super) fn ask_members(&self, host: HostId) {
        let config = self.config.borrow();
        let Some(asked) = config.peers.iter().find(|peer| peer.host == host).cloned() else { return };
        let (name, id) = (config.name.clone(), config.id);
        let (peers, learn) = (self.surroundings.peers.clone(), self.surroundings.learn.clone());
        spawn_local(async move {
            let removals = standing::ask_removals(&peers, id, vec![asked], ANSWER_TIME).await;
            pass_on(&learn, &name, removals);
        });
    }

    /// On a replica that no primary writes to: asks all others in a while, and again as long as that is so.
    pub(super) fn ask_members_later(&mut self) {
        if std::mem::replace(&mut self.asks_members, true) {
            return;
        }
        let events = self.events.clone();
        spawn_local(async move {
            tokio::time::sleep(ASK_TIME).await;
            drop(events.send(Event::IsAlone));
        });
    }

    /// Looks whether a replica is still alone.
    pub(super) fn look_whether_alone(&mut self) {
        self.asks_members = false;
        if matches!(&self.role, OpenRole::Replica(replica) if !replica.report().connected) {
            self.ask_all();
            self.ask_members_later();
        }
    }

    /// Asks all others which hosts were removed and, for the operator's sake, how they stand.
    fn ask_all(&self) {
        let config = self.config.borrow();
        let (name, id, asked) = (config.name.clone(), config.id, config.peers.clone());
        let (peers, learn) = (self.surroundings.peers.clone(), self.surroundings.learn.clone());
        let events = self.events.clone();
        spawn_local(async move {
            let told = standing::hear_all(&peers, id, &asked, ANSWER_TIME).await;
            pass_on(&learn, &name, told.removals);
            // Nobody listens any more when the agent has ended meanwhile.
            drop(events.send(Event::Heard(told.answers)));
        });
    }

    /// Whether one of the hosts that were heard is to be promoted rather than this one, or one went on elsewhere.
    pub(super) fn look_for_better(&mut self, answers: &[(PeerConfig, Answered)]) {
        let OpenRole::Replica(replica) = &self.role else { return };
        let objection = self.applicant(replica).candidate.objection(&heard(answers));
        (self.better, self.elsewhere) = (None, None);
        let is_away = |host: HostId| {
            let said = answers.iter().find(|(peer, _)| peer.host == host);
            said.is_some_and(|(_, answered)| answered.as_ref().is_ok_and(Standing::is_out_of_reach))
        };
        let better = |host: HostId, was_demoted| Better {
            name: self.name_of(host),
            was_demoted,
            is_away: is_away(host),
        };
        let elsewhere =
            |host: HostId, how| Elsewhere { name: self.name_of(host), how, is_away: is_away(host) };
        match objection {
            Some(Objection::Demoted(host)) => self.better = Some(better(host, true)),
            Some(Objection::Later(host)) => self.better = Some(better(host, false)),
            Some(Objection::Serves(host)) => self.elsewhere = Some(elsewhere(host, WentOn::Serves)),
            Some(Objection::Promoted(host)) => self.elsewhere = Some(elsewhere(host, WentOn::Promoted)),
            Some(Objection::Split(host)) => self.elsewhere = Some(elsewhere(host, WentOn::Split)),
            // What else stands against a promotion is said when one is asked for.
            Some(
                Objection::Connected
                | Objection::Touched
                | Objection::Kept
                | Objection::Rollback
                | Objection::Unheard(_)
                | Objection::Unpromised,
            )
            | None => {}
        }
    }
}

/// Has the supervisor keep which hosts were removed, if any were. It is there as long as a volume is.
pub(super) fn pass_on(learn: &Learn, volume: &Name, removals: Vec<Removal>) {
    if !removals.is_empty() {
        learn(volume, Learned::Removals(removals));
    }
}
