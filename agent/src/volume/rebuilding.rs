//! `rebuild`: a primary takes another backing for its own, serves from a replica at once, and fills it (S4).

use super::changes::{CLOSE_TIME, Next, close, failed, refused};
use super::{Answer, OpenRole, Volume};
use crate::config::Role;
use crate::control::api::Failure;
use blockmirror_protocol::units::HostId;
use tokio::task::spawn_local;

impl Volume {
    /// Whether this host may take another backing. `overwrite`: also where its copy is a good one.
    pub(super) async fn may_rebuild(&self, overwrite: bool) -> Result<(), Failure> {
        let primary = match &self.role {
            OpenRole::Changing(_) => return Err(self.not_open()),
            OpenRole::Primary(primary, _) => primary,
            OpenRole::Closed(_) if self.config.borrow().role == Role::Primary => return Ok(()),
            OpenRole::Replica(_) | OpenRole::Closed(_) => {
                let text = "this host is a replica: its primary copies to it by itself, also to another disk; only a \
                            primary is rebuilt";
                return Err(refused(text));
            }
        };
        if let Some(fence) = primary.superseded() {
            let holder = self.name_of(fence.holder);
            return Err(refused(format!("{holder} was promoted: this host becomes its replica")));
        }
        let users = self.devices.users().await.words();
        if !users.is_empty() {
            return Err(refused(format!(
                "the device is in use: {}; close it first: its content is another one after a rebuild",
                users.join(", ")
            )));
        }
        if primary.failure().is_none() && !overwrite {
            let (what, lacking) = match primary.rebuild() {
                Some(_) => ("a rebuild of this host is under way, and goes on by itself", Vec::new()),
                None => ("this host's copy is a good one", self.lacking()),
            };
            let loses = match lacking.as_slice() {
                [] => String::new(),
                lacking => format!(", and what these don't have is lost then: {}", lacking.join(", ")),
            };
            return Err(refused(format!("{what}; --overwrite gives it up{loses}")));
        }
        Ok(())
    }

    /// The replicas that may lack something, in words.
    fn lacking(&self) -> Vec<String> {
        let OpenRole::Primary(primary, _) = &self.role else { return Vec::new() };
        let (_, reports) = primary.reports();
        let lacks = |host: &HostId| !primary.in_sync().contains(host);
        reports.keys().filter(|host| lacks(host)).map(|host| self.name_of(*host)).collect()
    }

    /// Opens the volume anew, with the backing that the configuration names now.
    pub(super) async fn rebuild(&mut self, answer: Answer<()>) {
        match &self.role {
            OpenRole::Primary(primary, links) => {
                let primary = primary.clone();
                links.values().for_each(|link| link.stop());
                let devices = std::mem::take(&mut self.devices);
                let hands = self.begin_change("taking another disk");
                spawn_local(async move {
                    devices.stop().await;
                    if primary.failure().is_none() {
                        close(&primary, CLOSE_TIME).await;
                    }
                    primary.retire();
                    drop(primary);
                    hands.end(Next::Reopen, move |role| drop(answer.send(opened(role))));
                });
            }
            OpenRole::Closed(_) => {
                self.reopen(super::opening::Others::Ask).await;
                drop(answer.send(opened(&self.role)));
            }
            OpenRole::Replica(_) | OpenRole::Changing(_) => drop(answer.send(self.may_rebuild(true).await)),
        }
    }
}

/// What came of it.
fn opened(role: &OpenRole) -> Result<(), Failure> {
    match role {
        OpenRole::Primary(..) => Ok(()),
        OpenRole::Closed(text) => Err(failed(text.clone())),
        OpenRole::Replica(_) => Err(refused("another host was promoted meanwhile; this one is its replica")),
        OpenRole::Changing(_) => Err(failed("the volume is being changed; look at the status later")),
    }
}
