//! How a session begins: greeting, the union of both sides' maps, the link.
//!
//! Nothing here clears a bit (D3): a handshake can only add. The replica answers a greeting after it has drained every
//! older session, so no frame of one lands after the first read for a copy (R1).

use super::{Action, Link, Phase, Session, State};
use crate::session::resync::Resync;
use crate::session::stream::Window;
use crate::units::{
    BlockSize, CopyId, Epoch, GenerationId, Sequence, Session as SessionNumber, Stream, Time, VolumeId,
};
use crate::wire::VERSIONS;
use crate::wire::message::{DataState, Fence, Hello, Member, Message, Refused, Union, Welcome};

/// Who greets: what a primary says of itself and the volume.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The volume.
    pub volume: VolumeId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its tracking block.
    pub block_size: BlockSize,
    /// The primary's larger physical sector, in bytes.
    pub sector_bytes: u32,
    /// The primary's copy.
    pub copy: CopyId,
    /// The primary's fence.
    pub fence: Fence,
    /// The primary's generations, newest first.
    pub lineage: Vec<GenerationId>,
    /// Every host of the volume, the primary first.
    pub members: Vec<Member>,
}

/// Why a session cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The replica broke the protocol.
    #[error("the replica broke the protocol: {0}")]
    Misbehaved(&'static str),
    /// The replica said no.
    #[error("the replica refused: {}", .0.text)]
    Refused(Refused),
    /// The two can't work together.
    #[error("the replica is incompatible: {0}")]
    Incompatible(&'static str),
}

#[derive(Debug)]
pub(super) struct Greeting {
    session: SessionNumber,
    stream: Stream,
    welcome: Option<Welcome>,
}

impl Session {
    /// A connection is up: greet the replica. `session` is higher than any before, durably.
    pub fn handle_connected(&mut self, session: SessionNumber, identity: &Identity) {
        assert!(matches!(self.state, State::Away), "a session begins when the one before has ended");
        let stream = Stream(1);
        self.state = State::Greeting(Greeting { session, stream, welcome: None });
        let hello = Hello {
            versions: VERSIONS,
            features: 0,
            volume: identity.volume,
            size_bytes: identity.size_bytes,
            block_size: identity.block_size,
            sector_bytes: identity.sector_bytes,
            copy: identity.copy,
            session,
            stream,
            fence: identity.fence,
            lineage: identity.lineage.clone(),
            mode: 0,
            members: identity.members.clone(),
        };
        self.actions.push_back(Action::Send(hello.into()));
    }

    /// A control message of the replica. `last` is the newest write.
    ///
    /// # Errors
    /// [`PeerError`] when the session must end.
    pub fn handle_message(
        &mut self,
        message: Message,
        last: Sequence,
        now: Time,
    ) -> Result<Handled, PeerError> {
        let State::Greeting(greeting) = &mut self.state else {
            return self.handle_linked(message, now).map(|()| Handled::Nothing);
        };
        match message {
            Message::Welcome(welcome) if greeting.welcome.is_none() => {
                if welcome.session != greeting.session {
                    return Err(PeerError::Misbehaved("it answered a greeting of another session"));
                }
                if !(VERSIONS.0..=VERSIONS.1).contains(&welcome.version) {
                    return Err(PeerError::Incompatible("it chose a version that this agent does not speak"));
                }
                let sector_bytes = welcome.sector_bytes;
                if !sector_bytes.is_power_of_two() || !(512..=1 << 16).contains(&sector_bytes) {
                    return Err(PeerError::Misbehaved("its sector size is none"));
                }
                if welcome.data == DataState::Empty || welcome.copy != self.map.base() {
                    // Nothing is known of what this copy holds: the map can't vouch for it (L2).
                    self.map.begin_anew(welcome.copy);
                    self.unwritten = Some(self.unwritten.unwrap_or(last.next()));
                }
                greeting.welcome = Some(welcome);
                Ok(Handled::Sector(sector_bytes))
            }
            Message::Union(Union { ranges, last: is_last }) if greeting.welcome.is_some() => {
                if ranges.iter().any(|range| range.end() > self.size_bytes) {
                    return Err(PeerError::Misbehaved("it reports blocks past the volume's end"));
                }
                for range in ranges {
                    self.mark_suspect(range, last);
                }
                if is_last {
                    self.link(now);
                }
                Ok(Handled::Nothing)
            }
            Message::Refused(refused) => Err(PeerError::Refused(refused)),
            _ => Err(PeerError::Misbehaved("it sent a message that does not fit the handshake")),
        }
    }

    fn link(&mut self, now: Time) {
        let State::Greeting(greeting) = std::mem::replace(&mut self.state, State::Away) else {
            unreachable!("only a greeting becomes a link");
        };
        let welcome = greeting.welcome.expect("the union comes after the welcome");
        let phase = if self.map.is_clean() {
            Phase::Committing { closed: None, sent: false }
        } else {
            Phase::Draining
        };
        self.since = now;
        self.state = State::Linked(Box::new(Link {
            session: greeting.session,
            stream: greeting.stream,
            window_limit_bytes: welcome.window_bytes.min(self.window_limit_bytes),
            window: Window::default(),
            streamed: None,
            spilled: false,
            resync: Resync::new(self.block_size, self.size_bytes, self.next_read, now),
            phase,
            verify: None,
            durable: Epoch(0),
        }));
    }
}

/// What a message asks of the tracker.
#[derive(Debug, PartialEq, Eq)]
pub enum Handled {
    /// Nothing.
    Nothing,
    /// To judge overlap in sectors of at least so many bytes (W1).
    Sector(u32),
}
