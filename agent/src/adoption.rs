//! What a volume's metadata says once its backing was replaced: no more than what the new content is known to be (L4, X4).
//!
//! After a recovery that is the source's history up to the position of its copy: a host that has more is found by its
//! generations, or by where this content ends ([`Ends`]), and is never overwritten unasked. A mixture is a history of its
//! own. Of what an earlier release recovered, only as much is claimed as this host's map vouches for. Where blocks of others may
//! differ is not known in any of these cases but one: on the source of a recovery, they are what this host's map says.
//!
//! The superblock comes last. What comes before it only says that less is known, so a crash in between does no harm, and
//! the next start does it all again.

use crate::backing::{Content, Recovered};
use crate::metadata::{State, StateError};
use crate::transport::key;
use blockmirror_protocol::disk::superblock::{Role, Superblock};
use blockmirror_protocol::lineage::Ends;
use blockmirror_protocol::units::{CopyId, Epoch, GenerationId, HostId, Mark, Position};
use blockmirror_protocol::wire::message::{DataState, Fence, Mode};

/// Makes the metadata of a volume with these other hosts say what is known of a backing that took the place of another.
///
/// # Errors
/// [`StateError`] when it can't be read or written.
pub async fn adopt(state: &State, peers: &[HostId], recovered: Option<&Recovered>) -> Result<(), StateError> {
    match state.superblock().role {
        Role::Primary => adopt_as_primary(state, peers, recovered).await,
        Role::Replica => adopt_as_replica(state, recovered).await,
    }
}

async fn adopt_as_primary(
    state: &State,
    peers: &[HostId],
    recovered: Option<&Recovered>,
) -> Result<(), StateError> {
    let source = recovered.map(|recovered| recovered.source);
    let mut vouched = GenerationId::default();
    for peer in peers {
        let (mut map, file) = state.open_map(*peer).await?;
        let base = map.base();
        if Some(*peer) == source {
            vouched = base.generation;
        } else {
            map.begin_anew(base);
            state.write_map(&file, map.take_changes()).await?;
        }
    }
    let Some(recovered) = recovered else { return Ok(()) };
    state
        .change_superblock(|superblock| match &recovered.content {
            Some(Content::Image { position, lineage }) => claim(superblock, *position, lineage),
            Some(Content::Mixture) => {
                (superblock.lineage, superblock.ends) = (vec![GenerationId(key::random())], Ends::default());
            }
            None => {
                let known = superblock.lineage.iter().position(|generation| *generation == vouched);
                match known {
                    Some(known) => drop(superblock.lineage.drain(..known)),
                    None => superblock.lineage = vec![GenerationId(key::random())],
                }
                superblock.ends = Ends::default();
            }
        })
        .await
}

/// What a primary says whose content is another copy's.
fn claim(superblock: &mut Superblock, position: Position, lineage: &[GenerationId]) {
    superblock.lineage = lineage.to_vec();
    let generation = lineage.first().copied().unwrap_or_default();
    // Where no epoch of it was durable there, nothing of it is here.
    let held = position.generation == generation;
    superblock.ends = Ends::only(generation, if held { position.epoch.next() } else { Epoch(1) });
    // The next run's epochs come after those of both.
    superblock.run = superblock.run.max(position.epoch);
}

