//! What a backing carries, so that nobody overwrites it unasked.
//!
//! The signatures of partition tables, file systems and volume managers are looked for where their formats put them.
//! Where there is none, any byte that isn't zero counts: all of the first and the last mebibyte is looked at, and in between
//! samples on a device; of an image file what it has allocated, up to a limit, and samples of the rest. All reads are
//! synchronous.

use super::file::{File, Kind};
use crate::buffer::is_zero;
use crate::buffer::{Buffer, BufferPool};
use blockmirror_protocol::ranges::ByteRange;
use std::fmt;
use std::io;
use std::os::fd::AsFd;

/// How much is read at the start and at the end, in bytes: what the signatures need, and a usual partition gap.
const EDGE_BYTES: u64 = 1 << 20;
/// How much allocated space of an image is searched beyond that, in bytes.
const SEARCHED_BYTES: u64 = 64 << 20;
/// How many places of a device are sampled beyond that, and how much at each, in bytes.
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 4096;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A partition table: `GPT` or `MBR`.
    PartitionTable(&'static str),
    /// A file system.
    FileSystem {
        /// Its usual short name.
        name: &'static str,
        /// Its label, where it has one.
        label: Option<String>,
    },
    /// Swap space.
    Swap {
        /// Its label, where it has one.
        label: Option<String>,
    },
    /// A part of something larger, or a container: what, with its article.
    Container(&'static str),
    /// Nothing that is known, and not all zero.
    Data,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labelled = |f: &mut fmt::Formatter<'_>, label: &Option<String>| match label {
            Some(label) => write!(f, " labelled {label:?}"),
            None => Ok(()),
        };
        match self {
            Self::PartitionTable(name) => write!(f, "{} {name} partition table", article(name)),
            Self::FileSystem { name, label } => {
                write!(f, "{} {name} file system", article(name))?;
                labelled(f, label)
            }
            Self::Swap { label } => {
                f.write_str("swap space")?;
                labelled(f, label)
            }
            Self::Container(what) => f.write_str(what),
            Self::Data => f.write_str("data that is not zero"),
        }
    }
}

/// The article that a name is spoken with.
fn article(name: &str) -> &'static str {
    if matches!(name, "btrfs" | "FAT" | "squashfs" | "GPT") { "a" } else { "an" }
}

/// Says what a backing carries; nothing when all that was looked at is zero.
///
/// # Errors
/// When the backing can't be read.
pub fn what_is_on(file: &File) -> io::Result<Option<Content>> {
    let size_bytes = file.size_bytes();
    let start = read(file, ByteRange::between(0, EDGE_BYTES.min(size_bytes)))?;
    let end = read(file, ByteRange::between(size_bytes.saturating_sub(EDGE_BYTES), size_bytes))?;
    if let Some(found) = recognise(&start, &end) {
        return Ok(Some(found));
    }
    let clean = is_zero(&start) && is_zero(&end) && is_zero_between(file)?;
    Ok((!clean).then_some(Content::Data))
}

/// A label's offset and the longest that it can be.
type LabelPlace = Option<(usize, usize)>;

/// A signature at a fixed place from the start.
struct Signature {
    at: usize,
    magic: &'static [u8],
    label: LabelPlace,
    what: What,
}

