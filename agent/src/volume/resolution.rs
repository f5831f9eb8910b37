//! `resolve`: the operator gives this host's content up for another's, where both went on after they were last in sync
//! (L6). Whether that may be is decided by [`Resolver`], with what the other hosts say.
//!
//! All that happens here is that a layer of pre-images is begun and this host forgets its own generations, in one durable
//! write. From then on it takes the winner's greeting, and the union of both maps since the fork is copied (D3), while
//! what it overwrites is kept; a crash leaves it done or not begun.

use super::changes::{Hands, Next, failed, refused};
use super::resolvable::Resolver;
use super::{Answer, OpenRole, Volume};
use crate::control::api::{Failure, Resolved, Stake};
use crate::replica::{PromotionError, Replica};
use crate::standing::{self, Answered};
use crate::state::generations;
use crate::state::pre_images::LayerError;
use crate::state::stored::{self, Undelivered};
use crate::words::with_causes;
use blockmirror_protocol::disk::superblock::{Role, Superblock};
use blockmirror_protocol::replica::resolve::{self, Keep};
use blockmirror_protocol::split::{Concession, Side};
use blockmirror_protocol::units::{GenerationId, HostId, Position};
use blockmirror_protocol::wire::message::Standing;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use tokio::task::spawn_local;

/// How long other hosts may take to say how they stand.
const STANDING_TIME: Duration = Duration::from_secs(3);

/// What giving in means for this host.
struct Yielding {
    concession: Concession,
    resolved: Resolved,
}

impl Volume {
    /// Gives this host's content up for another's, or only says what that would lose.
    pub(super) async fn resolve(&mut self, keep: HostId, dry_run: bool, answer: Answer<Resolved>) {
        let resolver = match self.resolver().await {
            Ok(resolver) => resolver,
            Err(failure) => return drop(answer.send(Err(failure))),
        };
        let folder = self.surroundings.state_folder.clone();
        match &self.role {
            OpenRole::Replica(replica) if !dry_run => {
                let replica = replica.clone();
                let hands = self.begin_change("taking another host's content");
                spawn_local(async move { give_in(hands, folder, resolver, replica, keep, answer).await });
            }
            _ => {
                let hands = self.hands();
                spawn_local(async move {
                    let looked = look(&hands, &folder, &resolver, keep).await;
                    drop(answer.send(looked.map(|yielding| yielding.resolved)));
                });
            }
        }
    }

    async fn resolver(&self) -> Result<Resolver, Failure> {
        let own = &self.surroundings.own;
        let (superblock, position, openers) = match &self.role {
            OpenRole::Replica(replica) if replica.is_recovering() => {
                return Err(refused("a recovery reads this replica; wait for its end, or interrupt it"));
            }
            OpenRole::Replica(replica) => (replica.state().superblock(), replica.report().position, None),
            OpenRole::Primary(primary, _) => {
                let is_superseded = primary.superseded().is_some();
                let openers = if is_superseded { Some(self.devices.users().await.words()) } else { None };
                let superblock = Superblock { role: Role::Primary, ..primary.state().superblock() };
                (superblock, Position::default(), openers)
            }
            OpenRole::Changing(_) | OpenRole::Closed(_) => return Err(self.not_open()),
        };
        let side = Side { own: own.host, superblock, position };
        Ok(Resolver { volume: self.name(), own_name: own.name.clone(), side, openers })
    }
}

async fn give_in(
    hands: Hands,
    folder: PathBuf,
    resolver: Resolver,
    replica: Rc<Replica>,
    keep: HostId,
    answer: Answer<Resolved>,
) {
    let yielding = match look(&hands, &folder, &resolver, keep).await {
        Ok(yielding) => yielding,
        Err(failure) => return hands.end(Next::GoOn(replica), move |_| drop(answer.send(Err(failure)))),
    };
    replica.close().await;
    if replica.state().superblock() != resolver.side.superblock {
        let failure = refused("this copy has changed while the others were asked; run this again");
        return hands.end(Next::Reopen, move |_| drop(answer.send(Err(failure))));
    }
    let Yielding { concession, resolved } = yielding;
    let (name, kept_before) =
        (hands.config.name.clone(), replica.state().superblock().layers.undo().is_some());
    let yielded = replica.yield_to(&concession).await;
    drop(replica);
    let done = match yielded {
        Ok(can_be_undone) => Ok(Resolved { can_be_undone, ..resolved }),
        Err(PromotionError::PreImages(LayerError::Full(shortage))) => Err(refused(format!(
            "there is no room to keep what this host has: {}; nothing was given up{}",
            with_causes(&shortage),
            if kept_before {
                format!(
                    ", and what an earlier resolve kept is still there: blockmirror undo {name} brings it back, \
                     blockmirror forget {name} makes its room free"
                )
            } else {
                String::new()
            }
        ))),
        Err(error) => Err(failed(with_causes(&error))),
    };
    if done.is_ok() {
        tracing::warn!(volume = %hands.config.name, "this host gave its content up; the operator resolved the split");
    }
    hands.end(Next::Reopen, move |_| drop(answer.send(done)));
}

