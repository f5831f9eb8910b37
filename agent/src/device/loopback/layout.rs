//! The structures that are read from and written to `/dev/fuse`, as `include/uapi/linux/fuse.h` has them since version
//! 7.34 of the interface (Linux 5.15). Integers are in the host's byte order.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `fuse_in_header`.
#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct InHeader {
    pub length: u32,
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
    pub extension_words: u16,
    pub padding: u16,
}

/// The start of `fuse_init_in`.
#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct InitIn {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub features: u32,
}

/// The start of `fuse_setattr_in`.
#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct SetAttributesIn {
    pub valid: u32,
    pub padding: u32,
    pub handle: u64,
    pub size: u64,
}

/// `fuse_open_in`.
#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct OpenIn {
    pub flags: u32,
    pub open_flags: u32,
}

/// `fuse_read_in` and `fuse_write_in`, which agree in all that matters here.
#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct TransferIn {
    pub handle: u64,
    pub offset: u64,
    pub size: u32,
    pub transfer_flags: u32,
    pub lock_owner: u64,
    pub flags: u32,
    pub padding: u32,
}

/// `fuse_fallocate_in`.
#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct AllocateIn {
    pub handle: u64,
    pub offset: u64,
    pub length: u64,
    pub mode: u32,
    pub padding: u32,
}

/// `fuse_out_header`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct OutHeader {
    pub length: u32,
    pub error: i32,
    pub unique: u64,
}

/// `fuse_init_out`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct InitOut {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u32,
    pub max_background: u16,
    pub congestion_threshold: u16,
    pub max_write: u32,
    pub time_granularity: u32,
    pub max_pages: u16,
    /// `map_alignment`, `flags2` and what later versions took from the reserve; all off.
    pub unused: [u16; 17],
}

/// `fuse_attr_out`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct AttributesOut {
    pub valid_seconds: u64,
    pub valid_nanoseconds: u32,
    pub padding: u32,
    pub inode: u64,
    pub size: u64,
    pub sectors: u64,
    pub times: [u64; 3],
    pub nanoseconds: [u32; 3],
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
    pub device: u32,
    pub preferred_bytes: u32,
    pub flags: u32,
}

/// `fuse_open_out`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct OpenOut {
    pub handle: u64,
    pub flags: u32,
    pub unused: u32,
}

/// `fuse_write_out`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct WriteOut {
    pub length: u32,
    pub padding: u32,
}

/// `fuse_statfs_out`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct StatisticsOut {
    pub blocks: u64,
    pub free_blocks: u64,
    pub available_blocks: u64,
    pub files: u64,
    pub free_files: u64,
    pub block_bytes: u32,
    pub name_bytes: u32,
    pub fragment_bytes: u32,
    pub padding: [u32; 7],
}

const _: () = {
    assert!(size_of::<InHeader>() == 40);
    assert!(size_of::<TransferIn>() == 40);
    assert!(size_of::<AllocateIn>() == 32);
    assert!(size_of::<OpenIn>() == 8);
    assert!(size_of::<OutHeader>() == 16);
    assert!(size_of::<InitOut>() == 64);
    assert!(size_of::<AttributesOut>() == 104);
    assert!(size_of::<OpenOut>() == 16);
    assert!(size_of::<WriteOut>() == 8);
    assert!(size_of::<StatisticsOut>() == 80);
};
