//! The shell of a replica: its machine, the payloads that wait, and what is under way on the disk and in the files.

use super::disk::{Data, DiskOperation, Ended, Value};
use super::files::{Batch, FileOperation};
use super::host::{Host, Shell, host_id, host_number};
use super::links::{Channel, LinkId, Packet};
use super::primary::digest;
use super::promises::{Expected, Promises};
use super::world::{Event, World};
use blockmirror_protocol::disk::superblock::Superblock;
use blockmirror_protocol::disk::{activity_log, marker, slot_offset, superblock};
use blockmirror_protocol::layers::LayerId;
use blockmirror_protocol::lineage::{self, Relation};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::replica::{self, Action, FrameId, Replica, Saved, SpacePolicy, StateChange};
use blockmirror_protocol::terms::{DataState, Fence};
use blockmirror_protocol::units::{Sequence, Session};
use blockmirror_protocol::wire::FrameHeader;
use blockmirror_protocol::wire::message::{Members, Message, Superseded};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Stands for the files of pre-images: only when a write to them ends matters.
pub(super) const LAYERS: &str = "pre-images";

#[derive(Debug)]
enum DiskWork {
    Apply(FrameId),
    Sync,
    Digest(FrameId, ByteRange),
    /// What the primary lacks, for a session.
    Content(Session, u64, ByteRange),
}

#[derive(Debug)]
enum FileWork {
    Marker,
    /// And whose link was served when it began.
    State(StateChange, Option<usize>),
    Log,
    Layer(LayerId),
    /// What was read of these ranges, if they could be read.
    Saved(Vec<ByteRange>, Option<BTreeMap<u64, Value>>),
}

/// The shell of a replica, and what it has under way.
#[derive(Debug)]
pub struct ReplicaShell {
    /// The machine.
    pub machine: Replica,
    /// The link whose greeting was taken last.
    speaker: Option<LinkId>,
    /// The life of its dialler in which that was.
    speaker_life: u64,
    marker_serial: u64,
    payloads: BTreeMap<FrameId, Data>,
    disk_work: BTreeMap<DiskOperation, DiskWork>,
    file_work: BTreeMap<FileOperation, FileWork>,
}

impl ReplicaShell {
    /// A replica as the files of its host say.
    fn recover(host: &Host, window_bytes: u64, space: SpacePolicy) -> Self {
        let bytes = host.files.bytes(marker::FILE_NAME, marker::FILE_BYTES);
        let (marker_serial, mark) = marker::recover(&bytes).unwrap_or_default();
        let superblock = host.superblock.clone();
        let settings =
            replica::Settings { sector_bytes: host.disk.sector_bytes() as u32, window_bytes, space };
        let maps = host.members.peers().into_iter();
        let maps = maps.map(|peer| (host_id(peer), host.recover_map(peer)));
        let saved = host.layers.saved(superblock.layers.rollback());
        let kept = host.layers.saved(superblock.layers.undo());
        let stored = replica::Stored {
            superblock,
            mark,
            log: host.recover_log(),
            // A lost one may have said anything.
            maps: maps.filter(|(_, map)| map.is_lost() || !map.base().is_none()).collect(),
            saved,
            kept,
        };
        Self {
            machine: Replica::new(settings, stored),
            speaker: None,
            speaker_life: 0,
            marker_serial,
            payloads: BTreeMap::new(),
            disk_work: BTreeMap::new(),
            file_work: BTreeMap::new(),
        }
    }

    /// Whether nothing is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.disk_work.is_empty() && self.file_work.is_empty()
    }

    /// Whether this host's greeting was taken last.
    pub(super) fn is_greeted_by(&self, host: usize) -> bool {
        self.speaker.is_some_and(|link| link.dialler == host)
    }

    /// Payloads that are neither dropped nor written.
    #[must_use]
    pub fn held_payloads(&self) -> usize {
        self.payloads.len()
    }
}

impl Host {
    /// It was released: until it follows another promotion it must have all that its primary answers.
    pub(super) fn expects_all(&mut self) {
        let promises = Promises::of(&self.disk);
        let primary = host_number(self.superblock.fence.holder);
        self.expected =
            Some(Expected { primary, promises: promises.clone(), all: promises, is_outdated: false });
    }
}

