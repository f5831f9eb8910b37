//! Recoveries from a replica: begun on one stream, read on others; no primary writes meanwhile.
//!
//! One that nobody reads from for a while ends by itself, and all of them when their host is removed or this replica is
//! promoted by force: none holds up what keeps the volume alive.

use super::{OpenRole, Volume, refuse};
use crate::recovery;
use crate::replica::{Recovery, Replica};
use crate::storage;
use crate::transport::{CloseReason, Connection, ControlReceiver, ControlSender};
use crate::words::with_causes;
use blockmirror_protocol::succession;
use blockmirror_protocol::terms::{DataState, Fence};
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{Message, Recovering, Refusal, Refused};
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::broadcast;
use tokio::task::spawn_local;

/// After so long without a read a recovery is over.
const IDLE_TIME: Duration = Duration::from_secs(60);
/// How long whoever recovers may take to hang up when it was told why.
const PARTING_TIME: Duration = Duration::from_secs(5);

/// What ends recoveries: all, or those of one host; and why.
#[derive(Clone)]
pub(super) struct Ending {
    host: Option<HostId>,
    no: Refused,
}

impl Volume {
    /// The replica, if its content can be read now, or when no session of this primary is open.
    pub(super) fn recoverable(
        &self,
        accept_inconsistent: bool,
        primary: Option<HostId>,
    ) -> Result<Rc<Replica>, Refused> {
        let no = |refusal, text| Err(Refused { refusal, text });
        let replica = match &self.role {
            OpenRole::Replica(replica) => replica,
            OpenRole::Closed(text) if !text.is_empty() => return no(Refusal::Role, text.clone()),
            _ => {
                let text = "this host is the volume's primary; recover from a replica".to_owned();
                return no(Refusal::Role, text);
            }
        };
        if replica.has_failed() {
            let text = "the backing of this replica has failed; see its log".to_owned();
            return no(Refusal::Backing, text);
        }
        let superblock = replica.state().superblock();
        let (data, _) = succession::counts_as(&superblock);
        let is_taken = accept_inconsistent || data == DataState::Empty;
        if let Some(words) = self.touched_words(&superblock).filter(|_| !is_taken) {
            let text = format!(
                "this copy was changed by something else ({words}), and was not compared with a primary's since; use \
                 another replica; --accept-inconsistent takes it as it is"
            );
            return no(Refusal::Backing, text);
        }
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
            return no(Refusal::Backing, format!("{text}; {advice}"));
        }
        if replica.is_served() && (primary.is_none() || replica.greeter() != primary) {
            let text = "the primary is connected and writes to this replica; stop it or pause the link first";
            return no(Refusal::Busy, text.to_owned());
        }
        Ok(replica.clone())
    }

    pub(super) async fn begin_recovery(
        &mut self,
        accept_inconsistent: bool,
        sender: ControlSender,
        connection: Connection,
    ) {
        let replica = match self.recoverable(accept_inconsistent, None) {
            Ok(replica) => replica,
            Err(no) => return refuse(sender, no.refusal, no.text),
        };
        let guard = replica.begin_recovery().await;
        self.keep_writers_away(replica, guard, sender, connection).await;
    }

    /// A primary with this fence has lost its disk, and goes on from this host's copy. A session of its own ends for that.
    pub(super) async fn lend(&mut self, fence: Fence, sender: ControlSender, connection: Connection) {
        let replica = match self.recoverable(false, Some(connection.peer())) {
            Ok(replica) => replica,
            Err(no) => return refuse(sender, no.refusal, no.text),
        };
        if replica.is_served() {
            replica.disconnect();
        }
        let guard = replica.begin_recovery().await;
        match replica.lend(fence).await {
            Ok(true) => self.keep_writers_away(replica, guard, sender, connection).await,
            Ok(false) => {
                let text = "this host could not record for whom its copy is; see its log";
                refuse(sender, Refusal::Backing, text.to_owned());
            }
            Err(answer) => sender.end_with(answer, None),
        }
    }

    /// Tells what the copy is, and keeps primaries away until whoever asked for that is gone.
    async fn keep_writers_away(
        &mut self,
        replica: Rc<Replica>,
        guard: Recovery,
        sender: ControlSender,
        connection: Connection,
    ) {
        // Who reads it goes on from there, so nothing of it may be lost here (P5).
        if let Err(error) = storage::sync(&**replica.storage(), replica.backing()).await {
            return refuse(sender, Refusal::Backing, with_causes(&error));
        }
        let superblock = replica.state().superblock();
        let info = Recovering {
            volume: superblock.volume,
            copy: superblock.copy,
            size_bytes: superblock.size_bytes,
            block_size: superblock.block_size,
            data: succession::counts_as(&superblock).0,
            position: replica.report().position,
            lineage: superblock.lineage,
        };
        let source = Rc::new(recovery::Source::new(
            replica.storage().clone(),
            replica.backing().clone(),
            self.pool.clone(),
            info.clone(),
        ));
        *self.recovery.borrow_mut() = Some(source.clone());
        let (endings, kept) = (self.endings.subscribe(), self.recovery.clone());
        spawn_local(async move {
            serve_recovery(guard, source, info, sender, connection, endings).await;
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
                let (endings, name) = (self.endings.clone(), self.config.borrow().name.clone());
                spawn_local(async move {
                    let Err(error) = recovery::serve(&source, first, sender, receiver).await else { return };
                    tracing::info!(volume = %name, "{}", with_causes(&error));
                    // Frames can't carry a reason: it goes out where the recovery was asked for.
                    if let Some(no) = error.refusal() {
                        drop(endings.send(Ending { host: None, no }));
                    }
                });
            }
            _ => refuse(sender, Refusal::Other, "no recovery was begun on this connection".to_owned()),
        }
    }

    /// Ends all recoveries, or those of one host.
    pub(super) fn end_recoveries(&self, host: Option<HostId>, no: &Refused) {
        // An error means that there are none.
        let _ = self.endings.send(Ending { host, no: no.clone() });
    }
}

