//! `blockmirror inspect`: prints what a file of metadata says, each copy in it, and which of them is damaged. Needs no
//! agent, and changes nothing.

use crate::client::Client;
use crate::output::{Error, Output, aligned};
use blockmirror_agent::config;
use blockmirror_agent::control::api::{Failure, FailureKind};
use blockmirror_agent::quantity::Size;
use blockmirror_agent::state::stored::{self, AbsentFile, Ending, LayerFile, MapFile};
use blockmirror_protocol::disk::activity_log::{self, Recovered};
use blockmirror_protocol::disk::dirty_map::{self, Header};
use blockmirror_protocol::disk::recovery::{CHUNK_BYTES, RecoveryState};
use blockmirror_protocol::disk::superblock::{Role, Superblock};
use blockmirror_protocol::disk::{FileKind, MetadataError, PAGE_BYTES, absent, marker, pre_images};
use blockmirror_protocol::given::Given;
use blockmirror_protocol::terms::{DataState, Fence, Promise};
use blockmirror_protocol::units::{BlockSize, EXTENT_BYTES, Extent, Position};
use clap::Args;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// How many runs of blocks, or extents, are shown.
const SHOWN: usize = 16;

/// What to print.
#[derive(Args)]
pub struct Arguments {
    /// A file of a volume's state folder, or of a recovery
    file: PathBuf,
}

/// Rows of a label and a value.
#[derive(Default)]
struct Page {
    rows: Vec<Vec<String>>,
}

impl Page {
    fn row(&mut self, label: &str, value: impl ToString) {
        self.rows.push(vec![format!("  {label}:"), value.to_string()]);
    }
}

/// Prints the file; fails when it is of no use.
pub async fn run(arguments: Arguments, _: &Client, output: &mut Output) -> Result<(), Error> {
    let path = &arguments.file;
    let cannot = |error: io::Error| {
        Failure::new(FailureKind::Failed, format!("cannot read {}: {error}", path.display()))
    };
    let Some(kind) = recognise(path).map_err(cannot)? else {
        let message = format!("{} is no metadata of Blockmirror", path.display());
        return Err(Failure::new(FailureKind::Failed, message).into());
    };
    let mut page = Page::default();
    let (title, outcome) = match kind {
        FileKind::Superblock => ("superblock", superblock(&fs::read(path).map_err(cannot)?, &mut page)),
        FileKind::Marker => ("marker", epoch_marker(&fs::read(path).map_err(cannot)?, &mut page)),
        FileKind::ActivityLog => ("activity log", log(&fs::read(path).map_err(cannot)?, &mut page)),
        FileKind::DirtyMap => ("dirty map", map(&stored::read_map(path).map_err(cannot)?, &mut page)),
        FileKind::Absent => {
            ("map of absent blocks", absent_blocks(&stored::read_absent(path).map_err(cannot)?, &mut page))
        }
        FileKind::PreImages => {
            ("layer of pre-images", pre_images(stored::read_layer(path).map_err(cannot)?, &mut page))
        }
        FileKind::RecoveryState => {
            ("state of a recovery", recovery(&fs::read(path).map_err(cannot)?, &mut page))
        }
    };
    output.line(title)?;
    output.lines(&aligned(&page.rows))?;
    Ok(outcome.map_err(|error| Failure::from_error(FailureKind::Failed, &error))?)
}

fn recognise(path: &Path) -> io::Result<Option<FileKind>> {
    let mut start = Vec::new();
    fs::File::open(path)?.take(activity_log::FILE_BYTES).read_to_end(&mut start)?;
    Ok(FileKind::recognise(&start))
}

/// Tells of the slots of a file, and of their twins where it has any; gives what the newest whole one says.
fn newest<Value>(
    file: &[u8],
    page: &mut Page,
    recover: impl Fn(&[u8]) -> Result<(u64, Value), MetadataError>,
) -> Result<Value, MetadataError> {
    let newest = recover(file);
    for (index, label) in ["slot 0", "slot 1", "twin 0", "twin 1"].into_iter().enumerate() {
        let bytes = file.get(index * PAGE_BYTES..(index + 1) * PAGE_BYTES);
        if index >= 2 && bytes.is_none() {
            break;
        }
        let text = match bytes.map(|bytes| (bytes, recover(bytes))) {
            None => "missing".to_owned(),
            Some((_, Ok((serial, _)))) => match &newest {
                Ok((best, _)) if *best == serial => format!("serial {serial}, whole, newest"),
                _ => format!("serial {serial}, whole"),
            },
            Some((bytes, Err(_))) if bytes.iter().all(|byte| *byte == 0) => "empty".to_owned(),
            Some((_, Err(MetadataError::TooNew { found, .. }))) => format!("of the newer version {found}"),
            Some(_) => "damaged".to_owned(),
        };
        page.row(label, text);
    }
    newest.map(|(_, value)| value)
}

