//! What a primary has to do with the other hosts: it connects to them, hears them, and carries out what its sessions
//! want.

use super::disk::Data;
use super::files::batches_of_map;
use super::host::{Shell, SuperblockWork, host_id, host_number};
use super::links::{Channel, LinkId, Packet};
use super::mirror::Image;
use super::primary::{DiskWork, FileWork};
use super::world::{Event, World};
use blockmirror_protocol::disk::dirty_map;
use blockmirror_protocol::peer::resync::CopyRead;
use blockmirror_protocol::peer::{self, PeerError};
use blockmirror_protocol::succession::Succeeded;
use blockmirror_protocol::tracker::Follower;
use blockmirror_protocol::wire::message::{Commit, Message, Refusal};
use blockmirror_protocol::wire::{Body, FrameHeader};
use std::time::Duration;

impl World {
    /// A primary plans to connect.
    pub(super) fn plan_connect(&mut self, link: LinkId) {
        let delay = self.random.up_to(self.settings.outage);
        let life = self.hosts[link.dialler].life;
        self.plan(delay, Event::Connect(link, life));
    }

    /// A primary tries to connect: first the session's number is made durable.
    pub(super) fn connect(&mut self, link: LinkId, life: u64) {
        let is_listening = self.hosts[link.listener].is_up();
        let it = &mut self.hosts[link.dialler];
        let Shell::Primary(shell) = &it.shell else { return };
        let is_peer = it.members.contains(link.listener);
        if life != it.life || self.links[link].dialler_side.is_some() || !is_peer {
            return;
        }
        if shell.is_recording() || !is_listening {
            return self.plan_connect(link);
        }
        it.superblock_work.push_back(SuperblockWork::Session(link));
        self.record_next(link.dialler);
    }

    /// A session's number was recorded: the connection comes up.
    pub(super) fn session_recorded(&mut self, link: LinkId, good: bool) {
        if good {
            self.hosts[link.dialler].superblock_written();
        }
        if !self.hosts[link.dialler].members.contains(link.listener) {
            return;
        }
        let is_lost = self.settings.loses_greetings && !self.random.once_in(3);
        if !good || is_lost || !self.hosts[link.listener].is_up() {
            return self.plan_connect(link);
        }
        self.open(link);
        let session = self.hosts[link.dialler].superblock.session;
        let identity = self.identity(link.dialler);
        let now = self.clock(link.dialler);
        let tracker = self.hosts[link.dialler].tracker_mut().expect("a crash ends operations");
        tracker.handle_connected(host_id(link.listener), session, &identity, now);
    }

    /// A primary receives a control message.
    pub(super) fn dialler_receives(&mut self, link: LinkId, packet: Packet) {
        let Packet::Message(bytes) = packet else { panic!("a primary receives no frames") };
        let message = Message::decode(&bytes[4..]).expect("a message reads back");
        self.note(|| format!("{link} back: {message:?}"));
        self.promote_amid_resync(link.listener, &message);
        if let Message::Acknowledgement(acknowledgement) = &message {
            let it = &mut self.links[link];
            it.copies.retain(|number, _| *number > acknowledgement.copies);
            while it.unacknowledged.pop_front_if(|(epoch, _)| *epoch <= acknowledgement.durable).is_some() {}
        }
        let now = self.clock(link.dialler);
        if let Message::Welcome(welcome) = &message {
            let it = &mut self.hosts[link.dialler];
            // One that had forgotten it by then is at odds with the copy, and rightly so.
            if welcome.lineage.first().is_none_or(|newest| it.known_lineage().contains(newest)) {
                it.heard.insert(link.listener, welcome.copy);
            }
        }
        let Some(tracker) = self.hosts[link.dialler].tracker_mut() else { return };
        match tracker.handle_message(host_id(link.listener), message, now) {
            Ok(()) => {}
            Err(PeerError::Refused(no)) => {
                self.cut(link);
                if no.refusal == Refusal::UnknownKey {
                    self.ask_members(link.dialler, link.listener);
                }
            }
            Err(PeerError::SplitBrain | PeerError::NothingInCommon | PeerError::Reused) => self.cut(link),
            Err(PeerError::Superseded(fence)) => {
                self.cut(link);
                self.hear_of(link.dialler, Succeeded { fence, by: host_id(link.listener) });
            }
            Err(_) if self.lies.is_some() => self.cut(link),
            Err(error) => panic!("host {}: {error}", link.listener),
        }
    }

    /// At times operators promote a replica just when some of what it was sent is durable there.
    fn promote_amid_resync(&mut self, host: usize, message: &Message) {
        let is_amid =
            matches!(message, Message::Acknowledgement(acknowledgement) if acknowledgement.copies > 0);
        let may = self.is_rough
            && self.settings.has_operators
            && self.hosts[host].superblock.layers.rollback().is_some();
        if is_amid && may && self.random.once_in(20) {
            let life = self.hosts[host].life;
            self.plan(Duration::ZERO, Event::Promote(host, life));
        }
    }

