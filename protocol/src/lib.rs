//! The rules of Blockmirror: everything that can be stated without a file descriptor.
//!
//! Nothing here has a clock, a socket, a file, a thread, a lock or a random source; `clippy.toml` beside this crate refuses
//! them. So the simulation (`tests/src/harness`) runs these very rules in virtual time, with every crash, cut and delay that
//! it can think of, and finds a bug again from its seed. A rule that decides who may write, whose copy counts or what is
//! durable belongs here, once.
//!
//! # The contract of a machine
//!
//! There are three: [`tracker::Tracker`], the primary of a volume; [`peer::Peer`], one replica as its primary sees it;
//! [`replica::Replica`], the replica of a volume. All of them are used in the same way:
//!
//! - `handle_*(event, now)` takes an event: a request, a message, a frame, the end of something that was asked for.
//! - `poll_action()` hands out what the shell must do, until there is nothing: write, sync, send, answer. What is finished
//!   comes back as an event, once. The table at the head of each machine says which.
//! - `poll_timeout()` says when to call `handle_timeout` if nothing else happens before. A replica has none: it waits for nothing.
//!
//! An order that must be kept is a value, never a comment: what may only happen after something durable is not handed out
//! before that was reported as durable. Payload never passes through: machines handle names and ranges, the shell holds the
//! buffers. Everything that is kept has a bound, which the head of the module states.
//!
//! # Words
//!
//! | word | meaning |
//! |---|---|
//! | volume | one mirrored device: a name, an id, a size, a tracking block |
//! | primary, replica | the role of a host for a volume; there is one writer at a time |
//! | backing | what holds the bytes on a host: an image file or a block device |
//! | block | the unit of tracking, one bit of a dirty map; 4 KiB unless the volume says otherwise |
//! | extent | 4 MiB, the unit of the activity log |
//! | range | any interval of bytes, 512-aligned |
//! | dirty map | for one replica, kept over restarts: blocks that may differ there |
//! | activity log | kept over restarts: extents whose writes may not be finished, durable and replicated |
//! | epoch | the writes between two barriers: flushes, or the agent's own limit |
//! | generation | one uninterrupted stretch of a volume's history, with a random name |
//! | lineage | a host's list of generations, newest first |
//! | position | a place in that history: generation, epoch, number of the write |
//! | fence | who may write: a counter that each promotion raises, and the host that it was raised for |
//! | session | one connection's life between two hosts for a volume; its frames carry its number |
//! | stream, resync | live epochs; the copying of dirty blocks |
//! | pre-image | the old content of a block, saved before it is overwritten |
//! | layer | the pre-images since one moment, with a purpose: rollback of a resync, or undo of what was given up (the history) |
//! | absent block | a block of a primary whose content is not on its backing, and comes from a replica |
//! | standing | what a host durably knows of itself for a volume, as it tells others |
//!
//! # Where to begin
//!
//! 1. [`units`] and [`ranges`]: every index and count has a type. [`order`]: what overlaps waits.
//! 2. [`tracker`], with `tracker/pipeline` and `tracker/pieces`: the path of a write, from its arrival to its answer.
//! 3. [`peer`], with `peer/phase`: states of a replica; `peer/stream` and `peer/resync` are its two flows.
//! 4. [`replica`]: how what arrives becomes durable, and what is recorded when.
//! 5. [`lineage`]: whose content counts when two hosts meet. [`terms::Fence`]: who may write.
//! 6. [`promise`], [`succession`], [`membership`]: who may become the primary, and whose word counts.
//! 7. [`disk`] and [`wire`]: every persistent byte and every byte that is sent, each described beside its constants.

#![forbid(unsafe_code)]

mod active_set;
pub mod adoption;
pub mod dirty_map;
pub mod disk;
pub mod given;
pub mod handover;
pub mod inquiry;
pub mod layers;
pub mod lineage;
pub mod membership;
pub mod nbd;
pub mod order;
pub mod peer;
pub mod planted;
pub mod promise;
pub mod ranges;
pub mod rebuild;
pub mod replica;
pub mod rewrite;
pub mod source;
pub mod split;
pub mod succession;
pub mod terms;
pub mod tracker;
pub mod units;
pub mod wire;