fn superblock(file: &[u8], page: &mut Page) -> Result<(), MetadataError> {
    let superblock = newest(file, page, Superblock::recover)?;
    page.row("volume", superblock.volume);
    page.row("copy", superblock.copy);
    page.row("size", bytes(superblock.size_bytes));
    page.row("block", Size(superblock.block_size.bytes()));
    page.row(
        "role",
        match superblock.role {
            Role::Primary => "primary",
            Role::Replica => "replica",
        },
    );
    page.row("data", data(superblock.data));
    page.row("session", superblock.session);
    page.row("fence", fence(superblock.fence));
    position(superblock.position, page);
    page.row("source", fence(superblock.source));
    page.row("mode", config::Mode::from(superblock.mode));
    page.row("counts on", counts_on(&superblock.given));
    page.row("adopted", format!("{} times", superblock.adopted));
    match superblock.layers.rollback() {
        None => page.row("rollback point", "none needed"),
        Some(layer) => page.row("rollback point", format!("layer {layer} of pre-images")),
    }
    if superblock.run.0 > 0 {
        page.row("last run", format!("from epoch {}", superblock.run.0));
    }
    for (generation, epoch) in superblock.ends.iter() {
        page.row("content ends", format!("before epoch {} of generation {generation}", epoch.0));
    }
    page.row("layers begun", superblock.layers.last());
    match superblock.layers.undo() {
        None => page.row("kept for undo", "nothing"),
        Some(layer) => page.row("kept for undo", format!("layer {layer} of pre-images")),
    }
    page.row("agreed to", format!("fences up to {}", superblock.agreed));
    for heir in &superblock.heirs {
        match superblock.role {
            Role::Replica => page.row("agreed to", format!("the next one, if it is held by {heir}")),
            Role::Primary => page.row("waits for", format!("{heir}, which was told that it lacks nothing")),
        }
    }
    if superblock.touched {
        page.row("touched", "yes, something else wrote to the backing, and all is to be compared");
    }
    if superblock.layers.is_undo_touched() {
        page.row("undo touched", "yes, what is kept has what something else wrote");
    }
    page.row("released", if superblock.released { "yes, by a demoted primary" } else { "no" });
    for (index, generation) in superblock.lineage.iter().enumerate() {
        page.row(&format!("lineage {index}"), generation);
    }
    Ok(())
}

fn fence(fence: Fence) -> String {
    match fence.holder.is_none() {
        true => "none".to_owned(),
        false => format!("{}, held by {}", fence.counter, fence.holder),
    }
}

fn count(extents: Option<&BTreeSet<Extent>>) -> String {
    extents.map_or_else(|| "all extents".to_owned(), |extents| format!("{} extents", extents.len()))
}

fn epoch_marker(file: &[u8], page: &mut Page) -> Result<(), MetadataError> {
    let mark = newest(file, page, marker::recover)?;
    position(mark.position, page);
    page.row("session", mark.session);
    page.row("copies", mark.copies);
    Ok(())
}

fn log(file: &[u8], page: &mut Page) -> Result<(), MetadataError> {
    let recovered = activity_log::recover(file);
    for (place, record) in
        file.chunks(activity_log::RECORD_BYTES).take(activity_log::RECORDS as usize).enumerate()
    {
        let text = match activity_log::decode(record) {
            Ok(Some((serial, extents))) => match &recovered {
                Ok(Recovered::Active { serial: newest, .. }) if *newest == serial => {
                    format!("serial {serial}, whole, newest: {}", count(extents.as_ref()))
                }
                _ => format!("serial {serial}, whole: {}", count(extents.as_ref())),
            },
            Ok(None) if record.iter().all(|byte| *byte == 0) => "empty".to_owned(),
            Ok(None) => "damaged".to_owned(),
            Err(error) => error.to_string(),
        };
        page.row(&format!("record {place}"), text);
    }
    match recovered? {
        Recovered::Active { extents, .. } => {
            let active = Size(extents.len() as u64 * EXTENT_BYTES);
            page.row("active", format!("{} extents, {active}", extents.len()));
            for extent in extents.iter().take(SHOWN) {
                page.row(
                    &format!("extent {extent}"),
                    format!("at byte {}", u64::from(extent.0) * EXTENT_BYTES),
                );
            }
            more(extents.len() as u64, page);
        }
        Recovered::Unsure { .. } => {
            page.row("active", "any block may differ: the newest record says so, or is not whole");
        }
    }
    Ok(())
}

