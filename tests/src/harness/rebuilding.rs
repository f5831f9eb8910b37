//! A primary whose disk is new: what is absent on it is the source's, applications read it all the same, and it comes to be there
//! (S4).
//!
//! A sector of such a disk that holds nothing of the volume is garbage: what reads give of it nobody may see. The model has what the
//! source holds in its place, so that everything that is checked of a disk is checked of what an application would read.

use super::disk::{Data, GARBAGE};
use super::files::Batch;
use super::host::{Host, Shell, host_id, host_number};
use super::links::{Channel, LinkId, Packet};
use super::primary::{DiskWork, FileWork};
use super::recovery::Adopting;
use super::world::World;
use blockmirror_protocol::disk::absent::{self, Header};
use blockmirror_protocol::disk::superblock::Superblock;
use blockmirror_protocol::disk::{PAGE_BYTES, Page};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::rebuild::{Absent, Changes, FetchId, Fetched, Landing};
use blockmirror_protocol::tracker::RequestId;
use blockmirror_protocol::units::Stream;
use blockmirror_protocol::units::{HostId, Session};
use blockmirror_protocol::wire::{Body, FrameHeader};
use std::collections::{BTreeMap, VecDeque};

/// What a primary's shell keeps of a rebuild.
#[derive(Debug, Default)]
pub struct Rebuilding {
    /// What was fetched and is being written.
    fetched: BTreeMap<FetchId, Data>,
    /// Reads that wait.
    reads: BTreeMap<RequestId, ByteRange>,
}

impl Rebuilding {
    /// What was fetched and is neither written nor dropped.
    #[must_use]
    pub fn held(&self) -> usize {
        self.fetched.len()
    }
}

/// The batches of changes of the file: the pages, then their twins.
fn batches_of(changes: &Changes) -> VecDeque<Batch> {
    let batch = |twin: usize| {
        changes.iter().map(|(page, bytes)| (absent::places(*page)[twin], Some(bytes.clone()))).collect()
    };
    VecDeque::from([batch(0), batch(1)])
}

impl Host {
    /// The file of absent blocks as a rebuild from this host begins with it.
    pub(super) fn absent_batches(&self, source: HostId) -> VecDeque<Batch> {
        let page = Box::new(self.absent_header(source).encode());
        VecDeque::from([absent::HEADER_PLACES.into_iter().map(|place| (place, Some(page.clone()))).collect()])
    }

    fn absent_header(&self, source: HostId) -> Header {
        let Superblock { volume, size_bytes, block_size, .. } = self.superblock;
        Header { volume, source, blocks: block_size.blocks_in(size_bytes), block_size }
    }

    /// The host that has what is absent here, as the files say.
    pub(super) fn source(&self) -> Option<usize> {
        if !self.superblock.is_absent() {
            return None;
        }
        let header = self.files.bytes(absent::FILE_NAME, 2 * PAGE_BYTES as u64);
        Header::recover(&header).ok().map(|header| host_number(header.source))
    }

    /// What is absent, where a rebuild is under way. What is left of one that has ended is removed.
    pub(super) fn open_absent(&mut self) -> Option<Absent> {
        if self.source().is_none() {
            self.files.remove(absent::FILE_NAME);
            return None;
        }
        let (absent, missing) = self.read_absent();
        for (place, page) in missing {
            self.files.write_now(absent::FILE_NAME, place, &page);
        }
        Some(absent)
    }

    /// What the file of absent blocks says, and the pages that are to be written again.
    fn read_absent(&self) -> (Absent, Vec<(u64, Box<Page>)>) {
        let header = self.files.bytes(absent::FILE_NAME, 2 * PAGE_BYTES as u64);
        let found = Header::recover(&header).expect("it is whole");
        let mut pages: BTreeMap<u64, [Page; 2]> = BTreeMap::new();
        for (number, page) in self.files.pages_from(absent::FILE_NAME, absent::places(0)[0]) {
            pages.entry(number / 2).or_insert([[0; PAGE_BYTES]; 2])[(number % 2) as usize] = *page;
        }
        let (mut read, mut missing) = (Vec::new(), Vec::new());
        for (page, pair) in pages {
            let found = absent::decode(page, [&pair[0], &pair[1]]).expect("one of the two is whole");
            missing.extend(found.missing.map(|at| (absent::places(page)[at], Box::new(pair[1 - at]))));
            read.push((page, found));
        }
        let expected = self.absent_header(found.source);
        let absent = Absent::new(&expected, found, self.superblock.size_bytes, read);
        (absent.expect("it is the volume's"), missing)
    }

    /// A crash came: whatever was written to a block that is absent as far as the file says, what the source has counts.
    pub(super) fn distrust_absent(&mut self) {
        self.recover_superblock();
        if self.source().is_none() || self.adopting.is_some() {
            return;
        }
        let Superblock { size_bytes, block_size, .. } = self.superblock;
        let (absent, _) = self.read_absent();
        let (mut at, blocks) = (0, block_size.blocks_in(size_bytes));
        while let Some(missing) = absent.next_missing(&(at..blocks)) {
            at = missing.end;
            self.disk.distrust(ByteRange::of_blocks(missing, block_size, size_bytes));
        }
    }
}