/// Keeps primaries away while the recovery goes on, and tells why it ends here.
async fn serve_recovery(
    guard: Recovery,
    source: Rc<recovery::Source>,
    info: Recovering,
    mut sender: ControlSender,
    connection: Connection,
    mut endings: broadcast::Receiver<Ending>,
) {
    let peer = connection.peer();
    let ending = async {
        loop {
            match endings.recv().await {
                Ok(ending) if ending.host.is_none_or(|host| host == peer) => return ending.no,
                Ok(_) => {}
                Err(_) => {
                    let text = "this host ended the recovery".to_owned();
                    return Refused { refusal: Refusal::Other, text };
                }
            }
        }
    };
    tracing::info!(%peer, "a recovery reads this replica");
    let no = if sender.send(&info.into()).await.is_ok() {
        let refused = sender.refused();
        tokio::select! {
            _ = connection.closed() => None,
            _ = refused => None,
            no = ending => Some(no),
            () = source.is_idle_for(IDLE_TIME) => {
                let text = "nothing was read for too long, so this host goes on; the same command goes on, too";
                Some(Refused { refusal: Refusal::Other, text: text.to_owned() })
            }
        }
    } else {
        None
    };
    // From here on nobody is kept away, and nothing is read any more.
    drop((guard, source));
    if let Some(no) = no {
        tracing::info!(%peer, "a recovery was ended: {}", no.text);
        if sender.send(&no.into()).await.is_ok() {
            // The recovery hangs up when it has read that.
            let _ = tokio::time::timeout(PARTING_TIME, connection.closed()).await;
        }
        connection.close(CloseReason::Done, "the recovery was ended");
    } else {
        tracing::info!(%peer, "a recovery has gone away");
    }
}
