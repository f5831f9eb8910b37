//! `superblock`: who this copy is, what it holds, and whose history it follows.
//!
//! Two slots of one page each, and then their twins: what has serial number n goes to slot n mod 2 and to its twin, so a torn
//! write leaves what was before. A change is reported as durable when both are: of what somebody relies on, one page may go bad.
//! Without a twin, a slot that went bad was taken for one that was torn, and the copy went back by a change: whom it follows,
//! whom its operator agreed to, what it was promised (W4, L5, L6).
//!
//! ```text
//!    0 magic "BMSUPER\0"      8 version (4)      12 CRC-32 of the rest (4)
//!   16 serial (8)            24 size in bytes (8)
//!   32 volume (16)           48 copy (16)
//!   64 block bytes (4)       68 role (1)  69 data state (1)  70 zero (2)
//!   72 session (8)           80 fence counter (8)   88 fence holder (32)
//!  120 position: generation (16), epoch (8), sequence (8)
//!  152 source host (32)     184 lineage length (4)  188 zero (4)
//!  192 lineage: up to 64 generations of 16 bytes, newest first
//! 1216 adopted (8)         1224 zero (8)        1232 number of the last layer (8)
//! 1240 mode (1)  1241 released (1)  1242 replaced (1)  1243 touched (1)
//! 1244 zero (4)            1248 counter of the source's fence (8)          1256 zero (8)
//! 1264 promise (1)  1265 zero (3)  1268 replicas of the promise (4)
//! 1272 catalog of layers: 8 of layer (8), purposes (4): 1 rollback, 2 undo, touched (4); zeroes where there is none
//! 1400 zero                1432 agreed (8)            1440 run (8)
//! 1448 ends: an epoch (8) for each generation of the lineage, 0 where none is known
//! 1960 heirs: how many (4)  1964 zero (4)       1968 up to 33 hosts (32)
//! 3024 hosts that count for the promise: how many (4)  3028 zero (4)  3032 up to 33 hosts (32)  4088 zero
//! ```
//!
//! Version 1 had zeroes from 1216 on, which read as what was true of every copy then: nothing adopted, no gap, no
//! layers, asynchronous, never released, no history. Version 2 had zeroes from 1264 on: nothing was
//! promised, and no end is known. Version 3 said at 1400 where a recovered content ends: generation (16), epoch (8), and
//! the first epoch of the run after it (8), with which that was settled. It had no run: the position of a primary told it.
//! Nobody was asked whether he agreed: whoever was followed by then is agreed to. Version 4 had zeroes from 1960 on: a primary
//! that was demoted in order agreed to whoever was promoted next, and had no heirs. Version 5 had a zero at 1243: that something
//! else wrote to the backing was known to the run alone that noticed it; and zeroes from 3024 on: it did not know which hosts
//! a promise of replicas was about, so such a promise counts for nothing. Its primaries had no
//! heirs. Version 6 had a zero at 1244: what an older version kept counts as touched, since nothing says that it is not.
//! Version 7 had no catalog: at 1224 the layer to roll back to (8), at 1256 that for an undo (8), each 0 for none, and at 1244
//! whether the latter was touched (1). Version 8 had no twins: the file ended after the slots.
//! Version 10 is written as long as a primary lacks something of its own copy (S4), and version 9 otherwise, which says the same: a
//! release that knows nothing of absent blocks would serve what is on the disk in their place.

use super::dirty_map::Base;
use super::{
    MetadataError, PAGE_BYTES, Page, is_sealed, newest, promise_of, raw_hosts, raw_promise, seal, slot_offset,
};
use crate::given::Given;
use crate::layers::{Catalog, Entry, LAYERS_LIMIT, LayerId, Purpose};
use crate::lineage::{self, Ends};
use crate::planted::{Bug, planted};
pub use crate::terms::Role;
use crate::terms::{DataState, Fence, MEMBERS_LIMIT, Mode, Promise};
use crate::units::{BlockSize, CopyId, Epoch, GenerationId, HostId, Position, Sequence, Session, VolumeId};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The file's name in the volume's state folder.
pub const FILE_NAME: &str = "superblock";
/// The file's size in bytes.
pub const FILE_BYTES: u64 = 4 * PAGE_BYTES as u64;
/// The newest layout that this release reads, and the one that it writes for a primary that lacks something of its own copy.
pub const VERSION: u32 = 10;
/// The one that it writes for all others.
const WHOLE_VERSION: u32 = 9;
/// Where the slots end, and their twins begin.
pub const TWINS: u64 = 2 * PAGE_BYTES as u64;
/// How many generations a lineage holds at most.
pub const LINEAGE_LIMIT: usize = 64;
/// How many heirs there are at most.
pub const HEIRS_LIMIT: usize = 33;

/// How many low bits of a session's number count within one fence.
const SESSION_BITS: u32 = 40;

