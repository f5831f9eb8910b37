//! How the volume's other hosts stand: content that is older than another host's is recovered only where the operator
//! says so. The peer is asked, which knows the others; those that it can't hear are asked from here, if this host's key is
//! one of the volume's.

use super::peer::{Peer, Trouble};
use crate::output::warn;
use blockmirror_agent::control::api::{Failure, FailureKind};
use blockmirror_agent::transport::Connection;
use blockmirror_protocol::adoption::Content;
use blockmirror_protocol::terms::Role;
use blockmirror_protocol::units::VolumeId;
use blockmirror_protocol::wire::message::{AskOthers, AskStanding, Message, Other, Others, Standing};
use std::time::Duration;

/// How long one host may take to say how it stands.
const ANSWER_TIME: Duration = Duration::from_secs(3);

/// Asks the peer how all hosts of the volume stand.
pub async fn ask(peer: &Peer, connection: &Connection) -> Result<Others, Trouble> {
    let (mut sender, mut receiver) = connection.open_control().await?;
    let ask = AskOthers { name: peer.request.name.clone(), secret: peer.request.secret };
    sender.send(&ask.into()).await?;
    match receiver.receive().await? {
        Message::Others(others) => Ok(others),
        Message::Refused(refused) => Err(Trouble::refused(&refused)),
        _ => Err(Trouble::misbehaved("it answers with another message")),
    }
}

/// Asks those from here that the peer can't hear.
pub async fn ask_silent(peer: &Peer, volume: VolumeId, others: &mut [Other]) {
    if peer.request.secret.is_some() {
        return;
    }
    for other in others.iter_mut().filter(|other| other.standing.is_none()) {
        let standing = tokio::time::timeout(ANSWER_TIME, ask_one(peer, volume, other)).await;
        other.standing = standing.ok().flatten();
    }
}

async fn ask_one(peer: &Peer, volume: VolumeId, other: &Other) -> Option<Standing> {
    let connection = peer.endpoint.connect(&other.addresses, other.host).await.ok()?;
    let (mut sender, mut receiver) = connection.open_control().await.ok()?;
    sender.send(&AskStanding { volume }.into()).await.ok()?;
    match receiver.receive().await.ok()? {
        Message::Standing(standing) => Some(standing),
        _ => None,
    }
}

/// Refuses a source where another host has later content, and names hosts that did not say what they have.
pub fn judge(content: &Content, others: &[Other], volume: &str, accept_older: bool) -> Result<(), Failure> {
    if let Some(other) = others
        .iter()
        .find(|other| other.standing.as_ref().is_some_and(|standing| content.is_older_than(standing)))
    {
        let (name, address) = (shown(&other.name), other.addresses.first().map(|address| shown(address)));
        let how = match other.standing.as_ref().map(|standing| standing.role) {
            Some(Role::Primary) => {
                "it is the primary, and copies to this host where that is its replica".to_owned()
            }
            _ if other.standing.as_ref().is_some_and(Standing::is_out_of_reach) => {
                format!(
                    "the disk of {name} is not there or does not answer: bring it back, and recover from {name} then"
                )
            }
            _ => {
                let from = address.unwrap_or_else(|| name.clone());
                format!("recover from it: blockmirror recover {volume} --from {from} --to PATH")
            }
        };
        let what = format!("{name} has later content than this peer");
        if !accept_older {
            let message = format!("{what}; {how}; --accept-older takes the older content all the same");
            return Err(Failure::new(FailureKind::Refused, message));
        }
        warn(&format!(
            "{what}; {name} keeps that, and is in a split with this host, until the operator resolves it"
        ));
    }
    let silent: Vec<String> =
        others.iter().filter(|other| other.standing.is_none()).map(|other| shown(&other.name)).collect();
    if !silent.is_empty() {
        warn(&format!(
            "{} did not say how up to date it is: if it has later content than this peer, it keeps that, and is in a \
             split with this host, until the operator resolves it",
            silent.join(", ")
        ));
    }
    Ok(())
}

/// A peer's text must not steer our terminal.
fn shown(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmirror_protocol::lineage::Ends;
    use blockmirror_protocol::terms::{DataState, Fence};
    use blockmirror_protocol::units::{Epoch, GenerationId, HostId, Position, Sequence};

    fn lineage(text: &str) -> Vec<GenerationId> {
        text.bytes().map(|byte| GenerationId([byte; 16])).collect()
    }

    fn position(byte: u8, epoch: u64) -> Position {
        Position { generation: GenerationId([byte; 16]), epoch: Epoch(epoch), sequence: Sequence(0) }
    }

    fn replica(generations: &str, marker: Position) -> Standing {
        Standing {
            role: Role::Replica,
            data: DataState::Consistent,
            can_roll_back: false,
            fence: Fence::default(),
            lineage: lineage(generations),
            marker,
            serves: false,
            dirty_bytes: 0,
            began: Vec::new(),
            silent_milliseconds: 0,
            ends: Ends::default(),
            replaced: false,
            given: Box::default(),
        }
    }

    fn says(standing: Option<Standing>) -> Other {
        Other { name: "c".into(), host: HostId([3; 32]), addresses: vec!["c:7447".into()], standing }
    }

    #[test]
    fn older_content_than_another_hosts_is_recovered_only_where_the_operator_says_so() {
        let primary = |serves| Standing { role: Role::Primary, serves, ..replica("ba", position(b'b', 1)) };
        let mixture = Standing { data: DataState::Inconsistent, ..replica("ba", position(b'b', 1)) };
        for (standing, is_refused) in [
            (replica("a", position(b'a', 7)), false),
            (replica("a", position(b'a', 6)), false),
            (replica("a", position(b'a', 8)), true),
            (replica("ba", position(b'a', 7)), true),
            (primary(true), true),
            (primary(false), false),
            (mixture.clone(), false),
            (Standing { can_roll_back: true, ..mixture }, true),
        ] {
            let generations = lineage("a");
            let content = Content::Image { position: position(b'a', 7), lineage: generations.clone() };
            let others = [says(Some(standing.clone())), says(None)];
            let judged = judge(&content, &others, "data", false);
            assert_eq!(judged.is_err(), is_refused, "{standing:?}");
            assert!(judge(&content, &others, "data", true).is_ok());
        }
    }

    /// The one that was named could not be recovered from.
    #[test]
    fn a_host_whose_disk_is_not_there_is_not_named_to_recover_from() {
        let content = Content::Image { position: position(b'a', 7), lineage: lineage("a") };
        let later = Standing { silent_milliseconds: 900, ..replica("ba", position(b'b', 1)) };
        let text = judge(&content, &[says(Some(later))], "data", false).unwrap_err().to_string();
        assert!(text.contains("the disk of c is not there") && !text.contains("--from"), "{text}");
    }

    #[test]
    fn a_mixture_is_not_recovered_where_there_is_a_whole_copy() {
        let content = Content::Mixture;
        let whole = says(Some(replica("a", position(b'a', 7))));
        let text = judge(&content, &[whole], "data", false).unwrap_err().to_string();
        assert!(text.contains("blockmirror recover data --from c:7447 --to PATH"), "{text}");
        assert!(judge(&content, &[says(None)], "data", false).is_ok());
    }
}
