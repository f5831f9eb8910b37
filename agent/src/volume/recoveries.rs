//! Recoveries from a replica: begun on one stream, read on others; no primary writes meanwhile.

use super::{OpenRole, Volume, refuse};
use crate::recovery;
use crate::replica::Recovery;
use crate::transport::{Connection, ControlReceiver, ControlSender};
use crate::words::with_causes;
use blockmirror_protocol::wire::message::{DataState, Message, Recovering, Refusal, Refused};
use std::rc::Rc;
use tokio::sync::broadcast;
use tokio::task::spawn_local;

impl Volume {
    pub(super) async fn begin_recovery(
        &mut self,
        accept_inconsistent: bool,
        sender: ControlSender,
        connection: Connection,
    ) {
        let OpenRole::Replica(replica) = &self.role else {
            let text = match &self.role {
                OpenRole::Closed(text) if !text.is_empty() => text.clone(),
                _ => "this host is the volume's primary; recover from a replica".to_owned(),
            };
            return refuse(sender, Refusal::Role, text);
        };
        if replica.has_failed() {
            let text = "the backing of this replica has failed; see its log".to_owned();
            return refuse(sender, Refusal::Backing, text);
        }
        let data = replica.report().data;
        if data == DataState::Empty || data == DataState::Inconsistent && !accept_inconsistent {
            let text = "this copy is not consistent: its first sync or a resync did not end";
            let advice = match replica.rollback_point() {
                Some(_) => format!(
                    "it can be rolled back to what it was before: there, blockmirror promote {} --force; or use \
                     another replica; --accept-inconsistent takes the mixture",
                    self.name()
                ),
                None => "use another replica, or accept a mixture with --accept-inconsistent".to_owned(),
            };
            return refuse(sender, Refusal::Backing, format!("{text}; {advice}"));
        }
        let Some(guard) = replica.begin_recovery().await else {
            let text = "the primary is connected and writes to this replica; stop it or pause the link first";
            return refuse(sender, Refusal::Busy, text.to_owned());
        };
        let superblock = replica.state().superblock();
        let info = Recovering {
            volume: superblock.volume,
            copy: superblock.copy,
            size_bytes: superblock.size_bytes,
            block_size: superblock.block_size,
            data,
            position: replica.report().position,
        };
        let source = recovery::Source::new(
            replica.storage().clone(),
            replica.backing().clone(),
            self.pool.clone(),
            info.clone(),
        );
        *self.recovery.borrow_mut() = Some(Rc::new(source));
        let refusals = self.refusals.subscribe();
        let (kept, replica) = (self.recovery.clone(), replica.clone());
        spawn_local(async move {
            serve_recovery(guard, info, sender, connection, refusals).await;
            if !replica.is_recovering() {
                // What was kept for reads holds the backing's claim.
                *kept.borrow_mut() = None;
            }
        });
    }

    pub(super) fn read_for_recovery(&self, first: Message, sender: ControlSender, receiver: ControlReceiver) {
        let source = self.recovery.borrow().clone();
        match (&self.role, source) {
            (OpenRole::Replica(replica), Some(source)) if replica.is_recovering() => {
                let (refusals, name) = (self.refusals.clone(), self.config.borrow().name.clone());
                spawn_local(async move {
                    let Err(error) = recovery::serve(&source, first, sender, receiver).await else { return };
                    tracing::info!(volume = %name, "{}", with_causes(&error));
                    // Frames can't carry a reason: it goes out where the recovery was asked for.
                    if let Some(no) = error.refusal() {
                        drop(refusals.send(no));
                    }
                });
            }
            _ => refuse(sender, Refusal::Other, "no recovery was begun on this connection".to_owned()),
        }
    }
}

/// Keeps primaries away while the recovery's connection lives, and tells why a read failed.
async fn serve_recovery(
    guard: Recovery,
    info: Recovering,
    mut sender: ControlSender,
    connection: Connection,
    mut refusals: broadcast::Receiver<Refused>,
) {
    if sender.send(&info.into()).await.is_ok() {
        tokio::select! {
            _ = connection.closed() => {}
            Ok(no) = refusals.recv() => {
                if sender.send(&no.into()).await.is_ok() {
                    // The recovery hangs up when it has read that.
                    connection.closed().await;
                }
            }
        }
    }
    drop(guard);
}