/// What a replica counts on, as its primary gave it.
fn counts_on(given: &Given) -> String {
    match given.promise {
        Promise::None => "nothing".to_owned(),
        Promise::WhileHeard => "its primary's word, for some seconds".to_owned(),
        Promise::Replicas(replicas) => {
            let counted: Vec<String> = given.counted.iter().map(ToString::to_string).collect();
            let counted = if counted.is_empty() { "no other".to_owned() } else { counted.join(", ") };
            format!("no answer without it or {replicas} of {counted}")
        }
    }
}

fn map(file: &MapFile, page: &mut Page) -> Result<(), MetadataError> {
    let header = newest(&file.header, page, Header::recover)?;
    page.row("volume", header.volume);
    page.row("peer", header.peer);
    match header.base.is_none() {
        true => page.row("base", "none, since no session ever began"),
        false => {
            let copy = header.base.copy;
            let copy = if copy.is_none() { "any copy".to_owned() } else { format!("copy {copy}") };
            page.row("base", copy);
            page.row("generation", header.base.generation);
        }
    }
    page.row("adopted", format!("{} times", header.base.adopted));
    match header.copied {
        Some(session) => page.row("copied", format!("in session {}", session.0)),
        None => page.row("copied", "in no known session"),
    }
    page.row("counts on", header.given.as_ref().map_or("not known".to_owned(), counts_on));
    page.row("answered", if header.is_unanswered { "nothing that the peer lacks" } else { "perhaps" });
    page.row("blocks", format!("{} of {}", header.blocks, Size(header.block_size.bytes())));
    let pages: BTreeMap<u64, _> = file
        .pages
        .iter()
        .filter(|(number, _)| *number < header.full_from.min(dirty_map::page_count(header.blocks)))
        .filter_map(|(number, bytes)| Some((*number, (dirty_map::decode_bits(*number, bytes)?, bytes))))
        .collect();
    let damaged = pages
        .iter()
        .filter(|(number, (bits, bytes))| dirty_map::encode_bits(**number, bits) != ***bytes)
        .count();
    page.row(
        "pages",
        match damaged {
            0 => format!("{} with dirty blocks, all whole", pages.len()),
            _ => format!("{} with dirty blocks, {damaged} of them damaged and counted as dirty", pages.len()),
        },
    );
    let mut runs = Runs { blocks: header.blocks, ..Runs::default() };
    for (number, (bits, _)) in &pages {
        runs.add_bits(number * dirty_map::BLOCKS_PER_PAGE, bits);
    }
    runs.add(header.full_from.saturating_mul(dirty_map::BLOCKS_PER_PAGE)..header.blocks);
    runs.show("dirty", header.block_size, page);
    Ok(())
}

fn absent_blocks(file: &AbsentFile, page: &mut Page) -> Result<(), MetadataError> {
    let header = absent::Header::recover(&file.header)?;
    page.row("volume", header.volume);
    page.row("source", header.source);
    page.row("blocks", format!("{} of {}", header.blocks, Size(header.block_size.bytes())));
    let (mut runs, mut damaged, mut at) = (Runs { blocks: header.blocks, ..Runs::default() }, 0, 0);
    for (number, pair) in &file.pages {
        let read = absent::decode(*number, [&pair[0], &pair[1]])?;
        damaged += usize::from(read.missing.is_some());
        let blocks = absent::blocks_of(*number, header.blocks);
        runs.add(at..blocks.start);
        runs.add_bits(blocks.start, &read.bits);
        at = blocks.end;
    }
    runs.add(at..header.blocks);
    page.row("pages", format!("{} written, {damaged} of them whole once only", file.pages.len()));
    runs.show("absent", header.block_size, page);
    Ok(())
}

/// Dirty blocks, run by run in their order.
#[derive(Default)]
struct Runs {
    /// How many blocks there are.
    blocks: u64,
    /// How many of them are dirty.
    dirty: u64,
    /// How many runs there are.
    count: u64,
    /// The runs that are shown, and the one that may still grow.
    kept: Vec<Range<u64>>,
}

