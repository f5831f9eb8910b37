//! `promote`: a replica becomes the primary. Whether it may is decided by [`Candidate`], with what the other hosts say;
//! how it does is the shell's part ([`Replica::promote`]); then the volume opens anew and serves its devices.

use super::changes::{Hands, Next, Then, failed, refused};
use super::promotable::{Applicant, heard};
use super::{Answer, OpenRole, Volume, refuse};
use crate::clock::Moment;
use crate::control::api::Failure;
use crate::quantity::unix_seconds;
use crate::replica::{PromotionError, Replica};
use crate::standing;
use crate::transport::ControlSender;
use crate::words::with_causes;
use blockmirror_protocol::disk::marker;
use blockmirror_protocol::inquiry::{Inquiry, Next as Inquired};
use blockmirror_protocol::succession::{Candidate, Decision};
use blockmirror_protocol::units::{HostId, Time};
use blockmirror_protocol::wire::message::{Refusal, Refused, TookOver};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::task::spawn_local;

/// How long other hosts may take to say how they stand.
const STANDING_TIME: Duration = Duration::from_secs(3);
/// How long they may take where this host takes over from one that waits for it: nobody can write meanwhile.
const SUCCESSION_TIME: Duration = Duration::from_secs(1);
/// How long it takes at most until a dead connection is noticed, and how often that is looked at.
const SILENCE_TIME: Duration = Duration::from_secs(10);
const LOOK_TIME: Duration = Duration::from_millis(100);

/// A promotion that was carried out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Promoted {
    /// How long it took, until the devices were served.
    pub took: Duration,
    /// When the content was so that it was rolled back to, in seconds since 1970.
    pub rolled_back_to: Option<u64>,
    /// The hosts that did not say how they stand.
    pub unanswered: Vec<String>,
}

impl Volume {
    pub(super) fn promote(&mut self, force: bool, answer: Answer<Promoted>) {
        let began = Instant::now();
        if force {
            let text = "this replica is being promoted".to_owned();
            self.end_recoveries(None, &Refused { refusal: Refusal::Role, text });
        }
        let replica = match self.promotable(force) {
            Ok(replica) => replica,
            Err(failure) => return drop(answer.send(Err(failure))),
        };
        let mut applicant = self.applicant(&replica);
        if let Some(text) = applicant.obstacle() {
            return drop(answer.send(Err(refused(text))));
        }
        let hands = self.begin_change("being promoted");
        spawn_local(async move {
            let config = &hands.config;
            let mut answers = standing::ask_all(&hands.peers, config.id, &config.peers, STANDING_TIME).await;
            let inquiry = Inquiry::new(force, Time::default());
            let known = loop {
                let now = Time(began.elapsed());
                match inquiry.handle_answers(&heard(&answers), applicant.candidate.is_connected, now) {
                    Inquired::Ask => {
                        tokio::time::sleep(LOOK_TIME).await;
                        answers =
                            standing::ask_all(&hands.peers, config.id, &config.peers, STANDING_TIME).await;
                    }
                    Inquired::Watch => break inquiry.handle_watched(!is_left(&replica).await),
                    Inquired::Decide(known) => break known,
                }
            };
            applicant.candidate.is_promised = replica.is_promised();
            let decision = match applicant.decide(&answers, known) {
                Ok(decision) => decision,
                Err(text) => {
                    return hands.end(Next::GoOn(replica), move |_| drop(answer.send(Err(refused(text)))));
                }
            };
            let unanswered: Vec<String> = answers
                .iter()
                .filter(|(_, answered)| answered.is_err())
                .map(|(peer, _)| peer.name.to_string())
                .collect();
            let rolled_back_to = applicant.rollback_at;
            let done =
                carry_out(&hands, replica, decision).await.map_err(|error| failed(with_causes(&error)));
            hands.end(Next::Reopen, move |role| {
                let promoted = done.and_then(|()| is_primary(role)).map(|()| Promoted {
                    took: began.elapsed(),
                    rolled_back_to,
                    unanswered,
                });
                drop(answer.send(promoted));
            });
        });
    }

    /// The primary was demoted for this host, and says so. Where this host's operator was quicker, it has taken over: a
    /// refusal would make the other host a primary as well.
    pub(super) fn take_over(&mut self, host: HostId, sender: ControlSender) {
        match &self.role {
            OpenRole::Changing(_) => return self.taking_over.push((host, sender, Moment::now())),
            OpenRole::Primary(primary, _) if primary.superseded().is_none() => {
                return sender.end_with(TookOver { fence: primary.state().superblock().fence }, None);
            }
            _ => {}
        }
        let replica = match self.promotable(false) {
            Ok(replica) => replica,
            Err(failure) => return refuse(sender, Refusal::Role, failure.message),
        };
        let applicant = self.applicant(&replica);
        // The one that was demoted for this host may be the one that nobody here has agreed to.
        if let Some(text) = applicant.kept_words() {
            return refuse(sender, Refusal::Role, text);
        }
        if !applicant.candidate.is_heir_of(host) {
            let text = "this host has not recorded that it has everything, so it does not take over";
            return refuse(sender, Refusal::Role, text.to_owned());
        }
        let hands = self.begin_change("taking over as the primary");
        let volume = self.name();
        spawn_local(async move {
            let config = &hands.config;
            let answers = standing::ask_all(&hands.peers, config.id, &config.peers, SUCCESSION_TIME).await;
            let decision = match applicant.decide_to_succeed(&answers) {
                Ok(decision) => decision,
                Err(text) => {
                    return hands.end(Next::GoOn(replica), move |_| refuse(sender, Refusal::Role, text));
                }
            };
            let done = carry_out(&hands, replica, decision).await;
            hands.end(Next::Reopen, move |role| match (done, role) {
                (_, OpenRole::Primary(primary, _)) => {
                    sender.end_with(TookOver { fence: primary.state().superblock().fence }, None);
                }
                (Err(error), _) if !matches!(error, PromotionError::Unrecorded(_)) => {
                    refuse(sender, Refusal::Backing, with_causes(&error));
                }
                // The superblock says, or may say, that this host is the primary. A refusal would make one of the other
                // host as well; without an answer it asks how this one stands.
                (done, role) => {
                    let text = match (done, role) {
                        (Err(error), _) => with_causes(&error),
                        (Ok(()), OpenRole::Closed(text)) => text.clone(),
                        (Ok(()), _) => "it is a replica still".to_owned(),
                    };
                    tracing::error!(
                        %volume,
                        "this host was to take over as the primary and serves nothing: {text}; mend that, and the volume \
                         is opened by itself: `blockmirror status {volume}` here and on the other host"
                    );
                }
            });
        });
    }