const WHAT: &str = "superblock";
pub(super) const MAGIC: [u8; 8] = *b"BMSUPER\0";
const CRC_AT: usize = 12;
/// The first version that knows which hosts count for a promise.
const COUNTED_SINCE: u32 = 6;
/// The first version that knows whether what an undo brings back is touched.
const UNDO_TOUCHED_SINCE: u32 = 7;
/// The first version that has a catalog of layers.
const CATALOG_SINCE: u32 = 8;
/// The first version that has a run and ends, and says to whom the operator agreed.
const RUN_SINCE: u32 = 4;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    serial: U64,
    size_bytes: U64,
    volume: [u8; 16],
    copy: [u8; 16],
    block_bytes: U32,
    role: u8,
    data: u8,
    zero: U16,
    session: U64,
    fence_counter: U64,
    fence_holder: [u8; 32],
    generation: [u8; 16],
    epoch: U64,
    sequence: U64,
    source: [u8; 32],
    lineage_length: U32,
    zero_too: U32,
    lineage: [[u8; 16]; LINEAGE_LIMIT],
    adopted: U64,
    old_rollback: U64,
    last_layer: U64,
    mode: u8,
    released: u8,
    replaced: u8,
    touched: u8,
    old_undo_touched: u8,
    zero_again: [u8; 3],
    source_counter: U64,
    old_undo: U64,
    promise: u8,
    zero_at_last: [u8; 3],
    promise_replicas: U32,
    catalog: [RawLayer; LAYERS_LIMIT],
    old_end_generation: [u8; 16],
    old_end_epoch: U64,
    old_end_until: U64,
    agreed: U64,
    run: U64,
    ends: [U64; LINEAGE_LIMIT],
    heirs_length: U32,
    zero_at_end: U32,
    heirs: [[u8; 32]; HEIRS_LIMIT],
    counted_length: U32,
    zero_at_the_end: U32,
    counted: [[u8; 32]; MEMBERS_LIMIT],
    rest: [u8; PAGE_BYTES - 3032 - 32 * MEMBERS_LIMIT],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawLayer {
    layer: U64,
    purposes: U32,
    touched: U32,
}

const _: () = assert!(size_of::<Raw>() == PAGE_BYTES);

/// The lowest number that a session of this fence may have.
fn first_session(fence: Fence) -> Session {
    Session(fence.counter << SESSION_BITS)
}

/// The counter of the fence that a session was numbered under.
#[must_use]
pub fn fence_of_session(session: Session) -> u64 {
    session.0 >> SESSION_BITS
}

/// Whether a primary of this fence can have given a session so high a number before it was set back. Half of the numbers are
/// not believed of, so that nobody can use them up (X1).
#[must_use]
pub fn may_have_numbered(fence: Fence, session: Session) -> bool {
    session < Session(first_session(fence).0.saturating_add(1 << (SESSION_BITS - 1)))
}

/// Whether a primary of this fence may give a session this number. Those of later fences are kept for these.
#[must_use]
pub fn may_number(fence: Fence, session: Session) -> bool {
    fence_of_session(session) <= fence.counter
}

/// What a host knows durably about its copy of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// The volume.
    pub volume: VolumeId,
    /// This copy.
    pub copy: CopyId,
    /// The volume's size in bytes.
    pub size_bytes: u64,
    /// The tracking block.
    pub block_size: BlockSize,
    /// The host's role.
    pub role: Role,
    /// What the backing holds.
    pub data: DataState,
    /// The last session that this host opened as primary.
    pub session: Session,
    /// The newest promotion that this host knows of: its holder may write.
    pub fence: Fence,
    /// On a replica, the position that it last adopted by a commit; on a primary, where its content stood when it was
    /// opened.
    pub position: Position,
    /// On a replica, the fence of the primary whose content it adopted last, or whose resync made it inconsistent; none
    /// once its content was given up or brought back, until it follows a primary again (L6).
    pub source: Fence,
    /// The generations, newest first; at most [`LINEAGE_LIMIT`].
    pub lineage: Vec<GenerationId>,
    /// How often this copy adopted another's content; maps that were made before are void (L2).
    pub adopted: u64,
    /// The layers of pre-images that there are, and what each is for (P2, L6).
    pub layers: Catalog,
    /// The mode that the replica was last committed in (W4); async from when it knows that something was replied without
    /// it.
    pub mode: Mode,
    /// What the primary of the last commit promised about answering without this replica (W4).
    pub given: Given,
    /// Whether the primary was demoted when this replica had everything: whoever is promoted next loses nothing.
    pub released: bool,
    /// Whether this copy has lost, since a primary last committed to it, what that one may count on it for: its content was
    /// recovered from another copy, given up, or brought back to what it was (W4).
    pub replaced: bool,
    /// On a replica, whether something else wrote to the backing since all of it was last the content of a primary (X4): until
    /// a commit, for which all is compared, or the operator's word that the content is to be the volume's as it is.
    pub touched: bool,
    /// The first epoch of this host's last run as primary: whatever it numbered before is lower.
    pub run: Epoch,
    /// On a primary, where its content ends in generations that others may be further in. Of the one that is going on, an
    /// epoch that no replica was told of.
    pub ends: Ends,
    /// The counter of the last fence whose holder may overwrite this copy for good, since this host took part in its
    /// promotion or this host's operator agreed to it; what holders of later ones overwrite is kept
    /// ([`crate::replica::consent`]).
    pub agreed: u64,
    /// Since this host was demoted in order, those that had recorded that they have everything; at most [`HEIRS_LIMIT`].
    /// Whoever of them is promoted next may overwrite this copy for good. On a primary that was promoted again after that,
    /// those that may count as such that lack nothing until they follow it ([`Superblock::has_returned`]).
    pub heirs: Vec<HostId>,
}

