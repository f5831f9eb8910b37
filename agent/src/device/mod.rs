//! What applications open: the front ends, one file each, and the interface that they all drive.
//!
//! A front end turns its protocol into [`Request`]s and hands them to a [`Volume`]; the volume answers each exactly
//! once through the request's [`Reply`], in any order. Everything runs on the volume's own thread: no front end waits
//! for another core between a socket and the disk.

pub mod front_end;
pub mod loopback;
#[cfg(test)]
pub mod memory;
pub mod nbd;
pub mod openers;
mod row;

use crate::buffer::Buffer;
pub use crate::storage::file::Part;
use blockmirror_protocol::ranges::ByteRange;
use bytes::Bytes;
use std::rc::Rc;

/// What a front end serves. Implemented by the primary's shell and by a replica's read-only export.
pub trait Volume {
    /// Size, rights and preferred sizes. Fixed while the volume is served.
    fn geometry(&self) -> Geometry;

    /// Takes a request. Its reply is called exactly once, later: never before this returns.
    ///
    /// The range was checked against [`Geometry::size_bytes`] and is 512-aligned; a write was refused by the front
    /// end where the volume is read-only.
    fn submit(&self, request: Request);
}

/// What a front end tells its clients about a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The volume's size in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The size of request that the backing handles best, in bytes.
    pub preferred_bytes: u32,
}

/// What an application asks of a volume.
#[derive(Debug)]
pub enum Command {
    /// Read the bytes of a range.
    Read(ByteRange),
    /// Write bytes.
    Write {
        /// Where they go, in bytes.
        offset: u64,
        /// The bytes. They start at an address that is a multiple of 512, as direct I/O wants.
        data: Bytes,
        /// They are durable before the reply.
        fua: bool,
    },
    /// Make a range read as zeroes. It can be as long as the whole volume.
    Zero {
        /// The bytes concerned.
        range: ByteRange,
        /// Their space may be given back.
        may_unmap: bool,
        /// It is durable before the reply.
        fua: bool,
    },
    /// Make everything durable whose reply was given before.
    Flush,
    /// Tell which parts of a range are allocated.
    Allocation(ByteRange),
}

/// How a request ended.
#[derive(Debug)]
pub enum Answer {
    /// A write, zero or flush is done.
    Done,
    /// A read's bytes, as many as were asked for.
    Data(Buffer),
    /// The parts of the range from its start on, at least one, without gaps, together as long as the range or
    /// shorter; neighbours differ.
    Allocation(Vec<Part>),
}

/// An error number of the kernel, as the application sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

/// Where the answer to a request goes. Called on the volume's thread; must not call the volume back.
pub trait Reply {
    /// Takes the answer to the request that carried this `cookie`.
    fn complete(&self, cookie: u64, answer: Result<Answer, Errno>);
}

/// A command and where its answer goes.
pub struct Request {
    /// What is asked.
    pub command: Command,
    /// Takes the answer.
    pub reply: Rc<dyn Reply>,
    /// The front end's own name for the request.
    pub cookie: u64,
}