impl Runs {
    fn add(&mut self, run: Range<u64>) {
        let run = run.start..run.end.min(self.blocks);
        if run.is_empty() {
            return;
        }
        self.dirty += run.end - run.start;
        match self.kept.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => {
                self.count += 1;
                self.kept.truncate(SHOWN);
                self.kept.push(run);
            }
        }
    }

    /// Adds the runs of set bits, which stand for the blocks from `first` on.
    fn add_bits(&mut self, first: u64, bits: &dirty_map::Bits) {
        for (index, word) in bits.iter().enumerate() {
            let (mut word, mut at) = (*word, first + index as u64 * 64);
            while word != 0 {
                let clean = word.trailing_zeros();
                let dirty = (word >> clean).trailing_ones();
                let end = at + u64::from(clean + dirty);
                self.add(at + u64::from(clean)..end);
                at = end;
                word = word.checked_shr(clean + dirty).unwrap_or(0);
            }
        }
    }

    fn show(&self, what: &str, block_size: BlockSize, page: &mut Page) {
        let bytes = |blocks: u64| blocks.saturating_mul(block_size.bytes());
        page.row(what, format!("{} blocks, {}", self.dirty, Size(bytes(self.dirty))));
        for run in self.kept.iter().take(SHOWN) {
            page.row("run", format!("{} at byte {}", Size(bytes(run.end - run.start)), bytes(run.start)));
        }
        more(self.count, page);
    }
}

/// Tells what the batches list; a batch that is not whole is counted in neither number.
fn pre_images(file: LayerFile, page: &mut Page) -> Result<(), MetadataError> {
    let header = file.header?;
    page.row("layer", header.layer);
    page.row("volume", header.volume);
    page.row("copy", header.copy);
    page.row("size", bytes(header.size_bytes));
    page.row("block", Size(header.block_size.bytes()));
    page.row("began", format!("{} seconds after the start of 1970", header.began_unix_seconds));
    position(header.point, page);
    for (index, generation) in header.lineage.iter().enumerate() {
        page.row(&format!("lineage {index}"), generation);
    }
    let entries = || file.batches.iter().flat_map(|batch| &batch.entries);
    let lengths = |is_wanted: fn(&pre_images::Entry) -> bool| {
        Size(entries().filter(|entry| is_wanted(entry)).map(|entry| entry.range.length).sum())
    };
    let zeroes = lengths(|entry| entry.crc.is_none());
    page.row("file", bytes(file.length_bytes));
    page.row("batches", file.batches.len());
    page.row(
        "entries",
        format!(
            "{}, {} of data and {zeroes} of zeroes",
            entries().count(),
            lengths(|entry| entry.crc.is_some())
        ),
    );
    page.row(
        "last batch",
        match (file.ending, file.batches.is_empty()) {
            (Ending::Whole, true) => "none yet",
            (Ending::Whole, false) => "whole",
            (Ending::Unfinished, _) => "not finished, and ignored: nothing of it was overwritten",
            (Ending::Damaged, _) => "damaged, with what may follow it",
        },
    );
    match file.ending {
        Ending::Damaged => Err(pre_images::Header::corrupted()),
        Ending::Whole | Ending::Unfinished => Ok(()),
    }
}

fn recovery(file: &[u8], page: &mut Page) -> Result<(), MetadataError> {
    let state = RecoveryState::decode(file)?;
    let subject = state.subject;
    page.row("volume", subject.volume);
    page.row("copy", subject.copy);
    page.row("size", bytes(subject.size_bytes));
    position(subject.position, page);
    page.row("key", if state.key.0.is_empty() { "the host's own" } else { "kept here" });
    let (chunks, each) = (subject.chunks(), Size(CHUNK_BYTES));
    page.row(
        "durable",
        format!("{} of {chunks} chunks of {each}, {}", state.done_chunks(), Size(state.done_bytes())),
    );
    Ok(())
}

fn position(position: Position, page: &mut Page) {
    page.row("generation", position.generation);
    page.row("epoch", position.epoch);
    page.row("sequence", position.sequence);
}

fn data(data: DataState) -> &'static str {
    match data {
        DataState::Empty => "empty",
        DataState::Inconsistent => "inconsistent",
        DataState::Consistent => "consistent",
    }
}

fn bytes(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", Size(bytes))
}

fn more(count: u64, page: &mut Page) {
    if count > SHOWN as u64 {
        page.row("more", count - SHOWN as u64);
    }
}