impl Superblock {
    /// What a copy says of itself that holds nothing yet and follows nobody.
    #[must_use]
    pub fn empty(volume: VolumeId, copy: CopyId, size_bytes: u64, block_size: BlockSize) -> Self {
        Self {
            volume,
            copy,
            size_bytes,
            block_size,
            role: Role::Replica,
            data: DataState::Empty,
            session: Session(0),
            fence: Fence::default(),
            position: Position::default(),
            source: Fence::default(),
            lineage: Vec::new(),
            adopted: 0,
            layers: Catalog::default(),
            mode: Mode::Async,
            given: Given::NOTHING,
            released: false,
            replaced: false,
            touched: false,
            run: Epoch(0),
            ends: Ends::default(),
            agreed: 0,
            heirs: Vec::new(),
        }
    }

    /// What the map of a peer is relative to that a primary has none of: it may differ anywhere.
    #[must_use]
    pub fn base_of_everything(&self) -> Base {
        let generation = self.lineage.first().copied().unwrap_or_default();
        Base { generation, adopted: self.adopted, ..Base::default() }
    }

    /// Something else wrote to the backing (X4). What a primary finds there is what it serves: that is the volume's content.
    pub fn note_touched(&mut self) {
        self.touched |= self.role == Role::Replica;
        // Where the layer has no pre-image yet, an undo leaves what is there now.
        if self.touched {
            self.layers.touch_undo();
        }
    }

    /// What this copy holds is kept in this layer from now on, which may be the one that keeps it already, or in none. A commit
    /// mends the copy, and not what was kept of it before.
    pub(crate) fn keep_in(&mut self, layer: Option<LayerId>) {
        self.layers.set(Purpose::Undo, layer);
        if self.touched {
            self.layers.touch_undo();
        }
    }

    /// Whether this host gave its content up, or brought it back, and has adopted nothing since (L6): what others remember
    /// of it is of another content.
    #[must_use]
    pub fn is_on_its_own(&self) -> bool {
        self.source == Fence::default()
    }

    /// Whether this primary was demoted in order and promoted again itself: hosts that recorded then that they have everything
    /// may not know of that, and be promoted without a word for what is answered since (W4).
    #[must_use]
    pub fn has_returned(&self) -> bool {
        self.role == Role::Primary && !self.source.holder.is_none() && self.source.holder == self.fence.holder
    }

    /// Where it has returned, those that had everything then, as far as that is recorded: a primary of an earlier release
    /// recorded none.
    #[must_use]
    pub fn returned(&self) -> Option<Vec<HostId>> {
        self.has_returned().then(|| self.heirs.clone())
    }

    /// All of them follow this primary by now.
    pub fn note_followed(&mut self) {
        self.source = Fence::default();
        self.heirs.clear();
    }

    /// The first epoch of this host's next run as primary; nothing where the numbers are used up.
    #[must_use]
    pub fn next_run(&self) -> Option<Epoch> {
        lineage::first_epoch_after(self.run.max(self.position.epoch))
    }

    /// Where the content of a primary stands that isn't open. What it told others of its newest generation was before the
    /// end of that; in one that another host began, nobody is further than before its next run.
    fn reached(&self, next: Epoch) -> Position {
        let generation = self.lineage.first().copied().unwrap_or_default();
        let end = self.ends.of(generation).unwrap_or(next);
        Position { generation, epoch: Epoch(end.0.saturating_sub(1)), sequence: Sequence(0) }
    }

    /// What the superblock says when a primary is opened whose epochs get numbers from `run` on.
    pub fn begin_run(&mut self, run: Epoch) {
        (self.position, self.run) = (self.reached(run), run);
    }

    /// Where the content of this host stands that was a primary when it ended.
    #[must_use]
    pub fn stands(&self) -> Position {
        self.reached(self.run)
    }

    /// What the superblock says when a primary begins a generation with the epoch `first`. Others are told of no epoch of
    /// it from `end` on before [`Superblock::tell_up_to`].
    pub fn begin_generation(
        &mut self,
        generation: GenerationId,
        kept: &[GenerationId],
        limit: usize,
        (first, end): (Epoch, Epoch),
    ) {
        if let Some(newest) = self.lineage.first()
            && self.ends.of(*newest).is_some_and(|end| end > first)
        {
            self.ends.set(*newest, first);
        }
        lineage::begin(&mut self.lineage, generation, kept, limit);
        self.ends.set(generation, end);
        self.ends.keep(&self.lineage);
    }

    /// Others may be told of the epochs of the newest generation up to this one, which is the first that they may not be
    /// told of; no lower one than any of which they were.
    pub fn tell_up_to(&mut self, end: Epoch) {
        let newest = self.lineage.first().copied().unwrap_or_default();
        self.ends.set(newest, end);
    }