    /// A primary finds out that a connection is gone.
    pub(super) fn dialler_lost(&mut self, link: LinkId, connection: u64) {
        if self.links[link].dialler_side != Some(connection) {
            return;
        }
        self.note(|| format!("{link}: the primary lost it"));
        self.links[link].dialler_side = None;
        let now = self.clock(link.dialler);
        if let Some(tracker) = self.hosts[link.dialler].tracker_mut() {
            tracker.handle_disconnected(host_id(link.listener), now);
            self.plan_connect(link);
        }
    }

    /// Carries out what a peer wants.
    pub(super) fn act_for_peer(&mut self, host: usize, follower: Follower, action: peer::Action) {
        let link = LinkId::new(host, host_number(follower.host));
        match action {
            peer::Action::Send(message) => self.send_message(link, &message),
            peer::Action::SendFrame { header, request } => {
                let value = request.map_or(0, |request| self.content_of(link.dialler, request, false));
                self.send_live(link, header, Data::Fill(value));
            }
            peer::Action::WriteMap(changes) => {
                let name = dirty_map::file_name(host_id(link.listener));
                self.start_primary_file(host, &name, batches_of_map(changes), FileWork::Map(follower));
            }
            peer::Action::ReadCopy { read, range, digest } => {
                let id = self.start_primary_disk(host, DiskWork::Copy(follower, read, range, digest));
                self.hosts[host].disk.begin_read(id, range);
            }
            peer::Action::SendCopy { read, header } => self.send_copy(link, follower, read, header),
            peer::Action::Hold { .. } => panic!("the tracker carries out holds itself"),
        }
    }

    fn send_message(&mut self, link: LinkId, message: &Message) {
        self.note(|| format!("{link}: {message:?}"));
        let is_united = matches!(message, Message::Commit(_) | Message::ResyncBegin(_));
        if is_united && self.links[link].is_up {
            self.links[link].united_by = Some(self.hosts[link.dialler].superblock.fence);
        }
        match message {
            Message::Commit(commit) => self.send_commit(link, commit),
            Message::ResyncBegin(begin) => {
                self.links[link].dirty_bytes.get_or_insert(begin.dirty_bytes);
                let connection = self.links[link].connection;
                self.hosts[link.listener].mirror.resync_is_announced(connection);
            }
            _ => {}
        }
        self.send(link, Channel::ToListener, Packet::Message(message.encode().expect("it is short")));
        if matches!(message, Message::Hello(_)) {
            self.introduce(link);
        }
    }

    fn send_commit(&mut self, link: LinkId, commit: &Commit) {
        let connection = self.links[link].connection;
        let image = Image::new(&mut self.hosts[link.dialler].history, commit.position.sequence);
        self.hosts[link.listener].mirror.commit_is_sent(connection, commit.position, image);
    }

    fn send_live(&mut self, link: LinkId, header: FrameHeader, data: Data) {
        if let Body::Write { epoch, sequence, range } | Body::Zero { epoch, sequence, range, .. } =
            header.body
        {
            self.hosts[link.dialler].history.record(sequence, range, data.clone());
            let both = self.links[link].copies.values().find(|copy| copy.overlaps(range));
            assert_eq!(both, None, "R1: {range:?} is streamed over {link} while a copy of it is on its way");
            let now = self.now;
            let it = &mut self.links[link];
            if it.unacknowledged.back().is_none_or(|(last, _)| *last < epoch) {
                it.unacknowledged.push_back((epoch, now));
            }
            let connection = it.connection;
            self.hosts[link.listener].mirror.frame_is_sent((connection, epoch.0), sequence, range, &data);
        }
        self.send_frame(link, Channel::Live, header, data);
    }

    fn send_copy(&mut self, link: LinkId, peer: Follower, read: CopyRead, header: Option<FrameHeader>) {
        let Shell::Primary(shell) = &mut self.hosts[link.dialler].shell else { panic!("it is primary") };
        let (read, data) = shell.copies.remove(&(peer, read)).expect("the read has ended");
        let Some(header) = header else { return };
        let range = header.body.range();
        let is_hole = matches!(header.body, Body::CopyZero { .. })
            && range.offset == read.offset
            && range.length <= data.hole_bytes(read);
        assert!(range == read || is_hole, "a copy is of what was read: {range:?}, {read:?}");
        if self.links[link].is_up {
            let it = &mut self.links[link];
            let is_digest = matches!(header.body, Body::CopyDigest { .. });
            let bytes = if is_digest { &mut it.compared_bytes } else { &mut it.copied_bytes };
            *bytes += range.length;
            if let Body::Copy { number, .. } | Body::CopyZero { number, .. } = header.body {
                it.copies.insert(number, range);
            }
            self.check_copied(link);
        }
        self.send_frame(link, Channel::Bulk, header, data);
    }

    fn send_frame(&mut self, link: LinkId, channel: Channel, header: FrameHeader, data: Data) {
        self.note(|| format!("{link} => {:?}", header.body));
        if header.body.payload_bytes() == 0 {
            let frame = FrameHeader::decode(&header.encode(&[])).and_then(|frame| frame.check(&[]));
            assert_eq!(frame, Ok(header), "a frame reads back");
        }
        self.send(link, channel, Packet::Frame(header, data));
    }
}