/// How saving ended.
fn saved(good: bool, is_full: bool) -> Saved {
    match (good, is_full) {
        (_, true) => Saved::Full,
        (true, false) => Saved::Done,
        (false, false) => Saved::Failed,
    }
}

impl World {
    /// Opens a host's volume as a replica.
    pub(super) fn start_replica(&mut self, host: usize) {
        let it = &mut self.hosts[host];
        it.recover_history();
        if it.superblock.released {
            it.is_handed_on();
        }
        self.recover_mirror(host);
        self.touch(host);
        let (window, space) = (self.settings.window_bytes, self.settings.space);
        let shell = ReplicaShell::recover(&self.hosts[host], window, space);
        self.hosts[host].shell = Shell::Replica(Box::new(shell));
        self.plan_telling(host);
    }

    /// What the superblock says of the data is known; a commit that became durable as the host crashed counts.
    pub(super) fn recover_mirror(&mut self, host: usize) {
        let it = &mut self.hosts[host];
        let Superblock { data, position, source, .. } = it.superblock;
        if it.mirror.recovered(data, position, it.superblock.layers.rollback()) {
            it.is_set_back = false;
            it.expected.take_if(|expected| host_id(expected.primary) != source.holder);
            it.known_lives = self.generations.lives(it.superblock.lineage.first().copied());
        }
    }

    /// A replica plans to tell its primary what it was not asked.
    fn plan_telling(&mut self, host: usize) {
        let life = self.hosts[host].life;
        self.plan(self.settings.patience / 10, Event::Tell(host, life));
    }

    /// A replica tells its primary what it was not asked, and asks for its word.
    pub(super) fn tell(&mut self, host: usize, life: u64) {
        let now = self.clock(host);
        let it = &mut self.hosts[host];
        if it.life != life {
            return;
        }
        if let Shell::Replica(shell) = &mut it.shell {
            shell.machine.ask_promise(now);
            shell.machine.tell_mark();
            let is_alone = !shell.machine.report().connected;
            self.plan_telling(host);
            if is_alone && self.random.once_in(4) {
                self.ask_removals(host, None);
            }
        }
    }

    /// A host receives what is sent to it as a listener.
    pub(super) fn listener_receives(&mut self, link: LinkId, packet: Packet) {
        match packet {
            Packet::Message(bytes) => {
                let message = Message::decode(&bytes[4..]).expect("a message reads back");
                self.listener_hears(link, message);
            }
            Packet::Frame(header, data) => self.listener_takes(link, header, data),
        }
    }

    fn listener_hears(&mut self, link: LinkId, message: Message) {
        let is_greeting = matches!(message, Message::Hello(_));
        if is_greeting && !self.may_be_heard(link.listener, link.dialler) {
            return self.turn_away(link);
        }
        if let (Message::Hello(hello), Shell::Primary(_)) = (&message, &self.hosts[link.listener].shell) {
            return self.primary_is_greeted(link, hello.fence);
        }
        let life = self.hosts[link.dialler].life;
        if self.hosts[link.listener].is_held {
            return self.cut(link);
        }
        let Shell::Replica(shell) = &mut self.hosts[link.listener].shell else { return self.cut(link) };
        if let Message::Hello(hello) = &message {
            if let Some(answer) = shell.machine.rejection(hello) {
                shell.machine.note_rejected(hello);
                // The session that is open goes on.
                return self.send(
                    link,
                    Channel::ToDialler,
                    Packet::Message(answer.encode().expect("it is short")),
                );
            }
            let before = shell.speaker.replace(link).filter(|before| *before != link);
            shell.speaker_life = life;
            self.links[link].listener_side = Some(self.links[link].connection);
            if let Some(before) = before {
                self.links[before].listener_side = None;
                self.cut(before);
            }
        }
        if self.is_served(link) {
            let machine = self.machine_mut(link.listener);
            let told = match &message {
                Message::Hello(hello) => {
                    Some(Members { members: hello.members.clone(), removed: Vec::new() })
                }
                Message::Members(told) => Some(told.clone()),
                _ => None,
            };
            let result = machine.handle_message(message);
            self.end_if_refused(link, result);
            if let Some(told) = told {
                self.learn(link.listener, &told);
            }
        }
    }