    /// Of a primary whose backing is new and is filled from a replica: its own disk holds no image of the volume yet (S4).
    pub fn note_absent(&mut self) {
        (self.data, self.source) = (DataState::Inconsistent, Fence::default());
    }

    /// Whether it is such a primary.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        self.role == Role::Primary && self.data == DataState::Inconsistent
    }

    /// It holds one now.
    pub fn note_filled(&mut self) {
        self.data = DataState::Consistent;
    }

    /// The page to write at both [`places`] of `serial`.
    ///
    /// # Panics
    /// When there are more generations, heirs or hosts that count than there is room for.
    #[must_use]
    pub fn encode(&self, serial: u64) -> Page {
        assert!(self.lineage.len() <= LINEAGE_LIMIT, "a lineage is pruned before it is recorded");
        assert!(self.heirs.len() <= HEIRS_LIMIT, "heirs are members");
        assert!(self.given.is_sound(), "those that count are members");
        let (promise, replicas) = raw_promise(self.given.promise);
        let mut lineage = [[0; 16]; LINEAGE_LIMIT];
        for (slot, generation) in lineage.iter_mut().zip(&self.lineage) {
            *slot = generation.0;
        }
        let mut ends = [U64::ZERO; LINEAGE_LIMIT];
        for (slot, generation) in ends.iter_mut().zip(&self.lineage) {
            *slot = U64::new(self.ends.of(*generation).map_or(0, |end| end.0.max(1)));
        }
        let mut catalog =
            [RawLayer { layer: U64::ZERO, purposes: U32::ZERO, touched: U32::ZERO }; LAYERS_LIMIT];
        for (slot, entry) in catalog.iter_mut().zip(self.layers.entries()) {
            slot.layer = U64::new(entry.layer.number());
            slot.purposes = U32::new(entry.purposes);
            slot.touched = U32::new(entry.is_touched.into());
        }
        let raw = Raw {
            magic: MAGIC,
            version: U32::new(if self.is_absent() { VERSION } else { WHOLE_VERSION }),
            crc: U32::ZERO,
            serial: U64::new(serial),
            size_bytes: U64::new(self.size_bytes),
            volume: self.volume.0,
            copy: self.copy.0,
            block_bytes: U32::new(self.block_size.bytes() as u32),
            role: match self.role {
                Role::Primary => 1,
                Role::Replica => 2,
            },
            data: match self.data {
                DataState::Empty => 0,
                DataState::Inconsistent => 1,
                DataState::Consistent => 2,
            },
            zero: U16::ZERO,
            session: U64::new(self.session.0),
            fence_counter: U64::new(self.fence.counter),
            fence_holder: self.fence.holder.0,
            generation: self.position.generation.0,
            epoch: U64::new(self.position.epoch.0),
            sequence: U64::new(self.position.sequence.0),
            source: self.source.holder.0,
            lineage_length: U32::new(self.lineage.len() as u32),
            zero_too: U32::ZERO,
            lineage,
            adopted: U64::new(self.adopted),
            old_rollback: U64::ZERO,
            last_layer: U64::new(self.layers.last()),
            mode: self.mode.to_byte(),
            released: self.released.into(),
            replaced: self.replaced.into(),
            touched: self.touched.into(),
            old_undo_touched: 0,
            zero_again: [0; 3],
            source_counter: U64::new(self.source.counter),
            old_undo: U64::ZERO,
            promise,
            zero_at_last: [0; 3],
            promise_replicas: U32::new(replicas),
            catalog,
            old_end_generation: [0; 16],
            old_end_epoch: U64::ZERO,
            old_end_until: U64::ZERO,
            agreed: U64::new(self.agreed),
            run: U64::new(self.run.0),
            ends,
            heirs_length: U32::new(self.heirs.len() as u32),
            zero_at_end: U32::ZERO,
            heirs: raw_hosts(&self.heirs),
            counted_length: U32::new(self.given.counted.len() as u32),
            zero_at_the_end: U32::ZERO,
            counted: raw_hosts(&self.given.counted),
            rest: [0; PAGE_BYTES - 3032 - 32 * MEMBERS_LIMIT],
        };
        let mut page: Page = zerocopy::transmute!(raw);
        seal(&mut page, CRC_AT);
        page
    }

    /// The number of this host's next session as primary: higher than its last one, and than that of any session by a
    /// lower fence, so that no frame is taken for one of another primary's session (R1); and above what replicas have seen of
    /// it before it was set back, so that what they had then is not taken for what they got since (X4).
    #[must_use]
    pub fn next_session(&self, above: Session) -> Session {
        let last = if may_have_numbered(self.fence, above) { self.session.max(above) } else { self.session };
        Session(last.0.saturating_add(1)).max(first_session(self.fence))
    }

    /// Reads the file: the newest whole copy and its serial number.
    ///
    /// # Errors
    /// [`MetadataError`] when no slot or twin is whole, or a newer release wrote one.
    pub fn recover(file: &[u8]) -> Result<(u64, Self), MetadataError> {
        let length = if planted(Bug::ForgetTwins) { TWINS } else { FILE_BYTES };
        let pages = &file[..file.len().min(length as usize)];
        newest(WHAT, pages, |slot| Self::decode(slot).transpose())
    }

    /// The place in bytes where the newest one is to be as well and isn't, and the page that belongs there. A crash came before it was
    /// written, or that page went bad; until it is there again, one more page that goes bad takes a change back.
    ///
    /// `file`: what the whole file says; none is missing of a shorter one, or where no page is whole.
    #[must_use]
    pub fn missing_twin(file: &[u8]) -> Option<(u64, Page)> {
        let (serial, _) = Self::recover(file).ok()?;
        let [slot, twin] = places(serial).map(|place| {
            let page: Option<&Page> = file.get(place as usize..).and_then(|rest| rest.first_chunk());
            page.map(|page| (place, page))
        });
        let (slot, twin) = (slot?, twin?);
        let is_newest = |page: &Page| matches!(Self::decode(page), Ok(Some((found, _))) if found == serial);
        let (from, to) = if is_newest(slot.1) { (slot, twin) } else { (twin, slot) };
        (from.1 != to.1).then_some((to.0, *from.1))
    }

    fn decode(slot: &[u8]) -> Result<Option<(u64, Self)>, MetadataError> {
        let Ok(raw) = Raw::ref_from_bytes(slot) else { return Ok(None) };
        if raw.magic != MAGIC || !is_sealed(slot, CRC_AT) {
            return Ok(None);
        }
        if raw.version.get() > VERSION {
            return Err(MetadataError::TooNew { what: WHAT, found: raw.version.get(), known: VERSION });
        }
        let corrupted = MetadataError::Corrupted { what: WHAT };
        let block_size = BlockSize::new(raw.block_bytes.get().into()).map_err(|_| corrupted.clone())?;
        let length = raw.lineage_length.get() as usize;
        let lineage = raw.lineage.get(..length).ok_or_else(|| corrupted.clone())?;
        let heirs = raw.heirs.get(..raw.heirs_length.get() as usize).ok_or_else(|| corrupted.clone())?;
        let counted =
            raw.counted.get(..raw.counted_length.get() as usize).ok_or_else(|| corrupted.clone())?;
        let promise = promise_of(raw.promise, raw.promise_replicas.get()).ok_or_else(|| corrupted.clone())?;
        let is_known = raw.version.get() >= COUNTED_SINCE || !matches!(promise, Promise::Replicas(_));
        let promise = if is_known { promise } else { Promise::None };
        let mut ends = Ends::default();
        for (generation, end) in lineage.iter().zip(&raw.ends).filter(|(_, end)| end.get() != 0) {
            ends.set(GenerationId(*generation), Epoch(end.get()));
        }
        let old_end = GenerationId(raw.old_end_generation);
        // One that a run has settled is told from what followed by the number of its own.
        let is_told = raw.old_end_until.get() == 0 || raw.old_end_epoch.get() >> Epoch::RUN_BITS != 0;
        if !old_end.is_none() && is_told {
            ends.set(old_end, Epoch(raw.old_end_epoch.get().max(1)));
        }
        let epoch = Epoch(raw.epoch.get());
        let is_older = raw.version.get() < RUN_SINCE;
        let run = match (is_older, raw.role) {
            (false, _) => Epoch(raw.run.get()),
            // It had numbered epochs of the run that the position tells of: it stands after all of them.
            (true, 1) => lineage::first_epoch_after(epoch).unwrap_or(epoch),
            (true, _) => epoch,
        };
        let superblock = Self {
            volume: VolumeId(raw.volume),
            copy: CopyId(raw.copy),
            size_bytes: raw.size_bytes.get(),
            block_size,
            role: match raw.role {
                1 => Role::Primary,
                2 => Role::Replica,
                _ => return Err(corrupted),
            },
            data: match raw.data {
                0 => DataState::Empty,
                1 => DataState::Inconsistent,
                2 => DataState::Consistent,
                _ => return Err(corrupted),
            },
            session: Session(raw.session.get()),
            fence: Fence { counter: raw.fence_counter.get(), holder: HostId(raw.fence_holder) },
            position: Position {
                generation: GenerationId(raw.generation),
                epoch: Epoch(raw.epoch.get()),
                sequence: Sequence(raw.sequence.get()),
            },
            source: match (is_older, raw.role) {
                // It answered long ago, whoever follows it.
                (true, 1) => Fence::default(),
                _ => Fence { counter: raw.source_counter.get(), holder: HostId(raw.source) },
            },
            lineage: lineage.iter().map(|generation| GenerationId(*generation)).collect(),
            adopted: raw.adopted.get(),
            layers: layers_of(raw).ok_or_else(|| corrupted.clone())?,
            mode: Mode::from_byte(raw.mode).ok_or_else(|| corrupted.clone())?,
            given: Given { promise, counted: counted.iter().map(|host| HostId(*host)).collect() },
            released: raw.released != 0,
            replaced: raw.replaced != 0,
            touched: raw.touched != 0,
            run,
            ends,
            agreed: if is_older { raw.fence_counter.get() } else { raw.agreed.get() },
            heirs: heirs.iter().map(|heir| HostId(*heir)).collect(),
        };
        Ok(Some((raw.serial.get(), superblock)))
    }
}