impl World {
    /// What sources hold is what is absent elsewhere.
    pub(super) fn absorb_sources(&mut self) {
        for host in 0..self.hosts.len() {
            let it = &self.hosts[host];
            if !it.disk.is_lacking() {
                continue;
            }
            // Until its metadata says so, the files are of what it had before.
            let adopted = it.adopting.as_ref().map(Adopting::source);
            let Some(source) = adopted.or_else(|| it.source()) else { continue };
            // What is written there as the primary is nobody's here.
            if it.superblock.fence.is_refused_by(self.hosts[source].superblock.fence) {
                continue;
            }
            let changed = self.hosts[source].disk.peek_changed();
            let values: Vec<_> =
                changed.into_iter().map(|sector| (sector, self.hosts[source].disk.value(sector))).collect();
            for (sector, value) in values {
                self.hosts[host].disk.set_truth(sector, value);
            }
        }
    }

    /// Whether a host has what is absent on another one. If its disk is lost, so is that.
    pub(super) fn is_source(&self, host: usize) -> bool {
        self.hosts.iter().any(|other| {
            other.source() == Some(host) || other.adopting.as_ref().is_some_and(|it| it.source() == host)
        })
    }

    fn rebuilding(&mut self, host: usize) -> &mut Rebuilding {
        match &mut self.hosts[host].shell {
            Shell::Primary(shell) => &mut shell.rebuilding,
            _ => panic!("the host is primary"),
        }
    }

    /// At times an application reads from a primary of which something is absent.
    pub(super) fn read_by_chance(&mut self, host: usize) {
        let is_rebuilt = self.hosts[host].tracker().is_some_and(|tracker| tracker.rebuild().is_some());
        if !is_rebuilt || !self.random.once_in(2) {
            return;
        }
        let range = self.random_range(self.settings.write_bytes);
        let id = RequestId(self.next_operation() | 1 << 62);
        let now = self.clock(host);
        self.rebuilding(host).reads.insert(id, range);
        let tracker = self.hosts[host].tracker_mut().expect("it is primary");
        if tracker.handle_read(id, range, now) {
            self.read_here(host, id);
        }
    }

    /// A read is carried out: nothing of it may be garbage.
    pub(super) fn read_here(&mut self, host: usize, id: RequestId) {
        let range = self.rebuilding(host).reads.remove(&id).expect("it waited");
        let found = self.hosts[host].disk.read(range).into_iter().find(|(_, value)| *value == GARBAGE);
        assert_eq!(found, None, "S4: an application reads on host {host} what is not there");
    }

    /// A read was answered with an error. Says whether this was one.
    pub(super) fn read_failed(&mut self, host: usize, id: RequestId) -> bool {
        self.rebuilding(host).reads.remove(&id).is_some()
    }

    pub(super) fn land(&mut self, host: usize, landing: u64, part: Landing, is_zero: bool) {
        let Landing { fetch, range } = part;
        let data = match is_zero {
            true => Data::Fill(0),
            false => self.rebuilding(host).fetched[&fetch].clone(),
        };
        let id = self.start_primary_disk(host, DiskWork::Land(landing));
        self.hosts[host].disk.write(id, range, &data, false);
    }

    pub(super) fn drop_fetched(&mut self, host: usize, fetch: FetchId) {
        self.rebuilding(host).fetched.remove(&fetch);
    }

    pub(super) fn write_absent(&mut self, host: usize, changes: &Changes) {
        self.start_primary_file(host, absent::FILE_NAME, batches_of(changes), FileWork::Absent);
    }

    /// A replica sends what its primary lacks.
    pub(super) fn send_content(
        &mut self,
        link: LinkId,
        session: Session,
        number: u64,
        range: ByteRange,
        data: Data,
    ) {
        let body = match data.not_zero(range).is_empty() {
            true => Body::FetchedZero { range, number },
            false => Body::Fetched { range, number },
        };
        let header = FrameHeader { session, stream: Stream(1), body };
        self.note(|| format!("{link} <= {body:?}"));
        self.send(link, Channel::Fetched, Packet::Frame(header, data));
    }

    /// A primary receives what it asked for.
    pub(super) fn dialler_fetches(&mut self, link: LinkId, packet: Packet) {
        let Packet::Frame(header, data) = packet else { panic!("only content comes so") };
        let (range, number, content) = match header.body {
            Body::Fetched { range, number } => (range, number, Fetched::Data),
            Body::FetchedZero { range, number } => (range, number, Fetched::Zero),
            body => panic!("{body:?} comes so"),
        };
        let (host, now, fetch) = (link.dialler, self.clock(link.dialler), FetchId(number));
        let Shell::Primary(shell) = &mut self.hosts[host].shell else { return };
        let known = shell.rebuilding.fetched.insert(fetch, data);
        assert!(known.is_none(), "what was asked for comes once");
        let source = host_id(link.listener);
        match shell.tracker.handle_fetched(source, header.session, (fetch, range), content, now) {
            Ok(true) => {}
            Ok(false) => drop(shell.rebuilding.fetched.remove(&fetch)),
            Err(error) => panic!("host {}: {error}", link.listener),
        }
    }

    /// A rebuild has ended: nothing that is told of is garbage.
    pub(super) fn check_filled(&self, host: usize) {
        assert!(!self.hosts[host].disk.has_garbage(), "S4: host {host} counts as whole, and is not");
    }
}