    /// Another primary greets: one of the two is none any more (L5).
    fn primary_is_greeted(&mut self, link: LinkId, fence: Fence) {
        let known = self.hosts[link.listener].superblock.fence;
        if fence.supersedes(known) {
            self.supersede(link.listener, fence);
            return self.cut(link);
        }
        let superseded = Message::from(Superseded { fence: known });
        self.send(link, Channel::ToDialler, Packet::Message(superseded.encode().expect("it is short")));
    }

    fn listener_takes(&mut self, link: LinkId, header: FrameHeader, data: Data) {
        if self.is_served(link) {
            let result = self.take_frame(link.listener, header, data);
            self.end_if_refused(link, result);
        }
    }

    /// A frame of a connection that was cut comes out of some buffer after its session: nothing of it may be written
    /// (R1).
    pub(super) fn stray(&mut self, link: LinkId, header: FrameHeader, data: Data) {
        let Shell::Replica(shell) = &self.hosts[link.listener].shell else { return };
        if shell.machine.session() != Some(header.session) {
            self.note(|| format!("{link} astray: {:?}", header.body));
            let result = self.take_frame(link.listener, header, data);
            assert_eq!(result, Ok(()), "a frame of an old session is nobody's mistake");
        }
    }

    fn take_frame(
        &mut self,
        host: usize,
        header: FrameHeader,
        data: Data,
    ) -> Result<(), replica::PrimaryMisbehaved> {
        let frame = FrameId(self.next_operation());
        let shell = self.replica_shell(host);
        shell.payloads.insert(frame, data);
        let result = shell.machine.handle_frame(frame, header);
        shell.machine.acknowledge_receipt();
        result
    }

    /// Whether a link's connection is the one that its listener serves.
    fn is_served(&self, id: LinkId) -> bool {
        let link = &self.links[id];
        matches!(self.hosts[id.listener].shell, Shell::Replica(_))
            && link.listener_side == Some(link.connection)
    }

    fn machine_mut(&mut self, host: usize) -> &mut Replica {
        let Shell::Replica(shell) = &mut self.hosts[host].shell else { panic!("the host is a replica") };
        &mut shell.machine
    }

    fn end_if_refused(&mut self, link: LinkId, result: Result<(), replica::PrimaryMisbehaved>) {
        if let Err(error) = result {
            let is_meant = self.lies.is_some() || self.hosts[link.listener].has_failed();
            assert!(is_meant, "host {}: {error}", link.listener);
            self.cut(link);
        }
    }

    /// Carries out an action of a replica.
    pub(super) fn act_replica(&mut self, host: usize, action: Action) {
        self.note(|| format!("host {host}: {action:?}"));
        match action {
            Action::Apply { frame, range, zero } => {
                let id = self.start_replica_disk(host, DiskWork::Apply(frame));
                let it = &mut self.hosts[host];
                let Shell::Replica(shell) = &it.shell else { panic!("the host is a replica") };
                let data = if zero.is_some() { &Data::Fill(0) } else { &shell.payloads[&frame] };
                it.disk.write(id, range, data, false);
            }
            Action::Drop(frame) => {
                let payload = self.replica_shell(host).payloads.remove(&frame);
                payload.expect("a payload is dropped once");
            }
            Action::Sync => {
                let id = self.start_replica_disk(host, DiskWork::Sync);
                self.hosts[host].disk.sync(id);
            }
            Action::WriteMarker(mark) => {
                let shell = self.replica_shell(host);
                shell.marker_serial += 1;
                let serial = shell.marker_serial;
                let page = Box::new(marker::encode(mark, serial));
                let batches = VecDeque::from([vec![(slot_offset(serial), Some(page))]]);
                self.start_replica_file(host, marker::FILE_NAME, batches, FileWork::Marker);
            }
            Action::WriteState(change) => self.write_state(host, change),
            Action::WriteLog { offset, record } => {
                let batches = VecDeque::from([vec![(offset, Some(record))]]);
                self.start_replica_file(host, activity_log::FILE_NAME, batches, FileWork::Log);
            }
            Action::BeginLayer(_) => {
                let layer = self.hosts[host].superblock.layers.next();
                self.start_replica_file(host, LAYERS, VecDeque::new(), FileWork::Layer(layer));
            }
            Action::SavePreImages { ranges } => {
                let disk = &self.hosts[host].disk;
                let is_read = ranges.iter().all(|range| disk.can_read(*range));
                let contents = is_read.then(|| ranges.iter().flat_map(|range| disk.read(*range)).collect());
                self.start_replica_file(host, LAYERS, VecDeque::new(), FileWork::Saved(ranges, contents));
            }
            Action::EndLayer(number) => {
                self.hosts[host].layers.end(number);
            }
            Action::ReadDigest { frame, range } => {
                let id = self.start_replica_disk(host, DiskWork::Digest(frame, range));
                self.hosts[host].disk.begin_read(id, range);
            }
            Action::SendContent { session, number, range, .. } => {
                let id = self.start_replica_disk(host, DiskWork::Content(session, number, range));
                self.hosts[host].disk.begin_read(id, range);
            }
            Action::Send(message) => self.answer(host, &message),
        }
    }

