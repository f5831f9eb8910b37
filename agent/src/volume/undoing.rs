//! `undo` and `forget`: what this host had before its content was given up, or before another host took over unasked,
//! comes back, or is given up for good (L6).

use super::changes::{Next, failed, refused};
use super::{Answer, OpenRole, Volume};
use crate::control::api::Failure;
use crate::replica::Replica;
use crate::words::with_causes;
use blockmirror_protocol::replica::undo::NotUndoable;
use std::rc::Rc;
use tokio::task::spawn_local;

/// An undo that was carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Undone {
    /// How much was restored, in bytes.
    pub restored_bytes: u64,
    /// When the content was so, in seconds since 1970.
    pub back_to: u64,
}

impl Volume {
    /// Restores what this host had.
    pub(super) fn undo(&mut self, answer: Answer<Undone>) {
        let replica = match self.undoable() {
            Ok(replica) => replica,
            Err(failure) => return drop(answer.send(Err(failure))),
        };
        let hands = self.begin_change("being undone");
        spawn_local(async move {
            replica.close().await;
            let back_to = replica.history_point().map_or(0, |(began, _)| began);
            let restored_bytes = replica.kept_bytes().await;
            let done = replica.undo(&hands.hosts(), &hands.progress).await;
            drop(replica);
            let done = done.map(|()| Undone { restored_bytes, back_to });
            let done = done.map_err(|error| failed(with_causes(&error)));
            hands.end(Next::Reopen, move |_| drop(answer.send(done)));
        });
    }

    fn undoable(&self) -> Result<Rc<Replica>, Failure> {
        let replica = self.keeper(|replica| replica.state().superblock().layers.undo().is_some())?;
        if replica.is_recovering() {
            return Err(refused("a recovery reads this replica; wait for its end, or interrupt it"));
        }
        if replica.report().connected {
            let (volume, fence) = (self.name(), replica.state().superblock().fence);
            let primary = self.name_of(fence.holder);
            return Err(refused(format!(
                "{primary} is connected and writes here; first: blockmirror pause {volume} {primary}"
            )));
        }
        Ok(replica)
    }

    /// Agrees to the primary, and gives up what is kept for undo; says how many bytes that were.
    pub(super) fn forget(&self, answer: Answer<u64>) {
        let replica = match self.keeper(Replica::has_reason_to_forget) {
            Ok(replica) => replica,
            Err(failure) => return drop(answer.send(Err(failure))),
        };
        spawn_local(async move {
            let bytes = replica.kept_bytes().await;
            replica.forget().await;
            let is_gone = !replica.has_reason_to_forget();
            let text = || failed("it can't be recorded that nothing is kept; see the agent's log");
            drop(answer.send(if is_gone { Ok(bytes) } else { Err(text()) }));
        });
    }

    /// The replica, if it has a reason.
    fn keeper(&self, has_reason: impl Fn(&Replica) -> bool) -> Result<Rc<Replica>, Failure> {
        match &self.role {
            OpenRole::Replica(replica) if replica.has_failed() => Err(failed(format!(
                "this replica's backing has failed ({}); check the disk, then try again",
                replica.error().unwrap_or_default()
            ))),
            OpenRole::Replica(replica) if !has_reason(replica) => {
                Err(refused(NotUndoable::NoHistory.to_string()))
            }
            OpenRole::Replica(replica) => Ok(replica.clone()),
            OpenRole::Primary(..) => Err(refused(NotUndoable::Primary.to_string())),
            OpenRole::Changing(_) | OpenRole::Closed(_) => Err(self.not_open()),
        }
    }
}