async fn adopt_as_replica(state: &State, recovered: Option<&Recovered>) -> Result<(), StateError> {
    // Whatever this host has noted is of the old disk: its position, what it had in common with others, and the layers.
    let copy = CopyId(key::random());
    let image = match recovered.and_then(|recovered| recovered.content.as_ref()) {
        Some(Content::Image { position, lineage }) => Some((*position, lineage.clone())),
        Some(Content::Mixture) | None => None,
    };
    if let Some((position, _)) = &image {
        // What the source had begun of its next epoch is here as well (D5).
        state.log_everything().await?;
        state.recover_marker().await?;
        state.write_marker(Mark { position: *position, ..Mark::default() }).await?;
    }
    state
        .change_superblock(|superblock| {
            superblock.copy = copy;
            (superblock.gap, superblock.history, superblock.ends) = (0, 0, Ends::default());
            (superblock.mode, superblock.released) = (Mode::Async, false);
            match image {
                Some((position, lineage)) => {
                    (superblock.data, superblock.position) = (DataState::Consistent, position);
                    (superblock.lineage, superblock.source) = (lineage, Fence::default());
                    superblock.adopted += 1;
                }
                None => (superblock.data, superblock.lineage) = (DataState::Empty, Vec::new()),
            }
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;
    use crate::metadata::tests::superblock;
    use crate::storage;
    use blockmirror_protocol::disk::activity_log::Recovered as Log;
    use blockmirror_protocol::disk::dirty_map::Base;
    use blockmirror_protocol::units::Sequence;

    const SOURCE: HostId = HostId([3; 32]);
    const OTHER: HostId = HostId([4; 32]);

    fn generation(byte: u8) -> GenerationId {
        GenerationId([byte; 16])
    }

    fn position(byte: u8, epoch: u64) -> Position {
        Position { generation: generation(byte), epoch: Epoch(epoch), sequence: Sequence(0) }
    }

    /// A volume of generations 7, 6 and 5, whose map for the source is relative to 6, after its backing was recovered;
    /// and how many blocks are dirty for the source and the other.
    fn adopted(role: Role, content: Option<Content>) -> (Superblock, Position, Log, [bool; 2]) {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let lineage = vec![generation(7), generation(6), generation(5)];
            let run = Epoch(900);
            let before = Superblock { role, lineage, position: position(7, 900), run, ..superblock() };
            let storage = storage::open().unwrap();
            let state =
                State::create(folder.path(), storage, BufferPool::new(1 << 20), &before).await.unwrap();
            for peer in [SOURCE, OTHER] {
                let (map, file) = state.open_map(peer).await.unwrap();
                let copy = CopyId([8; 16]);
                let mut map = map.clean(Base { copy, generation: generation(6), adopted: 1 });
                state.write_map(&file, map.take_changes()).await.unwrap();
            }
            state.recover_marker().await.unwrap();
            state.write_marker(Mark { position: position(7, 950), ..Mark::default() }).await.unwrap();
            let recovered = Recovered { source: SOURCE, content };
            adopt(&state, &[SOURCE, OTHER], Some(&recovered)).await.unwrap();
            let (source, _) = state.open_map(SOURCE).await.unwrap();
            let (other, _) = state.open_map(OTHER).await.unwrap();
            let marker = state.recover_marker().await.unwrap().position;
            let log = state.recover_log().await.unwrap();
            (state.superblock(), marker, log, [source.is_full(), other.is_full()])
        })
    }

    #[test]
    fn a_recovered_primary_claims_what_the_copy_had_and_ends_there() {
        let image = |at, lineage| Some(Content::Image { position: at, lineage });
        let end = |byte, epoch| Ends::only(generation(byte), Epoch(epoch));
        for (content, lineage, ends, epoch) in [
            (image(position(6, 30), vec![generation(6), generation(5)]), vec![6, 5], end(6, 31), 900),
            (image(position(6, 1000), vec![generation(6), generation(5)]), vec![6, 5], end(6, 1001), 1000),
            // The source had recorded a generation of which no epoch was durable there.
            (image(position(5, 30), vec![generation(6), generation(5)]), vec![6, 5], end(6, 1), 900),
            // Its history may be another one.
            (image(position(9, 30), vec![generation(9), generation(5)]), vec![9, 5], end(9, 31), 900),
            // What was known of the source is what it had confirmed.
            (None, vec![6, 5], Ends::default(), 900),
        ] {
            let (superblock, _, log, are_full) = adopted(Role::Primary, content.clone());
            let lineage: Vec<GenerationId> = lineage.into_iter().map(generation).collect();
            assert_eq!(superblock.lineage, lineage, "{content:?}");
            assert_eq!((superblock.ends, superblock.run), (ends, Epoch(epoch)), "{content:?}");
            assert!(matches!(log, Log::Active { .. }));
            assert_eq!(are_full, [false, true], "the source's blocks are known");
        }
        let (superblock, ..) = adopted(Role::Primary, Some(Content::Mixture));
        let [own] = superblock.lineage[..] else { panic!("{:?}", superblock.lineage) };
        assert!(![5, 6, 7].map(generation).contains(&own), "nobody takes it for what it has");
    }

    #[test]
    fn a_recovered_replica_is_what_the_copy_was_and_a_mixture_is_nothing() {
        let lineage = vec![generation(6), generation(5)];
        let content = Content::Image { position: position(6, 30), lineage: lineage.clone() };
        let (after, marker, log, _) = adopted(Role::Replica, Some(content));
        assert_eq!(
            (after.data, after.position, after.lineage),
            (DataState::Consistent, position(6, 30), lineage)
        );
        assert_eq!(marker, position(6, 30), "the old disk's marker is not believed");
        assert!(matches!(log, Log::Unsure { .. }), "what the source had begun is not known");
        assert_eq!(after.adopted, 2, "maps of others are of the old disk");
        assert_ne!(after.copy, superblock().copy);
        for content in [Some(Content::Mixture), None] {
            let (after, ..) = adopted(Role::Replica, content);
            assert_eq!((after.data, after.lineage), (DataState::Empty, vec![]));
            assert_ne!(after.copy, superblock().copy);
        }
    }
}