    fn write_state(&mut self, host: usize, change: StateChange) {
        let source = self.replica_shell(host).speaker.map(|link| link.dialler);
        self.hosts[host].note_change(&change, self.settings.space);
        change.apply(&mut self.hosts[host].superblock);
        let batches = self.hosts[host].superblock_batches();
        self.start_replica_file(host, superblock::FILE_NAME, batches, FileWork::State(change, source));
    }

    /// What a replica's machine says goes back on the connection that it serves, or nowhere.
    fn answer(&mut self, host: usize, message: &Message) {
        if let Message::Acknowledgement(acknowledgement) = message {
            self.check_marked(host, acknowledgement.mark);
        }
        let Some(speaker) = self.replica_shell(host).speaker else { return };
        let served = self.links[speaker].listener_side;
        let mirror = &mut self.hosts[host].mirror;
        match message {
            Message::Welcome(welcome) => {
                mirror.session_begins(served.unwrap_or_default());
                let Fence { counter, holder } = welcome.fence;
                let known = self.hosts[host].followed.insert(counter, holder);
                let is_new = known.is_none_or(|known| known == holder);
                assert!(is_new, "L5: host {host} follows {holder} and {known:?}, both of fence {counter}");
                let is_member = self.hosts[host].members.contains(speaker.dialler);
                assert!(is_member, "X3: host {host} follows {}, which was removed", speaker.dialler);
                self.hosts[host].check_consent(welcome);
                // A greeting of before its primary was set back is answered to nobody.
                let is_numbered = welcome.session <= self.hosts[speaker.dialler].superblock.session;
                if self.links[speaker].is_up && is_numbered {
                    self.check_lives(host, speaker.dialler);
                }
            }
            Message::Acknowledgement(acknowledgement) => {
                mirror.acknowledged(acknowledgement.durable);
                let has_writes = acknowledgement.received > Sequence(0);
                if has_writes && mirror.data == DataState::Consistent {
                    let life = (speaker.dialler, self.replica_shell(host).speaker_life);
                    self.hosts[host].known_lives.insert(life);
                }
            }
            _ => {}
        }
        if served == Some(self.links[speaker].connection) {
            self.send(speaker, Channel::ToDialler, Packet::Message(message.encode().expect("it is short")));
        }
    }

    /// A disk operation of a replica ended.
    pub(super) fn replica_disk_ended(&mut self, host: usize, id: DiskOperation, ended: Ended, fails: bool) {
        let Host { shell: Shell::Replica(shell), disk, .. } = &mut self.hosts[host] else {
            panic!("the host is a replica")
        };
        match (shell.disk_work.remove(&id).expect("it is known"), ended) {
            (DiskWork::Apply(frame), Ended::Done(good)) => {
                shell.payloads.remove(&frame).expect("it was written");
                shell.machine.handle_applied(frame, good);
            }
            (DiskWork::Sync, Ended::Done(good)) => shell.machine.handle_synced(good),
            (DiskWork::Digest(frame, range), Ended::Read(data)) => {
                shell.payloads.remove(&frame).expect("it was asked for");
                let is_read = !fails && disk.can_read(range);
                shell.machine.handle_digest(frame, is_read.then(|| digest(range, &data)));
            }
            (DiskWork::Content(session, number, range), Ended::Read(data)) => {
                let is_read = !fails && disk.can_read(range);
                shell.machine.handle_fetched(session, number, is_read);
                let link = shell.speaker.filter(|_| is_read && shell.machine.session() == Some(session));
                if let Some(link) = link.filter(|link| self.is_served(*link)) {
                    self.send_content(link, session, number, range, data);
                }
            }
            (work, ended) => panic!("{work:?} ended as {ended:?}"),
        }
    }

