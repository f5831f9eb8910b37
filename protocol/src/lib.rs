//! The rules of Blockmirror: everything that can be stated without a file descriptor.

#![forbid(unsafe_code)]

pub mod dirty_map;
pub mod disk;
pub mod lineage;
pub mod membership;
pub mod nbd;
pub mod order;
pub mod planted;
pub mod promise;
pub mod ranges;
pub mod replica;
pub mod session;
pub mod succession;
pub mod tracker;
pub mod units;
pub mod wire;