/// What a signature stands for.
enum What {
    FileSystem(&'static str),
    Swap,
    Container(&'static str),
}

const fn container(at: usize, magic: &'static [u8], what: &'static str) -> Signature {
    Signature { at, magic, label: None, what: What::Container(what) }
}

const fn file_system(at: usize, magic: &'static [u8], name: &'static str, label: LabelPlace) -> Signature {
    Signature { at, magic, label, what: What::FileSystem(name) }
}

const LVM: &str = "an LVM2 physical volume";
const LUKS: &str = "a LUKS encrypted volume";
const RAID: &str = "a member of an md RAID array";
const ZFS: &str = "a member of a ZFS pool";

/// In the order of trust: those with long magic numbers first. Sources: the formats' headers in Linux, util-linux'
/// libblkid, and lvm2's `label.h`.
const SIGNATURES: &[Signature] = &[
    container(0, b"LUKS\xba\xbe", LUKS),
    container(0, b"LABELONE", LVM),
    container(512, b"LABELONE", LVM),
    container(1024, b"LABELONE", LVM),
    container(1536, b"LABELONE", LVM),
    container(0, b"\xfc\x4e\x2b\xa9", RAID),
    container(4096, b"\xfc\x4e\x2b\xa9", RAID),
    container(0, b"QFI\xfb", "a qcow2 image, which is not a raw one; convert it with qemu-img"),
    container(
        4096 + 24,
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
        "a bcache device",
    ),
    container(128 << 10, b"\x0c\xb1\xba\x00\x00\x00\x00\x00", ZFS),
    Signature { at: 4096 - 10, magic: b"SWAPSPACE2", label: Some((1052, 16)), what: What::Swap },
    Signature { at: 65536 - 10, magic: b"SWAPSPACE2", label: Some((1052, 16)), what: What::Swap },
    file_system(0, b"XFSB", "xfs", Some((108, 12))),
    file_system(65536 + 64, b"_BHRfS_M", "btrfs", Some((65536 + 299, 256))),
    file_system(3, b"NTFS    ", "NTFS", None),
    file_system(3, b"EXFAT   ", "exFAT", None),
    file_system(82, b"FAT32   ", "FAT", Some((71, 11))),
    file_system(54, b"FAT16   ", "FAT", Some((43, 11))),
    file_system(54, b"FAT12   ", "FAT", Some((43, 11))),
    file_system(32768 + 1, b"CD001", "ISO 9660", Some((32768 + 40, 32))),
    file_system(1024, b"\x10\x20\xf5\xf2", "f2fs", None),
    file_system(0, b"hsqs", "squashfs", None),
];

impl Signature {
    fn find(&self, start: &[u8]) -> Option<Content> {
        let found = start.get(self.at..)?.starts_with(self.magic);
        let label = || self.label.and_then(|(at, longest)| text(start.get(at..at + longest)?));
        found.then(|| match self.what {
            What::FileSystem(name) => Content::FileSystem { name, label: label() },
            What::Swap => Content::Swap { label: label() },
            What::Container(what) => Content::Container(what),
        })
    }
}

/// What the start and the end of a backing show.
fn recognise(start: &[u8], end: &[u8]) -> Option<Content> {
    gpt(start)
        .or_else(|| SIGNATURES.iter().find_map(|signature| signature.find(start)))
        .or_else(|| extended_file_system(start))
        .or_else(|| md_at_the_end(end))
        .or_else(|| mbr(start))
}

/// ext2, ext3 or ext4 (`fs/ext4/ext4.h`, `struct ext4_super_block` at 1024): they differ in features.
fn extended_file_system(start: &[u8]) -> Option<Content> {
    let superblock = start.get(1024..2048)?;
    let number =
        |at: usize| u32::from_le_bytes(superblock[at..at + 4].try_into().expect("four bytes are four bytes"));
    if superblock[56..58] != [0x53, 0xef] {
        return None;
    }
    let (has_journal, incompatible, read_only_compatible) = (number(92) & 0x4 != 0, number(96), number(100));
    // What ext3 knows: filetype, recover, journal_dev, meta_bg; sparse_super, large_file, btree_dir.
    let name = match has_journal {
        _ if incompatible & !0x1e != 0 || read_only_compatible & !0x7 != 0 => "ext4",
        true => "ext3",
        false => "ext2",
    };
    Some(Content::FileSystem { name, label: text(&superblock[120..136]) })
}

/// Versions 0.90 and 1.0 of md's superblock are near the end: 64 KiB to 128 KiB, and 8 KiB to 12 KiB before it.
fn md_at_the_end(end: &[u8]) -> Option<Content> {
    let magic = b"\xfc\x4e\x2b\xa9";
    let mut sectors = end.rchunks_exact(4096).take(32);
    sectors.any(|sector| sector.starts_with(magic)).then_some(Content::Container(RAID))
}

/// A GPT, whose header is in the second sector of either size.
fn gpt(start: &[u8]) -> Option<Content> {
    let has_header = |at: usize| start.get(at..).is_some_and(|rest| rest.starts_with(b"EFI PART"));
    [512, 4096].into_iter().any(has_header).then_some(Content::PartitionTable("GPT"))
}

/// An MBR with an entry in use. Boot sectors of other kinds carry its signature too, but no plausible entries.
fn mbr(start: &[u8]) -> Option<Content> {
    let entries = start.get(446..510)?;
    let signed = start.get(510..512)? == [0x55, 0xaa];
    let plausible = |entry: &[u8]| entry[0] & 0x7f == 0;
    let in_use = |entry: &[u8]| entry[4] != 0;
    let mut entries = entries.chunks_exact(16);
    let is_table = signed && entries.clone().all(plausible) && entries.any(in_use);
    is_table.then_some(Content::PartitionTable("MBR"))
}

/// A label: up to its end, without padding; none when nothing is left.
fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let label = String::from_utf8_lossy(&bytes[..end]).trim().to_owned();
    (!label.is_empty() && label != "NO NAME").then_some(label)
}

/// Whether what is looked at between the edges is zero.
fn is_zero_between(file: &File) -> io::Result<bool> {
    let edge = EDGE_BYTES.min(file.size_bytes() / 2);
    let between = ByteRange::between(edge, file.size_bytes() - edge);
    match file.kind() {
        Kind::BlockDevice => samples_are_zero(file, between),
        Kind::Image | Kind::Metadata => allocated_is_zero(file, between),
    }
}

fn samples_are_zero(file: &File, range: ByteRange) -> io::Result<bool> {
    let distance = (range.length / SAMPLES).max(SAMPLE_BYTES);
    for sample in range.split_at_multiples(distance).take(SAMPLES as usize) {
        if !is_zero(&read(file, ByteRange::new(sample.offset, sample.length.min(SAMPLE_BYTES)))?) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Searches allocated space until the limit, and looks at samples of the rest, as on a device.
fn allocated_is_zero(file: &File, range: ByteRange) -> io::Result<bool> {
    let (mut offset, mut searched) = (range.offset, 0);
    for part in file.allocation(range) {
        let part = part?;
        let bytes = ByteRange::new(offset, part.length);
        offset = bytes.end();
        if part.hole {
            continue;
        }
        for piece in bytes.split_at_multiples(EDGE_BYTES) {
            if searched >= SEARCHED_BYTES {
                return samples_are_zero(file, ByteRange::between(piece.offset, range.end()));
            }
            searched += piece.length;
            if !is_zero(&read(file, piece)?) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Reads a range, by whole units of the file's alignment.
fn read(file: &File, range: ByteRange) -> io::Result<Buffer> {
    let widened = range.widened(file.alignment());
    let mut buffer = BufferPool::new(0).take(widened.length as usize);
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(file.as_fd(), &mut buffer[done..], widened.offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => done += length,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let before = (range.offset - widened.offset) as usize;
    buffer.copy_within(before..before + range.length as usize, 0);
    buffer.truncate(range.length as usize);
    Ok(buffer)
}