    /// A metadata write of a replica ended.
    pub(super) fn replica_file_ended(&mut self, host: usize, id: FileOperation, good: bool) {
        let has_room = !(self.state_fails(host) && self.hosts[host].state_is_full);
        let is_full = !has_room || self.is_rough && self.random.once_in(self.settings.space_failures);
        let it = &mut self.hosts[host];
        let Shell::Replica(shell) = &mut it.shell else { panic!("the host is a replica") };
        match shell.file_work.remove(&id).expect("it is known") {
            FileWork::Marker => {
                shell.machine.handle_marker_written(good);
                shell.machine.tell_mark();
            }
            FileWork::Log => shell.machine.handle_log_written(good),
            FileWork::Layer(layer) => {
                let begun = saved(good, is_full);
                if begun == Saved::Done {
                    it.layers.begin(layer);
                }
                shell.machine.handle_layer_begun(begun);
            }
            FileWork::Saved(ranges, contents) => {
                let outcome = match &contents {
                    Some(_) => saved(good, is_full),
                    None => Saved::Unreadable,
                };
                if let Some(contents) = contents.filter(|_| outcome == Saved::Done) {
                    it.layers.save(&ranges, &contents);
                }
                shell.machine.handle_saved(outcome);
            }
            FileWork::State(change, source) => {
                shell.machine.handle_state_written(good);
                if good {
                    it.superblock_written();
                    it.note_history(&change);
                    it.mirror.state_is_durable(&change);
                    if change == StateChange::Release {
                        it.is_handed_on();
                        it.expects_all();
                    }
                    if matches!(change, StateChange::Commit { .. }) {
                        (it.is_set_back, it.must_remember) = (false, false);
                        it.expected
                            .take_if(|expected| Some(expected.primary) != source || expected.is_outdated);
                    }
                    self.learn_lives(host, &change);
                }
            }
        }
    }

    /// A copy that adopts a primary's content, or a generation, knows of what that one answered.
    fn learn_lives(&mut self, host: usize, change: &StateChange) {
        match change {
            StateChange::Commit { lineage, .. } => {
                self.hosts[host].known_lives = self.generations.lives(lineage.first().copied());
            }
            StateChange::Generation(generation) => {
                self.hosts[host].known_lives.extend(self.generations.lives(Some(*generation)));
            }
            _ => {}
        }
    }

    /// What a primary answered in a life of its own is given up by an operator's word only (L1, L3).
    fn check_lives(&self, host: usize, primary: usize) {
        if self.is_liar(host) || self.is_liar(primary) {
            return;
        }
        let (mine, primary) = (&self.hosts[host].known_lives, &self.hosts[primary]);
        let lineages = (&self.hosts[host].superblock.lineage, &primary.superblock.lineage);
        if lineage::relation(lineages.0, lineages.1) == Relation::Unrelated {
            // Where pruning leaves nothing in common, the primary says so.
            return;
        }
        let mut theirs = primary.known_lives.clone();
        theirs.extend(self.generations.lives(primary.superblock.lineage.first().copied()));
        let forgotten: Vec<_> = mine.difference(&theirs).collect();
        assert!(
            forgotten.is_empty(),
            "L3: host {host} follows {}, which knows nothing of what was answered in {forgotten:?}",
            primary.number
        );
    }

    fn replica_shell(&mut self, host: usize) -> &mut ReplicaShell {
        match &mut self.hosts[host].shell {
            Shell::Replica(shell) => shell,
            Shell::Down | Shell::Primary(_) | Shell::Rewriting(_) => panic!("the host is a replica"),
        }
    }

    fn start_replica_disk(&mut self, host: usize, work: DiskWork) -> DiskOperation {
        let id = DiskOperation(self.next_operation());
        self.replica_shell(host).disk_work.insert(id, work);
        self.plan_disk(host, id, Duration::ZERO);
        id
    }

    fn start_replica_file(&mut self, host: usize, name: &str, batches: VecDeque<Batch>, work: FileWork) {
        let id = FileOperation(self.next_operation());
        self.hosts[host].files.write(id, name, batches);
        self.replica_shell(host).file_work.insert(id, work);
        self.plan_file(host, id);
    }
}