/// Asks the others how they stand, and finds out what giving in means.
async fn look(hands: &Hands, folder: &Path, resolver: &Resolver, keep: HostId) -> Result<Yielding, Failure> {
    let config = hands.config.clone();
    let answers: Vec<(_, Answered)> =
        standing::ask_all(&hands.peers, config.id, &config.peers, STANDING_TIME).await;
    let winner = resolver.winner(keep, &answers).map_err(refused)?;
    let (folder, superblock) = (folder.to_owned(), resolver.side.superblock.clone());
    let read = move || {
        let undelivered = stored::undelivered(&folder, &config, &superblock, keep);
        (undelivered, generations::of_lineage(&folder, &superblock.lineage))
    };
    // A map can be large; the volume goes on meanwhile.
    let (undelivered, began) = crate::blocking::spawn(read).await.unwrap_or_default();
    Ok(yielding(&resolver.side, &began, undelivered.as_ref(), &winner))
}

/// When the oldest of the generations began that are in one lineage alone, where that is known: since then that history
/// has gone on without the other. A lineage is given newest first, and the times in its order.
fn alone_since(lineage: &[GenerationId], began: &[u64], other: &[GenerationId]) -> Option<u64> {
    let alone = lineage.iter().zip(began).take_while(|(generation, _)| !other.contains(generation));
    alone.last().map(|(_, began)| *began).filter(|began| *began > 0)
}

/// What giving in means. `began` is when the generations of this host's lineage began, in its order.
fn yielding(side: &Side, began: &[u64], undelivered: Option<&Undelivered>, standing: &Standing) -> Yielding {
    let superblock = &side.superblock;
    let undelivered = undelivered.filter(|_| !side.lacks_what_ended(standing));
    let concession = side.concession(standing, undelivered.map(|undelivered| undelivered.base));
    let loses = undelivered.filter(|_| !concession.copies_everything());
    let block_bytes = superblock.block_size.bytes();
    // The other's map is of what this copy was when it last followed.
    let spared = Some(standing.dirty_bytes).filter(|bytes| *bytes != u64::MAX && !superblock.is_on_its_own());
    let resolved = Resolved {
        loses: Stake {
            blocks: loses.map(|loses| loses.blocks),
            bytes: loses.map(|loses| loses.bytes),
            since_unix_seconds: alone_since(&superblock.lineage, began, &standing.lineage),
        },
        spares: Stake {
            blocks: spared.map(|bytes| bytes.div_ceil(block_bytes)),
            bytes: spared,
            since_unix_seconds: alone_since(&standing.lineage, &standing.began, &superblock.lineage),
        },
        copies_everything: concession.copies_everything(),
        is_kept_primary: standing.role == Role::Primary && !superblock.fence.supersedes(standing.fence),
        can_be_undone: resolve::keep(superblock, false) != Keep::Nothing,
    };
    Yielding { concession, resolved }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_is_alone_since_its_oldest_own_generation_began() {
        let lineage = |text: &str| text.bytes().map(|byte| GenerationId([byte; 16])).collect::<Vec<_>>();
        let mine = lineage("dcba");
        for (theirs, since) in
            [("xba", Some(30)), ("dcba", None), ("x", None), ("xcba", Some(40)), ("", None)]
        {
            assert_eq!(alone_since(&mine, &[40, 30, 20, 0], &lineage(theirs)), since, "{theirs}");
        }
        assert_eq!(alone_since(&mine, &[40, 0, 20, 10], &lineage("ba")), None, "the oldest isn't known");
        assert_eq!(alone_since(&mine, &[], &lineage("ba")), None);
    }
}
