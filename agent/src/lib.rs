//! The hands of Blockmirror: opens things, waits, moves bytes, reports. The rules are in `blockmirror_protocol`.

pub mod buffer;
pub mod config;
pub mod control;
pub mod device;
pub mod quantity;
pub mod storage;
pub mod verdict;
