//! Which host a primary's copy is rebuilt from (S4, L4).

use crate::adoption::Content;
use crate::disk::superblock::Role;
use crate::succession::Heard;
use crate::terms::{DataState, Fence};
use crate::units::{GenerationId, HostId};
use crate::wire::message::Standing;

/// A host whose copy is an image of the volume, and what that is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source {
    /// The host.
    pub host: HostId,
    /// Its copy.
    pub content: Content,
}

/// Why nothing is rebuilt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoSource {
    /// This host was promoted since: it serves the volume, and its content counts.
    Promoted(HostId),
    /// The host that was named is none of the volume's, or did not say how it stands.
    Silent(HostId),
    /// The copy of the host that was named is no image of the volume now.
    Unfit(HostId),
    /// Another host has later content than the one that was named.
    Behind {
        /// The one that was named.
        named: HostId,
        /// One that has more.
        better: HostId,
    },
    /// This host lacks what this one answered without it (L1). Who names it gives that up.
    Lacks(HostId),
    /// No host that was heard has an image of the volume.
    Nobody,
}

/// The host to rebuild from: the one that was `named`, unless another one has more, or else one that none has more than and that
/// followed this host, which is the primary, to the end. `own`: its fence, and its newest generation.
///
/// # Errors
/// [`NoSource`].
pub fn choose(
    own: (Fence, Option<GenerationId>),
    answers: &[Heard],
    named: Option<HostId>,
) -> Result<Source, NoSource> {
    let (fence, generation) = own;
    let heard = || answers.iter().filter_map(|heard| Some((heard.host, heard.standing.as_ref()?)));
    if let Some((_, newer)) = heard().find(|(_, standing)| standing.fence.supersedes(fence)) {
        return Err(NoSource::Promoted(newer.fence.holder));
    }
    let sources =
        || heard().filter_map(|(host, standing)| Some(Source { host, content: image_of(standing)? }));
    let better = |source: &Source| {
        let later = |(host, standing): &(HostId, &Standing)| {
            *host != source.host && source.content.is_older_than(standing)
        };
        heard().find(later).map(|(host, _)| host)
    };
    let Some(named) = named else {
        let source = sources().find(|source| better(source).is_none()).ok_or(NoSource::Nobody)?;
        let followed = match &source.content {
            Content::Image { lineage, .. } => generation.is_none_or(|own| lineage.contains(&own)),
            Content::Mixture => false,
        };
        return if followed { Ok(source) } else { Err(NoSource::Lacks(source.host)) };
    };
    if !heard().any(|(host, _)| host == named) {
        return Err(NoSource::Silent(named));
    }
    let source = sources().find(|source| source.host == named).ok_or(NoSource::Unfit(named))?;
    match better(&source) {
        Some(better) => Err(NoSource::Behind { named, better }),
        None => Ok(source),
    }
}

/// What a host's copy is, where it is an image of the volume that can be read now.
fn image_of(standing: &Standing) -> Option<Content> {
    let is_fit = standing.role == Role::Replica
        && standing.data == DataState::Consistent
        && !standing.lineage.is_empty()
        && !standing.is_out_of_reach();
    is_fit.then(|| Content::of(standing.data, standing.marker, &standing.lineage))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::given::Given;
    use crate::lineage::Ends;
    use crate::units::{Epoch, Position, Sequence};

    const OWN: Fence = Fence { counter: 3, holder: HostId([9; 32]) };

    fn host(number: u8) -> HostId {
        HostId([number; 32])
    }

    fn replica(epoch: u64) -> Standing {
        let generation = GenerationId([b'a'; 16]);
        Standing {
            role: Role::Replica,
            data: DataState::Consistent,
            can_roll_back: false,
            fence: OWN,
            lineage: vec![generation],
            marker: Position { generation, epoch: Epoch(epoch), sequence: Sequence(epoch) },
            serves: false,
            dirty_bytes: 0,
            began: Vec::new(),
            silent_milliseconds: 0,
            ends: Ends::default(),
            replaced: false,
            given: Box::new(Given::NOTHING),
        }
    }

    fn chosen(answers: &[(u8, Option<Standing>)], named: Option<u8>) -> Result<HostId, NoSource> {
        let heard: Vec<Heard> = answers
            .iter()
            .map(|(number, standing)| Heard { host: host(*number), standing: standing.clone() })
            .collect();
        let own = (OWN, Some(GenerationId([b'a'; 16])));
        choose(own, &heard, named.map(host)).map(|source| source.host)
    }

    #[test]
    fn the_source_is_a_host_that_none_has_more_than() {
        let (older, newer) = (Some(replica(5)), Some(replica(7)));
        let two = [(1, older.clone()), (2, newer.clone()), (3, None)];
        assert_eq!(chosen(&two, None), Ok(host(2)));
        assert_eq!(chosen(&two, Some(2)), Ok(host(2)));
        assert_eq!(chosen(&two, Some(1)), Err(NoSource::Behind { named: host(1), better: host(2) }));
        assert_eq!(chosen(&two, Some(3)), Err(NoSource::Silent(host(3))));
        assert_eq!(chosen(&two, Some(4)), Err(NoSource::Silent(host(4))));
        assert_eq!(chosen(&[(1, older.clone()), (2, older)], None), Ok(host(1)), "they have the same");
        assert_eq!(chosen(&[(1, None)], None), Err(NoSource::Nobody));
    }

    #[test]
    fn a_copy_that_is_no_image_or_can_not_be_read_is_no_source() {
        let mixture = Standing { data: DataState::Inconsistent, can_roll_back: true, ..replica(5) };
        let empty = Standing { data: DataState::Empty, ..replica(5) };
        let silent = Standing { silent_milliseconds: 1, ..replica(5) };
        let unknown = Standing { lineage: Vec::new(), ..replica(5) };
        for unfit in [mixture, empty, silent, unknown] {
            assert_eq!(chosen(&[(1, Some(unfit.clone()))], None), Err(NoSource::Nobody), "{unfit:?}");
            assert_eq!(chosen(&[(1, Some(unfit))], Some(1)), Err(NoSource::Unfit(host(1))));
        }
    }

    #[test]
    fn what_this_host_answered_alone_is_given_up_only_by_name() {
        let older = Standing { lineage: vec![GenerationId([b'0'; 16])], ..replica(5) };
        let answers = [(1, Some(older))];
        assert_eq!(chosen(&answers, None), Err(NoSource::Lacks(host(1))));
        assert_eq!(chosen(&answers, Some(1)), Ok(host(1)));
    }

    #[test]
    fn where_another_host_was_promoted_nothing_is_rebuilt() {
        let fence = Fence { counter: 4, holder: host(2) };
        let answers = [(1, Some(replica(5))), (2, Some(Standing { fence, ..replica(5) }))];
        assert_eq!(chosen(&answers, None), Err(NoSource::Promoted(host(2))));
    }
}