/// The catalog as it was recorded, or as an older version knew of layers; nothing where it contradicts itself.
fn layers_of(raw: &Raw) -> Option<Catalog> {
    let (version, last) = (raw.version.get(), raw.last_layer.get());
    if version >= CATALOG_SINCE {
        let recorded = raw.catalog.iter().filter_map(|slot| {
            let layer = LayerId::new(slot.layer.get())?;
            Some(Entry { layer, purposes: slot.purposes.get(), is_touched: slot.touched.get() != 0 })
        });
        return Catalog::recorded(last, recorded.collect());
    }
    let [rollback, undo] = [raw.old_rollback, raw.old_undo].map(|layer| LayerId::new(layer.get()));
    let mut layers = Catalog::new(last, rollback, undo);
    // Before that was known, nothing says what the copy was when it was kept.
    if version < UNDO_TOUCHED_SINCE || raw.old_undo_touched != 0 {
        layers.touch_undo();
    }
    Some(layers)
}

/// Where what has this serial number goes, in bytes: its slot and the twin of that.
#[must_use]
pub fn places(serial: u64) -> [u64; 2] {
    let slot = slot_offset(serial);
    [slot, TWINS + slot]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of 15 layers the twelfth leads back, and the last one is kept for an undo.
    fn layers(is_touched: bool) -> Catalog {
        let mut layers = Catalog::new(15, LayerId::new(12), LayerId::new(15));
        if is_touched {
            layers.touch_undo();
        }
        layers
    }

    fn sample() -> Superblock {
        Superblock {
            volume: VolumeId([1; 16]),
            copy: CopyId([2; 16]),
            size_bytes: 1 << 30,
            block_size: BlockSize::default(),
            role: Role::Replica,
            data: DataState::Inconsistent,
            session: Session(3),
            fence: Fence { counter: 4, holder: HostId([5; 32]) },
            position: Position { generation: GenerationId([6; 16]), epoch: Epoch(7), sequence: Sequence(8) },
            source: Fence { counter: 14, holder: HostId([9; 32]) },
            lineage: vec![GenerationId([6; 16]), GenerationId([10; 16])],
            adopted: 11,
            layers: layers(true),
            mode: Mode::Sync,
            given: Given {
                promise: Promise::Replicas(16),
                counted: vec![HostId([22; 32]), HostId([23; 32])],
            },
            released: true,
            replaced: true,
            touched: true,
            run: Epoch(17),
            ends: Ends::only(GenerationId([10; 16]), Epoch(18)),
            agreed: 19,
            heirs: vec![HostId([20; 32]), HostId([21; 32])],
        }
    }

    #[test]
    fn the_page_has_these_golden_bytes() {
        let page = sample().encode(11);
        let bytes = page[..256]
            .iter()
            .chain(&page[1216..1304])
            .chain(&page[1432..1464])
            .chain(&page[1960..2032])
            .chain(&page[3024..3096]);
        let text: String = bytes.map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(text, golden(include_str!("golden/superblock-9.hex")));
        let zero = page[256..1216]
            .iter()
            .chain(&page[1304..1432])
            .chain(&page[1464..1960])
            .chain(&page[2032..3024])
            .chain(&page[3096..]);
        assert!(zero.copied().all(|byte| byte == 0));
    }

    /// A page with these golden bytes at these places, and zeroes elsewhere.
    fn page_of(text: &str, places: impl Iterator<Item = usize>) -> Page {
        let (mut page, text) = ([0; PAGE_BYTES], golden(text));
        for (number, at) in places.enumerate() {
            page[at] = u8::from_str_radix(&text[2 * number..2 * number + 2], 16).unwrap();
        }
        page
    }

    #[test]
    fn a_primary_that_lacks_something_is_for_releases_that_know_of_it() {
        let version = |superblock: &Superblock| superblock.encode(11)[8];
        let mut primary = Superblock { role: Role::Primary, data: DataState::Consistent, ..sample() };
        assert_eq!(version(&primary), 9);
        primary.note_absent();
        assert_eq!((version(&primary), primary.is_absent()), (10, true));
        assert_eq!(Superblock::recover(&primary.encode(11)), Ok((11, primary.clone())));
        assert_eq!(version(&Superblock { role: Role::Replica, ..primary.clone() }), 9);
        primary.note_filled();
        assert_eq!(version(&primary), 9);
    }

    #[test]
    fn a_page_of_version_8_says_the_same() {
        let text = include_str!("golden/superblock-8.hex");
        let places = (0..256).chain(1216..1304).chain(1432..1464).chain(1960..2032).chain(3024..3096);
        assert_eq!(Superblock::recover(&page_of(text, places)), Ok((11, sample())));
    }

    #[test]
    fn a_page_of_version_7_has_no_catalog() {
        let text = include_str!("golden/superblock-7.hex");
        let places = (0..256).chain(1216..1272).chain(1432..1464).chain(1960..2032).chain(3024..3096);
        let mut page = page_of(text, places);
        assert_eq!(Superblock::recover(&page), Ok((11, sample())));
        page[1244] = 0;
        seal(&mut page, CRC_AT);
        let untouched = Superblock { layers: layers(false), ..sample() };
        assert_eq!(Superblock::recover(&page), Ok((11, untouched)));
    }

    #[test]
    fn a_catalog_that_contradicts_itself_is_damage() {
        let mut page = sample().encode(11);
        let second = 1272 + 16;
        page.copy_within(1272..1280, second);
        seal(&mut page, CRC_AT);
        assert_eq!(Superblock::recover(&page), Err(MetadataError::Corrupted { what: WHAT }));
    }

    #[test]
    fn a_page_of_version_6_does_not_know_that_a_history_is_not_touched() {
        let text = include_str!("golden/superblock-6.hex");
        let places = (0..256).chain(1216..1272).chain(1432..1464).chain(1960..2032).chain(3024..3096);
        let mut page = page_of(text, places);
        assert_eq!(Superblock::recover(&page), Ok((11, sample())));
        page[1243] = 0;
        seal(&mut page, CRC_AT);
        let mended = Superblock { touched: false, ..sample() };
        assert_eq!(Superblock::recover(&page), Ok((11, mended)));
    }

    #[test]
    fn a_page_of_version_5_knows_of_nothing_else_that_wrote_and_not_who_counts() {
        let text = include_str!("golden/superblock-5.hex");
        let page = page_of(text, (0..256).chain(1216..1272).chain(1432..1464).chain(1960..2032));
        let old = Superblock { given: Given::NOTHING, touched: false, ..sample() };
        assert_eq!(Superblock::recover(&page), Ok((11, old)));
    }

    #[test]
    fn a_page_of_version_4_has_no_heirs() {
        let text = include_str!("golden/superblock-4.hex");
        let page = page_of(text, (0..256).chain(1216..1272).chain(1432..1464));
        let old = Superblock { heirs: Vec::new(), given: Given::NOTHING, touched: false, ..sample() };
        assert_eq!(Superblock::recover(&page), Ok((11, old)));
    }

    #[test]
    fn what_something_else_wrote_to_a_primarys_backing_is_the_volumes_content() {
        for (role, touched) in [(Role::Primary, false), (Role::Replica, true)] {
            let mut superblock = Superblock { role, touched: false, ..sample() };
            superblock.note_touched();
            assert_eq!(superblock.touched, touched);
        }
    }

    #[test]
    fn a_page_of_version_2_knows_of_no_promise_and_no_end() {
        let page = page_of(include_str!("golden/superblock-2.hex"), (0..256).chain(1216..1264));
        let old = without_ends();
        assert_eq!(Superblock::recover(&page), Ok((11, old)));
    }

    /// What an earlier layout has no room for.
    fn without_ends() -> Superblock {
        Superblock {
            run: sample().position.epoch,
            ends: Ends::default(),
            agreed: 4,
            heirs: Vec::new(),
            replaced: false,
            given: Given::NOTHING,
            touched: false,
            ..sample()
        }
    }

    #[test]
    fn a_page_of_version_3_tells_where_a_recovered_content_ends_until_a_run_has_settled_it() {
        let text = include_str!("golden/superblock-3.hex");
        let mut page = page_of(text, (0..256).chain(1216..1272).chain(1400..1432));
        assert_eq!(Superblock::recover(&page), Ok((11, without_ends())));
        page[1424..1432].fill(0);
        seal(&mut page, CRC_AT);
        let ends = Ends::only(GenerationId([16; 16]), Epoch(17));
        assert_eq!(Superblock::recover(&page), Ok((11, Superblock { ends, ..without_ends() })));
        // A primary may have written all through its run.
        page[68] = 1;
        seal(&mut page, CRC_AT);
        let (_, primary) = Superblock::recover(&page).unwrap();
        assert!(primary.stands().epoch > primary.position.epoch);
        assert_eq!(primary.source, Fence::default(), "it waits for nobody after an upgrade");
    }

    #[test]
    fn a_primary_stands_where_it_may_have_told_others_that_it_does() {
        let generation = |byte| GenerationId([byte; 16]);
        let position = |byte, epoch| Position {
            generation: generation(byte),
            epoch: Epoch(epoch),
            sequence: Sequence(0),
        };
        let mut superblock = Superblock { lineage: vec![generation(1)], ends: Ends::default(), ..sample() };
        // Another host began that generation: nobody who follows this one is told of less than others may have.
        superblock.begin_run(Epoch(1 << 40));
        assert_eq!(superblock.position, position(1, (1 << 40) - 1));
        superblock.begin_generation(generation(2), &[], 64, (Epoch(1 << 40), Epoch((1 << 40) + 5)));
        assert!(!superblock.ends.lacks(position(1, 2 << 40)), "others may have been further");
        assert_eq!(superblock.stands(), position(2, (1 << 40) + 4));
        superblock.tell_up_to(Epoch((1 << 40) + 9));
        superblock.begin_generation(generation(3), &[], 64, (Epoch((1 << 40) + 7), Epoch((1 << 40) + 8)));
        assert_eq!(superblock.ends.of(generation(2)), Some(Epoch((1 << 40) + 7)), "it has ended");
        // What is written in the next run is of a generation of its own.
        superblock.begin_run(Epoch(2 << 40));
        assert_eq!((superblock.position, superblock.run), (position(3, (1 << 40) + 7), Epoch(2 << 40)));
        assert_eq!(superblock.next_run(), Some(Epoch(3 << 40)));
    }

    #[test]
    fn a_page_of_version_1_reads_as_what_was_true_then() {
        let page = page_of(include_str!("golden/superblock-1.hex"), 0..256);
        let old = Superblock {
            adopted: 0,
            layers: Catalog::default(),
            mode: Mode::Async,
            released: false,
            source: Fence { counter: 0, holder: HostId([9; 32]) },
            ..without_ends()
        };
        assert_eq!(Superblock::recover(&page), Ok((11, old)));
    }

    fn golden(text: &str) -> String {
        text.split_whitespace().collect()
    }

    #[test]
    fn the_newest_whole_slot_wins_whatever_a_crash_tore() {
        let (old, new) = (sample(), Superblock { data: DataState::Consistent, ..sample() });
        let file = [old.encode(4), new.encode(5)].concat();
        assert_eq!(Superblock::recover(&file), Ok((5, new)));
        for torn_at in (0..PAGE_BYTES).step_by(512) {
            let mut torn = file.clone();
            torn[PAGE_BYTES + torn_at] ^= 1;
            assert_eq!(Superblock::recover(&torn), Ok((4, old.clone())), "{torn_at}");
        }
    }

    #[test]
    fn the_newest_goes_on_where_any_one_page_went_bad() {
        let (old, new) = (sample(), Superblock { data: DataState::Consistent, ..sample() });
        let mut file = vec![0; FILE_BYTES as usize];
        for (superblock, serial) in [(&old, 4), (&new, 5)] {
            for place in places(serial) {
                file[place as usize..][..PAGE_BYTES].copy_from_slice(&superblock.encode(serial));
            }
        }
        assert_eq!(Superblock::recover(&file), Ok((5, new.clone())));
        for page in 0..4 {
            let mut bad = file.clone();
            bad[page * PAGE_BYTES + 100] ^= 1;
            assert_eq!(Superblock::recover(&bad), Ok((5, new.clone())), "page {page}");
        }
        assert_eq!(Superblock::missing_twin(&file), None);
        let without_twins = &file[..TWINS as usize];
        assert_eq!(Superblock::missing_twin(without_twins), None);
        assert_eq!(Superblock::recover(without_twins), Ok((5, new)), "as version 8 left it");
    }

    #[test]
    fn a_page_that_is_missing_is_the_other_one_of_the_newest() {
        let (old, new) = (sample(), Superblock { data: DataState::Consistent, ..sample() });
        let mut file = vec![0; FILE_BYTES as usize];
        let mut write = |place: u64, page: &Page| {
            file[place as usize..][..PAGE_BYTES].copy_from_slice(page);
            Superblock::missing_twin(&file)
        };
        let [slot, twin] = places(4);
        assert_eq!(
            write(slot, &old.encode(4)),
            Some((twin, old.encode(4))),
            "a crash came between, or none had twins"
        );
        assert_eq!(write(twin, &old.encode(4)), None);
        let [slot, twin] = places(5);
        assert_eq!(write(slot, &new.encode(5)), Some((twin, new.encode(5))));
        assert_eq!(
            write(twin, &old.encode(5)),
            Some((twin, new.encode(5))),
            "one that failed, and was written anew"
        );
        assert_eq!(write(twin, &new.encode(5)), None);
        assert_eq!(write(slot, &[7; PAGE_BYTES]), Some((slot, new.encode(5))), "the slot went bad");
        assert_eq!(Superblock::missing_twin(&[7; FILE_BYTES as usize]), None, "nothing is whole");
    }

    #[test]
    fn sessions_of_a_later_fence_have_higher_numbers() {
        let fence = |counter| Fence { counter, holder: HostId([5; 32]) };
        let before = Superblock { fence: fence(4), session: Session((4 << 40) + 900), ..sample() };
        let none = Session(0);
        assert_eq!(before.next_session(none), Session((4 << 40) + 901));
        // It was set back.
        assert_eq!(before.next_session(Session((4 << 40) + 950)), Session((4 << 40) + 951));
        let unbelievable = Session((5 << 40) - 1);
        assert_eq!(before.next_session(unbelievable), Session((4 << 40) + 901));
        let promoted = Superblock { fence: fence(5), session: Session(2), ..sample() };
        assert!(promoted.next_session(none) > before.next_session(none));
    }

    #[test]
    fn damage_and_newer_versions_are_refused() {
        let corrupted = Err(MetadataError::Corrupted { what: WHAT });
        for bytes in [vec![], vec![0; 8192], vec![0xff; 8192], sample().encode(1)[..4095].to_vec()] {
            assert_eq!(Superblock::recover(&bytes), corrupted);
        }
        let mut newer = sample().encode(6);
        newer[8] = VERSION as u8 + 1;
        seal(&mut newer, CRC_AT);
        let file = [newer, sample().encode(5)].concat();
        assert_eq!(
            Superblock::recover(&file),
            Err(MetadataError::TooNew { what: WHAT, found: VERSION + 1, known: VERSION })
        );
    }
}
