//! A backing took the place of another: what [`blockmirror_protocol::adoption`] says of it is written to the volume's
//! metadata.

use crate::state::backing::Recovered;
use crate::state::{StateError, Unrecovered};
use crate::transport::key;
use blockmirror_protocol::adoption::Adoption;
use blockmirror_protocol::rewrite::{Order, Rewrite};
use blockmirror_protocol::units::HostId;

/// Makes the metadata of a volume with these other hosts say what is known of a backing that took the place of another.
///
/// # Errors
/// [`StateError`] when it can't be read or written.
pub async fn adopt(
    state: &Unrecovered,
    peers: &[HostId],
    recovered: Option<&Recovered>,
) -> Result<(), StateError> {
    let content = recovered.and_then(|recovered| recovered.content.as_ref());
    let is_absent = recovered.is_some_and(|recovered| recovered.is_absent);
    let adoption = Adoption { source: recovered.map(|recovered| recovered.source), content, is_absent };
    let mut rewrite = Rewrite::adoption(&state.superblock(), peers, adoption, key::random());
    while let Ok(Some(order)) = rewrite.next(true) {
        let Order::Write(part) = order else { unreachable!("the new backing is as it is to be") };
        state.rewrite(&mut rewrite, part).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;
    use crate::state;
    use crate::state::holding::Compared;
    use crate::state::metadata::tests::superblock;
    use crate::storage;
    use blockmirror_protocol::adoption::Content;
    use blockmirror_protocol::disk::activity_log::Recovered as Log;
    use blockmirror_protocol::disk::dirty_map::Base;
    use blockmirror_protocol::disk::superblock::{Role, Superblock};
    use blockmirror_protocol::terms::DataState;
    use blockmirror_protocol::units::{CopyId, Epoch, GenerationId, Mark, Position, Sequence};

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
            let pool = BufferPool::new(1 << 20);
            let new =
                Unrecovered::create(folder.path(), storage.clone(), pool.clone(), &before).await.unwrap();
            let state = new.recover(&Compared::anew()).await.unwrap().state;
            for peer in [SOURCE, OTHER] {
                let (map, file) = state.open_map(peer).await.unwrap();
                let copy = CopyId([8; 16]);
                let mut map = map.clean(Base { copy, generation: generation(6), adopted: 1 });
                state.write_map(&file, map.take_changes()).await.unwrap();
            }
            state.write_marker(Mark { position: position(7, 950), ..Mark::default() }).await.unwrap();
            drop(state);
            let recovered = Recovered { source: SOURCE, content, is_absent: false };
            let old = Unrecovered::open(folder.path(), storage, pool).await.unwrap();
            adopt(&old, &[SOURCE, OTHER], Some(&recovered)).await.unwrap();
            let state::Recovered { state, log, mark } = old.recover(&Compared::anew()).await.unwrap();
            let (source, _) = state.open_map(SOURCE).await.unwrap();
            let (other, _) = state.open_map(OTHER).await.unwrap();
            (state.superblock(), mark.position, log, [source.is_full(), other.is_full()])
        })
    }

    #[test]
    fn of_a_recovered_primarys_maps_that_of_the_source_is_kept() {
        let content = Content::Image { position: position(6, 30), lineage: vec![generation(6)] };
        let (superblock, _, log, are_full) = adopted(Role::Primary, Some(content));
        assert_eq!(superblock.lineage, [generation(6)]);
        assert!(matches!(log, Log::Active { .. }));
        assert_eq!(are_full, [false, true]);
        // What an earlier release recovered is what the map vouches for.
        let (superblock, ..) = adopted(Role::Primary, None);
        assert_eq!(superblock.lineage, [generation(6), generation(5)]);
    }

    #[test]
    fn a_recovered_replicas_marker_and_log_are_those_of_the_copy() {
        let content = Content::Image { position: position(6, 30), lineage: vec![generation(6)] };
        let (after, marker, log, _) = adopted(Role::Replica, Some(content));
        assert_eq!(
            (after.position, marker),
            (position(6, 30), position(6, 30)),
            "the old disk's is not believed"
        );
        assert!(matches!(log, Log::Unsure { .. }), "what the source had begun is not known");
        let (after, ..) = adopted(Role::Replica, Some(Content::Mixture));
        assert_eq!(after.data, DataState::Empty);
    }
}