    /// What this host was demoted for did not come to be: it is the primary again.
    pub(super) fn promote_again(&mut self, then: Then) {
        let replica = match self.promotable(false) {
            Ok(replica) => replica,
            Err(failure) => {
                tracing::error!(volume = %self.name(), "{}", failure.message);
                return then(&self.role);
            }
        };
        let hands = self.begin_change("becoming the primary again");
        spawn_local(async move {
            let newest = replica.state().superblock().fence;
            let decision = Decision { newest, ..Decision::default() };
            if let Err(error) = carry_out(&hands, replica, decision).await {
                tracing::error!(volume = %hands.config.name, "{}", with_causes(&error));
            }
            hands.end(Next::Reopen, then);
        });
    }

    /// The replica, if nothing stands in the way of changing its role.
    fn promotable(&self, force: bool) -> Result<Rc<Replica>, Failure> {
        let (volume, own) = (self.name(), &self.surroundings.own.name);
        match &self.role {
            OpenRole::Replica(replica) if replica.is_recovering() && !force => Err(refused(
                "a recovery reads this replica; wait for its end, or interrupt it; --force ends it",
            )),
            OpenRole::Replica(_) if self.config.borrow().removal.is_some() && !force => {
                let config = self.config.borrow();
                let words = config.removal.as_ref().map(|removal| removal.words(&volume)).unwrap_or_default();
                Err(refused(format!(
                    "{words}: its copy was not kept up since, and no other host would follow it; --force promotes it \
                     all the same"
                )))
            }
            OpenRole::Replica(replica) if replica.has_failed() => Err(failed(format!(
                "this replica's backing has failed ({}); check the disk, then try again",
                replica.error().unwrap_or_default()
            ))),
            OpenRole::Replica(replica) => Ok(replica.clone()),
            OpenRole::Primary(primary, _) => Err(refused(match primary.superseded() {
                Some(fence) => format!(
                    "{} was promoted after this host, which becomes a replica: blockmirror status {volume}",
                    self.name_of(fence.holder)
                ),
                None => format!("{own} is the primary of {volume} already"),
            })),
            OpenRole::Changing(_) | OpenRole::Closed(_) => Err(self.not_open()),
        }
    }

    pub(super) fn applicant(&self, replica: &Replica) -> Applicant {
        let (superblock, report) = (replica.state().superblock(), replica.report());
        let own = &self.surroundings.own;
        let marker = self.surroundings.state_folder.join(marker::FILE_NAME);
        let written = std::fs::metadata(marker).and_then(|status| status.modified());
        let since = replica.history_point().map_or(0, |(began, _)| began);
        let kept = self.unagreed(&superblock).map(|primary| (primary, since));
        let touched = self.touched_words(&superblock);
        let candidate = Candidate {
            own: own.host,
            superblock,
            position: report.position,
            is_connected: report.connected,
            is_promised: replica.is_promised(),
        };
        Applicant {
            volume: self.name(),
            own_name: own.name.clone(),
            candidate,
            rollback_at: replica.rollback_point().map(|(began, _)| began),
            last_written: written
                .ok()
                .map(|at| unix_seconds().saturating_sub(at.elapsed().map_or(0, |age| age.as_secs()))),
            link_seconds: replica.since().elapsed().as_secs(),
            now: unix_seconds(),
            touched,
            kept,
        }
    }
}

/// Whether the connected primary, which does not answer, turns out to be gone: a dead connection is noticed late.
async fn is_left(replica: &Replica) -> bool {
    let left = async {
        while replica.report().connected {
            tokio::time::sleep(LOOK_TIME).await;
        }
    };
    tokio::time::timeout(SILENCE_TIME, left).await.is_ok()
}

/// Ends the session and carries the promotion out; the shell is given up.
async fn carry_out(hands: &Hands, replica: Rc<Replica>, decision: Decision) -> Result<(), PromotionError> {
    replica.end().await;
    replica.promote(hands.own, &hands.hosts(), decision, &hands.progress).await
}

/// Whether the volume opened as a primary.
fn is_primary(role: &OpenRole) -> Result<(), Failure> {
    match role {
        OpenRole::Primary(..) => Ok(()),
        OpenRole::Closed(text) => Err(failed(format!("promoted, but the volume can't be opened: {text}"))),
        OpenRole::Replica(_) | OpenRole::Changing(_) => {
            Err(failed("it is a replica still; see the agent's log"))
        }
    }
}
